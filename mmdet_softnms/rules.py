"""Suppression rules; in a config ``nms=dict(type='mmdet_softnms.SoftNMS', ...)``.

A rule is a callable ``(boxes, scores, labels, max_num) -> (keep, scores)`` over the candidates of one image, with the
shapes and the order of :func:`mmdet_softnms.soft_nms`. A new rule is one class here, registered in
:mod:`mmdet_softnms.registry`. This module needs torch only, so that any framework can use the rules.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmdet_softnms.ops import batched_soft_nms, quality, ranked_soft_nms, rotated_soft_nms, soft_nms, vote, weights
from mmdet_softnms.ops._soft_nms import Decay, Method
from mmdet_softnms.ops._voting import check_support, check_tolerance


class Rule(Protocol):
    """What every rule offers.

    Four attributes are optional. ``box_dim``: how many values a box has, 4, or 5 where it is rotated; a rule without it
    takes any. ``batch(boxes, scores, labels, max_num)`` takes a list with a tensor for each image
    and returns a list of what the call returns. ``refine(boxes, scores, labels, keep, kept_scores)`` takes the
    candidates of one image and what the call made of them, and returns the (M, 4) boxes of the detections, which are
    ``boxes[keep]`` otherwise. ``keeps_non_finite = True``: the rule wants to see candidates whose box or score is not
    finite; other rules never meet one.
    """

    params: dict[str, Any]  # what the rule was made with, for tables and files

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        """Select among (N, 4) ``xyxy`` boxes, (N,) scores and labels; max_num -1 means no limit."""


def check_box_dim(rule: Rule, box_dim: int) -> None:
    """Raise a ValueError that names the right rule where boxes of so many values are not what a rule takes."""
    if (wanted := getattr(rule, 'box_dim', box_dim)) == box_dim:
        return
    kinds = {4: 'axis-aligned boxes (x1, y1, x2, y2)', 5: 'rotated boxes (x, y, w, h, angle)'}
    remedies = {4: "write type='mmdet_softnms.SoftNMS'", 5: "write type='mmdet_softnms.RotatedSoftNMS'"}
    raise ValueError(
        f'{name_of(rule)} takes {kinds[wanted]}, and the detector predicts {kinds.get(box_dim, f"{box_dim} values")}: '
        + remedies.get(box_dim, "leave type='nms' or 'nms_quadri' to mmcv")
    )


class SoftNMS:
    """Soft-NMS (Bodla et al., ICCV 2017), class by class; the arguments are those of :func:`mmdet_softnms.soft_nms`.

    Args:
        class_agnostic: boxes of different classes suppress each other, too.

    Raises:
        TypeError, ValueError: a parameter is of the wrong type or out of range; at once, not at the first image.
    """

    box_dim = 4

    def __init__(
        self,
        method: Method = 'gaussian',
        iou_threshold: float = 0.3,
        sigma: float = 0.5,
        min_score: float = 1e-3,
        offset: float = 0,
        class_agnostic: bool = False,
        decay: Decay = 'product',
    ) -> None:
        self._class_agnostic = is_flag('class_agnostic', class_agnostic)
        self._arguments = dict(
            method=method, iou_threshold=iou_threshold, sigma=sigma, min_score=min_score, offset=offset, decay=decay
        )
        self.params = _used(self._arguments, class_agnostic)
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

    def ranked(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int, quality: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the call, ordered by current score times (N,) quality, which is the score returned."""
        groups = None if self._class_agnostic else labels
        return ranked_soft_nms(boxes, scores, groups, quality, max_num=max_num, **self._arguments)  # type: ignore[arg-type]


class HardNMS(SoftNMS):
    """Greedy NMS with the same kernel: a box is removed if its IoU with a selected one of its class is > threshold."""

    def __init__(self, iou_threshold: float = 0.5, offset: float = 0, class_agnostic: bool = False) -> None:
        super().__init__('hard', iou_threshold, min_score=0.0, offset=offset, class_agnostic=class_agnostic)
        del self.params['method'], self.params['min_score']


class RotatedSoftNMS:
    """:class:`SoftNMS` of rotated boxes ``(x, y, w, h, angle)`` in pixels and radians, mmcv's and mmrotate's.

    The arguments are those of :func:`mmdet_softnms.ops.rotated_soft_nms`; ``method='hard'`` is mmcv's ``nms_rotated``.

    Args:
        class_agnostic: boxes of different classes suppress each other, too.

    Raises:
        TypeError, ValueError: a parameter is of the wrong type or out of range; at once, not at the first image.
    """

    box_dim = 5

    def __init__(
        self,
        method: Method = 'gaussian',
        iou_threshold: float = 0.3,
        sigma: float = 0.5,
        min_score: float = 1e-3,
        class_agnostic: bool = False,
        decay: Decay = 'product',
    ) -> None:
        self._class_agnostic = is_flag('class_agnostic', class_agnostic)
        self._arguments = dict(
            method=method, iou_threshold=iou_threshold, sigma=sigma, min_score=min_score, decay=decay
        )
        self.params = _used(self._arguments, class_agnostic)
        self(torch.empty(0, 5), torch.empty(0), torch.empty(0, dtype=torch.int64), 0)  # checks the arguments

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        groups = None if self._class_agnostic else labels
        return rotated_soft_nms(boxes, scores, groups, max_num=max_num, **self._arguments)  # type: ignore[arg-type]


