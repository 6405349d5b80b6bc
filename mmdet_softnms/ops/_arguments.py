"""What every path needs of the arguments: their checks, in words, and the types they are computed in."""

import ctypes
import functools
import math
import operator
import sys
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from mmdet_softnms.ops import weights


class Parameters(NamedTuple):
    """Parameters as every path uses them: already rounded to the type the scores are computed in."""

    method: str
    iou_threshold: float
    sigma: float
    min_score: float
    max_num: int  # -1 means no limit
    offset: float
    decay: str = 'product'  # or 'strongest'


def working_type(boxes: Tensor, scores: Tensor) -> torch.dtype:
    """What is computed in: float64 where either is float64, else float32."""
    return torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32


def checked(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, parameters: Parameters, box_dim: int = 4
) -> tuple[Tensor, Tensor, Tensor | None, Parameters]:
    """The arguments of :func:`mmdet_softnms.soft_nms` as a path takes them: without gradients, of the working type.

    ``parameters`` as they were given: they are checked and rounded here. ``box_dim``: of :func:`check_tensors`.
    """
    check_tensors(boxes, scores, labels, box_dim)
    dtype = working_type(boxes, scores)
    params = check_parameters(*parameters, dtype=dtype)
    labels = None if labels is None else labels.to(torch.int64)  # torch compares no uint16, uint32 or uint64
    return boxes.detach().to(dtype), scores.detach().to(dtype), labels, params


#: What a box of so many values is called, and what takes it.
_BOXES = {
    4: 'axis-aligned boxes (x1, y1, x2, y2) are for soft_nms and the rule mmdet_softnms.SoftNMS',
    5: 'rotated boxes (x, y, w, h, angle) are for ops.rotated_soft_nms and the rule mmdet_softnms.RotatedSoftNMS',
}


def check_tensors(boxes: Tensor, scores: Tensor, labels: Tensor | None, box_dim: int = 4) -> None:
    """Kind, layout, device, shape and type of the tensors; their values are looked at by the paths.

    ``box_dim``: how many values a box has, 5 where it is rotated.

    Raises:
        TypeError, ValueError: as :func:`mmdet_softnms.soft_nms`; the message names the argument.
    """
    for name, tensor in (('boxes', boxes), ('scores', scores)) + ((('labels', labels),) if labels is not None else ()):
        if not isinstance(tensor, Tensor):
            raise TypeError(f'{name} must be a torch.Tensor, got {type(tensor).__name__}')
        if tensor.layout != torch.strided:
            raise TypeError(f'{name} must be a dense tensor, got {tensor.layout}; call to_dense()')
        if tensor.device != boxes.device:
            raise ValueError(f'{name} is on {tensor.device} but boxes is on {boxes.device}; move them together')
    # shape[0] here and below: len() of a tensor is Python code of torch's, and slow.
    if boxes.dim() != 2 or boxes.shape[1] != box_dim:
        others = f'; {_BOXES[boxes.shape[1]]}' if boxes.dim() == 2 and boxes.shape[1] in _BOXES else ''
        raise ValueError(f'boxes must have shape (N, {box_dim}), got {tuple(boxes.shape)}{others}')
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


def check_parameters(
    method: str,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_num: int,
    offset: float,
    decay: str = 'product',
    *,
    dtype: torch.dtype,
) -> Parameters:
    """The parameters in range and rounded to ``dtype``.

    Raises:
        TypeError, ValueError: as :func:`mmdet_softnms.soft_nms`; the message names the parameter.
    """
    given = method, iou_threshold, sigma, min_score, max_num, offset, decay
    if _PLAIN.issuperset(map(type, given)):  # nearly always; others may not be hashable, or change
        return _check_plain(*given, dtype)
    return _check(*given, dtype)


def _check(
    method: str,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_num: int,
    offset: float,
    decay: str,
    dtype: torch.dtype,
) -> Parameters:
    weight = weights.get(method)
    if not isinstance(decay, str) or decay not in ('product', 'strongest'):
        raise ValueError(f"decay must be 'product' or 'strongest', got {decay!r}")
    if decay == 'strongest' and not weight.falls:
        raise ValueError(f"decay='strongest' needs a weight that never rises with the IoU, and {method!r} does")
    iou_threshold = _rounded('iou_threshold', iou_threshold, dtype)
    sigma = _rounded('sigma', sigma, dtype)
    for (name, parameter), value in zip(weights.PARAMETERS.items(), (iou_threshold, sigma), strict=True):
        if not parameter.fits(value):
            raise ValueError(f'{name} must be {parameter.range}, got {value} in {dtype}')
    min_score = _rounded('min_score', min_score, dtype)
    offset = _rounded('offset', offset, dtype)
    if not 0 <= min_score <= 1:
        raise ValueError(f'min_score must be in [0, 1], got {min_score}')
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
    return Parameters(method, iou_threshold, sigma, min_score, min(limit, sys.maxsize), offset, decay)


_PLAIN = {str, float, int}
_check_plain = functools.lru_cache(1024, typed=True)(_check)  # a tenth of the time of a call on few boxes


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
    """(N,) areas of (N, 4) ``xyxy`` boxes; may be negative or positive for inverted ones (they overlap nothing).

    Of (N, 5) rotated boxes: width times height; ``offset`` is 0.
    """
    if boxes.shape[1] == 5:
        return boxes[:, 2] * boxes[:, 3]
    sides = boxes[:, 2:] - boxes[:, :2] + boxes.new_tensor(offset)
    return sides[:, 0] * sides[:, 1]
