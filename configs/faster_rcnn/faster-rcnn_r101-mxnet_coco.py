"""Faster R-CNN (2fc) of msracver/Deformable-ConvNets: ResNet-101 with a dilated res5, 12 anchors, 600 / 1000 px."""

_base_ = '../rfcn/rfcn_r101-mxnet-600_coco.py'  # backbone, RPN, test settings and data are the same

model = dict(
    roi_head=dict(
        _delete_=True,
        type='mmdet_softnms.SoftNMSRoIHead',
        bbox_roi_extractor=dict(type='mmdet_softnms.ReducedRoIExtractor', in_channels=2048, out_channels=256),
        bbox_head=dict(
            type='Shared2FCBBoxHead',
            in_channels=256,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=80,
            bbox_coder=dict(type='mmdet_softnms.MXNetDeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
            reg_class_agnostic=False,
            loss_cls=dict(type='CrossEntropyLoss', loss_weight=1.0),
            loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(rcnn=dict(assigner=dict(neg_iou_thr=(0.1, 0.5)), sampler=dict(num=128, pos_fraction=0.25))),
)
