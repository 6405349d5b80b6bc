"""Which setting to use, and what choosing it is worth: tuning on some images, reporting on others, with intervals.

Glossary: *setting* s, *image* i, *fold* f, *resample* b. ``weights[b, i]``: how often image i was drawn in b.

The best of 50 settings on some images is partly luck on those images. So settings are chosen on images other than
those they are scored on: on a split of its own, or fold by fold (for each fold the setting that is best on all other
folds; the detections of all folds are pooled and scored once). The interval comes from a paired bootstrap over images
(Efron and Tibshirani 1993, percentiles), and each resample goes through the whole procedure again, choice included:
it is the interval of the procedure, not of a setting somebody happened to like. An image drawn twice stays in its
fold.

Detections are matched to objects once (:func:`match`), exactly as COCO does at all areas and 100 detections; what a
resample changes is only how much each image counts. With equal weights the AP is
faster-coco-eval's, which :func:`mmdet_softnms.reevaluation.engine.choose` checks every time.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numba
import numpy as np
from mmengine.structures import InstanceData

from mmdet_softnms.reevaluation.metrics import IOU_THRS, MAX_DETS, RECALLS, GroundTruth
from mmdet_softnms.reevaluation.settings import Setting
from mmdet_softnms.reevaluation.store import ReevaluationError

#: What settings can be chosen by, and the IoU thresholds (positions in IOU_THRS) it is the mean over.
CRITERIA: dict[str, tuple[int, ...]] = dict(AP=tuple(range(10)), AP50=(0,), AP75=(5,))


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

    boxes: np.ndarray  # (G, 4) float64, x1, y1, width, height; crowd last in each cell
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
        boxes = np.array([one['bbox'] for one in annotations], np.float64).reshape(-1, 4)
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


def match_image(result: InstanceData, image: int, objects: Objects) -> np.ndarray:
    """(M, T) int32: the annotation that each detection of one image matches at each of ``IOU_THRS``, or -1.

    Annotations are positions in ``truth.coco['annotations']``, crowds among them.
    """
    order, found = _match_all(*_flat([result], np.array([image])), objects)
    annotations = np.full((len(result), len(IOU_THRS)), -1, np.int32)
    annotations[order] = np.append(objects.number, np.int32(-1))[found]
    return annotations


def _flat(results: Sequence[InstanceData], images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(D,) position of the image in the data set, (D,) score, (D,) label and (D, 4) box, x1, y1, width, height."""
    boxes = np.concatenate([result.bboxes.numpy() for result in results]).astype(np.float64)
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
    return order, _match(boxes[order], cell, objects.boxes, objects.crowd, objects.starts, IOU_THRS)


@numba.njit(cache=True, nogil=True)
def _match(boxes, cells, objects, crowd, starts, thresholds):  # type: ignore[no-untyped-def]
    """COCOeval.evaluateImg over all cells; detections of one cell are neighbours, best first."""
    matched = np.full((len(boxes), len(thresholds)), -1, np.int32)
    taken = np.zeros((len(thresholds), len(objects)), np.bool_)
    for d in range(len(boxes)):
        begin, end = starts[cells[d]], starts[cells[d] + 1]
        x, y, w, h = boxes[d]
        for t in range(len(thresholds)):
            best = min(thresholds[t], 1 - 1e-10)
            found = -1
            for g in range(begin, end):
                if taken[t, g] and not crowd[g]:
                    continue
                if found >= 0 and not crowd[found] and crowd[g]:
                    break  # a real object is better than any crowd
                width = min(x + w, objects[g, 0] + objects[g, 2]) - max(x, objects[g, 0])
                height = min(y + h, objects[g, 1] + objects[g, 3]) - max(y, objects[g, 1])
                if width <= 0 or height <= 0:
                    iou = 0.0
                else:
                    inside = width * height
                    area = w * h
                    iou = inside / (area if crowd[g] else area + objects[g, 2] * objects[g, 3] - inside)
                if iou < best:
                    continue
                best = iou
                found = g
            if found >= 0:
                taken[t, found] = True
                matched[d, t] = found
    return matched


