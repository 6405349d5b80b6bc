"""The memory that one call of Soft-NMS takes at its peak. Imports little: the processes that measure do so, too."""

import ctypes
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdet_softnms.ops import soft_nms


def peak_bytes(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, max_num: int) -> int | None:
    """What one gaussian call adds to a process's resident memory at its peak, without its input. None: no glibc.

    In a process with a heap of its own: in a fork of this one, what a call takes depends on what ran before.
    """
    context = get_context('forkserver')
    context.set_forkserver_preload([__name__])
    queue = context.SimpleQueue()
    arguments = [one.numpy() for one in (boxes, scores, labels)]
    process = context.Process(target=_measure_peak, args=(queue, *arguments, max_num))
    process.start()
    process.join()
    grown: int | None = queue.get()
    return grown


def _measure_peak(queue: Any, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, max_num: int) -> None:
    inputs = [torch.from_numpy(one) for one in (boxes, scores, labels)]
    try:
        for _ in range(2):  # loads the kernels, and lets malloc settle on where it takes arrays of these sizes from
            soft_nms(*inputs, max_num=max_num)
        ctypes.CDLL(None).malloc_trim(0)  # what these calls have freed is resident, and would be used again
        Path('/proc/self/clear_refs').write_text('5')  # the peak is that of now
        before = _peak_kibibytes()
        soft_nms(*inputs, max_num=max_num)
        queue.put(1024 * (_peak_kibibytes() - before))
    except (OSError, AttributeError):
        queue.put(None)


def _peak_kibibytes() -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith('VmHWM')))
