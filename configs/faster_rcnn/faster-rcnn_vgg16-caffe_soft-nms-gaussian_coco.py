_base_ = './faster-rcnn_vgg16-caffe_coco.py'

nms = dict(_delete_=True, type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=1e-3, offset=1)
model = dict(test_cfg=dict(rcnn=dict(nms=nms)))
