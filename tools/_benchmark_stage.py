"""Parts of tools/benchmark.py: the whole post-processing stage of a RoI head, how the operator grows, how it starts.

``stage``: class logits and box deltas in, ``InstanceData`` out, for one image of 1,000 proposals and 80 classes:
mmdet's own stage with hard NMS (``BBoxHead.predict_by_feat`` with the stock ``test_cfg``) against ours (the same
method up to raw results, then ``mmdet_softnms.post_process``), at several ``score_thr``.

``growth``: time and memory of the operator against candidates, classes and ``max_num``, with the exponents of power
laws fitted to them on log axes.

``serving``: importing the package, ``warmup()``, and batches of images.
"""

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData

from mmdet_softnms import soft_nms
from mmdet_softnms.post_process import post_process
from mmdet_softnms.rules import HardNMS, SoftNMS

NUM_PROPOSALS, NUM_CLASSES = 1000, 80
STOCK, PARTS = "mmdet's own, hard", ('softmax and decode', 'threshold and gather', 'suppression')


def stages(score_thr: float, seed: int = 0) -> dict[str, Callable[[], Any]]:
    """What is timed at one ``score_thr``: mmdet's stage, ours under three rules, and the parts of ours."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import ConfigDict

    register_all_modules(init_default_scope=True)
    head: Any = MODELS.build(
        dict(
            type='Shared2FCBBoxHead', in_channels=8, fc_out_channels=8, roi_feat_size=7, num_classes=NUM_CLASSES,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
        )
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    rois, logits, deltas = _network_output(generator)
    meta = dict(img_shape=(800, 1333), scale_factor=(1.0, 1.0))
    stock = ConfigDict(score_thr=score_thr, max_per_img=100, nms=dict(type='nms', iou_threshold=0.5))

    def raw() -> InstanceData:
        with torch.no_grad():
            (result,) = head.predict_by_feat((rois,), (logits,), (deltas,), [meta], rcnn_test_cfg=None)
        return result

    def mmdet_stage() -> InstanceData:
        with torch.no_grad():
            (result,) = head.predict_by_feat((rois,), (logits,), (deltas,), [meta], rcnn_test_cfg=stock)
        return result

    def with_rule(rule: SoftNMS) -> Callable[[], InstanceData]:
        def stage() -> InstanceData:
            result = raw()
            return post_process(result.bboxes, result.scores, rule, score_thr, 100)

        return stage

    from mmdet_softnms.post_process import to_candidates

    once = raw()
    candidates = to_candidates(once.bboxes, once.scores, score_thr)
    gaussian = SoftNMS('gaussian')
    return {
        STOCK: mmdet_stage,
        'ours, gaussian': with_rule(gaussian),
        'ours, linear': with_rule(SoftNMS('linear')),
        'ours, hard': with_rule(HardNMS()),
        PARTS[0]: raw,
        PARTS[1]: lambda: to_candidates(once.bboxes, once.scores, score_thr),
        PARTS[2]: lambda: gaussian(candidates.bboxes, candidates.scores, candidates.labels, 100),
    }


def _network_output(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RoIs (R, 5), logits (R, K + 1) and deltas (R, 4K), shaped like a detector's: proposals round 20 objects."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    centres = torch.rand(20, 2, generator=generator) * torch.tensor([1333, 800])
    sizes = 32 * 12 ** torch.rand(20, 1, generator=generator) * (0.3 * normal(20, 2)).exp()
    classes = torch.randint(NUM_CLASSES, (20,), generator=generator)
    nearest = torch.randint(20, (NUM_PROPOSALS,), generator=generator)
    middle = centres[nearest] + 0.1 * sizes[nearest] * normal(NUM_PROPOSALS, 2)
    half = sizes[nearest] * (0.15 * normal(NUM_PROPOSALS, 2)).exp() / 2
    rois = torch.cat([torch.zeros(NUM_PROPOSALS, 1), middle - half, middle + half], 1)
    logits = 1.5 * normal(NUM_PROPOSALS, NUM_CLASSES + 1)
    logits[torch.arange(NUM_PROPOSALS), classes[nearest]] += 6.0
    logits[:, -1] += 4
    return rois, logits, 0.3 * normal(NUM_PROPOSALS, 4 * NUM_CLASSES)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of a line through the logarithms: 1 is linear growth, 2 quadratic."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def peak_bytes(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, max_num: int) -> int | None:
    """What one gaussian call adds to a process's resident memory at its peak, without its input. None: no glibc."""
    queue = get_context('fork').SimpleQueue()

    def call() -> None:
        soft_nms(boxes[:10], scores[:10], labels[:10])  # loads the kernel
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed is resident, and would be used again
            Path('/proc/self/clear_refs').write_text('5')  # the peak is that of now
            before = _peak_kibibytes()
            soft_nms(boxes, scores, labels, max_num=max_num)
            queue.put(1024 * (_peak_kibibytes() - before))
        except (OSError, AttributeError):
            queue.put(None)

    process = get_context('fork').Process(target=call)
    process.start()
    grown: int | None = queue.get()
    process.join()
    return grown


def _peak_kibibytes() -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith('VmHWM')))


def startup(runs: int) -> dict[str, float]:
    """Median seconds of new processes: the import after torch's, the first ``warmup()``, with and without its cache."""
    program = (
        'import time, torch; start = time.perf_counter(); import mmdet_softnms; imported = time.perf_counter(); '
        'mmdet_softnms.warmup(); print(imported - start, time.perf_counter() - imported)'
    )
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).resolve().parents[1])}

    def run(cache: str) -> list[float]:
        here = environment | {'NUMBA_CACHE_DIR': cache}
        done = subprocess.run([sys.executable, '-c', program], env=here, check=True, capture_output=True, text=True)
        return [float(value) for value in done.stdout.split()]

    with tempfile.TemporaryDirectory() as cache:
        compiled = run(cache)[1]
        imports, warm = zip(*(run(cache) for _ in range(runs)), strict=True)
    return {
        'import, after torch': statistics.median(imports),
        'warmup, from the disk cache': statistics.median(warm),
        'warmup, compiled': compiled,
    }


def median(values: Sequence[float]) -> float:
    """In milliseconds, of seconds."""
    return 1e3 * statistics.median(values)
