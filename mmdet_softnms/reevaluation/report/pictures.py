"""The images on which another suppression changes most, drawn under both, for the report.

An image's gain is that of its own AP times its objects: a crowd of ten that gains 20 points says more about
suppression than a single cat whose second box moved up. What changed is told by COCO's matching, side by side:

* *recovered*: an object that a detection matches at IoU 0.5 under the second setting and none under the first;
  *lost*: the other way round;
* *tighter*: an object matched under both, up to a higher IoU threshold under the second setting (a better box of it was
  kept); *looser*: up to a lower one;
* *added false positive*: any other detection of at least ``PICTURE_SCORE_THR`` that matches no object at IoU 0.5 and
  is not among those of the first setting; *removed false positive*: the other way round.

Each of these is a box with a number, and a line of text with the same number. What both sides share has no number.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

import mmcv
import numpy as np
from mmengine.structures import InstanceData
from PIL import Image

from mmdet_softnms.reevaluation.choice.resampling import image_ap
from mmdet_softnms.reevaluation.result import Session
from mmdet_softnms.reevaluation.scoring.matching import Objects, match, match_image
from mmdet_softnms.reevaluation.scoring.metrics import IOU_THRS
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import detections

#: Detections below it are drawn only where they recover, lose, tighten or loosen an object.
PICTURE_SCORE_THR = 0.3
_SHOWN = 448  # CSS pixels of the longer side on the page; a smaller image stays as it is
_STORED = 896  # pixels of the longer side in the file, for the enlarged picture
_TAG_HEIGHT = 15.0


class Kind(NamedTuple):
    """How a kind of box is drawn: colours by Okabe and Ito (2008), and a line style that tells it without colour."""

    colour: str
    dashes: str  # of SVG; '' is a solid line
    width: float


#: By kind, the last on top: what is drawn later lies over the others.
KINDS = dict(
    object=Kind('#ffffff', '1.5 3', 2.0),
    found=Kind('#009e73', '', 1.5),
    false=Kind('#bbbbbb', '5 3', 1.5),
    changed_false=Kind('#d55e00', '6 3', 2.5),
    better=Kind('#56b4e9', '9 3 2 3', 2.5),
    only=Kind('#f0e442', '', 3.0),
)


@dataclass
class Mark:
    """One box of a drawn side, in pixels of the shown picture."""

    kind: str
    box: tuple[float, float, float, float]  # x, y, width, height, inside the picture; before it is turned
    words: str
    angle: float = 0.0  # degrees, clockwise about the centre of the box
    number: int = 0  # of the tag and of the line of text; 0: neither
    tag: tuple[float, float, float, float] | None = None  # x, y, width, height; inside the picture, over no other tag


@dataclass
class Picture:
    """One image under two settings."""

    name: str
    objects: int
    ap: tuple[float, float]  # of this image alone, in [0, 1]
    recovered: int
    lost: int
    tighter: int
    looser: int
    added: int
    removed: int
    width: int  # as shown
    height: int
    image: str  # data URL of a JPEG
    before: list[Mark] = field(default_factory=list)
    after: list[Mark] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """AP after minus before."""
        return self.ap[1] - self.ap[0]

    @property
    def thin(self) -> float:
        """Lines of a small picture are thinner by this factor."""
        return min(1.0, max(0.55, max(self.width, self.height) / _SHOWN))

    @property
    def changes(self) -> str:
        """What changed, in words."""
        counted = [
            f'{number} {word}'
            for number, word in (
                (self.recovered, 'recovered'),
                (self.lost, 'lost'),
                (self.tighter, 'tighter'),
                (self.looser, 'looser'),
                (self.added, f'added false positive{"s" * (self.added > 1)}'),
                (self.removed, f'removed false positive{"s" * (self.removed > 1)}'),
            )
            if number
        ]
        return ', '.join(counted) or 'only scores changed, and with them the order of detections'


def draw_pictures(session: Session, before: Setting, after: Setting, number: int) -> tuple[list[Picture], str]:
    """Pictures of the images with the largest gain, then the largest loss, and a remark where some are missing.

    Args:
        session: of a re-evaluation.
        before, after: the settings to compare.
        number: of gains, and of losses.
    """
    objects = Objects.of(session.truth)
    results = [detections(session.candidates, setting) for setting in (before, after)]
    matches = [match(result, objects) for result in results]
    aps = [image_ap(one, objects.counts) for one in matches]
    gain = (aps[1] - aps[0]) * objects.counts.sum(1)
    order = np.argsort(-gain, kind='stable')
    chosen = [int(image) for image in order[:number] if gain[image] > 0]
    chosen += [int(image) for image in order[::-1][:number] if gain[image] < 0]
    pictures, missing = [], 0
    for image in chosen:
        try:
            picture = mmcv.imfrombytes(session.read_image(image), channel_order='rgb')
        except Exception:  # storage backends and OpenCV raise errors of their own
            picture = None
        if picture is None:  # gone since, or damaged
            missing += 1
            continue
        pair = results[0][image], results[1][image]
        pictures.append(_picture(session, image, picture, pair, objects, (float(aps[0][image]), float(aps[1][image]))))
    if missing:
        return pictures, f'{missing} images could not be read.'
    return pictures, '' if chosen else 'No image gains or loses.'


def _picture(
    session: Session,
    image: int,
    picture: np.ndarray,
    results: tuple[InstanceData, InstanceData],
    objects: Objects,
    ap: tuple[float, float],
) -> Picture:
    classes, annotations = session.truth.classes, session.truth.coco['annotations']
    height, width = picture.shape[:2]
    scale = min(1.0, _SHOWN / max(width, height))
    shown = max(1, round(width * scale)), max(1, round(height * scale))
    matched = [match_image(result, image, objects) for result in results]  # (M, T) each
    best = [_best_boxes(one, annotations) for one in matched]
    known = [
        {_key(result, row) for row in range(len(result)) if result.scores[row] >= PICTURE_SCORE_THR}
        for result in results
    ]
    counts = dict.fromkeys(('recovered', 'lost', 'tighter', 'looser', 'added', 'removed'), 0)
    num_classes = objects.counts.shape[1]
    begin, end = objects.starts[image * num_classes], objects.starts[(image + 1) * num_classes]
    truth = []
    for row in range(begin, end):
        label = int(np.searchsorted(objects.starts, row, side='right') - 1 - image * num_classes)
        words = f'annotated: {classes[label]}' + (', not counted' if objects.crowd[row] else '')
        truth.append(Mark('object', *_drawn(objects.boxes[row], scale, shown, words)))
    sides: list[list[Mark]] = []
    for side, result in enumerate(results):
        # The detections that make this side the better one for an object.
        special: dict[int, tuple[str, str, str]] = {}
        for number, (threshold, row) in best[side].items():
            other = best[1 - side].get(number)
            if other is None:
                word = ('lost', 'recovered')[side]
                special[row] = 'only', word, ''
            elif threshold > other[0]:
                word = ('looser', 'tighter')[side]
                levels = f'{IOU_THRS[threshold]:.2f}', f'{IOU_THRS[other[0]]:.2f}'
                special[row] = 'better', word, f', up to IoU {levels[0]}, {("after", "before")[side]} only {levels[1]}'
            else:
                continue
            counts[word] += 1
        marks = list(truth)
        for row in range(len(result)):
            what = f'{classes[int(result.labels[row])]}, score {_score(float(result.scores[row]))}'
            if row in special:
                kind, word, remark = special[row]
            elif result.scores[row] < PICTURE_SCORE_THR:
                continue
            elif matched[side][row, 0] >= 0:
                kind, word, remark = 'found', '', ''
            elif _key(result, row) in known[1 - side]:
                kind, word, remark = 'false', '', ''
            else:
                kind, word, remark = 'changed_false', ('removed', 'added')[side], ''
                counts[word] += 1
                word += ' false positive'
            box = result.bboxes[row].double().numpy()
            if len(box) == 4:
                box = np.concatenate([box[:2], box[2:] - box[:2]])
            prefix = word or ('finds an object' if kind == 'found' else 'false positive on both sides')
            drawn = _drawn(box, scale, shown, f'{prefix}: {what}{remark}')
            marks.append(Mark(kind, *drawn, number=-1 if word else 0))
        order = list(KINDS)
        marks.sort(key=lambda one: order.index(one.kind))
        _number(marks, shown)
        sides.append(marks)
    name = PurePath(session.image_paths[image]).name or f'image {session.candidates.img_ids[image]}'
    num_objects = int(objects.counts[image].sum())
    stored = min(1.0, _STORED / max(width, height))
    url = _jpeg(mmcv.imresize(picture, (max(1, round(width * stored)), max(1, round(height * stored)))))
    return Picture(name, num_objects, ap, **counts, width=shown[0], height=shown[1], image=url,
                   before=sides[0], after=sides[1])  # fmt: skip


def _drawn(
    box: np.ndarray, scale: float, shown: tuple[int, int], words: str
) -> tuple[tuple[float, float, float, float], str, float]:
    """Box, words and angle of a mark. A rotated box, centre, sides and angle, may reach out of the picture."""
    if len(box) == 4:
        return _inside(box, scale, shown), words, 0.0
    x, y, width, height = (float(value) * scale for value in box[:4])
    return (x - width / 2, y - height / 2, width, height), words, float(np.degrees(box[4]))


def _inside(box: np.ndarray, scale: float, shown: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box, x, y, width, height, as it is drawn: the whole line inside the picture."""
    x1, y1 = (float(np.clip(box[axis] * scale, 1, shown[axis] - 2)) for axis in (0, 1))
    x2, y2 = (float(np.clip((box[axis] + box[axis + 2]) * scale, 1, shown[axis] - 1)) for axis in (0, 1))
    return x1, y1, max(x2 - x1, 1.0), max(y2 - y1, 1.0)


