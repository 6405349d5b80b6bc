"""The definition of Soft-NMS in plain PyTorch: the oracle of the tests and the path for devices without a kernel.

One selection a turn over all boxes, nothing clever. Any device, float32 and float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmdet_softnms.ops import weights
from mmdet_softnms.ops._arguments import Parameters, box_areas, checked, has_safe_area, raise_bad_values


def reference(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    method: str = 'gaussian',
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    max_num: int = -1,
    offset: float = 0,
    decay: str = 'product',
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`mmdet_softnms.soft_nms` in plain PyTorch, to compare with; slow, without gradients.

    Args, Returns, Raises: as there. Any device that has float64.
    """
    parameters = Parameters(method, iou_threshold, sigma, min_score, max_num, offset, decay)
    keep, kept_scores = select(*checked(boxes, scores, labels, parameters))
    return keep, kept_scores.to(scores.dtype)


def select(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    params: Parameters,
    quality: Tensor | None = None,
    overlaps: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Select by the definition in :func:`mmdet_softnms.soft_nms`.

    Args:
        boxes (Tensor[N, 4]), scores (Tensor[N]): of one dtype, float32 or float64. labels: (Tensor[N]) or None.
        quality (Tensor[N], optional): in [0, 1], of the same dtype. Boxes are ordered by current score times quality,
            and that is the score returned; ``min_score`` is compared with the current score.
        overlaps: the IoUs of (1, D) boxes with (N, D) ones, (1, N), where boxes are not ``xyxy``.

    Returns:
        keep (Tensor[M], int64) and scores (Tensor[M]), in selection order.

    Raises:
        ValueError: a value is not finite, an area overflows, or a label is negative.
    """
    if len(scores) == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device), scores.new_empty(0)
    fine = boxes.isfinite().all() & scores.isfinite().all() & has_safe_area(boxes, params.offset).all()
    if labels is not None:
        fine &= (labels >= 0).all()
    if not fine:
        raise_bad_values(boxes, scores, labels, params.offset)

    rule = weights.get(params.method)
    values = [getattr(params, name) for name in rule.parameters]
    # As a tensor of the working type: a Python number would be added in a type of torch's choosing.
    offset = boxes.new_tensor(params.offset)
    areas = box_areas(boxes, params.offset)
    current, closest = scores.clone(), torch.zeros_like(scores)
    alive = current >= scores.new_tensor(params.min_score)
    index = torch.arange(len(scores), device=scores.device)
    keep: list[Tensor] = []
    kept_scores: list[Tensor] = []
    limit = len(scores) if params.max_num < 0 else params.max_num
    while len(keep) < limit and alive.any():
        key = current if quality is None else current * quality
        top = key[alive].max()
        chosen = index[alive & (key == top)][0]  # ties: the lowest index; argmax promises no order
        keep.append(chosen)
        kept_scores.append(top)
        alive[chosen] = False

        iou = _iou_with(boxes, areas, chosen, offset) if overlaps is None else overlaps(boxes[chosen, None], boxes)[0]
        decays = alive if labels is None else alive & (labels == labels[chosen])
        if params.decay == 'strongest':
            closest = iou = torch.where(decays, torch.maximum(closest, iou), closest)
        left = rule.function(iou.double(), *values).to(iou.dtype)
        if rule.removes:
            alive &= ~decays | (left > 0)
            continue
        before = scores if params.decay == 'strongest' else current
        current = torch.where(decays, before * left, current)
        alive &= current >= scores.new_tensor(params.min_score)
    if not keep:
        return index[:0], scores[:0].clone()
    return torch.stack(keep), torch.stack(kept_scores)


def _iou_with(boxes: Tensor, areas: Tensor, chosen: Tensor, offset: Tensor) -> Tensor:
    """(N,) IoU of every box with the chosen one; 0 where the intersection is empty or the union not positive."""
    sides = torch.minimum(boxes[:, 2:], boxes[chosen, 2:]) - torch.maximum(boxes[:, :2], boxes[chosen, :2]) + offset
    intersection = sides[:, 0] * sides[:, 1]
    union = areas + areas[chosen] - intersection
    overlaps = (sides > 0).all(dim=1) & (union > 0)
    # Divided only where it counts, so that no 0/0 is ever computed.
    return torch.where(overlaps, intersection / torch.where(overlaps, union, torch.ones_like(union)), 0)
