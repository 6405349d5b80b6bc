_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

model = dict(
    bbox_head=dict(type='mmdet_softnms.SoftNMSDenseHead', head='RetinaHead'),
    test_cfg=dict(
        score_thr=1e-3,
        max_per_img=100,
        nms=dict(_delete_=True, type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=1e-3),
    ),
)
