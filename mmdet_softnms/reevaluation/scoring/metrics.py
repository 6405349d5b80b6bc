"""The metrics of a test set's detections: COCO's by faster-coco-eval, VOC's by mmdet, both unrounded.

mmdet's ``CocoMetric`` and ``VOCMetric`` round to three decimals and name values by position (with ``proposal_nums=(1,
10, 100)`` its ``AR@100`` is AR@1), and pycocotools takes half a minute where faster-coco-eval takes six seconds; a
test checks that the two agree to 1e-9.
"""

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import faster_coco_eval
import faster_coco_eval.core.mask as box_api
import numpy as np
import torch
from mmcv.ops import box_iou_rotated
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ConcatDataset
from mmengine.structures import InstanceData

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.candidates.plug import box_dim_of
from mmdet_softnms.reevaluation.scoring.evaluators import (
    IOU_THRS,
    MAX_DETS,
    Evaluators,
    annotated,
    annotated_boxes,
    build_evaluators,
    class_names,
    leaves_of,
    without_processes,
)

#: ``COCOeval.stats`` at ``maxDets=(1, 10, 100)``, by position.
COCO_STATS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl')
#: The metric at each of the ten IoU thresholds of COCO's AP.
AP_NAMES = tuple(f'AP{round(100 * threshold)}' for threshold in IOU_THRS)
#: VOC's metrics by IoU threshold: names, and mmdet's names of their definitions.
VOC_METRICS = {0.5: dict(VOC07_AP50='11points', VOC12_AP50='area'), 0.7: dict(VOC07_AP70='11points')}
VOC_NAMES = tuple(sorted(name for modes in VOC_METRICS.values() for name in modes))
#: An object is crowded if its IoU with another object of its class, an ignored one included, is at least this.
CROWDED_IOU = 0.3
#: The metrics that a setting can be chosen by, and the IoU thresholds (positions in IOU_THRS) that each averages over.
CRITERIA: dict[str, tuple[int, ...]] = dict(AP=tuple(range(10)), AP50=(0,), AP75=(5,))
#: Recall levels of the precision-recall curves.
RECALLS = np.linspace(0.0, 1.0, 101)
_ALL_AREAS = [0.0, 1e10]  # COCO's


@dataclass
class GroundTruth:
    """Annotated objects of a test set as both evaluators want them; everything by position in the data set.

    Attributes:
        classes: names by label.
        coco: COCO's ``images``, ``annotations`` and ``categories``, without segmentations. Image ids are 1, 2, ... in
            the order of the data set's own ids, which is how COCO breaks ties between images.
        image_ids: id in ``coco`` of every image of the data set, then those of images that only the evaluator knows.
        category_ids: id in ``coco`` of every label.
        voc: per image ``bboxes``, ``labels``, ``bboxes_ignore``, ``labels_ignore``; None where the data set is not
            VOC's.
        notes: what a reader of the numbers has to know.
        box_dim: how many values a ``bbox`` of ``coco`` has: 4 (x1, y1, width, height), or 5 where boxes are rotated.
        no_class_ignores: the number of ignored objects without a class, before each was counted for every class.
    """

    classes: tuple[str, ...]
    coco: dict[str, list[dict[str, Any]]]
    image_ids: list[int]
    category_ids: list[int]
    voc: list[dict[str, np.ndarray]] | None = None
    notes: list[str] = field(default_factory=list)
    no_class_ignores: int = 0
    box_dim: int = 4


@dataclass
class Scores:
    """What one setting scores; everything in [0, 1], unrounded, -1 where undefined."""

    metrics: dict[str, float]  # COCO_STATS, AP_NAMES, AP_crowded and, for VOC, those of VOC_METRICS
    per_class: dict[str, float]  # AP of every class with an object
    precision: dict[str, list[float]]  # per IoU threshold: mean precision over classes at each of RECALLS


