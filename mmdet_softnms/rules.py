"""Suppression rules, by name in a config: ``nms=dict(type='mmdet_softnms.SoftNMS', ...)``.

A rule is a callable ``(boxes, scores, labels, max_num) -> (keep, scores)`` over the candidates of one image, with the
shapes and the order of :func:`mmdet_softnms.soft_nms`. A new rule is one class here.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from mmdet_softnms.ops import soft_nms, weights
from mmdet_softnms.ops._soft_nms import Method
from mmdet_softnms.registry import TASK_UTILS


class Rule(Protocol):
    """What every rule offers."""

    params: dict[str, Any]  # what the rule was made with, for tables and files

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        """Select among (N, 4) ``xyxy`` boxes, (N,) scores and labels; max_num -1 means no limit."""


@TASK_UTILS.register_module()
class SoftNMS:
    """Soft-NMS (Bodla et al., ICCV 2017), class by class; the arguments are those of :func:`mmdet_softnms.soft_nms`.

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
    ) -> None:
        self._arguments = dict(
            method=method, iou_threshold=iou_threshold, sigma=sigma, min_score=min_score, offset=offset
        )
        unused = weights.PARAMETERS.keys() - set(weights.get(method).parameters)
        self.params = {name: value for name, value in self._arguments.items() if name not in unused}
        self(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64), 0)  # checks the arguments

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        return soft_nms(boxes, scores, labels, max_num=max_num, **self._arguments)  # type: ignore[arg-type]


@TASK_UTILS.register_module()
class HardNMS(SoftNMS):
    """Greedy NMS with the same kernel: a box is removed if its IoU with a selected one of its class is > threshold."""

    def __init__(self, iou_threshold: float = 0.5, offset: float = 0) -> None:
        super().__init__(method='hard', iou_threshold=iou_threshold, min_score=0.0, offset=offset)
        self.params = dict(iou_threshold=iou_threshold, offset=offset)


@TASK_UTILS.register_module()
class NoSuppression:
    """Keeps every candidate in input order, the first ``max_num`` of them: how raw candidates leave a live model."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        keep = torch.arange(len(scores), device=scores.device)
        keep = keep if max_num < 0 else keep[:max_num]
        return keep, scores[keep]


@TASK_UTILS.register_module()
class MmcvNMS:
    """mmdet's own suppression, ``mmcv.ops.batched_nms``, class offset and all, as a rule over stored candidates.

    Args:
        **nms_cfg: a stock ``test_cfg.rcnn.nms``, with ``nms_type`` for its ``type`` (``'nms'`` or ``'soft_nms'``).
    """

    def __init__(self, nms_type: str = 'nms', **nms_cfg: Any) -> None:
        self.nms_type = nms_type
        self.params = dict(nms_cfg)
        self._nms_cfg = dict(type=nms_type, **nms_cfg)

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        from mmcv.ops import batched_nms

        if len(scores) == 0:  # mmdet's multiclass_nms does not reach batched_nms either
            return torch.empty(0, dtype=torch.int64, device=scores.device), scores
        dets, keep = batched_nms(boxes, scores, labels, dict(self._nms_cfg))
        if max_num > 0:  # mmdet: 0 and -1 both mean no limit
            dets, keep = dets[:max_num], keep[:max_num]
        return keep, dets[:, -1]


def is_stock(nms_cfg: dict[str, Any]) -> bool:
    """Whether ``test_cfg.rcnn.nms`` is mmdet's own business: no type or an unscoped one (``'nms'``, ``'soft_nms'``)."""
    kind = nms_cfg.get('type', 'nms')  # a class in mmengine's pure Python configs
    return isinstance(kind, str) and '.' not in kind


def build_rule(nms_cfg: dict[str, Any]) -> Rule:
    """Build the rule that ``test_cfg.rcnn.nms`` names; stock types become :class:`MmcvNMS`.

    Raises:
        TypeError: an argument the rule does not have (often a key inherited from a base config: the message says how
            to drop it).
        KeyError: no rule of that name is registered.
    """
    nms_cfg = dict(nms_cfg)
    if is_stock(nms_cfg):
        return MmcvNMS(nms_cfg.pop('type', 'nms'), **nms_cfg)
    try:
        return TASK_UTILS.build(nms_cfg)
    except TypeError as error:
        raise TypeError(
            f'test_cfg.rcnn.nms = {nms_cfg} does not fit its rule: {error}. Keys of the base config are merged in '
            'unless the dict says _delete_=True.'
        ) from error


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
