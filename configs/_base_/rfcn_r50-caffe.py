"""R-FCN on ResNet-50 as its authors built it, for their weights and their schedule; 20 classes, 9 anchors.

From the prototxts of bharatsingh430/soft-nms (models/*/ResNet-101/rfcn_end2end) and py-R-FCN's configuration.
"""

model = dict(
    type='mmdet_softnms.RFCN',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[102.9801, 115.9465, 122.7717],
        std=[1.0, 1.0, 1.0],
        bgr_to_rgb=False,
        pad_size_divisor=1,
    ),
    backbone=dict(
        type='mmdet_softnms.CaffeResNet',
        depth=50,
        num_stages=4,
        out_indices=(2, 3),
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=False),
        norm_eval=True,
        style='caffe',
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://detectron2/resnet50_caffe'),
    ),
    neck=None,
    rpn_head=dict(
        type='mmdet_softnms.RFCNRPNHead',
        in_channels=1024,
        feat_channels=512,
        anchor_generator=dict(
            type='mmdet_softnms.CaffeAnchorGenerator', scales=[8, 16, 32], ratios=[0.5, 1.0, 2.0], strides=[16]
        ),
        bbox_coder=dict(type='mmdet_softnms.CaffeDeltaXYWHBBoxCoder'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='SmoothL1Loss', beta=1 / 9, loss_weight=1.0),
    ),
    roi_head=dict(
        type='mmdet_softnms.RFCNRoIHead',
        bbox_head=dict(
            type='mmdet_softnms.RFCNBBoxHead',
            in_channels=2048,
            num_classes=20,
            ohem=128,
            bbox_coder=dict(type='mmdet_softnms.CaffeDeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type='CrossEntropyLoss', loss_weight=1.0),
            loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.7,
                neg_iou_thr=0.3,
                min_pos_iou=0.3,
                match_low_quality=True,
                ignore_iof_thr=-1,
            ),
            sampler=dict(type='RandomSampler', num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
            allowed_border=0,
            pos_weight=-1,
            debug=False,
        ),
        rpn_proposal=dict(
            nms_pre=6000, max_per_img=300, nms=dict(type='nms', iou_threshold=0.7, offset=1), min_bbox_size=8
        ),
        rcnn=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.5,
                min_pos_iou=0.5,
                match_low_quality=False,
                ignore_iof_thr=-1,
            ),
            # Hands every RoI to OHEM.
            sampler=dict(type='RandomSampler', num=10000, pos_fraction=1.0, neg_pos_ub=-1, add_gt_as_proposals=True),
            pos_weight=-1,
            debug=False,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=6000, max_per_img=300, nms=dict(type='nms', iou_threshold=0.7, offset=1), min_bbox_size=8),
        rcnn=dict(score_thr=1e-4, nms=dict(type='mmdet_softnms.HardNMS', iou_threshold=0.3, offset=1), max_per_img=100),
    ),
)