def read_ground_truth(
    cfg: Config, dataset: BaseDataset | ConcatDataset, evaluators: Evaluators | None = None
) -> GroundTruth:
    """Annotated objects of the test set: those of the CocoMetric that mmdet builds, else those of the data set.

    Crowd, difficult and ignored objects are all COCO's ``iscrowd`` in the second case; an ignored object without a
    class counts for every class.

    Args:
        cfg: the user's config.
        dataset: its test set.
        evaluators: of the config, if they are built already.

    Raises:
        ReevaluationError: no object is annotated; the evaluator cannot be built; its annotation file lacks an
            image, or names none of the model's classes; the parts of the test set have different classes.
    """
    from mmdet.datasets import XMLDataset

    evaluators = evaluators or build_evaluators(cfg, dataset)
    box_dim = box_dim_of(cfg) if cfg.get('model') else 4  # a data set may be read by itself
    infos = [dataset.get_data_info(number) for number in range(len(dataset))]
    classes = class_names(dataset)
    source = annotated_by(evaluators, dataset)
    if source and box_dim != 4:
        raise ReevaluationError(
            f'the objects of {type(source[0].metric).__name__} are those of a COCO json, whose boxes are axis-aligned, '
            'and the detector predicts rotated ones: leave its ann_file out, and give a data set of rotated boxes '
            "(mmrotate's DOTADataset, say)"
        )
    truth = _from_apis(classes, infos, source) if source else _from_instances(classes, infos, box_dim)
    if not truth.coco['annotations']:
        raise ReevaluationError('the test set has no annotated object, so nothing can be evaluated (a test-dev split?)')
    if evaluators.has_voc or any(isinstance(part, XMLDataset) for part in leaves_of(dataset)):
        truth.voc = [_voc_annotation(info.get('instances', [])) for info in infos]
    return truth


def _image_ids(img_ids: list[Any]) -> list[int]:
    # Strings and numbers together, as in a ConcatDataset of VOC and COCO, have an order as strings.
    key = None if len({isinstance(img_id, str) for img_id in img_ids}) < 2 else str
    rank = {img_id: number for number, img_id in enumerate(sorted(img_ids, key=key), 1)}
    return [rank[img_id] for img_id in img_ids]


def _from_instances(classes: tuple[str, ...], infos: list[dict[str, Any]], box_dim: int = 4) -> GroundTruth:
    image_ids = _image_ids([info['img_id'] for info in infos])
    annotations: list[dict[str, Any]] = []
    unknown = no_class_ignores = 0
    for image_id, info in zip(image_ids, infos, strict=True):
        instances = annotated(info)
        for instance in instances:
            if 'bbox' not in instance or 'bbox_label' not in instance:
                raise ReevaluationError(
                    f'an object of image {info["img_id"]} has no bbox or no bbox_label: boxes cannot be evaluated'
                )
        for instance, box in zip(instances, annotated_boxes(instances, box_dim).tolist(), strict=True):
            if box_dim == 4:
                box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            label, ignored = int(instance['bbox_label']), int(instance.get('ignore_flag', 0))
            labels: Sequence[int] = [label]
            if not 0 <= label < len(classes):
                no_class_ignores += bool(ignored)
                unknown += not ignored
                labels = range(len(classes)) if ignored else []
            annotations += [
                dict(
                    id=len(annotations) + number,
                    image_id=image_id,
                    category_id=counted_as + 1,
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=int(bool(ignored)),
                )
                for number, counted_as in enumerate(labels, 1)
            ]
    coco = dict(
        images=[dict(id=image_id) for image_id in image_ids],
        annotations=annotations,
        categories=[dict(id=number, name=name) for number, name in enumerate(classes, 1)],
    )
    category_ids = list(range(1, len(classes) + 1))
    truth = GroundTruth(classes, coco, image_ids, category_ids, no_class_ignores=no_class_ignores, box_dim=box_dim)
    if unknown:
        truth.notes.append(f'{unknown} annotated objects have a label without a class and are left out, as in mmdet.')
    return truth


@dataclass
class Annotated:
    """A part of the test set, and the COCO metric that scores it."""

    metric: Any
    api: Any  # pycocotools' or LVIS', with the annotation file in it
    images: range  # of the data set


