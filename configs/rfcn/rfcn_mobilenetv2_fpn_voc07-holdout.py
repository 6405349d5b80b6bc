"""R-FCN on MobileNetV2 for a day without a GPU: VOC2007 at short side 320, trained on train.txt, tested on test.txt.

MobileNetV2 has no dilated last stage; a two-level FPN brings it to stride 16 instead, and RPN and score maps share that
level. ``bilinear`` pooling, since at this image size a pixel of the map is a sixth of an object.
"""

_base_ = '../_base_/voc07-holdout.py'

model = dict(
    type='FasterRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type='MobileNetV2',
        out_indices=(4, 7),
        frozen_stages=3,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://mmdet/mobilenet_v2'),
    ),
    neck=dict(type='FPN', in_channels=[96, 1280], out_channels=192, num_outs=2),
    rpn_head=dict(
        type='mmdet_softnms.RFCNRPNHead',
        in_channels=192,
        feat_channels=192,
        anchor_generator=dict(type='AnchorGenerator', scales=[2, 4, 8, 16], ratios=[0.5, 1.0, 2.0], strides=[16]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    ),
    roi_head=dict(
        type='mmdet_softnms.RFCNRoIHead',
        in_index=0,
        bbox_head=dict(
            type='mmdet_softnms.RFCNBBoxHead',
            in_channels=192,
            reduced_channels=256,
            num_classes=20,
            pooling='bilinear',
            ohem=128,
            loss_cls=dict(type='CrossEntropyLoss', loss_weight=1.0),
            loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(
                type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, match_low_quality=True,
                ignore_iof_thr=-1,
            ),
            sampler=dict(type='RandomSampler', num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        rpn_proposal=dict(nms_pre=1000, max_per_img=300, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            assigner=dict(
                type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, match_low_quality=False,
                ignore_iof_thr=-1,
            ),
            # Hands every RoI to OHEM.
            sampler=dict(type='RandomSampler', num=10000, pos_fraction=1.0, neg_pos_ub=-1, add_gt_as_proposals=True),
            pos_weight=-1,
            debug=False,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=300, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.001, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    ),
)  # fmt: skip

max_epochs = 8
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, begin=0, end=max_epochs, eta_min=1e-4,
        convert_to_iter_based=True,
    ),
]  # fmt: skip
