"""Detectron2's Faster R-CNN R50-FPN, 3x with weights that detectron2_to_mmdet.py has converted."""

_base_ = './d2_faster-rcnn_r50_fpn_1x_coco.py'