def annotated_by(evaluators: Evaluators, dataset: BaseDataset | ConcatDataset) -> list[Annotated]:
    """The metrics whose annotation files are the ground truth: one for all, or one for each of several data sets."""
    found = evaluators.annotated
    if not found:
        return []
    if not evaluators.one_by_one and len(evaluators.metrics) > 1:
        sizes = list(getattr(dataset, 'cumulative_sizes', []))
        if len(found) != len(evaluators.metrics) or len(sizes) != len(found):
            return []
        api_of = {id(metric): api for metric, api in found}
        return [
            Annotated(metric, api_of[id(metric)], range(start, end))
            for metric, start, end in zip(evaluators.metrics, [0, *sizes], sizes, strict=False)
        ]
    metric, api = found[0]
    return [Annotated(metric, api, range(len(dataset)))]


def _from_apis(classes: tuple[str, ...], infos: list[dict[str, Any]], source: list[Annotated]) -> GroundTruth:
    """The ground truth as the metrics' own ``compute_metrics`` takes it: labels are positions in ``cat_ids``."""
    tested = [info['img_id'] for info in infos]
    untested: list[Any] = []
    objects: list[tuple[Any, int, dict[str, Any]]] = []  # image id, label, annotation
    categories: list[dict[str, Any]] = []
    strangers: dict[Any, str] = {}
    unknown = 0
    for part in source:
        try:
            known, img_ids = _known(classes, part), part.api.get_img_ids()
        except (KeyError, TypeError, AttributeError) as error:
            raise ReevaluationError(
                f'the annotation file of test_evaluator is not a COCO json: {type(error).__name__}: {error}'
            ) from error
        names = [one['name'] for one in known]
        if categories and names != [one['name'] for one in categories]:
            raise ReevaluationError(
                'the annotation files of test_evaluator have their categories in different orders, so a label means '
                'different things in them; evaluate the parts of the test set one by one'
            )
        categories = categories or known
        wanted = tested[part.images.start : part.images.stop]
        present, here = set(img_ids), set(wanted)
        if missing := [img_id for img_id in wanted if img_id not in present]:
            raise ReevaluationError(
                f'the annotation file of test_evaluator lacks {len(missing)} of the {len(wanted)} test images, first '
                f'id {missing[0]}; evaluator and data set have to name the same annotations'
            )
        # Parts may share an annotation file: an image that another part tests, or has brought already, counts there.
        mine = here | (present - {*tested, *untested})
        untested += [img_id for img_id in img_ids if img_id in mine and img_id not in here]
        label_of = {one['id']: label for label, one in enumerate(known)}
        for one in part.api.dataset.get('annotations', []):
            if one['image_id'] not in mine:
                continue
            if one['category_id'] in label_of:
                objects.append((one['image_id'], label_of[one['category_id']], one))
            elif one['image_id'] in here:
                unknown += 1
        strangers |= {one['id']: one['name'] for one in part.api.dataset['categories'] if one['id'] not in label_of}
    image_ids = _image_ids([*tested, *untested])
    number_of = dict(zip([*tested, *untested], image_ids, strict=True))
    kept: list[dict[str, Any]] = []
    for img_id, label, one in objects:
        if 'bbox' not in one:
            raise ReevaluationError(
                f'annotation {one.get("id")} of test_evaluator has no bbox: boxes cannot be evaluated'
            )
        kept.append(
            dict(
                id=len(kept) + 1,
                image_id=number_of[img_id],
                category_id=categories[label]['id'],
                bbox=[float(value) for value in one['bbox']],
                area=float(one.get('area', one['bbox'][2] * one['bbox'][3])),
                iscrowd=int(one.get('iscrowd', 0)),
            )
        )
    coco = dict(
        images=[dict(id=image_id) for image_id in image_ids],
        annotations=kept,
        categories=[dict(id=one['id'], name=one['name']) for one in categories],
    )
    labels = tuple(one['name'] for one in categories)  # by label: the evaluator's order, whatever the config's
    truth = GroundTruth(labels, coco, image_ids, [one['id'] for one in categories])
    if unknown:
        some = list(strangers.values())
        truth.notes.append(
            f'{unknown} annotated objects are of classes the model does not know ({", ".join(map(str, some[:5]))}'
            f'{", ..." if len(some) > 5 else ""}) and are left out, as mmdet does.'
        )
    if untested:
        truth.notes.append(
            f'The annotation file of test_evaluator has {len(untested)} images that are not in the test set; their '
            'objects count as missed, as in mmdet.'
        )
    return truth


