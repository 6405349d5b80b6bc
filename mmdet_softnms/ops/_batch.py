"""Several images at once, and getting ready before the first."""

import functools
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from mmdet_softnms.ops import _triton, weights
from mmdet_softnms.ops._arguments import check_tensors
from mmdet_softnms.ops._dispatch import path
from mmdet_softnms.ops._soft_nms import differentiable_or_compiled, soft_nms

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
        boxes: (N_i, 4) for each image, as there; a list or tuple, or a tensor (B, N, 4).
        scores: (N_i,) for each image, or (B, N).
        labels: (N_i,) for each image, or (B, N); None: one class.
        **parameters: as there, shared by all images.

    Returns:
        ``(keep, scores)`` of each image, indices counting from 0 in each.

    Raises:
        TypeError, ValueError: as there; lists of different lengths.
    """
    boxes, scores = _images('boxes', boxes), _images('scores', scores)
    labels = None if labels is None else _images('labels', labels)
    if len(boxes) != len(scores) or (labels is not None and len(labels) != len(boxes)):
        lengths = f'{len(boxes)} boxes, {len(scores)} scores' + ('' if labels is None else f', {len(labels)} labels')
        raise ValueError(f'boxes, scores and labels must be of the same images, got {lengths}')
    grad_enabled = torch.is_grad_enabled()  # of this thread; others have their own

    def one(number: int) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(grad_enabled):
            return soft_nms(boxes[number], scores[number], None if labels is None else labels[number], **parameters)

    if not boxes:
        soft_nms(torch.empty(0, 4, device='cpu'), torch.empty(0, device='cpu'), **parameters)  # checks the parameters
    if torch.compiler.is_compiling():  # threads and their number are nothing for a graph
        return [one(number) for number in range(len(boxes))]
    at_once = _in_one_launch(boxes, scores, labels, parameters)
    if at_once is not None:
        return at_once
    helpers = min(_cores(), len(boxes)) - 1
    on_cpu = all(isinstance(one_, Tensor) and one_.device.type == 'cpu' for one_ in scores)
    max_num = parameters.get('max_num', -1)
    if helpers < 1 or not on_cpu or not isinstance(max_num, int) or _work(scores, max_num) < _WORTH_THREADS:
        return [one(number) for number in range(len(boxes))]
    return _on_all_cores(one, len(boxes), helpers)


def _images(name: str, images: Any) -> Sequence[Tensor]:
    dimensions = 3 if name == 'boxes' else 2
    if isinstance(images, Tensor) and images.dim() == dimensions:
        return images.unbind()
    if isinstance(images, (list, tuple)):
        return images
    got = f'a tensor of shape {tuple(images.shape)}' if isinstance(images, Tensor) else type(images).__name__
    raise TypeError(
        f'{name} must be a list with a tensor for each image, or one tensor of {dimensions} dimensions, got {got}'
    )


def _work(scores: Sequence[Tensor], max_num: int) -> int:
    sizes = [one.numel() for one in scores]
    return sum((size if max_num < 0 else min(size, max_num)) + size // 50 for size in sizes)


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

    helpers = []
    try:
        # A RuntimeError of submit: the interpreter is on its way out, and starts nothing any more.
        with suppress(RuntimeError):
            for _ in range(num_helpers):
                helpers.append(_pool(os.getpid()).submit(work))
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
    if any(map(differentiable_or_compiled, boxes, scores)):
        return None
    for number in range(len(scores)):
        check_tensors(boxes[number], scores[number], None if labels is None else labels[number])
    return _triton.soft_nms_of_list(boxes, scores, labels, **parameters)


def warmup(methods: Iterable[str] | None = None) -> None:
    """Load what the first call on a CPU would otherwise load: numba and the kernels, for float32 and float64.

    Those of every rule of :mod:`mmdet_softnms.rules`: either decay, small and large classes, votes and support. From
    numba's disk cache that takes about a second, nearly all of it numba itself. On the very first time on a machine
    every method takes some ten seconds of compiling. For servers, and before worker processes are forked. May be
    called any number of times, from several processes at once.

    Args:
        methods: to prepare, as ``method`` of :func:`mmdet_softnms.soft_nms`; None: every registered one.

    Raises:
        ValueError: there is no such rule.
    """
    cpu = path(torch.device('cpu'))
    importlib.import_module('mmdet_softnms.ops._neighbours')  # compiles votes and support
    for method in list(weights.WEIGHTS) if methods is None else methods:
        cpu.load(weights.get(method))
        soft_nms(torch.zeros(1, 4, device='cpu'), torch.ones(1, device='cpu'), method=method)


@functools.lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """One pool a process; a forked one has none of its parent's threads, and gets its own by its number."""
    warmup(())  # numba, in this thread: two that import it at once would wait for one another
    return ThreadPoolExecutor(_cores(), thread_name_prefix='mmdet_softnms')


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
