"""Pictures of the images that change most: the right boxes, numbers that can be read, and words that match them."""

import base64
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from mmdet_softnms.reevaluation.candidates.store import Candidates, ImageCandidates
from mmdet_softnms.reevaluation.report.pictures import KINDS, Mark, _number, draw_pictures
from mmdet_softnms.reevaluation.result import Session
from mmdet_softnms.reevaluation.scoring.metrics import GroundTruth
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.rules import HardNMS, SoftNMS
from tests.drawn import picture_file


def _image(name, boxes, scores, labels):
    found = InstanceData(bboxes=torch.tensor(boxes), scores=torch.tensor(scores), labels=torch.tensor(labels))
    return ImageCandidates(name, (200, 300), found)


def _scene(tmp_path):
    """Two cats side by side, the second lost to hard NMS; on another image Soft-NMS keeps a second box of one dog."""
    pair, dog = [[50.0, 50, 150, 150], [80.0, 50, 180, 150]], [[20.0, 20, 120, 120], [50.0, 20, 150, 120]]
    candidates = Candidates.of(
        [_image('image 0', pair, [0.9, 0.8], [0, 0]), _image('image 1', dog, [0.9, 0.85], [1, 1])]
    )
    objects = [(1, 0, pair[0]), (1, 0, pair[1]), (2, 1, dog[0]), (2, 1, [200.0, 20, 250, 70])]
    annotations = [
        dict(id=number + 1, image_id=image_id, category_id=label + 1, iscrowd=0, area=1e4,
             bbox=[box[0], box[1], box[2] - box[0], box[3] - box[1]])
        for number, (image_id, label, box) in enumerate(objects)
    ]  # fmt: skip
    coco = dict(
        images=[dict(id=1), dict(id=2)],
        annotations=annotations,
        categories=[dict(id=1, name='cat'), dict(id=2, name='dog')],
    )
    path = picture_file(tmp_path / 'one.jpg', (200, 300))
    settings = [Setting(HardNMS(0.5), 1e-3, 100), Setting(SoftNMS('linear', iou_threshold=0.3), 1e-3, 100)]
    return Session(candidates, GroundTruth(('cat', 'dog'), coco, [1, 2], [1, 2]), [path, path]), settings


def _kinds(marks: list[Mark]) -> list[str]:
    return [mark.kind for mark in marks]


def test_recovered_objects_are_marked(tmp_path):
    session, settings = _scene(tmp_path)
    pictures, remark = draw_pictures(session, *settings, 4)
    (picture,) = pictures  # the dog's second box comes after all its objects: no gain, no loss
    assert (picture.name, picture.objects) == ('one.jpg', 2) and remark == ''
    assert picture.changes == '1 recovered'
    assert picture.ap[0] == pytest.approx(51 / 101) and picture.ap[1] == 1.0
    # The objects on both sides, below everything; one box on the left, both on the right, the recovered one on top.
    assert _kinds(picture.before) == ['object', 'object', 'found']
    assert _kinds(picture.after) == ['object', 'object', 'found', 'only']
    recovered = picture.after[-1]
    assert (recovered.number, recovered.words) == (1, 'recovered: cat, score 0.37') and recovered.tag
    assert recovered.box == (80, 50, 100, 100) and picture.after[0].words == 'annotated: cat'
    assert [mark.number for mark in picture.before] == [0, 0, 0]


def test_better_located_boxes_are_marked(tmp_path):
    """The object lies under the second box, the first one is 12 px off: only where both stay is it found up to 0.95."""
    session, settings = _scene(tmp_path)
    session.truth.coco['annotations'][2]['bbox'] = [32.0, 20, 100, 100]
    dogs = _image('dog', [[20.0, 20, 120, 120], [32.0, 20, 132, 120]], [0.9, 0.8], [1, 1])
    session.candidates = Candidates.of([session.candidates[0], dogs])
    session.image_paths[1] = picture_file(tmp_path / 'dog.jpg', (200, 300))
    pictures, _ = draw_pictures(session, *settings, 4)
    (dog,) = (picture for picture in pictures if picture.name == 'dog.jpg')
    assert dog.changes == '1 tighter' and dog.gain > 0
    (mark,) = (mark for mark in dog.after if mark.number)
    assert mark.kind == 'better' and mark.words == 'tighter: dog, score 0.17, up to IoU 0.95, before only 0.75'
    assert not any(mark.number for mark in dog.before)
    pictures, _ = draw_pictures(session, *reversed(settings), 4)
    (dog,) = (picture for picture in pictures if picture.name == 'dog.jpg')
    assert dog.changes == '1 looser' and dog.gain < 0
    (mark,) = (mark for mark in dog.before if mark.number)
    assert mark.words.startswith('looser: dog') and mark.words.endswith('up to IoU 0.95, after only 0.75')


