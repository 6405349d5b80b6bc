"""``stage``: class logits and box deltas in, detections out, against mmdet's stage with hard NMS.

One image of 1,000 proposals and 80 classes: ``BBoxHead.predict_by_feat`` with the stock ``test_cfg`` against ours (the
same method up to raw results, then ``mmdet_softnms.post_process``), at several ``score_thr``.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.structures import InstanceData
from rich.console import Console
from rich.table import Table

from benchmarks.timing import check_device, finish, finished, in_turns, median
from mmdet_softnms.post_process import post_process, to_candidates
from mmdet_softnms.rules import HardNMS, Rule, SoftNMS, VotedNMS

NUM_PROPOSALS, NUM_CLASSES = 1000, 80
STOCK, PARTS = "mmdet's own, hard", ('softmax and decode', 'threshold and gather', 'suppression')


def run(arguments: argparse.Namespace) -> None:
    """mmdet's post-processing stage with hard NMS, and ours."""
    device = torch.device(arguments.device)
    check_device(device)
    rows = measure_all(arguments.score_thr, device, arguments.seconds)
    table = Table(*header(rows), title='one image, 1,000 proposals, 80 classes, ms (ratio to mmdet)')
    for row in rows:
        table.add_row(*cells(row))
    Console(width=180).print(table)
    finish(arguments, rows)


def measure_all(score_thrs: Sequence[float], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A row for each threshold."""
    rows = []
    for score_thr in score_thrs:
        times, results = in_turns(stages(score_thr, device=device), seconds)
        medians = {name: median(values) for name, values in times.items()}
        rows.append(dict(score_thr=score_thr, candidates=len(results[PARTS[1]].scores), milliseconds=medians))
    return rows


def header(rows: list[dict[str, Any]]) -> list[str]:
    """Titles of the columns."""
    return ['score_thr', 'candidates', *rows[0]['milliseconds']]


def cells(row: dict[str, Any]) -> list[str]:
    """A row as texts."""
    stock = row['milliseconds'][STOCK]
    times = (
        f'{value:.2f}' + (f' ({stock / value:.2f}x)' if name.startswith('ours') else '')
        for name, value in row['milliseconds'].items()
    )
    return [f'{row["score_thr"]:g}', f'{row["candidates"]:,}', *times]


def stages(score_thr: float, seed: int = 0, device: torch.device | None = None) -> dict[str, Callable[[], Any]]:
    """What is timed at one ``score_thr``: mmdet's stage, ours under four rules, and the parts of ours."""
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
    rois, logits, deltas = (each.to(device) for each in _network_output(generator))
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

    def with_rule(rule: Rule) -> Callable[[], InstanceData]:
        def stage() -> InstanceData:
            result = raw()
            detections = post_process(result.bboxes, result.scores, rule, score_thr, 100)
            return InstanceData(**detections._asdict())  # as the head returns them

        return stage

    once = raw()
    candidates = to_candidates(once.bboxes, once.scores, score_thr)
    gaussian = SoftNMS('gaussian')
    timed: dict[str, Callable[[], Any]] = {
        STOCK: mmdet_stage,
        'ours, gaussian': with_rule(gaussian),
        'ours, linear': with_rule(SoftNMS('linear')),
        'ours, hard': with_rule(HardNMS()),
        'ours, voted': with_rule(VotedNMS(gaussian)),
        PARTS[0]: raw,
        PARTS[1]: lambda: to_candidates(once.bboxes, once.scores, score_thr),
        PARTS[2]: lambda: gaussian(candidates.bboxes, candidates.scores, candidates.labels, 100),
    }
    return {name: finished(call) for name, call in timed.items()} if rois.is_cuda else timed


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
