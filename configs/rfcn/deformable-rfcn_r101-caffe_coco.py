_base_ = './rfcn_r101-caffe_coco.py'

model = dict(
    backbone=dict(
        dcn=dict(type='DCN', deform_groups=4, fallback_on_stride=False), stage_with_dcn=(False, False, False, True)
    ),
    roi_head=dict(bbox_head=dict(pooling='deformable')),
)
