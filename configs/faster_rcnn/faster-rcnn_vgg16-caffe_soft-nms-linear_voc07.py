_base_ = './faster-rcnn_vgg16-caffe_voc07.py'

nms = dict(_delete_=True, type='mmdet_softnms.SoftNMS', method='linear', iou_threshold=0.3, min_score=1e-3, offset=1)
model = dict(test_cfg=dict(rcnn=dict(nms=nms)))