def _score(score: float) -> str:
    return f'{score:.2f}' if score >= 0.005 else 'below 0.01'


def _number(marks: Sequence[Mark], shown: tuple[int, int]) -> None:
    """Number what changed, best kind first, and give each number a place of its own inside the picture."""
    taken: list[tuple[float, float, float, float]] = []
    changed = [mark for mark in reversed(marks) if mark.number]
    for number, mark in enumerate(changed, 1):
        mark.number = number
        mark.tag = _place(_upright(mark), 6 + 7.0 * len(str(number)), taken, shown)
        if mark.tag:
            taken.append(mark.tag)


def _upright(mark: Mark) -> tuple[float, float, float, float]:
    """The box that holds a mark."""
    x, y, width, height = mark.box
    cos, sin = abs(np.cos(np.radians(mark.angle))), abs(np.sin(np.radians(mark.angle)))
    wide, high = width * cos + height * sin, width * sin + height * cos
    return x + (width - wide) / 2, y + (height - high) / 2, wide, high


def _place(
    box: tuple[float, float, float, float],
    width: float,
    taken: Sequence[tuple[float, float, float, float]],
    shown: tuple[int, int],
) -> tuple[float, float, float, float] | None:
    """The free place for a tag that is nearest to a corner of its box, the upper left one first; None: all is full."""
    x, y, w, h = box
    corners = [(x, y - _TAG_HEIGHT), (x, y), (x + w - width, y - _TAG_HEIGHT), (x + w - width, y),
               (x, y + h), (x, y + h - _TAG_HEIGHT), (x + w - width, y + h)]  # fmt: skip
    most = shown[0] - width, shown[1] - _TAG_HEIGHT
    if min(most) < 0:
        return None
    anywhere = [
        (float(left), float(top)) for left in np.arange(0, most[0] + 1e-6, 4) for top in np.arange(0, most[1] + 1e-6, 4)
    ]
    anywhere.sort(key=lambda place: abs(place[0] - x) + abs(place[1] - y))
    for left, top in [*corners, *anywhere]:
        if 0 <= left <= most[0] and 0 <= top <= most[1]:
            tag = left, top, width, _TAG_HEIGHT
            if not any(_overlap(tag, other) for other in taken):
                return tag
    return None


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


def _best_boxes(matched: np.ndarray, annotations: Sequence[dict[str, Any]]) -> dict[int, tuple[int, int]]:
    """For each object that is found at IoU 0.5: the highest threshold (position) that finds it, and the row that does.

    Crowds are no objects.
    """
    at_half = {int(number) for number in matched[:, 0]}
    best: dict[int, tuple[int, int]] = {}
    for row, threshold in np.argwhere(matched >= 0):
        number = int(matched[row, threshold])
        if number in at_half and not annotations[number]['iscrowd'] and threshold >= best.get(number, (-1, -1))[0]:
            best[number] = int(threshold), int(row)
    return best


def _key(result: InstanceData, row: int) -> tuple[float, ...]:
    return (*result.bboxes[row].tolist(), float(result.labels[row]))


def _jpeg(picture: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, 'JPEG', quality=80)
    return 'data:image/jpeg;base64,' + base64.b64encode(content.getvalue()).decode()
