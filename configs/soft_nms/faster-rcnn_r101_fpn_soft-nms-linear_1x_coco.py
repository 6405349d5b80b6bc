_base_ = 'mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py'

model = dict(
    roi_head=dict(type='mmdet_softnms.SoftNMSRoIHead'),
    test_cfg=dict(
        rcnn=dict(
            score_thr=1e-3,
            max_per_img=100,
            nms=dict(_delete_=True, type='mmdet_softnms.SoftNMS', method='linear', iou_threshold=0.3, min_score=1e-3),
        )
    ),
)
