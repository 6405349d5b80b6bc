_base_ = 'mmdet::dcn/faster-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py'

model = dict(
    roi_head=dict(type='mmdet_softnms.SoftNMSRoIHead'),
    test_cfg=dict(
        rcnn=dict(
            score_thr=1e-3,
            max_per_img=100,
            nms=dict(_delete_=True, type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=1e-3),
        )
    ),
)