def _used(arguments: dict[str, Any], class_agnostic: bool) -> dict[str, Any]:
    """What a rule was made with, without what its method does not use."""
    unused = weights.PARAMETERS.keys() - set(weights.get(arguments['method']).parameters)
    unused |= {'decay'} if arguments['decay'] == 'product' else set()
    used = {name: value for name, value in arguments.items() if name not in unused}
    return used | (dict(class_agnostic=True) if class_agnostic else {})


class VotedNMS:
    """Box voting after any rule: selection, scores and order are the rule's, and the boxes move.

    Each box goes to where the raw candidates of its class say it is (:func:`mmdet_softnms.ops.vote`), decayed or
    not, all of those above ``score_thr``.

    Args:
        rule: what selects; None: :class:`SoftNMS`. In a config, a dict of its own.
        tolerance: of the votes, finite and > 0: those of candidates with ``(1 - IoU) ** 2`` well above it hardly count.
        first_only: boxes whose score the rule left below 0.9 of the raw one keep their coordinates.
        class_agnostic: all candidates are of one class, for the rule and for the votes.

    Raises:
        TypeError, ValueError: a parameter is of the wrong type or out of range, or the rule cannot be wrapped.
    """

    box_dim = 4

    def __init__(
        self,
        rule: Rule | None = None,
        tolerance: float = 0.025,
        first_only: bool = False,
        class_agnostic: bool = False,
    ) -> None:
        self.rule = SoftNMS() if rule is None else _wrapped(rule)
        check_tolerance(tolerance)
        self._tolerance, self._first_only = tolerance, is_flag('first_only', first_only)
        self._class_agnostic = is_flag('class_agnostic', class_agnostic)
        supported = isinstance(rule, SupportedNMS)
        moves = isinstance(rule.rule, VotedNMS) if isinstance(rule, SupportedNMS) else hasattr(rule, 'refine')
        if moves:
            raise TypeError(f'VotedNMS cannot wrap {type(rule).__name__}, which moves boxes itself')
        if first_only and supported:
            raise ValueError(
                'first_only compares with the raw score, which SupportedNMS rescales; put it inside: '
                'SupportedNMS(rule=VotedNMS(first_only=True))'
            )
        self.params: dict[str, Any] = dict(rule=_nested(self.rule), tolerance=tolerance)
        self.params |= dict(first_only=True) if first_only else {}
        self.params |= dict(class_agnostic=True) if class_agnostic else {}

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        return self.rule(boxes, scores, self._groups(labels), max_num)

    def batch(
        self, boxes: Sequence[Tensor], scores: Sequence[Tensor], labels: Sequence[Tensor], max_num: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Several images at once, as the rule does them."""
        groups = [self._groups(one) for one in labels]
        batch = getattr(self.rule, 'batch', None)
        if batch is None:
            return [self.rule(*image, max_num) for image in zip(boxes, scores, groups, strict=True)]
        selected: list[tuple[Tensor, Tensor]] = batch(boxes, scores, groups, max_num)
        return selected

    def refine(self, boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor, kept_scores: Tensor) -> Tensor:
        """(M, 4) boxes of the detections."""
        inner: Rule = getattr(self.rule, 'rule', self.rule)
        offset: Any = inner.params.get('offset', 0)
        groups = self._groups(labels)
        if not self._first_only:
            return vote(boxes, scores, groups, keep, tolerance=self._tolerance, offset=offset)
        first = kept_scores >= 0.9 * scores[keep]
        voted = vote(boxes, scores, groups, keep[first], tolerance=self._tolerance, offset=offset)
        return boxes[keep].masked_scatter(first[:, None], voted)

    def _groups(self, labels: Tensor) -> Tensor:
        return torch.zeros_like(labels) if self._class_agnostic else labels


class SupportedNMS:
    """An experiment: Soft-NMS in the order of current score times support by neighbours.

    The support of a box is ``q = S / (S + prior)`` with the sum S of the raw scores of its class, its own included,
    times ``IoU ** power`` (:func:`mmdet_softnms.ops.quality`). Boxes are ordered by current score times q, and that is
    the score they get; ``min_score`` is compared with the current score alone. Scores fall, so thresholds of a display
    must fall, too. It helped on some detectors and cost AP on others: use it where it won on images of your own.

    Args:
        rule: :class:`SoftNMS` or :class:`HardNMS`, whose decay and ``min_score`` are used; None: ``SoftNMS()``. Or a
            :class:`VotedNMS` of these, whose votes then count raw score times q (in a VotedNMS *around* this rule,
            they count raw scores).
        power: finite and > 0.
        prior: finite and > 0: the support that halves a score.
        class_agnostic: all candidates are of one class, for the rule and for the support.

    Raises:
        TypeError, ValueError: a parameter is of the wrong type or out of range, or the rule cannot be wrapped.
    """

    box_dim = 4

    def __init__(
        self, rule: Rule | None = None, power: float = 8, prior: float = 1, class_agnostic: bool = False
    ) -> None:
        self.rule = SoftNMS() if rule is None else _wrapped(rule)
        selects: Any = self.rule.rule if isinstance(self.rule, VotedNMS) else self.rule
        if not isinstance(selects, SoftNMS) or type(selects).__call__ is not SoftNMS.__call__:
            raise TypeError(f'SupportedNMS takes SoftNMS, HardNMS, or VotedNMS of these, not {describe(self.rule)}')
        check_support(power, prior)
        self._selects: SoftNMS = selects
        self._power, self._prior = power, prior
        self._class_agnostic = is_flag('class_agnostic', class_agnostic)
        self.params: dict[str, Any] = dict(rule=_nested(self.rule), power=power, prior=prior)
        self.params |= dict(class_agnostic=True) if class_agnostic else {}

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        groups = torch.zeros_like(labels) if self._class_agnostic or self._inside_agnostic() else labels
        return self._selects.ranked(boxes, scores, groups, max_num, self._quality(boxes, scores, labels))

    def refine(self, boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor, kept_scores: Tensor) -> Tensor:
        """(M, 4) boxes of the detections; they move where the rule is a :class:`VotedNMS`."""
        if not isinstance(self.rule, VotedNMS):
            return boxes[keep]
        supported = (scores * self._quality(boxes, scores, labels)).to(scores.dtype)
        groups = torch.zeros_like(labels) if self._class_agnostic else labels
        return self.rule.refine(boxes, supported, groups, keep, kept_scores)

    def _quality(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        groups = torch.zeros_like(labels) if self._class_agnostic else labels
        offset: Any = self._selects.params['offset']
        return quality(boxes, scores, groups, power=self._power, prior=self._prior, offset=offset)

    def _inside_agnostic(self) -> bool:
        return isinstance(self.rule, VotedNMS) and 'class_agnostic' in self.rule.params


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


def name_of(rule: Rule) -> str:
    """The name of its class, or mmdet's own ``type`` of stock ones."""
    return rule.nms_type if isinstance(rule, MmcvNMS) else type(rule).__name__


def describe(rule: Rule) -> str:
    """``'SoftNMS gaussian sigma=0.5 ...'``: a rule in one line of a table."""
    return ' '.join(["mmdet's"] * isinstance(rule, MmcvNMS) + [name_of(rule), *words_of(rule.params)])


def words_of(params: Mapping[str, Any]) -> list[str]:
    """Parameters of a rule as a line of a table says them; a rule inside a rule stands in brackets."""
    return [
        str(value) if name == 'method' else f'{name}={_short(value)}'
        for name, value in params.items()
        if not (name == 'offset' and value == 0)
    ]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = {name: one for name, one in value.items() if name != 'type'}
        return f'({" ".join([str(value.get("type", "")), *words_of(inner)])})'
    return f'{value:g}' if isinstance(value, float) and math.isfinite(value) else str(value)


def _nested(rule: Rule) -> dict[str, Any]:
    """A rule as a parameter of another."""
    return dict(type=name_of(rule), **rule.params)


def _wrapped(rule: Any) -> Rule:
    if not callable(rule) or not isinstance(getattr(rule, 'params', None), dict):
        raise TypeError(
            f'rule must be a rule, as mmdet_softnms.rules.SoftNMS(), got {rule!r:.60}; dicts of a config are for '
            'mmdet_softnms.registry.build_rule'
        )
    inner: Rule = rule
    if getattr(inner, 'box_dim', 4) != 4:
        raise TypeError(f'{name_of(inner)} cannot be wrapped: votes and support are of axis-aligned boxes')
    return inner


def is_flag(name: str, value: bool) -> bool:
    """The value, or a TypeError that names it."""
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be True or False, got {value!r}')
    return value


def in_range(name: str, value: float, low: float, high: float) -> float:
    """The value, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not low <= value <= high:
        raise ValueError(f'{name} must be in [{low:g}, {high:g}], got {value}')
    return value
