"""Faster R-CNN on MobileNetV2 with an FPN for a day without a GPU: VOC2007 at short side 320, 5 epochs."""

_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/voc07-holdout.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(2, 4, 7),
        frozen_stages=3,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://mmdet/mobilenet_v2'),
    ),
    neck=dict(in_channels=[32, 96, 1280], out_channels=96, num_outs=4),
    rpn_head=dict(
        in_channels=96,
        feat_channels=96,
        anchor_generator=dict(scales=[3, 5], ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=96,
            featmap_strides=[8, 16, 32],
            finest_scale=80,
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=2),
        ),
        bbox_head=dict(in_channels=96, fc_out_channels=512, num_classes=20),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=600, max_per_img=400), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300), rcnn=dict(score_thr=0.001)),
)

max_epochs = 5
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, begin=0, end=max_epochs, eta_min=1e-4,
        convert_to_iter_based=True,
    ),
]  # fmt: skip
