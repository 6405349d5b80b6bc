"""Faster R-CNN on VGG16 as in py-faster-rcnn (end2end), the Soft-NMS paper's second detector; 20 classes, 9 anchors."""

_base_ = './rfcn_r50-caffe.py'  # data preprocessor, RPN losses and test settings are the same

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet_softnms.CaffeVGG',
        depth=16,
        frozen_stages=2,
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://vgg16_caffe'),
    ),
    rpn_head=dict(type='RPNHead', in_channels=512),
    roi_head=dict(
        _delete_=True,
        type='mmdet_softnms.SoftNMSRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIPool', output_size=7),
            out_channels=512,
            featmap_strides=[16],
        ),
        bbox_head=dict(
            type='Shared2FCBBoxHead',
            in_channels=512,
            fc_out_channels=4096,
            roi_feat_size=7,
            num_classes=20,
            bbox_coder=dict(type='mmdet_softnms.CaffeDeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
            reg_class_agnostic=False,
            loss_cls=dict(type='CrossEntropyLoss', loss_weight=1.0),
            loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=12000, max_per_img=2000),
        rcnn=dict(sampler=dict(num=128, pos_fraction=0.25)),
    ),
    test_cfg=dict(rpn=dict(min_bbox_size=16)),
)
