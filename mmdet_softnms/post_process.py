"""Raw candidates to detections: the one place where suppression happens, for a live model and for stored candidates.

Raw (mmdet's ``rcnn_test_cfg=None`` contract), one image: ``boxes`` (R, 4K), or (R, 4) where box regression is
class-agnostic; ``scores`` (R, K+1), background last. Candidates: ``InstanceData`` with ``bboxes`` (N, 4), ``scores``
(N,) and ``labels`` (N,), in the order of mmdet's ``multiclass_nms``: by RoI, then by class.
"""

from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_softnms.rules import Rule


def to_candidates(boxes: Tensor, scores: Tensor, score_thr: float, keep_non_finite: bool = False) -> InstanceData:
    """Drop background and scores not above ``score_thr``, one candidate per remaining RoI and class.

    Args:
        boxes (Tensor[R, 4K] or Tensor[R, 4]): decoded ``xyxy`` boxes.
        scores (Tensor[R, K+1]): class probabilities, background last.
        score_thr: candidates with ``score > score_thr`` stay, as in mmdet.
        keep_non_finite: whether those with a NaN score stay, too.

    Raises:
        ValueError: the shapes do not belong together.
    """
    num_rois, num_classes = scores.shape[0], scores.shape[1] - 1
    # Without any RoI mmdet returns (0, 4) boxes for class-aware regression too.
    if boxes.shape[0] != num_rois or boxes.shape[1] not in (4, 4 * num_classes):
        raise ValueError(
            f'boxes {tuple(boxes.shape)} and scores {tuple(scores.shape)} are not the (R, 4K) or (R, 4) and (R, K+1) '
            'of one image'
        )
    of_classes = scores[:, :-1]
    roi, label = (~(of_classes <= score_thr) if keep_non_finite else of_classes > score_thr).nonzero(as_tuple=True)
    chosen = boxes[roi] if boxes.shape[1] == 4 else boxes.view(num_rois, num_classes, 4)[roi, label]
    return InstanceData(bboxes=chosen, scores=scores[roi, label], labels=label)


def suppress(candidates: InstanceData, rule: Rule, score_thr: float, max_per_img: int) -> InstanceData:
    """Apply a rule to the candidates of one image above ``score_thr``.

    Args:
        candidates: as :func:`to_candidates` returns them, with any threshold not above ``score_thr``.
        rule: a rule from :mod:`mmdet_softnms.rules`.
        score_thr: candidates with ``score > score_thr`` take part.
        max_per_img: at most so many detections; -1: no limit.

    Returns:
        Detections in selection order: ``bboxes`` (M, 4), ``scores`` (M,) never increasing, ``labels`` (M,).
    """
    above = candidates.scores > score_thr
    if not bool(above.all()):
        candidates = candidates[above]
    return _apply(candidates, rule, max_per_img)


def _apply(candidates: InstanceData, rule: Rule, max_per_img: int) -> InstanceData:
    keep, scores = rule(candidates.bboxes, candidates.scores, candidates.labels, max_per_img)
    return InstanceData(bboxes=candidates.bboxes[keep], scores=scores, labels=candidates.labels[keep])


def post_process(boxes: Tensor, scores: Tensor, rule: Rule, score_thr: float, max_per_img: int) -> InstanceData:
    """Raw boxes and scores of one image to detections; see :func:`to_candidates` and :func:`suppress`."""
    keep_non_finite = getattr(rule, 'keeps_non_finite', False)
    return _apply(to_candidates(boxes, scores, score_thr, keep_non_finite), rule, max_per_img)
