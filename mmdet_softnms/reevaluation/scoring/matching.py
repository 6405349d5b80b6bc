"""Detections of a whole test set matched to its objects as COCO does."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mmengine.structures import InstanceData

from mmdet_softnms.ops._compiled import compiled_when_called
from mmdet_softnms.reevaluation.scoring.metrics import IOU_THRS, MAX_DETS, GroundTruth, rotated_overlaps


@dataclass
class Matches:
    """Detections of a test set under one setting, matched to its objects; sorted by class, then as COCO ranks them.

    Attributes:
        image: (D,) int32, position of the image in the data set.
        score: (D,) float32.
        true: (D,) uint16, bit t: true positive at ``IOU_THRS[t]``.
        ignored: (D,) uint16, bit t: matched to a crowd or difficult object at ``IOU_THRS[t]``, so neither true nor
            false.
        starts: (K + 1,) int64, detections of label k are rows ``starts[k]`` to ``starts[k + 1]``.
    """

    image: np.ndarray
    score: np.ndarray
    true: np.ndarray
    ignored: np.ndarray
    starts: np.ndarray


@dataclass
class Objects:
    """Objects of a ground truth by (image, label) cell: rows ``starts[i * K + k]`` to ``starts[i * K + k + 1]``."""

    boxes: np.ndarray  # (G, 4) float64, x1, y1, width, height, or (G, 5) rotated; crowd last in each cell
    crowd: np.ndarray  # (G,) bool
    number: np.ndarray  # (G,) int32, position in truth.coco['annotations']
    starts: np.ndarray  # (I * K + 1,) int64
    counts: np.ndarray  # (I, K) int64: objects that are no crowd
    image_order: np.ndarray  # (I,) int64: rank of the image's COCO id, which breaks ties between images

    @classmethod
    def of(cls, truth: GroundTruth) -> 'Objects':
        """Sort a ground truth's annotations into cells."""
        num_images, num_classes = len(truth.image_ids), len(truth.category_ids)
        image_of = {image_id: number for number, image_id in enumerate(truth.image_ids)}
        label_of = {category_id: label for label, category_id in enumerate(truth.category_ids)}
        annotations = truth.coco['annotations']
        crowd = np.array([bool(one['iscrowd']) for one in annotations], bool)
        cells = np.array(
            [image_of[one['image_id']] * num_classes + label_of[one['category_id']] for one in annotations], np.int64
        )
        order = np.lexsort((np.arange(len(annotations)), crowd, cells))
        boxes = np.array([one['bbox'] for one in annotations], np.float64).reshape(-1, truth.box_dim)
        starts = np.searchsorted(cells[order], np.arange(num_images * num_classes + 1))
        counts = np.bincount(cells[~crowd], minlength=num_images * num_classes).reshape(num_images, num_classes)
        ranks = np.argsort(np.argsort(truth.image_ids))
        return cls(boxes[order], crowd[order], order.astype(np.int32), starts, counts, ranks)


def match(results: Sequence[InstanceData], objects: Objects) -> Matches:
    """Match the detections of every image to its objects, as COCOeval does at all areas and 100 detections a class."""
    image, score, label, boxes = _flat(results, np.arange(len(results), dtype=np.int32))
    order, found = _match_all(image, score, label, boxes, objects)
    crowd = np.append(objects.crowd, False)[found]  # the one behind the last is for -1, no object
    bits = np.uint16(1) << np.arange(len(IOU_THRS), dtype=np.uint16)
    true, ignored = (((found >= 0) & kind) @ bits for kind in (~crowd, crowd))
    # Ranked as COCO ranks the detections of a class: by falling score, ties by image, then as they were matched.
    ranks = np.lexsort((np.arange(len(order)), objects.image_order[image[order]], -score[order], label[order]))
    order = order[ranks]
    starts = np.searchsorted(label[order], np.arange(objects.counts.shape[1] + 1))
    return Matches(image[order], score[order], true[ranks], ignored[ranks], starts)


