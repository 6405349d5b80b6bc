_base_ = 'mmdet::atss/atss_r50_fpn_1x_coco.py'

model = dict(
    bbox_head=dict(type='mmdet_softnms.SoftNMSDenseHead', head='ATSSHead'),
    test_cfg=dict(
        score_thr=1e-3,
        max_per_img=100,
        nms=dict(_delete_=True, type='mmdet_softnms.SoftNMS', method='linear', iou_threshold=0.3, min_score=1e-3),
    ),
)
