"""R-FCN on the MobileNetV2 and the FPN of a trained Faster R-CNN: 3,750 iterations of 4 images, in two CPU hours.

As ``rfcn_mobilenetv2_fpn_voc07-holdout.py``, but with the 96 channels of that Faster R-CNN's FPN, its backbone frozen,
short side 256 and 64 proposals an image in training. README.md says how its weights get in.
"""

_base_ = './rfcn_mobilenetv2_fpn_voc07-holdout.py'

model = dict(
    backbone=dict(frozen_stages=7, init_cfg=None),
    neck=dict(out_channels=96),
    rpn_head=dict(in_channels=96, feat_channels=96),
    roi_head=dict(
        bbox_head=dict(
            in_channels=96,
            ohem=32,
            # Normal with a deviation of 0.01, the papers', starts both layers near zero, too slow for a short training.
            init_cfg=dict(type='Xavier', layer='Conv2d', distribution='uniform'),
        )
    ),
    train_cfg=dict(rpn_proposal=dict(max_per_img=64)),
)

scale = (384, 256)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_iters = 3750
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters + 1)
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', T_max=max_iters, by_epoch=False, begin=0, end=max_iters, eta_min=1e-4),
]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(by_epoch=False, interval=250, max_keep_ckpts=2))
log_processor = dict(by_epoch=False)