def match_flat(
    results: Sequence[InstanceData], objects: Objects
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every detection that COCO counts: image, score, label, box, and the row in ``objects`` it matches at IoU 0.5.

    Rows are -1 where it matches none; boxes (D, 4) float64, x1, y1, width, height, or (D, 5) rotated.
    """
    image, score, label, boxes = _flat(results, np.arange(len(results), dtype=np.int32))
    order, found = _match_all(image, score, label, boxes, objects)
    return image[order], score[order], label[order], boxes[order], found[:, 0]


def match_image(result: InstanceData, image: int, objects: Objects) -> np.ndarray:
    """(M, T) int32: the annotation that each detection of one image matches at each of ``IOU_THRS``, or -1.

    Annotations are positions in ``truth.coco['annotations']``, crowds among them.
    """
    order, found = _match_all(*_flat([result], np.array([image])), objects)
    annotations = np.full((len(result), len(IOU_THRS)), -1, np.int32)
    annotations[order] = np.append(objects.number, np.int32(-1))[found]
    return annotations


def _flat(results: Sequence[InstanceData], images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(D,) position of the image in the data set, (D,) score, (D,) label and (D, 4) box, x1, y1, width, height.

    Rotated boxes, (D, 5), stay as they are.
    """
    boxes = np.concatenate([result.bboxes.numpy() for result in results]).astype(np.float64)
    if boxes.shape[1] == 4:
        boxes[:, 2:] -= boxes[:, :2]
    return (
        np.repeat(images, [len(result) for result in results]),
        np.concatenate([result.scores.numpy() for result in results]).astype(np.float32),
        np.concatenate([result.labels.numpy() for result in results]),
        boxes,
    )


def _match_all(
    image: np.ndarray, score: np.ndarray, label: np.ndarray, boxes: np.ndarray, objects: Objects
) -> tuple[np.ndarray, np.ndarray]:
    """Match flat detections (see :func:`_flat`).

    Returns:
        order: positions of the detections in the order they were matched: by label, then image, then falling score,
            at most 100 of each label and image.
        found: (len(order), T) int32, the row in ``objects`` that each matched at each threshold, or -1.
    """
    order = np.lexsort((np.arange(len(score)), -score, image, label))
    cell = image[order].astype(np.int64) * objects.counts.shape[1] + label[order]
    first = np.concatenate([[True], cell[1:] != cell[:-1]]) if len(cell) else np.zeros(0, bool)
    place = np.arange(len(cell)) - np.maximum.accumulate(np.where(first, np.arange(len(cell)), 0))
    order, cell = order[place < MAX_DETS], cell[place < MAX_DETS]
    begins, ends = objects.starts[cell], objects.starts[cell + 1]
    ious, firsts = overlaps(boxes[order], objects, begins, ends)
    return order, _match(ious, firsts, begins, ends, objects.crowd, IOU_THRS)


def overlaps(
    boxes: np.ndarray, objects: Objects, begins: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """IoUs of detections, each with objects that are neighbours, as COCO computes them.

    Of axis-aligned boxes in float64, with a crowd over the area of the detection; of rotated ones by mmcv, as in
    mmrotate's metrics.

    Args:
        boxes: (D, 4) float64, x1, y1, width, height; or (D, 5) rotated.
        objects: of the ground truth.
        begins, ends: (D,) the rows of ``objects`` that each is compared with; the same for detections that follow one
            another, or it takes longer.

    Returns:
        (N,) float64, and (D,) int64: that of detection ``d`` with object ``g`` is ``firsts[d] + g - begins[d]``.
    """
    counts = ends - begins
    firsts = np.cumsum(counts) - counts
    if boxes.shape[1] == 4:
        return _upright_overlaps(boxes, objects.boxes, objects.crowd, begins, ends, firsts), firsts
    ious = np.zeros(int(counts.sum()))
    changes = np.flatnonzero(np.append(True, begins[1:] != begins[:-1]) | np.append(True, ends[1:] != ends[:-1]))
    for first, last in itertools.pairwise([*changes.tolist(), len(boxes)] if len(boxes) else []):
        if counts[first]:
            rows = slice(int(firsts[first]), int(firsts[first]) + int(counts[first]) * (last - first))
            ious[rows] = rotated_overlaps(boxes[first:last], objects.boxes[begins[first] : ends[first]]).reshape(-1)
    return ious, firsts


@compiled_when_called
def _upright_overlaps(boxes, objects, crowd, begins, ends, firsts):  # type: ignore[no-untyped-def]
    ious = np.zeros((ends - begins).sum())
    for d in range(len(boxes)):
        x, y, w, h = boxes[d]
        for g in range(begins[d], ends[d]):
            width = min(x + w, objects[g, 0] + objects[g, 2]) - max(x, objects[g, 0])
            height = min(y + h, objects[g, 1] + objects[g, 3]) - max(y, objects[g, 1])
            if width > 0 and height > 0:
                inside = width * height
                area = w * h
                union = area if crowd[g] else area + objects[g, 2] * objects[g, 3] - inside
                ious[firsts[d] + g - begins[d]] = inside / union
    return ious


@compiled_when_called
def _match(ious, firsts, begins, ends, crowd, thresholds):  # type: ignore[no-untyped-def]
    """COCOeval.evaluateImg over all cells; detections of one cell are neighbours, best first."""
    matched = np.full((len(firsts), len(thresholds)), -1, np.int32)
    taken = np.zeros((len(thresholds), len(crowd)), np.bool_)
    for d in range(len(firsts)):
        begin, end = begins[d], ends[d]
        for t in range(len(thresholds)):
            best = min(thresholds[t], 1 - 1e-10)
            found = -1
            for g in range(begin, end):
                if taken[t, g] and not crowd[g]:
                    continue
                if found >= 0 and not crowd[found] and crowd[g]:
                    break  # a real object is better than any crowd
                iou = ious[firsts[d] + g - begin]
                if iou < best:
                    continue
                best = iou
                found = g
            if found >= 0:
                taken[t, found] = True
                matched[d, t] = found
    return matched
