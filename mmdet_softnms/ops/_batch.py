"""Several images at once, and getting ready before the first."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from mmdet_softnms.ops import _triton
from mmdet_softnms.ops._soft_nms import _check_tensors, _differentiable_or_compiled, soft_nms

#: Selections, with a fiftieth of the candidates, below which a batch (a third of a millisecond) is not worth waking
#: threads for.
_WORTH_THREADS = 700


def batched_soft_nms(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], labels: Sequence[Tensor] | None = None, **parameters: Any
) -> list[tuple[Tensor, Tensor]]:
    """:func:`mmdet_softnms.soft_nms` for each image of a batch, on all cores; the same bits as one call an image.

    On the CPU the kernel lets go of Python's lock, so threads share the work. On a GPU with Triton all images are one
    launch, and the host waits for the device once. A single image, a small batch on the CPU, images on other devices,
    of mixed types or with gradients are one call after the other.

    Args:
        boxes: (N_i, 4) for each image, as there.
        scores: (N_i,) for each image.
        labels: (N_i,) for each image; None: one class.
        **parameters: as there, shared by all images.

    Returns:
        ``(keep, scores)`` of each image, indices counting from 0 in each.

    Raises:
        TypeError, ValueError: as there; lists of different lengths.
    """
    if len(boxes) != len(scores) or (labels is not None and len(labels) != len(boxes)):
        lengths = f'{len(boxes)} boxes, {len(scores)} scores' + ('' if labels is None else f', {len(labels)} labels')
        raise ValueError(f'boxes, scores and labels must be of the same images, got {lengths}')
    grad_enabled = torch.is_grad_enabled()  # of this thread; others have their own

    def one(number: int) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(grad_enabled):
            return soft_nms(boxes[number], scores[number], None if labels is None else labels[number], **parameters)

    at_once = _in_one_launch(boxes, scores, labels, parameters)
    if at_once is not None:
        return at_once
    helpers = min(_cores(), len(boxes)) - 1
    on_cpu = all(isinstance(one_, Tensor) and one_.device.type == 'cpu' for one_ in scores)
    max_num = parameters.get('max_num', -1)
    if helpers < 1 or not on_cpu or not isinstance(max_num, int) or _work(scores, max_num) < _WORTH_THREADS:
        return [one(number) for number in range(len(boxes))]
    return _on_all_cores(one, len(boxes), helpers)


def _work(scores: Sequence[Tensor], max_num: int) -> int:
    return sum((len(one) if max_num < 0 else min(len(one), max_num)) + len(one) // 50 for one in scores)


def _on_all_cores(
    one: Callable[[int], tuple[Tensor, Tensor]], num_images: int, num_helpers: int
) -> list[tuple[Tensor, Tensor]]:
    """``one`` of each image, this thread and the helpers taking the next as they are free.

    One task for a helper, not for an image: handing over costs as much as a small image does.
    """
    results: dict[int, tuple[Tensor, Tensor]] = {}
    numbers = iter(range(num_images))

    def work() -> None:
        for number in numbers:
            results[number] = one(number)

    helpers = [_pool(os.getpid()).submit(work) for _ in range(num_helpers)]
    try:
        work()
    finally:
        started = [helper for helper in helpers if not helper.cancel()]
        wait(started)
    for helper in started:
        helper.result()  # raises what it has raised
    return [results[number] for number in range(num_images)]


def _in_one_launch(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], labels: Sequence[Tensor] | None, parameters: dict[str, Any]
) -> list[tuple[Tensor, Tensor]] | None:
    """A batch on a GPU with Triton; None where that is not what it is, or a value is bad (alone, it is named)."""
    tensors = [*boxes, *scores]
    if len(scores) < 2 or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    kinds = {(tensor.device, tensor.dtype) for tensor in boxes}, {(tensor.device, tensor.dtype) for tensor in scores}
    if len(kinds[0]) > 1 or len(kinds[1]) > 1 or not _triton.available(scores[0].device):
        return None
    if any(map(_differentiable_or_compiled, boxes, scores)):
        return None
    for number in range(len(scores)):
        _check_tensors(boxes[number], scores[number], None if labels is None else labels[number])
    return _triton.soft_nms_of_list(boxes, scores, labels, **parameters)


def warmup() -> None:
    """Load what the first call on a CPU would otherwise load: numba and the kernels, for float32 and float64.

    From numba's disk cache that takes about a second, on the very first time on a machine some seconds of compiling.
    For servers, and before worker processes are forked. May be called any number of times, from several processes at
    once.
    """
    soft_nms(torch.zeros(1, 4), torch.ones(1))


@functools.lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """One pool a process; a forked one has none of its parent's threads, and gets its own by its number."""
    warmup()  # in this thread: two that import numba at once would wait for one another
    return ThreadPoolExecutor(_cores(), thread_name_prefix='mmdet_softnms')


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
