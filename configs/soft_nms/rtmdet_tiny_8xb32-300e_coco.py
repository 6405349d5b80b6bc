"""mmdet's own config as it is: what the number in mmdet's model zoo belongs to."""

_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
