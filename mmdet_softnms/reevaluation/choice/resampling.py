"""AP of resampled images, of single images, and without some of them, from one matching.

All kernels that numba compiles together are in this file: its disk cache looks at the file of the outermost one only.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numba
import numpy as np

from mmdet_softnms.ops._compiled import compiled_when_called
from mmdet_softnms.reevaluation.scoring.matching import Matches
from mmdet_softnms.reevaluation.scoring.metrics import CRITERIA, IOU_THRS, RECALLS


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


@compiled_when_called
def _weighted_ap(image, true, ignored, starts, counts, weights, folds, num_folds, chosen, recalls):  # type: ignore[no-untyped-def]
    num_resamples, (num_images, num_classes) = len(weights), counts.shape
    result = np.zeros((num_resamples, num_folds + 1))
    # Most detections are false at every threshold: they are counted, and only the others are looked at again.
    matched = np.flatnonzero(true | ignored)
    match_starts = np.searchsorted(matched, starts)
    most = 1
    for k in range(num_classes):
        most = max(most, match_starts[k + 1] - match_starts[k])
    seen = np.zeros((num_folds + 1, most), np.int64)  # detections up to a matched one, by fold; the last: all
    precision, recall = np.zeros((num_folds + 1, most)), np.zeros((num_folds + 1, most))
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
                classes[f] += positives[f] > 0
            classes[num_folds] += 1
            running = np.zeros(num_folds + 1, np.int64)
            first, last = match_starts[k], match_starts[k + 1]
            d = starts[k]
            for m in range(first, last):
                while d <= matched[m]:
                    running[num_folds] += weight[image[d]]
                    if num_folds:
                        running[folds[image[d]]] += weight[image[d]]
                    d += 1
                for f in range(num_folds):
                    seen[f, m - first] = running[num_folds] - running[f]
                seen[num_folds, m - first] = running[num_folds]
            for t in chosen:
                bit = np.uint16(1 << t)
                true_so_far = np.zeros(num_folds + 1, np.int64)
                ignored_so_far = np.zeros(num_folds + 1, np.int64)
                hits = 0
                for m in range(first, last):
                    d = matched[m]
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
                                recall[f, hits] = true_so_far[f] / positives[f]
                                among = seen[f, m - first] - ignored_so_far[f]
                                precision[f, hits] = 0.0
                                if among > 0:
                                    precision[f, hits] = true_so_far[f] / (among + 2.220446049250313e-16)
                        hits += 1
                for f in range(num_folds + 1):
                    if positives[f] > 0:
                        result[b, f] += _interpolated(precision[f], recall[f], hits, recalls)
        for f in range(num_folds + 1):
            result[b, f] = result[b, f] / (len(chosen) * classes[f]) if classes[f] else -1.0
    return result


@numba.njit(nogil=True)
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


def by_rank(matches: Matches) -> Matches:
    """The same detections in the same order, with minus their place in the ranking of their class as score.

    Rules rescale scores, so those of two settings cannot be ranked together; places can: so many detections of the
    class, on the same images, are ahead. Equal scores share the first place among them.
    """
    place = np.empty(len(matches.score), matches.score.dtype)
    for start, stop in itertools.pairwise(matches.starts):
        falling = -matches.score[start:stop]
        place[start:stop] = -np.searchsorted(falling, falling)
    return replace(matches, score=place)


def pool_folds(
    matches: Sequence[Matches], chosen: Sequence[int], folds: np.ndarray, image_order: np.ndarray
) -> Matches:
    """Detections of the images of each fold under the setting chosen for it, ranked together by their scores."""
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


def image_ap(matches: Matches, counts: np.ndarray) -> np.ndarray:
    """(I,) AP of every image alone, its classes weighted by their objects; -1 where it has no object."""
    label = np.repeat(np.arange(counts.shape[1]), np.diff(matches.starts))
    order = np.argsort(matches.image * counts.shape[1] + label, kind='stable')
    cells = (matches.image.astype(np.int64) * counts.shape[1] + label)[order]
    starts = np.searchsorted(cells, np.arange(counts.size + 1))
    return _image_ap(matches.true[order], matches.ignored[order], starts, counts, len(IOU_THRS), RECALLS)


@compiled_when_called
def _image_ap(true, ignored, starts, counts, num_thresholds, recalls):  # type: ignore[no-untyped-def]
    num_images, num_classes = counts.shape
    result = np.full(num_images, -1.0)
    for i in range(num_images):
        total, objects = 0.0, 0
        for k in range(num_classes):
            if counts[i, k] == 0:
                continue
            objects += counts[i, k]
            begin, end = starts[i * num_classes + k], starts[i * num_classes + k + 1]
            for t in range(num_thresholds):
                bit = np.uint16(1 << t)
                precision = np.zeros(end - begin)
                recall = np.zeros(end - begin)
                hits, among = 0, 0
                for d in range(begin, end):
                    if ignored[d] & bit:
                        continue
                    among += 1
                    if true[d] & bit:
                        precision[hits] = (hits + 1) / among
                        recall[hits] = (hits + 1) / counts[i, k]
                        hits += 1
                total += counts[i, k] * _interpolated(precision, recall, hits, recalls)
        if objects:
            result[i] = total / (objects * num_thresholds)
    return result
