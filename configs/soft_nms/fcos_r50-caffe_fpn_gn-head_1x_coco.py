"""mmdet's own config as it is: what the number in mmdet's model zoo belongs to."""

_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
