_base_ = 'mmrotate::oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota.py'

model = dict(
    roi_head=dict(type='mmdet_softnms.SoftNMSRoIHead', head='mmdet.StandardRoIHead'),
    test_cfg=dict(
        rcnn=dict(
            score_thr=1e-3,
            nms=dict(
                _delete_=True, type='mmdet_softnms.RotatedSoftNMS', method='linear', iou_threshold=0.3, min_score=1e-3
            ),
        )
    ),
)
