"""Faster R-CNN, VGG16, trained on VOC2007 trainval, tested on VOC2007 test, 600 / 1000 px."""

_base_ = [
    '../_base_/faster-rcnn_vgg16-caffe.py',
    'mmdet::_base_/datasets/voc0712.py',
    '../_base_/caffe_schedule.py',
]

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='VOCDataset',
        data_root={{_base_.data_root}},
        ann_file='VOC2007/ImageSets/Main/trainval.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32, bbox_min_size=32),
        pipeline={{_base_.train_pipeline}},
    )
)

# py-faster-rcnn's schedule (2 images a step, lr 0.001, 70,000 steps, drop at 50,000) times 8: 8 GPUs, two images each.
train_cfg = dict(max_iters=8750, val_interval=1750)
optim_wrapper = dict(optimizer=dict(lr=0.008))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=False, milestones=[6250], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(interval=1750))
auto_scale_lr = dict(enable=False, base_batch_size=16)
