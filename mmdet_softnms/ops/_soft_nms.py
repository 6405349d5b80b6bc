"""The public operator: check the arguments once, fix the arithmetic, pick the path for the device."""

import ctypes
import math
import operator
import sys
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Method = Literal['linear', 'gaussian', 'hard']
METHODS: tuple[str, ...] = get_args(Method)


class Parameters(NamedTuple):
    """Parameters as every path uses them: already rounded to the type the scores are computed in."""

    method: str
    iou_threshold: float
    sigma: float
    min_score: float
    max_num: int  # -1 means no limit
    offset: float


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
        method: ``'linear'``, ``'gaussian'`` or ``'hard'``.
        iou_threshold: in [0, 1]; used by ``linear`` (the paper's N_t) and ``hard``.
        sigma: finite and > 0; used by ``gaussian``. TensorFlow and OpenVINO divide by ``2 * sigma`` instead, so the
            paper's 0.5 is their 0.25.
        min_score: in [0, 1]; boxes that fall below it are dropped.
        max_num: return at most this many boxes, the first of the merged sequence over all classes; -1: no limit.
        offset: added to widths and heights, 0 (mmdet's coordinates) or 1 (the authors' and Detectron's).

    Returns:
        ``keep`` (Tensor[M], int64), input indices in selection order, and ``scores`` (Tensor[M]), the decayed scores
        of those boxes, never increasing, in the dtype of the input scores. Both on the input's device.

    Raises:
        TypeError: an argument is of the wrong type (integer boxes or scores, float labels, fractional ``max_num``).
        ValueError: wrong shapes, lengths or devices; coordinates that are not finite or whose areas overflow; scores
            that are not finite; negative labels; a parameter out of range. The message names the argument.
    """
    parameters = Parameters(method, iou_threshold, sigma, min_score, max_num, offset)
    if _differentiable_or_compiled(boxes, scores):
        from mmdet_softnms.ops._operator import padded_soft_nms

        if not torch.compiler.is_compiling():  # torch's own errors would name the operator's schema
            _check_tensors(boxes, scores, labels)
            parameters = _check_parameters(*parameters, dtype=working_type(boxes, scores))
        keep, kept_scores, count = padded_soft_nms(boxes, scores, labels, *parameters[:-1], float(parameters.offset))
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


def select(boxes: Tensor, scores: Tensor, labels: Tensor | None, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """:func:`soft_nms` without gradients: checks, and the device's path. What the registered operator calls, too.

    ``parameters`` as they were given: they are checked and rounded here.
    """
    _check_tensors(boxes, scores, labels)
    dtype = working_type(boxes, scores)
    params = _check_parameters(*parameters, dtype=dtype)
    device, score_dtype = scores.device, scores.dtype
    if device.type == 'mps':  # no float64 there, and the gaussian weight needs it
        boxes, scores = boxes.cpu(), scores.cpu()
        labels = None if labels is None else labels.cpu()
    boxes, scores = boxes.detach().to(dtype), scores.detach().to(dtype)
    labels = None if labels is None else labels.to(torch.int64)  # torch compares no uint16, uint32 or uint64
    keep, kept_scores = _path(boxes.device).select(boxes, scores, labels, params)
    return keep.to(device), kept_scores.to(device=device, dtype=score_dtype)


def _path(device: torch.device) -> Any:
    """The module whose ``select`` serves a device; imported at the first call."""
    if device.type == 'cpu':
        from mmdet_softnms.ops import _cpu  # numba takes longer to import than everything else here

        return _cpu
    from mmdet_softnms.ops import _reference, _triton

    return _triton if _triton.available(device) else _reference


def working_type(boxes: Tensor, scores: Tensor) -> torch.dtype:
    """What is computed in: float64 where either is float64, else float32."""
    return torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32


def _differentiable_or_compiled(boxes: Tensor, scores: Tensor) -> bool:
    """Whether the registered operator is needed, which costs some microseconds and torch 2.4."""
    if not hasattr(torch.library, 'custom_op'):
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


def raise_bad_values(boxes: Tensor, scores: Tensor, labels: Tensor | None, offset: float) -> NoReturn:
    """Name the first bad value. The kernels only notice that there is one; the words are found here, at leisure."""
    for name, values in (('boxes', boxes), ('scores', scores)):
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            place = tuple(bad[0].tolist())
            raise ValueError(
                f'{name} must be finite, but {name}[{", ".join(map(str, place))}] is {values[place].item()}; '
                'the network diverged or ran out of the range of its floating type'
            )
    if labels is not None and (bad := (labels < 0).nonzero()).numel():
        raise ValueError(f'labels must not be negative, but labels[{int(bad[0])}] is {int(labels[bad[0]])} as int64')
    overflow = (~has_safe_area(boxes, offset)).nonzero()
    index = int(overflow[0])
    raise ValueError(
        f'boxes[{index}] = {boxes[index].tolist()} has an area that overflows {boxes.dtype}; pass float64 boxes'
    )


def has_safe_area(boxes: Tensor, offset: float) -> Tensor:
    """(N,) bool: the area is finite with room for the sum of two, so that no union can overflow."""
    areas = box_areas(boxes, offset)
    return areas.abs() <= torch.finfo(boxes.dtype).max / 2


def box_areas(boxes: Tensor, offset: float) -> Tensor:
    """(N,) areas of (N, 4) ``xyxy`` boxes; may be negative or positive for inverted ones (they overlap nothing)."""
    sides = boxes[:, 2:] - boxes[:, :2] + boxes.new_tensor(offset)
    return sides[:, 0] * sides[:, 1]


def _check_tensors(boxes: Tensor, scores: Tensor, labels: Tensor | None) -> None:
    for name, tensor in (('boxes', boxes), ('scores', scores)) + ((('labels', labels),) if labels is not None else ()):
        if not isinstance(tensor, Tensor):
            raise TypeError(f'{name} must be a torch.Tensor, got {type(tensor).__name__}')
        if tensor.layout != torch.strided:
            raise TypeError(f'{name} must be a dense tensor, got {tensor.layout}; call to_dense()')
        if tensor.device != boxes.device:
            raise ValueError(f'{name} is on {tensor.device} but boxes is on {boxes.device}; move them together')
    # shape[0] here and below: len() of a tensor is Python code of torch's, and slow.
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f'boxes must have shape (N, 4), got {tuple(boxes.shape)}')
    if scores.dim() != 1:
        raise ValueError(f'scores must have shape (N,), got {tuple(scores.shape)}')
    if scores.shape[0] != boxes.shape[0]:
        raise ValueError(f'scores has {len(scores)} values for {len(boxes)} boxes')
    for name, tensor in (('boxes', boxes), ('scores', scores)):
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f'{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}')
    if labels is None:
        return
    if labels.dim() != 1:
        raise ValueError(f'labels must have shape (N,), got {tuple(labels.shape)}')
    if labels.shape[0] != boxes.shape[0]:
        raise ValueError(f'labels has {len(labels)} values for {len(boxes)} boxes')
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f'labels must be of an integer type, got {labels.dtype}')


def _check_parameters(
    method: str,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_num: int,
    offset: float,
    dtype: torch.dtype,
) -> Parameters:
    if method not in METHODS:
        raise ValueError(f'method must be one of {", ".join(map(repr, METHODS))}, got {method!r}')
    iou_threshold = _rounded('iou_threshold', iou_threshold, dtype)
    sigma = _rounded('sigma', sigma, dtype)
    min_score = _rounded('min_score', min_score, dtype)
    offset = _rounded('offset', offset, dtype)
    for name, value in (('iou_threshold', iou_threshold), ('min_score', min_score)):
        if not 0 <= value <= 1:
            raise ValueError(f'{name} must be in [0, 1], got {value}')
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f'sigma must be finite and > 0, got {sigma} in {dtype}')
    if not (math.isfinite(offset) and offset >= 0):
        raise ValueError(f'offset must be finite and >= 0, normally 0 or 1, got {offset}')
    try:
        limit = operator.index(max_num)
    except TypeError:
        limit = None
    if limit is None or isinstance(max_num, bool):
        raise TypeError(f'max_num must be an int, got {max_num!r}')
    if limit < -1:
        raise ValueError(f'max_num must be >= 0, or -1 for no limit, got {limit}')
    return Parameters(method, iou_threshold, sigma, min_score, min(limit, sys.maxsize), offset)


def _rounded(name: str, value: float, dtype: torch.dtype) -> float:
    """The value as ``dtype`` holds it."""
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f'{name} must be a number, got {value!r}')
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f'{name} is too large: {value!r}') from None
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        raise TypeError(f'{name} must be a number, got {value!r}') from None
    return number if dtype == torch.float64 else ctypes.c_float(number).value
