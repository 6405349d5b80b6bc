"""Raw candidates to detections: the one place where suppression happens, for a live model and for stored candidates.

Raw (mmdet's ``rcnn_test_cfg=None`` contract), one image: ``boxes`` (R, 4K), or (R, 4) where box regression is
class-agnostic; ``scores`` (R, K+1), background last. Rotated boxes have 5 values instead of 4.
Candidates and detections are three tensors of one length each, :class:`Instances`; candidates come in the order of
mmdet's ``multiclass_nms``: by RoI, then by class. Dense heads give candidates at once (:func:`suppress_candidates`).
Needs torch only.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from mmdet_softnms.rules import Rule, check_box_dim


class Instances(NamedTuple):
    """Boxes of one image with their scores and classes."""

    bboxes: Tensor  # (N, 4) xyxy, or (N, 5) rotated: x, y, w, h, angle
    scores: Tensor  # (N,)
    labels: Tensor  # (N,) int64


def warn_of_dropped(dropped: Sequence[int]) -> None:
    """Say how many candidates were dropped because their box or score is not finite; ``dropped``: of each image."""
    first = next(number for number, count in enumerate(dropped) if count)
    warnings.warn(
        f'{sum(dropped)} candidates whose box or score is not finite, or whose area overflows, were dropped (first in '
        f'image {first} of a batch of {len(dropped)}): the network diverged in training, or ran out of the range of '
        'its floating type',
        RuntimeWarning,
        stacklevel=3,
    )


def to_candidates(boxes: Tensor, scores: Tensor, score_thr: float) -> Instances:
    """Drop background and scores up to ``score_thr``, one candidate per remaining RoI and class.

    Args:
        boxes (Tensor[R, 4K] or Tensor[R, 4]): decoded ``xyxy`` boxes. Or rotated ones, (R, 5K) or (R, 5): whatever K
            is, no width is of both kinds.
        scores (Tensor[R, K+1]): class probabilities, background last.
        score_thr: candidates with ``score > score_thr`` stay, as in mmdet, and those whose score is not a number.

    Raises:
        ValueError: the shapes do not belong together.
    """
    num_rois, num_classes = scores.shape[0], scores.shape[1] - 1
    # Without any RoI mmdet returns (0, 4) boxes for class-aware regression too.
    box_dim = next((each for each in (4, 5) if boxes.shape[1] in (each, each * num_classes)), 0)
    if boxes.shape[0] != num_rois or not box_dim:
        raise ValueError(
            f'boxes {tuple(boxes.shape)} and scores {tuple(scores.shape)} are not the (R, 4K) or (R, 4) and (R, K+1) '
            'of one image (5 for 4 where boxes are rotated)'
        )
    roi, label = (~(scores[:, :-1] <= score_thr)).nonzero(as_tuple=True)
    chosen = boxes[roi] if boxes.shape[1] == box_dim else boxes.view(num_rois, num_classes, box_dim)[roi, label]
    return Instances(chosen, scores[roi, label], label)


def _usable(candidates: Instances) -> Tensor:
    """(N,) bool: False for what no rule can compare: boxes and scores that are not finite, areas that overflow."""
    boxes = candidates.bboxes
    if boxes.dtype not in (torch.float32, torch.float64):
        boxes = boxes.float()  # the type the operator computes in
    sides = boxes[:, 2:4] if boxes.shape[1] == 5 else boxes[:, 2:] - boxes[:, :2]
    # Not a number and infinity fail the comparison, too. A quarter: room for an offset, and for the union of two.
    small = (sides[:, 0] * sides[:, 1]).abs() <= torch.finfo(boxes.dtype).max / 4
    return small & boxes.isfinite().all(dim=1) & candidates.scores.isfinite()


def suppress(candidates: Any, rule: Rule, score_thr: float, max_per_img: int) -> Instances:
    """Apply a rule to the candidates of one image above ``score_thr``.

    Args:
        candidates: with ``bboxes``, ``scores`` and ``labels``, finite, in the order of :func:`to_candidates` with any
            threshold not above ``score_thr``. Where mmdet asks another number whether it is above ``score_thr`` than
            the score, as dense heads do whose class score is multiplied by a factor: with that, ``class_scores``.
        rule: a rule from :mod:`mmdet_softnms.rules`.
        score_thr: candidates with ``score > score_thr`` (``class_score > score_thr``) take part.
        max_per_img: at most so many detections; 0 or less: no limit, as in mmdet.

    Returns:
        Detections in selection order: ``bboxes`` (M, 4), which a rule with ``refine`` may have moved; ``scores`` (M,)
        never increasing; ``labels`` (M,).
    """
    above = getattr(candidates, 'class_scores', candidates.scores) > score_thr
    candidates = Instances(candidates.bboxes, candidates.scores, candidates.labels)
    if not bool(above.all()):
        candidates = Instances(*(part[above] for part in candidates))
    return _apply([candidates], rule, max_per_img)[0][0]


def _apply(images: Sequence[Instances], rule: Rule, max_per_img: int) -> list[tuple[Instances, Tensor]]:
    """Detections of each image, and where each stands among the candidates."""
    max_num = max_per_img if max_per_img > 0 else -1
    for image in images:
        check_box_dim(rule, image.bboxes.shape[1])
    batch = getattr(rule, 'batch', None)
    if batch is None or len(images) == 1:
        selected = [rule(*image, max_num) for image in images]
    else:
        selected = batch(*(list(part) for part in zip(*images, strict=True)), max_num)
    refine = getattr(rule, 'refine', None)
    detections = []
    for image, (keep, scores) in zip(images, selected, strict=True):
        boxes = image.bboxes[keep] if refine is None else refine(*image, keep, scores)
        detections.append((Instances(boxes, scores, image.labels[keep]), keep))
    return detections


@overload
def post_process(
    boxes: Tensor,
    scores: Tensor,
    rule: Rule,
    score_thr: float,
    max_per_img: int,
    on_dropped: Callable[[Sequence[int]], None] = ...,
) -> Instances: ...


@overload
def post_process(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    rule: Rule,
    score_thr: float,
    max_per_img: int,
    on_dropped: Callable[[Sequence[int]], None] = ...,
) -> list[Instances]: ...


def post_process(
    boxes: Tensor | Sequence[Tensor],
    scores: Tensor | Sequence[Tensor],
    rule: Rule,
    score_thr: float,
    max_per_img: int,
    on_dropped: Callable[[Sequence[int]], None] = warn_of_dropped,
) -> Instances | list[Instances]:
    """Raw boxes and scores to detections, of one image (tensors) or of a batch (lists of tensors).

    Args:
        boxes, scores: of :func:`to_candidates`, or a list with those of each image.
        rule, score_thr, max_per_img: of :func:`suppress`.
        on_dropped: called with the number of candidates dropped in each image because their box or score
            is not finite, or their area overflows; only where there are any.

    Returns:
        Detections of the image, or a list with those of each.
    """
    if isinstance(boxes, Tensor):
        assert isinstance(scores, Tensor)
        return post_process([boxes], [scores], rule, score_thr, max_per_img, on_dropped)[0]
    images = [to_candidates(*raw, score_thr) for raw in zip(boxes, scores, strict=True)]
    return [found for found, _ in suppress_candidates(images, rule, max_per_img, on_dropped)]


def suppress_candidates(
    images: Sequence[Instances],
    rule: Rule,
    max_per_img: int,
    on_dropped: Callable[[Sequence[int]], None] = warn_of_dropped,
) -> list[tuple[Instances, Tensor]]:
    """Candidates to detections; arguments as in :func:`post_process`.

    Returns:
        Of each image the detections, and a tensor (M,) of int64: where each stands among the candidates.

    Raises:
        ValueError: the boxes are rotated and the rule takes axis-aligned ones, or the other way round.
    """
    if getattr(rule, 'keeps_non_finite', False):
        return _apply(images, rule, max_per_img)
    usable = [_usable(image) for image in images]
    if all(bool(each.all()) for each in usable):
        return _apply(images, rule, max_per_img)
    on_dropped([int((~each).sum()) for each in usable])
    finite = [Instances(*(part[each] for part in image)) for image, each in zip(images, usable, strict=True)]
    return [
        (found, each.nonzero()[:, 0][keep])
        for (found, keep), each in zip(_apply(finite, rule, max_per_img), usable, strict=True)
    ]
