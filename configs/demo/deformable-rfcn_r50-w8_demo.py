"""A small Deformable R-FCN for the drawn data set: deformable convolutions in res5 and deformable pooling.

Bottleneck blocks, because mmdet's basic blocks take no deformable convolution. A third of the epochs, because those are
slow on a CPU.
"""

_base_ = './rfcn_r18-w16_demo.py'

model = dict(
    backbone=dict(
        depth=50,
        base_channels=8,
        dcn=dict(type='DCN', deform_groups=4, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True),
    ),
    rpn_head=dict(in_channels=128),
    roi_head=dict(bbox_head=dict(in_channels=256, pooling='deformable')),
)

max_epochs = 8
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=150),
    dict(
        type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, begin=0, end=max_epochs, eta_min=2e-4,
        convert_to_iter_based=True,
    ),
]  # fmt: skip
