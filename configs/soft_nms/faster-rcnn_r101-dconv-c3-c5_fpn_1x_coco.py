"""mmdet's own config as it is: what the number in mmdet's model zoo belongs to."""

_base_ = 'mmdet::dcn/faster-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py'
