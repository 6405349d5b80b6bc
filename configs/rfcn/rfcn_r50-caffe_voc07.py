"""R-FCN, ResNet-50, trained on VOC2007 trainval alone; the VOC07+12 schedule, shortened to as many epochs."""

_base_ = './rfcn_r50-caffe_voc0712.py'

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

train_cfg = dict(max_iters=9000, val_interval=3000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=False, milestones=[6000], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(interval=3000))
