_base_ = './faster-rcnn_r101-mxnet_coco.py'

model = dict(
    backbone=dict(
        dcn=dict(type='mmdet_softnms.MXNetDeformConv2d', deform_groups=4, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True),
    ),
    roi_head=dict(bbox_roi_extractor=dict(pooling='deformable')),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'offset_fc': dict(lr_mult=0.01)}))
