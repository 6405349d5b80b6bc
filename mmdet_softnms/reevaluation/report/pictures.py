"""The images on which another suppression changes most, drawn under both, for the report.

An image's gain is that of its own AP times its objects: a crowd of ten that gains 20 points says more about
suppression than a single cat whose second box moved up. What changed is told by COCO's matching.
*Recovered*: an object that a detection matches at IoU 0.5 under the second setting and none under the first. *Lost*:
the other way round. *Tighter*: an object matched under both, up to a higher IoU threshold under the second setting
(a better box of it was kept); *looser*: up to a lower one. *Added false positive*: any other detection of at least
``PICTURE_SCORE_THR`` that matches no object at IoU 0.5 and is not among those of the first setting.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mmcv
import numpy as np
from mmengine.structures import InstanceData
from mmengine.visualization import Visualizer
from PIL import Image

from mmdet_softnms.reevaluation.choice.resampling import image_ap
from mmdet_softnms.reevaluation.report.figures import plain
from mmdet_softnms.reevaluation.result import Session
from mmdet_softnms.reevaluation.scoring.matching import Objects, match, match_image
from mmdet_softnms.reevaluation.scoring.metrics import IOU_THRS
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import detections

#: Detections below it are drawn only where they recover or lose an object.
PICTURE_SCORE_THR = 0.3
_WIDTH = 640  # pixels
#: By kind, the last on top: what is drawn later lies over the others.
COLOURS = dict(
    false=(150, 150, 150), found=(46, 160, 67), added=(220, 40, 40), tighter=(64, 140, 255), only=(255, 200, 0)
)


@dataclass
class Picture:
    """One image under two settings."""

    img_id: str
    objects: int
    ap: tuple[float, float]  # of this image alone, in [0, 1]
    recovered: int
    lost: int
    tighter: int
    looser: int
    added: int
    before: str  # data URL of a JPEG
    after: str

    @property
    def gain(self) -> float:
        """AP after minus before."""
        return self.ap[1] - self.ap[0]


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
    annotations = session.truth.coco['annotations']
    matched = [match_image(result, image, objects) for result in results]  # (M, T) each
    best = [_best_boxes(one, annotations) for one in matched]
    num_better = [{'only': 0, 'tighter': 0} for _ in results]
    known = {_key(results[0], row) for row in range(len(results[0])) if results[0].scores[row] >= PICTURE_SCORE_THR}
    added = 0
    drawn = []
    for side, result in enumerate(results):
        # The detections that make this side the better one for an object.
        special: dict[int, tuple[str, str]] = {}
        for number, (threshold, row) in best[side].items():
            other = best[1 - side].get(number)
            if other is None or threshold > other[0]:
                kind = 'only' if other is None else 'tighter'
                num_better[side][kind] += 1
                special[row] = kind, f' IoU {IOU_THRS[threshold]:.2f}' if other is not None else ''
        kinds = []
        for row in range(len(result)):
            if row in special:
                kinds.append((row, *special[row]))
            elif result.scores[row] < PICTURE_SCORE_THR:
                continue
            elif matched[side][row, 0] >= 0:
                kinds.append((row, 'found', ''))
            elif side == 1 and _key(result, row) not in known:
                kinds.append((row, 'added', ''))
                added += 1
            else:
                kinds.append((row, 'false', ''))
        drawn.append(_draw(picture, result, kinds, session.truth.classes))
    lost, recovered = (one['only'] for one in num_better)
    looser, tighter = (one['tighter'] for one in num_better)
    num_objects = int(objects.counts[image].sum())
    name = str(session.candidates.img_ids[image])
    return Picture(name, num_objects, ap, recovered, lost, tighter, looser, added, drawn[0], drawn[1])


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


def _draw(picture: np.ndarray, result: InstanceData, kinds: list[tuple[int, str, str]], classes: Sequence[str]) -> str:
    """A JPEG as a data URL; ``kinds``: row, what it is, and what to write behind its score."""
    scale = _WIDTH / picture.shape[1]
    resized = mmcv.imresize(picture, (_WIDTH, max(1, round(picture.shape[0] * scale))))
    height = resized.shape[0]
    visualizer = Visualizer()
    visualizer.set_image(resized)
    order = list(COLOURS)
    for row, kind, remark in sorted(kinds, key=lambda one: order.index(one[1])):
        box = result.bboxes[row] * scale
        box[0::2] = box[0::2].clamp(1, _WIDTH - 2)
        box[1::2] = box[1::2].clamp(1, height - 2)
        colour, width = COLOURS[kind], 1 if kind == 'false' else 3
        visualizer.draw_bboxes(box[None], edge_colors=[colour], line_widths=width, alpha=1.0)
        if kind != 'false':
            name = plain(classes[int(result.labels[row])])
            visualizer.draw_texts(
                f'{name} {float(result.scores[row]):.2f}{remark}',
                box[:2] + 2,
                font_sizes=13,
                colors=[colour],
                vertical_alignments='top',
                bboxes=[dict(facecolor='black', alpha=0.6, pad=0.7, edgecolor='none')],
            )
    content = io.BytesIO()
    Image.fromarray(visualizer.get_image()).save(content, 'JPEG', quality=80)
    return 'data:image/jpeg;base64,' + base64.b64encode(content.getvalue()).decode()
