"""Faster R-CNN, VGG16, trained on VOC2007 trainval, tested on VOC2007 test, 600 / 1000 px."""

_base_ = [
    '../_base_/faster-rcnn_vgg16-caffe.py',
    'mmdet::_base_/datasets/voc0712.py',
    'mmdet::_base_/default_runtime.py',
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
train_cfg = dict(type='IterBasedTrainLoop', max_iters=8750, val_interval=1750)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.008, momentum=0.9, weight_decay=5e-4),
    paramwise_cfg=dict(bias_lr_mult=2.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=False, milestones=[6250], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1750, max_keep_ckpts=2))
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(enable=False, base_batch_size=16)
