"""A drawn test set without images: objects, and candidates round them, for what comes after the network."""

import contextlib
import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdet_softnms.reevaluation.candidates.store import Candidates, ImageCandidates
from mmdet_softnms.reevaluation.result import Reevaluation, Session
from mmdet_softnms.reevaluation.scoring.metrics import GroundTruth
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import evaluate_all

#: Of a detector, as far as settings need it.
CFG = Config(
    dict(
        model=dict(
            roi_head=dict(type='StandardRoIHead'),
            test_cfg=dict(rcnn=dict(score_thr=0.05, max_per_img=100, nms=dict(type='nms', iou_threshold=0.5))),
        )
    )
)


def drawn_test_set(num_images: int = 30, num_classes: int = 4, seed: int = 0) -> tuple[Candidates, GroundTruth]:
    """Candidates and ground truth with crowd, tied scores, close pairs, classes without objects, and empty images."""
    random = np.random.default_rng(seed)
    annotations, images = [], []
    image_ids = (random.permutation(num_images) + 1).tolist()  # COCO's order is not the data set's
    for number in range(num_images):
        boxes, labels = [], []
        for _ in range(int(random.integers(0, 7))):
            label = int(random.integers(0, num_classes - 1))  # the last class has no object
            x, y, w, h = *random.uniform(0, 300, 2), *random.uniform(8, 200, 2)
            for shift in (0.0, 0.4)[: int(random.integers(1, 3))]:
                annotations.append(
                    dict(id=len(annotations) + 1, image_id=image_ids[number], category_id=label + 1,
                         bbox=[x + shift * w, y, w, h], area=w * h * 0.7, iscrowd=int(random.random() < 0.1))
                )  # fmt: skip
                for _ in range(int(random.integers(3, 9))):
                    noise = random.normal(0, 0.07, 4) * [w, h, w, h]
                    boxes.append(np.array([x + shift * w, y, x + shift * w + w, y + h]) + noise)
                    labels.append(label)
        for _ in range(int(random.integers(0, 12)) if number else 0):
            x, y, w, h = *random.uniform(0, 300, 2), *random.uniform(8, 200, 2)
            boxes.append(np.array([x, y, x + w, y + h]))
            labels.append(int(random.integers(0, num_classes)))
        scores = np.round(0.98 * random.random(len(boxes)), 2)  # ties, within an image and between images
        candidates = InstanceData(
            bboxes=torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
            scores=torch.tensor(scores, dtype=torch.float32),
            labels=torch.tensor(labels, dtype=torch.int64),
        )
        images.append(ImageCandidates(number, (500, 500), candidates))
    coco = dict(
        images=[dict(id=image_id) for image_id in image_ids],
        annotations=annotations,
        categories=[dict(id=label + 1, name=f'class {label}') for label in range(num_classes)],
    )
    classes = tuple(f'class {label}' for label in range(num_classes))
    return Candidates.of(images), GroundTruth(classes, coco, image_ids, list(range(1, num_classes + 1)))


def pycocotools_evaluation(
    truth: GroundTruth, results: Sequence[InstanceData], kind: type[COCOeval] = COCOeval
) -> COCOeval:
    """pycocotools' evaluation of a test set, accumulated and summarized."""
    coco = COCO()
    coco.dataset = copy.deepcopy(truth.coco)
    found = [
        dict(image_id=image_id, category_id=truth.category_ids[label], score=score, bbox=[x1, y1, x2 - x1, y2 - y1])
        for image_id, result in zip(truth.image_ids, results, strict=True)
        for (x1, y1, x2, y2), score, label in zip(
            result.bboxes.tolist(), result.scores.tolist(), result.labels.tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = kind(coco, coco.loadRes(found), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def picture_file(path: Path, size: tuple[int, int] = (500, 500)) -> str:
    """A grey picture of a height and a width."""
    cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))
    return str(path)


def drawn_reevaluation(session: Session, settings: list[Setting], **options: Any) -> Reevaluation:
    """The result of a run that was none."""
    rows = evaluate_all(session.candidates, settings, session.truth)
    about = dict(
        dataset='Drawn <b>set</b>',
        num_images=len(session.candidates),
        num_candidates=session.candidates.num_candidates,
        masks_left_out=False,
        store='',
        store_bytes=0,
        forward_images=0,
        forward_seconds=0.0,
        notes=[],
    )
    return Reevaluation(**(about | options), rows=rows, session=session)
