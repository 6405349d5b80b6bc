"""mmdet's own config as it is: what the number in mmdet's model zoo belongs to."""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
