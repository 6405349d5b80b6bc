"""Resampled AP where there is nothing to average over."""

import numpy as np

from mmdet_softnms.reevaluation.choice.resampling import by_rank, image_ap, weighted_ap
from mmdet_softnms.reevaluation.scoring.matching import Matches, Objects, match
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import detections
from mmdet_softnms.rules import HardNMS
from tests.drawn import drawn_test_set


def test_places_instead_of_scores():
    """In each class the number of detections ahead, the same where scores tie; classes without any are no trouble."""
    score = np.array([0.9, 0.5, 0.5, 0.1, 0.3], np.float32)
    empty = np.zeros(5, np.uint16)
    ranked = by_rank(Matches(np.arange(5), score, empty, empty, np.array([0, 0, 4, 5, 5])))
    assert ranked.score.tolist() == [0, -1, -1, -3, 0] and ranked.image.tolist() == [0, 1, 2, 3, 4]


def test_without_an_object_there_is_no_ap():
    """-1, as COCO has it, and not 0: of a resample without objects, and of a data set without those of one fold."""
    candidates, truth = drawn_test_set(30)
    objects = Objects.of(truth)
    matches = match(detections(candidates, Setting(HardNMS(0.5), 0.0, -1)), objects)
    has_objects = objects.counts.sum(1) > 0
    assert has_objects.any() and not has_objects.all()
    folds = np.where(has_objects, 0, 1)  # all objects are in fold 0
    weights = np.stack([np.ones(30), ~has_objects]).astype(np.int32)
    with_objects, without = weighted_ap(matches, objects.counts, weights, folds, 2)
    assert without.tolist() == [-1, -1, -1]
    assert with_objects[0] == -1 and with_objects[1] > 0.1 and with_objects[2] > 0.1
    assert (image_ap(matches, objects.counts)[~has_objects] == -1).all()