def bootstrap_weights(num_images: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples + 1, num_images) int32: how often each image was drawn; row 0 is the data set as it is."""
    random = np.random.default_rng(seed)
    weights = np.ones((resamples + 1, num_images), np.int32)
    for number in range(1, resamples + 1):
        weights[number] = np.bincount(random.integers(0, num_images, num_images), minlength=num_images)
    return weights


def weighted_ap(
    matches: Matches, counts: np.ndarray, weights: np.ndarray, folds: np.ndarray, num_folds: int, criterion: str = 'AP'
) -> np.ndarray:
    """AP on resampled images, on all of them and without each fold.

    Args:
        matches: of one setting.
        counts: (I, K) objects that are no crowd, by image and label.
        weights: (B, I) how often each image counts.
        folds: (I,) fold of each image.
        num_folds: how many there are; 0: leave-one-fold-out APs are not wanted.
        criterion: one of :data:`CRITERIA`.

    Returns:
        (B, num_folds + 1): columns 0 to num_folds - 1 without that fold, the last on all images; the mean over classes
        that have an object, -1 where none has.
    """
    chosen = np.array(CRITERIA[criterion], np.int64)
    return _weighted_ap(
        matches.image, matches.true, matches.ignored, matches.starts, counts, weights, folds, num_folds, chosen, RECALLS
    )


@numba.njit(cache=True, nogil=True)
def _weighted_ap(image, true, ignored, starts, counts, weights, folds, num_folds, chosen, recalls):  # type: ignore[no-untyped-def]
    num_resamples, (num_images, num_classes) = len(weights), counts.shape
    result = np.zeros((num_resamples, num_folds + 1))
    longest = 1
    for k in range(num_classes):
        longest = max(longest, starts[k + 1] - starts[k])
    seen = np.zeros((num_folds + 1, longest), np.int64)  # detections up to here, by fold; the last: all
    for b in range(num_resamples):
        weight = weights[b]
        classes = np.zeros(num_folds + 1, np.int64)
        for k in range(num_classes):
            positives = np.zeros(num_folds + 1, np.int64)
            for i in range(num_images):
                here = weight[i] * counts[i, k]
                positives[num_folds] += here
                if num_folds:
                    positives[folds[i]] += here
            if positives[num_folds] == 0:
                continue
            for f in range(num_folds):
                positives[f] = positives[num_folds] - positives[f]
            begin, end = starts[k], starts[k + 1]
            running = np.zeros(num_folds + 1, np.int64)
            for d in range(begin, end):
                running[num_folds] += weight[image[d]]
                if num_folds:
                    running[folds[image[d]]] += weight[image[d]]
                for f in range(num_folds):
                    seen[f, d - begin] = running[num_folds] - running[f]
                seen[num_folds, d - begin] = running[num_folds]
            for f in range(num_folds + 1):
                if positives[f] > 0:
                    classes[f] += 1
            for t in chosen:
                bit = np.uint16(1 << t)
                hits = 0
                for d in range(begin, end):
                    hits += (true[d] & bit) != 0
                precision = np.zeros((num_folds + 1, hits))
                recall = np.zeros((num_folds + 1, hits))
                true_so_far = np.zeros(num_folds + 1, np.int64)
                ignored_so_far = np.zeros(num_folds + 1, np.int64)
                hit = 0
                for d in range(begin, end):
                    w = weight[image[d]]
                    if ignored[d] & bit:
                        for f in range(num_folds + 1):
                            if f == num_folds or folds[image[d]] != f:
                                ignored_so_far[f] += w
                    elif true[d] & bit:
                        for f in range(num_folds + 1):
                            if f == num_folds or folds[image[d]] != f:
                                true_so_far[f] += w
                            if positives[f] > 0:
                                recall[f, hit] = true_so_far[f] / positives[f]
                                among = seen[f, d - begin] - ignored_so_far[f]
                                if among > 0:
                                    precision[f, hit] = true_so_far[f] / (among + 2.220446049250313e-16)
                        hit += 1
                for f in range(num_folds + 1):
                    if positives[f] > 0:
                        result[b, f] += _interpolated(precision[f], recall[f], hits, recalls)
        for f in range(num_folds + 1):
            result[b, f] = result[b, f] / (len(chosen) * classes[f]) if classes[f] else -1.0
    return result


@numba.njit(cache=True, nogil=True)
def _interpolated(precision, recall, hits, recalls):  # type: ignore[no-untyped-def]
    """COCO's AP of one class: mean over recall levels of the best precision at that recall or more."""
    total, best, level = 0.0, 0.0, len(recalls) - 1
    for hit in range(hits - 1, -1, -1):
        # Levels above this recall take the best precision among the hits after this one.
        while level >= 0 and recalls[level] > recall[hit]:
            total += best
            level -= 1
        best = max(best, precision[hit])
    return (total + best * (level + 1)) / len(recalls)


