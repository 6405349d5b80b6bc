"""Several images at once on the CPU, and getting ready before the first."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mmdet_softnms.ops._soft_nms import soft_nms

#: Fewer candidates than this in a batch (a tenth of a millisecond) are not worth waking threads for.
_WORTH_THREADS = 4000


def batched_soft_nms(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], labels: Sequence[Tensor] | None = None, **parameters: Any
) -> list[tuple[Tensor, Tensor]]:
    """:func:`mmdet_softnms.soft_nms` for each image of a batch, on all cores; the same bits as one call an image.

    The kernel lets go of Python's lock, so threads share the work; a single image, a small batch and images that are
    not on the CPU are worked on in the calling thread, without any.

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

    on_cpu = all(isinstance(one_, Tensor) and one_.device.type == 'cpu' for one_ in scores)
    if len(boxes) < 2 or not on_cpu or sum(map(len, scores)) < _WORTH_THREADS:
        return [one(number) for number in range(len(boxes))]
    warmup()  # in this thread: two that import numba at once would wait for one another
    return list(_pool(os.getpid()).map(one, range(len(boxes))))


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return ThreadPoolExecutor(cores, thread_name_prefix='mmdet_softnms')