def _known(classes: tuple[str, ...], part: Annotated) -> list[dict[str, Any]]:
    """The categories that the model knows, by label: what the metric itself asks its API for."""
    asked = {} if hasattr(part.metric, '_lvis_api') else dict(cat_names=classes)
    cat_ids = part.api.get_cat_ids(**asked)
    by_id = {one['id']: one for one in part.api.dataset['categories']}
    known = [by_id[cat_id] for cat_id in cat_ids]
    if not known:
        raise ReevaluationError(
            f"the annotation file of test_evaluator names none of the model's classes ({', '.join(classes[:3])}, ...); "
            'correct test_dataloader.dataset.metainfo'
        )
    if len(known) < len(classes):
        # mmdet numbers the categories it finds, so each label after a missing one would mean another class.
        missing = sorted(set(classes) - {one['name'] for one in known})
        raise ReevaluationError(
            f"the annotation file of test_evaluator has {len(known)} of the model's {len(classes)} classes (not "
            f'{", ".join(missing[:3])}); add the others to its categories, with or without objects'
        )
    if len(known) > len(classes):
        raise ReevaluationError(
            f"the annotation file of test_evaluator has {len(known)} categories for the model's {len(classes)} "
            'classes, one name more than once; give every category a name of its own'
        )
    return known


def _voc_annotation(instances: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    def boxes(ignored: bool) -> tuple[np.ndarray, np.ndarray]:
        chosen = [instance for instance in instances if bool(instance.get('ignore_flag', 0)) == ignored]
        return (
            np.array([instance['bbox'] for instance in chosen], np.float32).reshape(-1, 4),
            np.array([instance['bbox_label'] for instance in chosen], np.int64),
        )

    (bboxes, labels), (bboxes_ignore, labels_ignore) = boxes(False), boxes(True)
    return dict(bboxes=bboxes, labels=labels, bboxes_ignore=bboxes_ignore, labels_ignore=labels_ignore)


def are_crowded(truth: GroundTruth) -> np.ndarray:
    """(A,) bool: which annotations of ``truth.coco`` are crowded (:data:`CROWDED_IOU`)."""
    cells: dict[tuple[int, int], list[int]] = {}
    for number, one in enumerate(truth.coco['annotations']):
        cells.setdefault((one['image_id'], one['category_id']), []).append(number)
    found = np.zeros(len(truth.coco['annotations']), bool)
    for numbers in cells.values():
        boxes = np.array([truth.coco['annotations'][number]['bbox'] for number in numbers], np.float64)
        overlaps = rotated_overlaps(boxes, boxes) if truth.box_dim == 5 else box_api.iou(boxes, boxes, [0] * len(boxes))
        np.fill_diagonal(overlaps, 0)
        found[numbers] = overlaps.max(1) >= CROWDED_IOU
    return found


def rotated_overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, M) float32 IoUs of (N, 5) with (M, 5) rotated boxes by mmcv, which mmrotate's metrics ask."""
    found: np.ndarray = box_iou_rotated(torch.tensor(boxes).float(), torch.tensor(others).float()).numpy()
    return found


