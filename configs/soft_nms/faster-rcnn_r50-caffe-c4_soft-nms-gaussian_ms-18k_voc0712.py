_base_ = 'mmdet::pascal_voc/faster-rcnn_r50-caffe-c4_ms-18k_voc0712.py'

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
