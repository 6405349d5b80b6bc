_base_ = './rfcn_r101-mxnet-600_coco.py'

model = dict(
    backbone=dict(
        dcn=dict(type='mmdet_softnms.MXNetDeformConv2d', deform_groups=4, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True),
    ),
    roi_head=dict(bbox_head=dict(pooling='deformable')),
)
