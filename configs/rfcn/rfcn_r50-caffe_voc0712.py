"""R-FCN, ResNet-50, trained on VOC07+12 trainval, tested on VOC2007 test, 600 / 1000 px."""

_base_ = [
    '../_base_/rfcn_r50-caffe.py',
    'mmdet::_base_/datasets/voc0712.py',
    '../_base_/caffe_schedule.py',
]

# The authors' coordinates and their 400 detections an image, for numbers to compare with theirs.
model = dict(coordinates='caffe', test_cfg=dict(rcnn=dict(max_per_img=400)))

train_dataloader = dict(batch_size=1)

# The Soft-NMS authors' schedule: 8 GPUs with one image each. For another number of GPUs, --auto-scale-lr.
train_cfg = dict(max_iters=30000, val_interval=10000)
optim_wrapper = dict(optimizer=dict(lr=0.004))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=False, milestones=[20000], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(interval=10000))
auto_scale_lr = dict(enable=False, base_batch_size=8)
