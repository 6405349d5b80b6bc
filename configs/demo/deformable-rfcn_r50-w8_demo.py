"""A small Deformable R-FCN for the drawn data set: deformable convolutions in res5 and deformable pooling.

Bottleneck blocks, because mmdet's basic blocks take no deformable convolution.
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
