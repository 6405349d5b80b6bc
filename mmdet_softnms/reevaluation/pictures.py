"""The images on which another suppression changes most, drawn under both, for the report.

An image's gain is that of its own AP times its objects: a crowd of ten that gains 20 points says more about
suppression than a single cat whose second box moved up. What changed is told by COCO's matching at IoU 0.5.
*Recovered*: an object that a detection matches under the second setting and none under the first. *Lost*: the other
way round. *Added false positive*: a detection of at least ``PICTURE_SCORE_THR`` that matches no object and is not
among those of the first setting.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import mmcv
import numba
import numpy as np
from mmengine.structures import InstanceData
from mmengine.visualization import Visualizer
from PIL import Image

from mmdet_softnms.reevaluation.engine import Session
from mmdet_softnms.reevaluation.metrics import IOU_THRS, RECALLS
from mmdet_softnms.reevaluation.selection import Matches, Objects, _interpolated, match
from mmdet_softnms.reevaluation.settings import Setting
from mmdet_softnms.reevaluation.sweep import detections

#: Detections below it are drawn only where they recover or lose an object.
PICTURE_SCORE_THR = 0.3
_WIDTH = 640  # pixels
_COLOURS = dict(
    found=(46, 160, 67), recovered=(255, 200, 0), lost=(255, 200, 0), added=(220, 40, 40), false=(150, 150, 150)
)


@dataclass
class Picture:
    """One image under two settings."""

    img_id: str
    objects: int
    ap: tuple[float, float]  # of this image alone, in [0, 1]
    recovered: int
    lost: int
    added: int
    before: str  # data URL of a JPEG
    after: str

    @property
    def gain(self) -> float:
        """AP after minus before."""
        return self.ap[1] - self.ap[0]


def image_ap(matches: Matches, counts: np.ndarray) -> np.ndarray:
    """(I,) AP of every image alone, its classes weighted by their objects; -1 where it has no object."""
    label = np.repeat(np.arange(counts.shape[1]), np.diff(matches.starts))
    order = np.argsort(matches.image * counts.shape[1] + label, kind='stable')
    cells = (matches.image.astype(np.int64) * counts.shape[1] + label)[order]
    starts = np.searchsorted(cells, np.arange(counts.size + 1))
    return _image_ap(matches.true[order], matches.ignored[order], starts, counts, len(IOU_THRS), RECALLS)


@numba.njit(cache=True)
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
            picture = mmcv.imread(session.image_paths[image], channel_order='rgb')
        except OSError:
            picture = None
        if picture is None:  # gone since, or damaged
            missing += 1
            continue
        pictures.append(_picture(session, image, picture, [result[image] for result in results], matches, aps))
    if missing:
        return pictures, f'{missing} images could not be read.'
    return pictures, '' if chosen else 'No image gains or loses.'


def _picture(
    session: Session,
    image: int,
    picture: np.ndarray,
    results: Sequence[InstanceData],
    matches: Sequence[Matches],
    aps: Sequence[np.ndarray],
) -> Picture:
    hits = []  # per setting: object by detection, for those that match one
    for one in matches:
        of_image = np.flatnonzero(one.image == image)
        hits.append({int(one.row[d]): int(one.object50[d]) for d in of_image if one.object50[d] >= 0})
    annotations = session.truth.coco['annotations']

    def objects(side: int) -> set[int]:
        return {number for number in hits[side].values() if not annotations[number]['iscrowd']}

    recovered, lost = objects(1) - objects(0), objects(0) - objects(1)
    known = {_key(results[0], row) for row in range(len(results[0])) if results[0].scores[row] >= PICTURE_SCORE_THR}
    added = 0
    drawn = []
    for side, special in ((0, lost), (1, recovered)):
        kinds = []
        for row in range(len(results[side])):
            score = float(results[side].scores[row])
            if hits[side].get(row) in special and row in hits[side]:
                kinds.append((row, 'lost' if side == 0 else 'recovered'))
            elif score < PICTURE_SCORE_THR:
                continue
            elif row in hits[side]:
                kinds.append((row, 'found'))
            elif side == 1 and _key(results[1], row) not in known:
                kinds.append((row, 'added'))
                added += 1
            else:
                kinds.append((row, 'false'))
        drawn.append(_draw(picture, results[side], kinds, session.truth.classes))
    ap = float(aps[0][image]), float(aps[1][image])
    num_objects = sum(one['image_id'] == session.truth.image_ids[image] and not one['iscrowd'] for one in annotations)
    name = str(session.candidates.img_ids[image])
    return Picture(name, num_objects, ap, len(recovered), len(lost), added, drawn[0], drawn[1])


def _key(result: InstanceData, row: int) -> tuple[float, ...]:
    return (*result.bboxes[row].tolist(), float(result.labels[row]))


def _draw(picture: np.ndarray, result: InstanceData, kinds: list[tuple[int, str]], classes: Sequence[str]) -> str:
    scale = _WIDTH / picture.shape[1]
    resized = mmcv.imresize(picture, (_WIDTH, max(1, round(picture.shape[0] * scale))))
    height = resized.shape[0]
    visualizer = Visualizer()
    visualizer.set_image(resized)
    # What matters last, so that it lies on top.
    ranks = ['false', 'found', 'added', 'lost', 'recovered']
    for row, kind in sorted(kinds, key=lambda one: ranks.index(one[1])):
        box = result.bboxes[row] * scale
        box[0::2] = box[0::2].clamp(1, _WIDTH - 2)
        box[1::2] = box[1::2].clamp(1, height - 2)
        colour = _COLOURS[kind]
        visualizer.draw_bboxes(box[None], edge_colors=[colour], line_widths=1 if kind == 'false' else 3, alpha=1.0)
        if kind != 'false':
            visualizer.draw_texts(
                f'{classes[int(result.labels[row])]} {float(result.scores[row]):.2f}',
                box[:2] + 2,
                font_sizes=13,
                colors=[colour],
                vertical_alignments='top',
                bboxes=[dict(facecolor='black', alpha=0.6, pad=0.7, edgecolor='none')],
            )
    content = io.BytesIO()
    Image.fromarray(visualizer.get_image()).save(content, 'JPEG', quality=80)
    return 'data:image/jpeg;base64,' + base64.b64encode(content.getvalue()).decode()
