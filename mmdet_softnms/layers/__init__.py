"""Position-sensitive RoI pooling, plain and deformable. Needs torch alone."""

from mmdet_softnms.layers.ps_roi_pool import KINDS, ps_roi_pool

__all__ = ['KINDS', 'ps_roi_pool']