class Evaluator:
    """Scores detections against one ground truth, any number of times.

    ``AP_crowded`` is COCO's AP where only crowded objects count (:func:`are_crowded`). The others are ignored as COCO
    ignores objects out of an area range: a detection that matches one is neither right nor wrong.

    Args:
        truth: the ground truth.
    """

    def __init__(self, truth: GroundTruth) -> None:
        self.truth = truth
        self._kind: Any = faster_coco_eval.COCOeval_faster
        if truth.box_dim == 5:  # a subclass that asks mmcv for rotated IoU
            module = importlib.import_module('mmrotate.evaluation.metrics.rotated_coco_metric')
            self._kind = module.RotatedCocoEval
        self._coco = faster_coco_eval.COCO(truth.coco)
        outside = 2 * _ALL_AREAS[1]
        annotations = [
            one if is_crowded else one | dict(area=outside)
            for one, is_crowded in zip(truth.coco['annotations'], are_crowded(truth), strict=True)
        ]
        self._crowded = faster_coco_eval.COCO(truth.coco | dict(annotations=annotations))

    def __call__(self, results: Sequence[InstanceData]) -> Scores:
        """Score the detections of every image: ``bboxes`` (M, 4) ``xyxy`` or (M, 5) rotated, ``scores``, ``labels``."""
        metrics, per_class, precision = self._coco_scores(results)
        if self.truth.voc is not None:
            metrics |= self._voc_scores(results)
        return Scores(metrics, per_class, precision)

    def _coco_scores(
        self, results: Sequence[InstanceData]
    ) -> tuple[dict[str, float], dict[str, float], dict[str, list[float]]]:
        truth = self.truth
        found = self._coco.loadRes(self._to_coco(results))
        evaluation = self._accumulated(self._coco, found, maxDets=[1, 10, MAX_DETS])
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
        limited = dict(maxDets=[MAX_DETS], areaRng=[_ALL_AREAS], areaRngLbl=['all'])
        crowded = self._accumulated(self._crowded, found, **limited).eval['precision']
        metrics['AP_crowded'] = float(crowded[crowded > -1].mean()) if (crowded > -1).any() else -1.0
        return metrics, per_class, precision

    def _accumulated(self, coco: Any, found: Any, **params: Any) -> Any:
        """COCO's evaluation of detections, up to its curves."""
        evaluation = self._kind(coco, found, 'bbox', print_function=lambda *line: None)
        vars(evaluation.params).update(
            params,
            catIds=self.truth.category_ids,
            imgIds=self.truth.image_ids,
            iouThrs=IOU_THRS,
            recThrs=RECALLS,
        )
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation

    def _to_coco(self, results: Sequence[InstanceData]) -> list[dict[str, Any]]:
        found = []
        if len(results) > len(self.truth.image_ids):
            raise ValueError(f'{len(results)} results for {len(self.truth.image_ids)} images')
        for image_id, result in zip(self.truth.image_ids, results, strict=False):  # behind them: images not tested
            # Widths in float64, from the float32 corners, as mmdet's CocoMetric.
            for box, score, label in zip(
                result.bboxes.tolist(), result.scores.tolist(), result.labels.tolist(), strict=True
            ):
                category_id = self.truth.category_ids[label]
                if len(box) == 4:
                    box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                found.append(dict(image_id=image_id, category_id=category_id, bbox=box, score=score))
        return found

    def _voc_scores(self, results: Sequence[InstanceData]) -> dict[str, float]:
        """PASCAL VOC AP by both definitions, in VOC's pixel convention; difficult objects are left out.

        ``VOC07_AP50``: the 11-point metric of VOC2007 at IoU 0.5 (the one the Soft-NMS authors report), and at 0.7
        (``VOC07_AP70``, Deformable-ConvNets' second column); ``VOC12_AP50``: the area under the precision-recall curve.
        """
        from mmdet.evaluation.functional import average_precision, eval_map

        num_classes = len(self.truth.classes)
        detections = []
        for result in results:
            rows = np.concatenate([result.bboxes.numpy(), result.scores.numpy()[:, None]], 1)
            labels = result.labels.numpy()
            detections.append([rows[labels == label] for label in range(num_classes)])
        values = {}
        for iou_thr, modes in VOC_METRICS.items():
            with warnings.catch_warnings(), without_processes():
                warnings.simplefilter('ignore', RuntimeWarning)  # 0/0 for classes without any object
                _, curves = eval_map(
                    detections,
                    self.truth.voc,
                    iou_thr=iou_thr,
                    dataset=self.truth.classes,
                    logger='silent',
                    nproc=1,  # settings are what is spread over cores
                    use_legacy_coordinate=True,
                    eval_mode='11points',
                )
            for name, mode in modes.items():
                aps = [
                    # One matching serves both definitions.
                    one['ap'] if mode == '11points' else average_precision(one['recall'], one['precision'], mode)
                    for one in curves
                    if one['num_gts'] > 0
                ]
                values[name] = float(np.mean(aps)) if aps else 0.0
        return values
