_base_ = './deformable-rfcn_r101-mxnet_coco.py'

nms = dict(_delete_=True, type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.6, min_score=1e-3, offset=1)
model = dict(test_cfg=dict(rcnn=dict(nms=nms)))
