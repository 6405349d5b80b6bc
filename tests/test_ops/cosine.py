"""A rule that is not the package's, in a module that a worker imports without the rest of the tests."""

from typing import Any

from mmdet_softnms.ops import weights
from mmdet_softnms.ops.weights import cos, where

PI = 3.141592653589793


def cosine(iou: Any, iou_threshold: Any) -> Any:
    """Smoothly from 1 to 0."""
    return where(iou > iou_threshold, (1 + cos(PI * iou)) / 2, 1)


def add() -> None:
    weights.register(cosine)
