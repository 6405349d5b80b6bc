"""R-FCN, ResNet-50, COCO 2017, 15 anchors, 800 / 1200 px."""

_base_ = [
    '../_base_/rfcn_r50-caffe.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/caffe_schedule.py',
]

# The authors' coordinates and their 400 detections an image, for numbers to compare with theirs.
model = dict(
    coordinates='caffe',
    rpn_head=dict(anchor_generator=dict(scales=[2, 4, 8, 16, 32])),
    roi_head=dict(bbox_head=dict(num_classes=80)),
    test_cfg=dict(rcnn=dict(max_per_img=400)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(1200, 800), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1200, 800), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# The Soft-NMS authors' schedule: 8 GPUs with two images each (theirs: one, two steps summed). --auto-scale-lr scales.
train_cfg = dict(max_iters=170000, val_interval=10000)
optim_wrapper = dict(optimizer=dict(lr=0.008))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=False, milestones=[90000], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(interval=10000))
auto_scale_lr = dict(enable=False, base_batch_size=16)
