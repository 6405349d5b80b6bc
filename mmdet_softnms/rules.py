"""Suppression rules; in a config ``nms=dict(type='mmdet_softnms.SoftNMS', ...)``.

A rule is a callable ``(boxes, scores, labels, max_num) -> (keep, scores)`` over the candidates of one image, with the
shapes and the order of :func:`mmdet_softnms.soft_nms`. A new rule is one class here, registered in
:mod:`mmdet_softnms.registry`. This module needs torch only, so that any framework can use the rules.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmdet_softnms.ops import batched_soft_nms, soft_nms, weights
from mmdet_softnms.ops._soft_nms import Method


class Rule(Protocol):
    """What every rule offers.

    Two attributes are optional. ``batch(boxes, scores, labels, max_num)`` takes a list with a tensor for each image and
    returns a list of what the call returns. ``keeps_non_finite = True``: the rule wants to see candidates whose box or
    score is not finite; other rules never meet one.
    """

    params: dict[str, Any]  # what the rule was made with, for tables and files

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        """Select among (N, 4) ``xyxy`` boxes, (N,) scores and labels; max_num -1 means no limit."""


class SoftNMS:
    """Soft-NMS (Bodla et al., ICCV 2017), class by class; the arguments are those of :func:`mmdet_softnms.soft_nms`.

    Args:
        class_agnostic: boxes of different classes suppress each other, too.

    Raises:
        TypeError, ValueError: a parameter is of the wrong type or out of range; at once, not at the first image.
    """

    def __init__(
        self,
        method: Method = 'gaussian',
        iou_threshold: float = 0.3,
        sigma: float = 0.5,
        min_score: float = 1e-3,
        offset: float = 0,
        class_agnostic: bool = False,
    ) -> None:
        if not isinstance(class_agnostic, bool):
            raise TypeError(f'class_agnostic must be True or False, got {class_agnostic!r}')
        self._class_agnostic = class_agnostic
        self._arguments = dict(
            method=method, iou_threshold=iou_threshold, sigma=sigma, min_score=min_score, offset=offset
        )
        unused = weights.PARAMETERS.keys() - set(weights.get(method).parameters)
        self.params = {name: value for name, value in self._arguments.items() if name not in unused}
        if class_agnostic:
            self.params['class_agnostic'] = True
        self(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64), 0)  # checks the arguments

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        groups = None if self._class_agnostic else labels
        return soft_nms(boxes, scores, groups, max_num=max_num, **self._arguments)  # type: ignore[arg-type]

    def batch(
        self, boxes: Sequence[Tensor], scores: Sequence[Tensor], labels: Sequence[Tensor], max_num: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Several images at once: the same bits as one call for each."""
        if type(self).__call__ is not SoftNMS.__call__:  # a subclass with a rule of its own
            return [self(*image, max_num) for image in zip(boxes, scores, labels, strict=True)]
        groups = None if self._class_agnostic else labels
        return batched_soft_nms(boxes, scores, groups, max_num=max_num, **self._arguments)


class HardNMS(SoftNMS):
    """Greedy NMS with the same kernel: a box is removed if its IoU with a selected one of its class is > threshold."""

    def __init__(self, iou_threshold: float = 0.5, offset: float = 0, class_agnostic: bool = False) -> None:
        super().__init__('hard', iou_threshold, min_score=0.0, offset=offset, class_agnostic=class_agnostic)
        del self.params['method'], self.params['min_score']


class NoSuppression:
    """Keeps every candidate in input order, the first ``max_num`` of them: how raw candidates leave a live model."""

    keeps_non_finite = True  # so that whoever collects candidates can refuse them

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        keep = torch.arange(len(scores), device=scores.device)
        keep = keep if max_num < 0 else keep[:max_num]
        return keep, scores[keep]


class MmcvNMS:
    """mmdet's own suppression, ``mmcv.ops.batched_nms``, class offset and all, as a rule over stored candidates.

    Args:
        nms_type: the ``type`` of a stock ``test_cfg.rcnn.nms``: ``'nms'``, ``'soft_nms'``, or a function of that kind.
            None: ``nms=None``, with which mmdet only sorts.
        **nms_cfg: the rest of it.
    """

    def __init__(self, nms_type: str | Callable[..., Any] | None = 'nms', **nms_cfg: Any) -> None:
        name = 'nms=None' if nms_type is None else nms_type
        self.nms_type: str = name if isinstance(name, str) else getattr(name, '__name__', str(name))
        self.params = dict(nms_cfg)
        self._nms_cfg = None if nms_type is None else dict(type=nms_type, **nms_cfg)

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        from mmcv.ops import batched_nms

        if len(scores) == 0:  # mmdet's multiclass_nms does not reach batched_nms either
            return torch.empty(0, dtype=torch.int64, device=scores.device), scores
        dets, keep = batched_nms(boxes, scores, labels, self._nms_cfg)
        if max_num > 0:  # mmdet: 0 and -1 both mean no limit
            dets, keep = dets[:max_num], keep[:max_num]
        return keep, dets[:, -1]


def describe(rule: Rule) -> str:
    """``'SoftNMS gaussian sigma=0.5 ...'``: a rule in one line of a table."""
    words = [f"mmdet's {rule.nms_type}" if isinstance(rule, MmcvNMS) else type(rule).__name__]
    words += [
        str(value) if name == 'method' else f'{name}={_short(value)}'
        for name, value in rule.params.items()
        if not (name == 'offset' and value == 0)
    ]
    return ' '.join(words)


def _short(value: Any) -> str:
    return f'{value:g}' if isinstance(value, float) and math.isfinite(value) else str(value)
