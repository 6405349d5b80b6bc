"""The public operator: with gradients and compilers by the registered one, else straight to the device's path."""

from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmdet_softnms.ops._arguments import Parameters, check_parameters, check_tensors, raise_bad_values, working_type
from mmdet_softnms.ops._dispatch import select
from mmdet_softnms.ops._operator import REGISTERS, padded_soft_nms

Method = str  #: a name in :data:`mmdet_softnms.ops.weights.WEIGHTS`
Decay = Literal['product', 'strongest']


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    method: Method = 'gaussian',
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    max_num: int = -1,
    offset: float = 0,
    decay: Decay = 'product',
) -> tuple[Tensor, Tensor]:
    """Soft-NMS (Bodla, Singh, Chellappa, Davis, ICCV 2017, section 3), exact, class by class.

    Repeatedly select the highest current score (ties: lowest input index). Every remaining box of the selected box's
    class is then decayed by it: ``linear`` multiplies its score by ``1 - IoU`` if ``IoU > iou_threshold``;
    ``gaussian`` multiplies it by ``exp(-IoU ** 2 / sigma)``; ``hard`` removes it if ``IoU > iou_threshold``, whatever
    ``min_score`` is. A box whose current score is below ``min_score`` is dropped, the first pick included. Classes
    never influence each other, and no coordinate is shifted to keep them apart.

    Half, bfloat16 and float32 input is computed in float32; where boxes or scores are float64, in float64. Parameters
    are rounded to that type first. Weights multiply in selection order; the gaussian weight is computed in float64
    from the rounded IoU and rounded once, so that every path and device gives the same bits. IoU is 0 when the
    intersection is empty or the union is not positive (boxes of zero area, inverted boxes).

    CPU tensors go through a numba kernel that finds the selections lazily (``ops/_cpu.py``), NVIDIA GPUs through a
    Triton kernel where Triton works (``ops/_triton.py``), other devices through plain PyTorch (``ops/_reference.py``);
    devices without float64 are computed on the CPU. Where an input requires a gradient, and under ``torch.compile``
    and ``torch.export``, the registered operator is called, which says what the gradients are (``ops/_operator.py``,
    torch 2.4 or newer).

    Args:
        boxes (Tensor[N, 4]): ``(x1, y1, x2, y2)`` in pixels, any floating type. Finite; normally ``x1 <= x2`` and
            ``y1 <= y2``, but inverted boxes are allowed and overlap nothing.
        scores (Tensor[N]): finite, any floating type, normally in [0, 1].
        labels (Tensor[N], optional): class of each box, any integer type, not negative. None: all are of one class.
        method: ``'linear'``, ``'gaussian'`` or ``'hard'``, or a rule added to :mod:`mmdet_softnms.ops.weights`.
        iou_threshold: in [0, 1]; used by ``linear`` (the paper's N_t) and ``hard``.
        sigma: finite and > 0; used by ``gaussian``. TensorFlow and OpenVINO divide by ``2 * sigma`` instead, so the
            paper's 0.5 is their 0.25.
        min_score: in [0, 1]; boxes that fall below it are dropped.
        max_num: return at most this many boxes, the first of the merged sequence over all classes; -1: no limit.
        offset: added to widths and heights, 0 (mmdet's coordinates) or 1 (the authors' and Detectron's).
        decay: ``'product'``, the definition above, or ``'strongest'``: the weight of the largest IoU with a selected
            box of the class alone, times the input score (several neighbours do not add up).

    Returns:
        ``keep`` (Tensor[M], int64), input indices in selection order, and ``scores`` (Tensor[M]), the decayed scores
        of those boxes, never increasing, in the dtype of the input scores. Both on the input's device.

    Raises:
        TypeError: an argument is of the wrong type (integer boxes or scores, float labels, fractional ``max_num``).
        ValueError: wrong shapes, lengths or devices; coordinates that are not finite or whose areas overflow; scores
            that are not finite; negative labels; a parameter out of range. The message names the argument.
    """
    parameters = Parameters(method, iou_threshold, sigma, min_score, max_num, offset, decay)
    if differentiable_or_compiled(boxes, scores):
        if not torch.compiler.is_compiling():  # torch's own errors would name the operator's schema
            check_tensors(boxes, scores, labels)
            parameters = check_parameters(*parameters, dtype=working_type(boxes, scores))
        keep, kept_scores, count = padded_soft_nms(
            boxes, scores, labels, *parameters._replace(offset=float(parameters.offset))
        )
        num = count.item()
        # Not is_compiling(), which is also true where another thread is at it.
        if torch.compiler.is_dynamo_compiling() or isinstance(num, torch.SymInt):
            torch._check(num >= 0)
            torch._check(num <= keep.shape[0])
        elif num < 0:  # a GPU's operator cannot raise without waiting
            dtype = working_type(boxes, scores)
            wide = None if labels is None else labels.to(torch.int64)
            raise_bad_values(boxes.detach().to(dtype), scores.detach().to(dtype), wide, float(offset))
        return keep[:num], kept_scores[:num]
    return select(boxes, scores, labels, parameters)


def differentiable_or_compiled(boxes: Tensor, scores: Tensor) -> bool:
    """Whether the registered operator is needed, which costs some microseconds and torch 2.4."""
    if not REGISTERS:
        return False
    if torch.compiler.is_compiling():
        return True
    if not (isinstance(boxes, Tensor) and isinstance(scores, Tensor)):
        return False
    if getattr(forward_ad, '_current_level', -1) >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in (boxes, scores)
    ):
        raise NotImplementedError('soft_nms has no forward-mode derivatives; use backward()')
    return torch.is_grad_enabled() and (boxes.requires_grad or scores.requires_grad)
