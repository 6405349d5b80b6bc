"""Deformable R-FCN on MobileNetV2 for a day without a GPU: the R-FCN beside it with deformable pooling, nothing else.

The paper has deformable convolutions in res5 as well. MobileNetV2 has no res5 that takes them, and in the FPN they
would be in its 1 x 1 convolutions too, and the RPN's; so the pooling is the one difference.
"""

_base_ = './rfcn_mobilenetv2_fpn_voc07-holdout.py'

model = dict(roi_head=dict(bbox_head=dict(pooling='deformable')))
