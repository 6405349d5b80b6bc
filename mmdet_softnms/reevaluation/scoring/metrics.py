"""Detections of a whole test set to numbers: COCO's by faster-coco-eval, VOC's by mmdet, both unrounded.

mmdet's ``CocoMetric`` and ``VOCMetric`` round to three decimals and name values by position (with ``proposal_nums=(1,
10, 100)`` its ``AR@100`` is AR@1), and pycocotools takes half a minute where faster-coco-eval takes six seconds; a
test holds the two to 1e-9 of one another.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faster_coco_eval
import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ConcatDataset
from mmengine.structures import InstanceData

from mmdet_softnms.files import ReevaluationError

#: ``COCOeval.stats`` at ``maxDets=(1, 10, 100)``, by position.
COCO_STATS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl')
#: The ten IoU thresholds of COCO's AP; the metric at each is called AP50, AP55, ... AP95.
IOU_THRS = np.linspace(0.5, 0.95, 10)
AP_NAMES = tuple(f'AP{round(100 * threshold)}' for threshold in IOU_THRS)
#: Recall levels of the precision-recall curves.
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_DETS = 100


@dataclass
class GroundTruth:
    """Annotated objects of a test set as both evaluators want them; everything by position in the data set.

    Attributes:
        classes: names by label.
        coco: COCO's ``images``, ``annotations`` and ``categories``, without segmentations. Image ids are 1, 2, ... in
            the order of the data set's own ids, which is how COCO breaks ties between images.
        image_ids: id in ``coco`` of every image.
        category_ids: id in ``coco`` of every label.
        voc: per image ``bboxes``, ``labels``, ``bboxes_ignore``, ``labels_ignore``; None where the data set is not
            VOC's.
        notes: what a reader of the numbers has to know.
    """

    classes: tuple[str, ...]
    coco: dict[str, list[dict[str, Any]]]
    image_ids: list[int]
    category_ids: list[int]
    voc: list[dict[str, np.ndarray]] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Scores:
    """What one setting scores; everything in [0, 1], unrounded, -1 where undefined."""

    metrics: dict[str, float]  # COCO_STATS, AP_NAMES and, for VOC, VOC07_AP50 and VOC12_AP50
    per_class: dict[str, float]  # AP of every class with an object
    precision: dict[str, list[float]]  # per IoU threshold: mean precision over classes at each of RECALLS


def read_ground_truth(cfg: Config, dataset: BaseDataset | ConcatDataset) -> GroundTruth:
    """Annotated objects of the test set: of the COCO json its evaluator names, else as mmdet's data set parses them.

    Crowd, difficult and ignored objects are all COCO's ``iscrowd`` in the second case.

    Raises:
        ReevaluationError: not one object is annotated; the evaluator's annotation file does not exist, lacks an image,
            or names none of the model's classes.
    """
    configured = cfg.get('test_evaluator') or []
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    by_type = {evaluator.get('type', '').split('.')[-1]: evaluator for evaluator in configured}
    ann_file = by_type.get('CocoMetric', {}).get('ann_file')
    infos = [dataset.get_data_info(number) for number in range(len(dataset))]
    classes = tuple(dataset.metainfo.get('classes', ()))
    truth = _from_instances(classes, infos) if ann_file is None else _from_coco_json(classes, infos, Path(ann_file))
    if not truth.coco['annotations']:
        raise ReevaluationError('the test set has no annotated object, so nothing can be evaluated (a test-dev split?)')
    # By name, since mmdet's data sets are slow to import and workers do without them.
    kinds = {kind.__name__ for one in getattr(dataset, 'datasets', [dataset]) for kind in type(one).__mro__}
    if 'XMLDataset' in kinds or 'VOCMetric' in by_type:
        truth.voc = [_voc_annotation(info.get('instances', [])) for info in infos]
    return truth


def _image_ids(img_ids: list[Any]) -> list[int]:
    rank = {img_id: number for number, img_id in enumerate(sorted(img_ids), 1)}
    return [rank[img_id] for img_id in img_ids]


def _from_instances(classes: tuple[str, ...], infos: list[dict[str, Any]]) -> GroundTruth:
    image_ids = _image_ids([info['img_id'] for info in infos])
    annotations: list[dict[str, Any]] = []
    for image_id, info in zip(image_ids, infos, strict=True):
        for instance in info.get('instances', []):
            x1, y1, x2, y2 = map(float, instance['bbox'])
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=int(instance['bbox_label']) + 1,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1),
                    iscrowd=int(instance.get('ignore_flag', 0)),
                )
            )
    coco = dict(
        images=[dict(id=image_id) for image_id in image_ids],
        annotations=annotations,
        categories=[dict(id=number, name=name) for number, name in enumerate(classes, 1)],
    )
    return GroundTruth(classes, coco, image_ids, list(range(1, len(classes) + 1)))


def _from_coco_json(classes: tuple[str, ...], infos: list[dict[str, Any]], path: Path) -> GroundTruth:
    try:
        content = json.loads(path.read_text())
        categories, images = content['categories'], {image['id'] for image in content['images']}
        annotations = content.get('annotations', [])
    except FileNotFoundError:
        raise ReevaluationError(
            f'annotation file {path} of test_evaluator does not exist; correct its ann_file'
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReevaluationError(
            f'annotation file {path} of test_evaluator is not a COCO json: {type(error).__name__}: {error}'
        ) from error
    img_ids = [info['img_id'] for info in infos]
    if missing := [img_id for img_id in img_ids if img_id not in images]:
        raise ReevaluationError(
            f'annotation file {path} of test_evaluator lacks {len(missing)} of the {len(img_ids)} test images, first '
            f'id {missing[0]}; evaluator and data set have to name the same annotations'
        )
    # As mmdet's CocoDataset: labels follow the file's order of the categories that the model knows.
    known = [category for category in categories if category['name'] in classes]
    if not known:
        raise ReevaluationError(
            f"annotation file {path} names none of the model's classes ({', '.join(classes[:3])}, ...); correct "
            'test_dataloader.dataset.metainfo'
        )
    if len(known) != len(classes):
        # mmdet numbers the categories it finds, so each label after a missing one would mean another class.
        missing_names = sorted(set(classes) - {category['name'] for category in known})
        raise ReevaluationError(
            f"annotation file {path} has {len(known)} of the model's {len(classes)} classes (not "
            f'{", ".join(missing_names[:3])}); add the others to its categories, with or without objects'
        )
    image_ids = _image_ids(img_ids)
    number_of = dict(zip(img_ids, image_ids, strict=True))
    known_ids = {category['id'] for category in known}
    kept: list[dict[str, Any]] = []
    unknown = 0
    for one in annotations:
        if one['image_id'] not in number_of:
            continue
        if one['category_id'] not in known_ids:
            unknown += 1
            continue
        if 'bbox' not in one:
            raise ReevaluationError(f'annotation {one.get("id")} of {path} has no bbox: boxes cannot be evaluated')
        area = one.get('area', one['bbox'][2] * one['bbox'][3])
        kept.append(
            dict(
                id=len(kept) + 1,
                image_id=number_of[one['image_id']],
                category_id=one['category_id'],
                bbox=[float(value) for value in one['bbox']],
                area=float(area),
                iscrowd=int(one.get('iscrowd', 0)),
            )
        )
    coco = dict(images=[dict(id=image_id) for image_id in image_ids], annotations=kept, categories=known)
    names = tuple(category['name'] for category in known)  # by label: the file's order, whatever the config's
    truth = GroundTruth(names, coco, image_ids, [category['id'] for category in known])
    if unknown:
        strangers = [category['name'] for category in categories if category['id'] not in known_ids]
        truth.notes.append(
            f'{unknown} annotated objects are of classes the model does not know ({", ".join(map(str, strangers[:5]))}'
            f'{", ..." if len(strangers) > 5 else ""}) and are left out, as mmdet does.'
        )
    return truth


def _voc_annotation(instances: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    def boxes(ignored: bool) -> tuple[np.ndarray, np.ndarray]:
        chosen = [instance for instance in instances if bool(instance.get('ignore_flag', 0)) == ignored]
        return (
            np.array([instance['bbox'] for instance in chosen], np.float32).reshape(-1, 4),
            np.array([instance['bbox_label'] for instance in chosen], np.int64),
        )

    (bboxes, labels), (bboxes_ignore, labels_ignore) = boxes(False), boxes(True)
    return dict(bboxes=bboxes, labels=labels, bboxes_ignore=bboxes_ignore, labels_ignore=labels_ignore)


class Evaluator:
    """Scores detections against one ground truth, any number of times.

    Args:
        truth: the ground truth.
    """

    def __init__(self, truth: GroundTruth) -> None:
        self.truth = truth
        self._coco = faster_coco_eval.COCO(truth.coco)

    def __call__(self, results: Sequence[InstanceData]) -> Scores:
        """Score the detections of every image: ``bboxes`` (M, 4) ``xyxy``, ``scores`` (M,), ``labels`` (M,)."""
        metrics, per_class, precision = self._coco_scores(results)
        if self.truth.voc is not None:
            metrics |= self._voc_scores(results)
        return Scores(metrics, per_class, precision)

    def _coco_scores(
        self, results: Sequence[InstanceData]
    ) -> tuple[dict[str, float], dict[str, float], dict[str, list[float]]]:
        truth = self.truth
        evaluation = faster_coco_eval.COCOeval_faster(
            self._coco, self._coco.loadRes(self._to_coco(results)), 'bbox', print_function=lambda *line: None
        )
        evaluation.params.catIds = truth.category_ids
        evaluation.params.imgIds = truth.image_ids
        evaluation.params.maxDets = [1, 10, MAX_DETS]
        evaluation.params.iouThrs = IOU_THRS
        evaluation.params.recThrs = RECALLS
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        metrics = dict(zip(COCO_STATS, map(float, evaluation.stats), strict=True))
        # (T, R, K) at all areas and 100 detections; classes in the order of sorted category ids.
        curves = evaluation.eval['precision'][:, :, :, 0, -1]
        exists = curves[0, 0] > -1
        for name, curve in zip(AP_NAMES, curves, strict=True):
            metrics[name] = float(curve[:, exists].mean()) if exists.any() else -1.0
        names = [truth.classes[truth.category_ids.index(category_id)] for category_id in sorted(truth.category_ids)]
        per_class = {name: float(curves[:, :, number].mean()) for number, name in enumerate(names) if exists[number]}
        precision = {
            name: curve[:, exists].mean(1).tolist()
            for name, curve in zip(AP_NAMES, curves, strict=True)
            if exists.any()
        }
        return metrics, per_class, precision

    def _to_coco(self, results: Sequence[InstanceData]) -> list[dict[str, Any]]:
        found = []
        for image_id, result in zip(self.truth.image_ids, results, strict=True):
            # Widths in float64, from the float32 corners, as mmdet's CocoMetric.
            for (x1, y1, x2, y2), score, label in zip(
                result.bboxes.tolist(), result.scores.tolist(), result.labels.tolist(), strict=True
            ):
                category_id = self.truth.category_ids[label]
                found.append(
                    dict(image_id=image_id, category_id=category_id, bbox=[x1, y1, x2 - x1, y2 - y1], score=score)
                )
        return found

    def _voc_scores(self, results: Sequence[InstanceData]) -> dict[str, float]:
        """PASCAL VOC AP at IoU 0.5 by both definitions, in VOC's pixel convention; difficult objects are left out.

        ``VOC07_AP50``: the 11-point metric of VOC2007 (the one the Soft-NMS authors report); ``VOC12_AP50``: the area
        under the precision-recall curve.
        """
        from mmdet.evaluation.functional import average_precision, eval_map

        num_classes = len(self.truth.classes)
        detections = []
        for result in results:
            rows = np.concatenate([result.bboxes.numpy(), result.scores.numpy()[:, None]], 1)
            labels = result.labels.numpy()
            detections.append([rows[labels == label] for label in range(num_classes)])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', RuntimeWarning)  # 0/0 for classes without any object
            _, curves = eval_map(
                detections,
                self.truth.voc,
                iou_thr=0.5,
                dataset=self.truth.classes,
                logger='silent',
                nproc=1,  # it copies everything to each of its processes; settings are what is spread over cores
                use_legacy_coordinate=True,
            )
        values = {}
        for name, mode in (('VOC07_AP50', '11points'), ('VOC12_AP50', 'area')):
            # One matching serves both definitions.
            aps = [average_precision(one['recall'], one['precision'], mode) for one in curves if one['num_gts'] > 0]
            values[name] = float(np.mean(aps)) if aps else 0.0
        return values
