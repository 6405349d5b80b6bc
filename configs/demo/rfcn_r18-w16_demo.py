"""A small R-FCN for the drawn data set: data, schedule and test settings of the Faster R-CNN beside it.

Stride 8 instead of 16 (res4 keeps res3's stride too), since the images are 192 px and an object some 40 px.
"""

_base_ = './faster-rcnn_r18-w16_fpn_demo.py'

model = dict(
    backbone=dict(out_indices=(2, 3), strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    neck=None,
    rpn_head=dict(
        type='mmdet_softnms.RFCNRPNHead',
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[3, 5, 8, 12], ratios=[0.5, 1.0, 2.0], strides=[8]),
    ),
    roi_head=dict(
        _delete_=True,
        type='mmdet_softnms.RFCNRoIHead',
        bbox_head=dict(
            type='mmdet_softnms.RFCNBBoxHead',
            in_channels=128,
            reduced_channels=128,
            num_classes={{_base_.num_classes}},
            output_size=5,
            stride=8,
            ohem=96,
        ),
    ),
    # Hands every RoI to OHEM.
    train_cfg=dict(rcnn=dict(sampler=dict(num=10000, pos_fraction=1.0))),
)
