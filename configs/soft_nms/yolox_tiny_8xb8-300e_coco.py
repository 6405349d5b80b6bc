"""mmdet's own config as it is: what the number in mmdet's model zoo belongs to."""

_base_ = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'