def pool_folds(
    matches: Sequence[Matches], chosen: Sequence[int], folds: np.ndarray, image_order: np.ndarray
) -> Matches:
    """Detections of the images of each fold under the setting chosen for it, ranked together."""
    parts = [np.flatnonzero(folds[matches[setting].image] == fold) for fold, setting in enumerate(chosen)]

    def gather(name: str) -> np.ndarray:
        return np.concatenate(
            [getattr(matches[setting], name)[part] for setting, part in zip(chosen, parts, strict=True)]
        )

    num_classes = len(matches[0].starts) - 1
    label = np.concatenate(
        [
            np.searchsorted(matches[setting].starts, part, side='right') - 1
            for setting, part in zip(chosen, parts, strict=True)
        ]
    )
    image, score = gather('image'), gather('score')
    order = np.lexsort((image_order[image], -score, label))
    starts = np.searchsorted(label[order], np.arange(num_classes + 1))
    true, ignored = gather('true')[order], gather('ignored')[order]
    return Matches(image[order], score[order], true, ignored, starts)


@dataclass
class Difference:
    """A setting, or the whole procedure, against its baseline; points are in [-1, 1]."""

    name: str
    value: float
    baseline: float
    low: float  # 95 % interval of value - baseline
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass
class Selection:
    """What tuning gives, honestly.

    Attributes:
        criterion: what was chosen by.
        tuned_on: in words.
        procedure: the whole procedure against the baseline.
        settings: every setting against its baseline, all images of the report split; what tuning on the same images
            that are reported would claim is the best of these.
        chosen: position of the setting to use, chosen on all tuning images.
        chosen_by_fold: position by fold; empty where the tuning split is another.
        resamples: of the bootstrap.
    """

    criterion: str
    tuned_on: str
    procedure: Difference
    settings: list[Difference]
    chosen: int
    chosen_by_fold: list[int]
    resamples: int

    def to_dict(self) -> dict[str, Any]:
        """As ``reevaluation.json`` holds it."""
        return asdict(self) | dict(significant=self.procedure.significant)


