"""Matching: which detection takes which object where several could, as COCO decides."""

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from mmdet_softnms.reevaluation.choice.resampling import weighted_ap
from mmdet_softnms.reevaluation.scoring.matching import Matches, Objects, match, match_image
from mmdet_softnms.reevaluation.scoring.metrics import IOU_THRS, GroundTruth
from tests.drawn import pycocotools_evaluation

ALL = (1 << len(IOU_THRS)) - 1


def _truth(objects: dict[int, list], crowd: tuple[int, ...] = (), classes: int = 1) -> GroundTruth:
    """Objects by COCO image id: (x1, y1, x2, y2[, label]); images in the order of the dict."""
    annotations = []
    for image_id, boxes in objects.items():
        for x1, y1, x2, y2, *label in boxes:
            number = len(annotations)
            annotations.append(
                dict(id=number + 1, image_id=image_id, category_id=1 + (label[0] if label else 0),
                     bbox=[float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
                     area=float((x2 - x1) * (y2 - y1)), iscrowd=int(number in crowd))
            )  # fmt: skip
    names = tuple(f'class {label}' for label in range(classes))
    coco = dict(
        images=[dict(id=image_id) for image_id in objects],
        annotations=annotations,
        categories=[dict(id=label + 1, name=name) for label, name in enumerate(names)],
    )
    return GroundTruth(names, coco, list(objects), list(range(1, classes + 1)))


def _found(*rows: tuple) -> InstanceData:
    """Detections of one image: (x1, y1, x2, y2, score[, label])."""
    table = torch.tensor([[*row, 0][:6] for row in rows], dtype=torch.float32).reshape(-1, 6)
    return InstanceData(bboxes=table[:, :4], scores=table[:, 4], labels=table[:, 5].long())


def _coco_ap(truth: GroundTruth, results: list[InstanceData]) -> float:
    return float(pycocotools_evaluation(truth, results).stats[0])


def _ap(matches: Matches, objects: Objects) -> float:
    images = len(objects.counts)
    return float(weighted_ap(matches, objects.counts, np.ones((1, images), np.int32), np.zeros(images, int), 0)[0, 0])


@pytest.mark.parametrize('ids', [(1, 2), (2, 1)])
def test_equal_scores_of_two_images_go_by_the_image_ids_of_coco(ids):
    """Whether the false positive stands before the true one or behind it: by COCO's ids, not the data set's order."""
    truth = _truth({ids[0]: [(0, 0, 10, 10)], ids[1]: [(100, 100, 110, 110)]})
    results = [_found((50, 50, 60, 60, 0.5)), _found((100, 100, 110, 110, 0.5))]
    objects = Objects.of(truth)
    matches = match(results, objects)
    assert [truth.image_ids[image] for image in matches.image] == [1, 2]
    assert _ap(matches, objects) == pytest.approx(_coco_ap(truth, results), abs=1e-12)
    assert _ap(matches, objects) == pytest.approx(51 / 101 * (0.5 if ids == (1, 2) else 1))


def test_equal_scores_of_one_image_stay_in_the_order_of_the_detector():
    truth = _truth({1: [(0, 0, 10, 10)]})
    objects = Objects.of(truth)
    better, worse = (0, 0, 10, 10, 0.5), (0, 0, 10, 8, 0.5)
    for first, second in ((better, worse), (worse, better)):
        result = _found(first, second)
        matches = match([result], objects)
        good, poor = (ALL, (1 << 7) - 1)  # the worse one has IoU 0.8: true up to the threshold 0.80
        expected = [good, 0] if first == better else [poor, ALL ^ poor]
        assert matches.true.tolist() == expected
        assert _ap(matches, objects) == pytest.approx(_coco_ap(truth, [result]), abs=1e-12)


def test_of_two_objects_with_the_same_iou_the_later_one_is_taken():
    """As in COCOeval. The second detection overlaps the first object alone, and finds it free."""
    truth = _truth({1: [(0, 0, 10, 10), (5, 0, 15, 10)]})
    objects = Objects.of(truth)
    result = _found((2.5, 0, 12.5, 10, 0.9), (0, 0, 10, 10, 0.8))
    assert match_image(result, 0, objects)[:, 0].tolist() == [1, 0]
    matches = match([result], objects)
    assert _ap(matches, objects) == pytest.approx(_coco_ap(truth, [result]), abs=1e-12)
    # The other way round the second detection's only object is the one that is gone.
    swapped = _truth({1: [(5, 0, 15, 10), (0, 0, 10, 10)]})
    again = match_image(result, 0, Objects.of(swapped))
    assert again[0, 0] == 1 and again[1, 0] == -1
    assert _ap(match([result], Objects.of(swapped)), Objects.of(swapped)) == pytest.approx(
        _coco_ap(swapped, [result]), abs=1e-12
    )


def test_an_iou_of_exactly_the_threshold_is_a_match():
    truth = _truth({1: [(0, 0, 10, 10)]})
    objects = Objects.of(truth)
    for height, last in ((5, 0), (7.5, 5), (10, 9)):  # IoU 0.5, 0.75 and 1, all exact
        (true,) = match([_found((0, 0, 10, height, 0.9))], objects).true
        assert true == (1 << (last + 1)) - 1


def test_a_real_object_goes_before_a_crowd_and_a_crowd_takes_several():
    truth = _truth({1: [(0, 0, 100, 100), (10, 10, 30, 30)]}, crowd=(0,))
    objects = Objects.of(truth)
    # Inside the crowd: its overlap with it is 1 whatever the size, but with the object only 0.64.
    result = _found((10, 10, 26, 30, 0.9), (50, 50, 60, 60, 0.8), (70, 70, 80, 80, 0.7), (200, 0, 210, 10, 0.6))
    assert match_image(result, 0, objects)[:, 0].tolist() == [1, 0, 0, -1]
    matches = match([result], objects)
    assert [int(bits) & 1 for bits in matches.true] == [1, 0, 0, 0]
    assert [int(bits) & 1 for bits in matches.ignored] == [0, 1, 1, 0]
    assert _ap(matches, objects) == pytest.approx(_coco_ap(truth, [result]), abs=1e-12)


def test_the_hundred_best_of_each_class_and_image_count():
    """The 101st is left out, true or not; other classes and other images have a hundred of their own."""
    truth = _truth({1: [(0, 0, 10, 10), (50, 50, 60, 60, 1)], 2: [(0, 0, 10, 10)]}, classes=2)
    objects = Objects.of(truth)
    wrong = [(200, 200, 210, 210, 0.9 - number / 1000) for number in range(99)]
    for extra, counted in ((0, True), (1, False)):
        many = [*wrong, *[(200, 200, 210, 210, 0.7)] * extra, (0, 0, 10, 10, 0.5)]
        results = [_found(*many, (50, 50, 60, 60, 0.1, 1)), _found((0, 0, 10, 10, 0.4))]
        matches = match(results, objects)
        assert matches.starts.tolist() == [0, 101, 102]
        assert [int(bits) & 1 for bits in matches.true[-3:]] == [int(counted), 1, 1]
        assert _ap(matches, objects) == pytest.approx(_coco_ap(truth, results), abs=1e-12)


def test_boxes_that_only_touch_do_not_overlap():
    truth = _truth({1: [(0, 0, 10, 10)]})
    result = _found((10, 0, 20, 10, 0.9), (0, 10, 10, 20, 0.8), (5, 5, 5, 5, 0.7))
    assert (match_image(result, 0, Objects.of(truth)) == -1).all()


def test_nothing_detected_and_nothing_there():
    truth = _truth({1: [], 2: [(0, 0, 10, 10)]})
    matches = match([_found(), _found()], Objects.of(truth))
    assert matches.starts.tolist() == [0, 0] and len(matches.true) == 0
    assert match_image(_found(), 1, Objects.of(truth)).shape == (0, len(IOU_THRS))