def test_losses_and_false_positives_of_one_side_are_marked(tmp_path):
    """From soft to hard, the same scene is a loss; a second box that is no object is an added false positive."""
    session, settings = _scene(tmp_path)
    (picture,), _ = draw_pictures(session, *reversed(settings), 4)
    assert picture.gain < 0 and picture.changes == '1 lost'
    # Without the second cat's annotation its box is a false positive that comes with Soft-NMS, above a later object.
    session.truth.coco['annotations'][1] = dict(session.truth.coco['annotations'][1], bbox=[250.0, 10, 40, 40])
    boxes = [[50.0, 50, 150, 150], [80.0, 50, 180, 150], [250.0, 10, 290, 50]]
    session.candidates = Candidates.of([_image('image 0', boxes, [0.9, 0.89, 0.3], [0, 0, 0]), session.candidates[1]])
    (picture,), _ = draw_pictures(session, *settings, 4)
    assert picture.gain < 0 and picture.changes == '1 added false positive'
    assert _kinds(picture.after).count('changed_false') == 1 and 'changed_false' not in _kinds(picture.before)
    (picture,), _ = draw_pictures(session, *reversed(settings), 4)
    assert picture.gain > 0 and picture.changes == '1 removed false positive'
    assert picture.before[-1].words == 'removed false positive: cat, score 0.41'


def test_a_score_too_low_to_show_is_no_label(tmp_path):
    session, settings = _scene(tmp_path)
    low = _image('low', [[50.0, 50, 150, 150], [80.0, 50, 180, 150]], [0.9, 0.008], [0, 0])
    session.candidates = Candidates.of([low, session.candidates[1]])
    (picture,), _ = draw_pictures(session, *settings, 4)
    assert picture.after[-1].words == 'recovered: cat, score below 0.01'


def test_images_that_are_gone_are_counted(tmp_path):
    session, settings = _scene(tmp_path)
    Path(session.image_paths[0]).unlink()
    pictures, remark = draw_pictures(session, *settings, 4)
    assert pictures == [] and remark == '1 images could not be read.'


@pytest.mark.parametrize(('size', 'shown'), [((120, 160), (160, 120)), ((1000, 2000), (448, 224))])
def test_small_images_stay_small_and_boxes_stay_inside(tmp_path, size, shown):
    session, settings = _scene(tmp_path)
    picture_file(tmp_path / 'one.jpg', size)
    (picture,), _ = draw_pictures(session, *settings, 4)
    assert (picture.width, picture.height) == shown
    content = np.frombuffer(base64.b64decode(picture.image.split(',')[1]), np.uint8)
    stored = cv2.imdecode(content, cv2.IMREAD_COLOR).shape[1]
    assert stored == min(
        size[1], 896
    )  # the enlarged picture has more than the page shows, and never more than there is
    for mark in [*picture.before, *picture.after]:
        x, y, width, height = mark.box
        assert min(x, y) > 0 and x + width < shown[0] and y + height < shown[1]


def test_numbers_never_hide_each_other_nor_leave_the_picture():
    """Sixty boxes in one corner, some at the edges."""
    shown = 192, 192
    boxes = [(1.0 + number % 5, 1.0, 40.0, 30.0) for number in range(40)]
    boxes += [(150.0, 150.0 + number, 41.0, 20.0) for number in range(20)]
    marks = [Mark('only', box, 'x', number=-1) for box in boxes]
    _number(marks, shown)
    assert sorted(mark.number for mark in marks) == list(range(1, 61))
    tags = [mark.tag for mark in marks]
    for number, (x, y, width, height) in enumerate(tags):
        assert min(x, y) >= 0 and x + width <= shown[0] and y + height <= shown[1]
        for other_x, other_y, other_width, other_height in tags[:number]:
            apart = (
                x >= other_x + other_width
                or other_x >= x + width
                or y >= other_y + other_height
                or other_y >= y + height
            )
            assert apart
    crowded = [Mark('only', (0.0, 0.0, 10.0, 10.0), 'x', number=-1) for _ in range(4)]
    _number(crowded, (30, 20))  # room for two
    assert sum(mark.tag is None for mark in crowded) == 2
    _number(crowded, (10, 10))  # and for none
    assert not any(mark.tag for mark in crowded)


def test_kinds_are_told_apart_without_colour():
    """By line style and width; each colour is one of Okabe and Ito's, or a grey."""
    styles = [(kind.dashes, kind.width) for kind in KINDS.values()]
    assert len(set(styles)) == len(styles)
    okabe_ito = {'#000000', '#e69f00', '#56b4e9', '#009e73', '#f0e442', '#0072b2', '#d55e00', '#cc79a7'}
    for kind in KINDS.values():
        assert kind.colour in okabe_ito or len({kind.colour[1:3], kind.colour[3:5], kind.colour[5:]}) == 1
