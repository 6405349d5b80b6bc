"""The path for a device."""

from typing import Any

import torch
from torch import Tensor

from mmdet_softnms.ops import _reference, _triton
from mmdet_softnms.ops._arguments import Parameters, checked


def select(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, parameters: Parameters, quality: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`mmdet_softnms.soft_nms` without gradients: checks, and the device's path.

    ``parameters`` as they were given: they are checked and rounded here. ``quality``: of
    :func:`mmdet_softnms.ops._reference.select`, of the working type.
    """
    boxes_, scores_, labels_, params = checked(boxes, scores, labels, parameters)
    device = scores.device
    if device.type == 'mps':  # no float64 there, and weights need it
        boxes_, scores_, labels_ = boxes_.cpu(), scores_.cpu(), None if labels_ is None else labels_.cpu()
    if quality is None:
        keep, kept_scores = path(boxes_.device).select(boxes_, scores_, labels_, params)
    else:  # the CPU's kernel takes it, Triton's does not
        one = path(boxes_.device) if boxes_.device.type == 'cpu' else _reference
        keep, kept_scores = one.select(boxes_, scores_, labels_, params, quality.to(boxes_.device))
    return keep.to(device), kept_scores.to(device=device, dtype=scores.dtype)


def path(device: torch.device) -> Any:
    """The module whose ``select`` serves a device; imported at the first call."""
    if device.type == 'cpu':
        from mmdet_softnms.ops import _eager  # numba takes longer to import than everything else here

        return _eager
    return _triton if _triton.available(device) else _reference