def select(
    settings: Sequence[Setting],
    matches: Sequence[Matches],
    objects: Objects,
    *,
    tuning: tuple[Sequence[Matches], Objects] | None = None,
    criterion: str = 'AP',
    num_folds: int = 5,
    resamples: int = 1000,
    seed: int = 0,
    threads: int = 1,
    labels: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Selection:
    """Choose a setting and say what the choice is worth.

    Args:
        settings: what to choose from, each with a baseline of its group among them. The config's own row is reported,
            but never chosen: it is not of the grid.
        matches: of each setting on the images to report on.
        objects: of these images.
        tuning: matches and objects on a split of its own to tune on; None: k-fold over the images.
        criterion: one of :data:`CRITERIA`.
        num_folds: without a tuning split.
        resamples: of the bootstrap, at least 1,000.
        seed: of folds and resamples.
        threads: to use.
        labels: what the settings are called.
        progress: called with (settings done, settings in all).

    Raises:
        ReevaluationError: too few images or resamples, an unknown criterion.
    """
    counts = objects.counts
    num_images = len(counts)
    check_choice(criterion, resamples, num_folds if tuning is None else None, num_images)
    random = np.random.default_rng(seed)
    folds = random.permutation(num_images) % num_folds
    weights = bootstrap_weights(num_images, resamples, seed + 1)
    baseline_of = [_baseline_of(setting, settings) for setting in settings]
    grid = np.array([number for number, setting in enumerate(settings) if setting.source != 'config'])
    run = functools.partial(_in_threads, threads=threads, progress=progress)
    with_folds = num_folds if tuning is None else 0
    jobs = [functools.partial(weighted_ap, one, counts, weights, folds, with_folds, criterion) for one in matches]
    if tuning is not None:
        tuning_matches, tuning_counts = tuning[0], tuning[1].counts
        tuning_weights = bootstrap_weights(len(tuning_counts), resamples, seed + 2)
        nowhere = np.zeros(len(tuning_counts), np.int64)
        jobs += [
            functools.partial(weighted_ap, one, tuning_counts, tuning_weights, nowhere, 0, criterion)
            for one in tuning_matches
        ]
    values = run(jobs)
    report = np.stack([value[:, -1] for value in values[: len(settings)]], 1)  # (B + 1, S), all images
    names = list(labels or (setting.name for setting in settings))
    each = [_difference(name, report[:, number], report[:, baseline_of[number]]) for number, name in enumerate(names)]
    if tuning is not None:
        tuned = np.stack([value[:, -1] for value in values[len(settings) :]], 1)
        best = grid[tuned[:, grid].argmax(1)]
        rows = np.arange(resamples + 1)
        procedure = _difference('procedure', report[rows, best], report[rows, np.array(baseline_of)[best]])
        return Selection(criterion, 'a split of its own', procedure, each, int(best[0]), [], resamples)
    without = np.stack([value[:, :-1] for value in values], 2)  # (B + 1, folds, S)
    best = grid[without[:, :, grid].argmax(2)]  # (B + 1, folds)
    pooled, pooled_baseline = (
        _pooled_ap(matches, choice, objects, weights, folds, criterion, threads)
        for choice in (best, np.array(baseline_of)[best])
    )
    return Selection(
        criterion,
        f'{num_folds}-fold over images',
        _difference('procedure', pooled, pooled_baseline),
        each,
        int(grid[report[0, grid].argmax()]),
        best[0].tolist(),
        resamples,
    )


def check_choice(criterion: str, resamples: int, num_folds: int | None, num_images: int) -> None:
    """Raise a ReevaluationError for what :func:`select` cannot do; ``num_folds`` None: there is a tuning split."""
    if criterion not in CRITERIA:
        raise ReevaluationError(f'--select takes {", ".join(CRITERIA)}, got {criterion}')
    if resamples < 1000:
        raise ReevaluationError(f'a bootstrap of {resamples} resamples says little; give at least 1000')
    if num_folds is not None and num_images < 2:
        raise ReevaluationError('a single image cannot be divided into folds: nothing to choose on and report on')
    if num_folds is not None and not 2 <= num_folds <= num_images:
        raise ReevaluationError(f'{num_folds} folds of {num_images} images are not possible; give 2 to {num_images}')


def _pooled_ap(
    matches: Sequence[Matches],
    best: np.ndarray,
    objects: Objects,
    weights: np.ndarray,
    folds: np.ndarray,
    criterion: str,
    threads: int,
) -> np.ndarray:
    """(B + 1,) AP of pooled out-of-fold detections; resamples that chose alike are scored together."""
    result = np.empty(len(best))
    choices, which = np.unique(best, axis=0, return_inverse=True)
    which = which.reshape(-1)

    def job(number: int) -> np.ndarray:
        pooled = pool_folds(matches, choices[number].tolist(), folds, objects.image_order)
        return weighted_ap(pooled, objects.counts, weights[which == number], folds, 0, criterion)[:, -1]

    for number, values in enumerate(_in_threads([functools.partial(job, n) for n in range(len(choices))], threads)):
        result[which == number] = values
    return result


def _in_threads(
    jobs: Sequence[Callable[[], np.ndarray]],
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[np.ndarray]:
    """Results of all jobs in order; the kernels let go of the interpreter's lock."""
    results = []
    with ThreadPoolExecutor(threads) as pool:
        for done, result in enumerate(pool.map(lambda job: job(), jobs), 1):
            results.append(result)
            progress(done, len(jobs))
    return results


def _baseline_of(setting: Setting, settings: Sequence[Setting]) -> int:
    """Position of a setting's baseline: that of its group, or for the config's own row the first where it has none."""
    baselines = [number for number, one in enumerate(settings) if one.is_baseline]
    for number in baselines:
        if settings[number].group == setting.group:
            return number
    if setting.source == 'config' and baselines:
        return baselines[0]
    raise ReevaluationError(f'there is no hard NMS at IoU 0.5 with score_thr, max_per_img of {setting.group}')


def _difference(name: str, values: np.ndarray, baseline: np.ndarray) -> Difference:
    low, high = np.percentile(values[1:] - baseline[1:], [2.5, 97.5])
    return Difference(name, float(values[0]), float(baseline[0]), float(low), float(high))
