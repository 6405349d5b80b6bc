"""What a detector's mistakes cost: TIDE's six kinds of error, as the AP that correcting each of them would gain.

Definitions: Bolya, Foley, Hays, Hoffman, "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020,
section 3, at a foreground IoU of 0.5 and a background IoU of 0.1. Every detection that matches no object is of the
first kind that fits:

* ``localisation``: IoU from 0.1 to 0.5 with an object of its class. Corrected: it matches that object.
* ``classification``: IoU of at least 0.5 with an object of another class. Corrected: it gets that class.
* ``duplicate``: IoU of at least 0.5 with an object of its class that a better detection matches. Corrected: removed.
* ``background``: IoU of at most 0.1 with every object. Corrected: removed.
* ``both``: all others, wrong in place and in class. Corrected: removed.

``missed``: objects that no detection matches, and that no correction of place or class would give one. Corrected: they
are not asked for. Of several detections that could be corrected to the same object, the one of the highest score is;
the others, and those whose object has a match, are removed.

Numbers are those of the ``tidecv`` package (a test holds recorded ones), with the matching and the AP of COCO: at most
100 detections of each class and image, the mean over the classes that have an object. ``tidecv`` takes 100 detections
of all classes together, and lets a class with detections but without objects count as AP 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.structures import InstanceData

from mmdet_softnms.ops._compiled import compiled_when_called
from mmdet_softnms.reevaluation.scoring.matching import Objects, match_flat, overlaps
from mmdet_softnms.reevaluation.scoring.metrics import RECALLS

#: Kinds of error, in the order of TIDE's figures.
KINDS = ('classification', 'localisation', 'both', 'duplicate', 'background', 'missed')
FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.1


def errors(results: Sequence[InstanceData], objects: Objects) -> dict[str, Any]:
    """TIDE's errors of one setting over a test set.

    Args:
        results: detections of every image: ``bboxes`` (M, 4) ``xyxy`` or (M, 5) rotated, ``scores``, ``labels``.
        objects: of the same images.

    Returns:
        ``AP50``: AP at IoU 0.5, in [0, 1]; ``dAP``: by kind, what correcting all errors of the kind, and of no other,
        adds to it, at least 0; ``count``: by kind, errors (of ``missed``: objects).
    """
    image, score, label, boxes, found = match_flat(results, objects)
    order = np.lexsort((np.arange(len(score)), -score, image))  # of an image, its best detection first
    image, score, label, boxes, found = (values[order] for values in (image, score, label, boxes, found))
    num_images, num_classes = objects.counts.shape
    label_of = np.repeat(np.tile(np.arange(num_classes), num_images), np.diff(objects.starts))
    starts = objects.starts[::num_classes]
    begins, ends = starts[image], starts[image + 1]
    ious, firsts = overlaps(boxes, objects, begins, ends)
    kind, target = _kinds(ious, firsts, begins, ends, label, found, objects.crowd, label_of)
    true = kind < 0
    counted = true | (found < 0)  # what a crowd takes is neither true nor false
    missed = np.ones(len(label_of), bool)
    missed[found[true]] = False
    missed[target[target >= 0]] = False
    missed &= ~objects.crowd
    ranks = objects.image_order[image]
    positives = objects.counts.sum(0)
    before = _mean_ap(label, score, ranks, true, positives, counted, positives)
    gains, counts = {}, {}
    for number, name in enumerate(KINDS[:-1]):
        wrong = kind == number
        mended = wrong & (target >= 0)
        new_label = np.where(mended, label_of[target], label)
        after = _mean_ap(new_label, score, ranks, true | mended, positives, (counted & ~wrong) | mended, positives)
        gains[name], counts[name] = max(after - before, 0.0), int(wrong.sum())
    wanted = positives - np.bincount(label_of[missed], minlength=num_classes)
    gains['missed'] = max(_mean_ap(label, score, ranks, true, wanted, counted, positives) - before, 0.0)
    counts['missed'] = int(missed.sum())
    return dict(AP50=before, dAP=gains, count=counts)


@compiled_when_called
def _kinds(ious, firsts, begins, ends, label, found, crowd, label_of):  # type: ignore[no-untyped-def]
    """Of every detection, best first in each image: its kind, -1 where it is right; the object it is corrected to."""
    kinds = np.full(len(label), -1, np.int8)
    targets = np.full(len(label), -1, np.int64)
    used = np.zeros(len(crowd), np.bool_)
    for d in range(len(label)):
        if found[d] >= 0 and not crowd[found[d]]:
            used[found[d]] = True
    promised = np.zeros(len(crowd), np.bool_)
    for d in range(len(label)):
        if found[d] >= 0 and not crowd[found[d]]:
            continue
        same, other = 0.0, 0.0  # highest IoU with an object of its class, of another
        same_object, other_object = -1, -1
        for g in range(begins[d], ends[d]):
            if crowd[g]:
                continue
            iou = ious[firsts[d] + g - begins[d]]
            if label_of[g] == label[d] and iou > same:
                same, same_object = iou, g
            elif label_of[g] != label[d] and iou > other:
                other, other_object = iou, g
        target = -1
        if BACKGROUND_IOU <= same <= FOREGROUND_IOU:
            kinds[d], target = 1, same_object
        elif other >= FOREGROUND_IOU:
            kinds[d], target = 0, other_object
        elif same >= FOREGROUND_IOU:
            kinds[d] = 3
        elif max(same, other) <= BACKGROUND_IOU:
            kinds[d] = 4
        else:
            kinds[d] = 2
        if target >= 0 and not used[target] and not promised[target]:
            promised[target] = True
            targets[d] = target
    return kinds, targets


def _mean_ap(
    label: np.ndarray,
    score: np.ndarray,
    ranks: np.ndarray,
    true: np.ndarray,
    positives: np.ndarray,
    counted: np.ndarray,
    objects: np.ndarray,
) -> float:
    """COCO's AP of the counted detections, over the classes that have ``objects``; -1 where none has.

    A class of which nothing is asked for any more counts as 0 where it has detections, and not at all without.
    """
    label, score, ranks, true = (values[counted] for values in (label, score, ranks, true))
    order = np.lexsort((np.arange(len(score)), ranks, -score, label))
    starts = np.searchsorted(label[order], np.arange(len(objects) + 1))
    values = []
    for k in np.flatnonzero(objects):
        hits = true[order[starts[k] : starts[k + 1]]].cumsum()
        if not positives[k]:
            values += [0.0] if len(hits) else []
            continue
        precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
        places = np.searchsorted(hits / positives[k], RECALLS, side='left')
        values.append(float(precision[places[places < len(hits)]].sum()) / len(RECALLS))
    return float(np.mean(values)) if values else -1.0
