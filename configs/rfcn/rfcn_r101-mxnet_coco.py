"""R-FCN by the conventions of Deformable-ConvNets, for its weights."""

_base_ = './rfcn_r101-caffe_coco.py'

model = dict(
    coordinates='mmdet',  # decoded before they are scaled, as there
    data_preprocessor=dict(mean=[103.06, 115.9, 123.15]),
    rpn_head=dict(whole_cells=True, bbox_coder=dict(type='mmdet_softnms.MXNetDeltaXYWHBBoxCoder')),
    roi_head=dict(bbox_head=dict(bbox_coder=dict(type='mmdet_softnms.MXNetDeltaXYWHBBoxCoder'))),
    test_cfg=dict(rpn=dict(min_bbox_size=-1), rcnn=dict(score_thr=1e-3, max_per_img=100)),
)
