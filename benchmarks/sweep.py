"""``sweep``: many suppression settings over the stored candidates of a drawn test set the size of COCO val2017.

5,000 of the scenes of ``op`` with 7 objects each, 80 classes. Tells the size of the store and how the time divides into
reading it, suppression and COCO metrics.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.structures import InstanceData
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.drawn import HEIGHT, WIDTH, detector_candidates, scene_objects
from benchmarks.timing import finish
from mmdet_softnms.reevaluation.candidates.store import CandidateStore, ImageCandidates
from mmdet_softnms.reevaluation.scoring.metrics import GroundTruth
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import evaluate_all
from mmdet_softnms.rules import HardNMS, SoftNMS


def run(arguments: argparse.Namespace) -> None:
    """Draw a test set, store its candidates, and sweep over them, timing each part."""
    num_classes = 80
    annotations: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        store = CandidateStore.create(Path(folder) / 'store', {'drawn': True}, arguments.images, 64)
        task = progress.add_task('drawing', total=arguments.images)
        writing = 0.0
        for shard in range(store.num_shards):
            images = []
            for number in store.images_of(shard):
                drawn = detector_candidates(arguments.candidates, num_classes, seed=number, num_objects=7)
                found = InstanceData(bboxes=drawn.boxes, scores=drawn.scores, labels=drawn.labels)
                images.append(ImageCandidates(number + 1, (HEIGHT, WIDTH), found))
                objects = scene_objects(torch.Generator().manual_seed(number), 7, num_classes)
                for centre, size, label in zip(*objects, strict=True):
                    low = (centre - size / 2).clamp(min=0)
                    width, height = (torch.minimum(centre + size / 2, torch.tensor([WIDTH, HEIGHT])) - low).tolist()
                    annotations.append(
                        dict(id=len(annotations) + 1, image_id=number + 1, category_id=int(label) + 1, iscrowd=0,
                             bbox=[*low.tolist(), width, height], area=width * height)
                    )  # fmt: skip
                progress.advance(task)
            start = time.perf_counter()
            store.write(shard, images)
            writing += time.perf_counter() - start
        image_ids = list(range(1, arguments.images + 1))
        coco = dict(
            images=[dict(id=image_id) for image_id in image_ids],
            annotations=annotations,
            categories=[dict(id=number, name=str(number)) for number in range(1, num_classes + 1)],
        )
        truth = GroundTruth(
            tuple(map(str, range(1, num_classes + 1))), coco, image_ids, list(range(1, num_classes + 1))
        )
        rules: list[SoftNMS] = [HardNMS(0.5)]
        for number in range(1, arguments.settings):
            value = round(number / arguments.settings, 4)
            rules.append(SoftNMS('gaussian', sigma=value) if number % 2 else SoftNMS('linear', iou_threshold=value))
        settings = [Setting(rule, 1e-3, 100) for rule in rules]
        start = time.perf_counter()
        assert not store.check()
        candidates = store.load()
        reading = time.perf_counter() - start
        task = progress.add_task('settings', total=arguments.settings)
        rows = evaluate_all(
            candidates,
            settings,
            truth,
            processes=arguments.processes,
            on_row=lambda row, done, total: progress.update(task, completed=done),
        )
        wall = time.perf_counter() - start
        bytes_each = store.num_bytes / candidates.num_candidates
    suppression, metric = sum(row.seconds for row in rows), sum(row.metric_seconds for row in rows)
    cpu = reading + suppression + metric
    result = dict(
        images=arguments.images,
        objects=len(annotations),
        candidates=candidates.num_candidates,
        settings=arguments.settings,
        bytes_per_candidate=bytes_each,
        writing_seconds=writing,
        wall_seconds=wall,
        reading_seconds=reading,
        suppression_seconds=suppression,
        metric_seconds=metric,
    )
    table = Table(title=f'{arguments.settings} settings over {arguments.images:,} images', show_header=False)
    table.add_row('candidates', f'{candidates.num_candidates:,}; {bytes_each:.2f} bytes each in the store')
    table.add_row('whole sweep', f'{wall:.1f} s')
    table.add_row('reading and checking', f'{reading:.2f} s, {100 * reading / cpu:.1f} % of the work')
    table.add_row('suppression', f'{suppression / len(rows):.2f} s a setting, {100 * suppression / cpu:.1f} %')
    table.add_row('metrics', f'{metric / len(rows):.2f} s a setting, {100 * metric / cpu:.1f} %')
    Console(width=120).print(table)
    finish(arguments, result, key='sweep')
