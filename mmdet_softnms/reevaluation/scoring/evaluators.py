"""The evaluators that a config names, built by mmengine: what they read, and their numbers where they differ from ours.

The table shows COCO's metrics for boxes, and VOC's, unrounded. Where the config's evaluator computes something else
(LVIS's federated AP, CrowdHuman's miss rate, several sets apart, a user's metric), a note says so, and its numbers are
extra columns: the evaluator gets every image's detections in the form in which mmengine's test loop passes them on.
"""

import contextlib
import copy
import io
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from mmdet.structures.bbox import convert_box_type
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ConcatDataset
from mmengine.evaluator import BaseMetric, DumpResults
from mmengine.evaluator import Evaluator as MMEngineEvaluator
from mmengine.logging import MMLogger
from mmengine.registry import METRICS
from mmengine.structures import InstanceData

from mmdet_softnms.files import ReevaluationError

#: The ten IoU thresholds of COCO's AP.
IOU_THRS = np.linspace(0.5, 0.95, 10)
#: Detections of an image and class that COCO's AP looks at.
MAX_DETS = 100
#: Image evaluations up to which a sweep fills in the extra columns too: they take seconds then, not hours.
_CHEAP_SWEEP = 20_000
#: Columns that a note names.
_NAMED = 6
_one_by_one = threading.RLock()  # two threads would take each other's replacement for the original


@dataclass
class Other:
    """An evaluator whose numbers differ from those in our columns."""

    name: str  # 'LVISMetric', with the arguments that make the difference
    evaluator: MMEngineEvaluator | None  # None: there is nothing to compute
    why_not: str = ''  # why its numbers are missing, if they are
    columns: list[str] = field(default_factory=list)


@dataclass
class Evaluators:
    """What mmengine makes of ``test_evaluator``.

    Attributes:
        metrics: every metric that could be built.
        wrapper: mmengine's ``Evaluator`` around them, or a subclass.
        unbuilt: name of every metric that could not be built, and why.
    """

    metrics: list[BaseMetric]
    wrapper: MMEngineEvaluator
    unbuilt: dict[str, str]

    @property
    def one_by_one(self) -> bool:
        """Whether the wrapper gives every metric all images, as mmengine's own does."""
        kind = type(self.wrapper)
        return kind.process is MMEngineEvaluator.process and kind.evaluate is MMEngineEvaluator.evaluate

    @property
    def has_voc(self) -> bool:
        """Whether a metric is VOC's."""
        from mmdet.evaluation import VOCMetric

        return any(isinstance(metric, VOCMetric) for metric in self.metrics)

    @property
    def annotated(self) -> list[tuple[BaseMetric, Any]]:
        """Metrics that read a COCO json, each with the API that holds it; those that score boxes first."""
        from mmdet.evaluation import CocoMetric

        found = [
            (metric, api)
            for metric in self.metrics
            if isinstance(metric, CocoMetric)
            and (api := getattr(metric, '_coco_api', None) or getattr(metric, '_lvis_api', None)) is not None
        ]
        return sorted(found, key=lambda one: 'bbox' not in getattr(one[0], 'metrics', ()))


def build_evaluators(cfg: Config, dataset: BaseDataset | ConcatDataset) -> Evaluators:
    """Build ``cfg.test_evaluator`` as mmengine's Runner does, metric by metric.

    Raises:
        ReevaluationError: a type that no registry has; a COCO metric whose annotation file cannot be read.
    """
    from mmengine.runner import Runner  # slow to import, and workers do without it

    configured = copy.deepcopy(cfg.get('test_evaluator') or [])
    around: dict[str, Any] = {}
    if isinstance(configured, dict) and 'metrics' in configured:
        around = configured
        configured = around['metrics']
    unbuilt: dict[str, str] = {}
    metrics = []
    with quiet():
        for one in configured if isinstance(configured, (list, tuple)) else [configured]:
            if (metric := _build(one, unbuilt)) is not None:
                metrics.append(metric)
        try:
            # A static method in all but name.
            built: Any = dict(around, metrics=metrics) if around and not unbuilt else metrics
            wrapper = Runner.build_evaluator(cast(Runner, None), built)
            wrapper.dataset_meta = _dataset_meta(dataset, wrapper)
        except Exception as error:  # whatever an evaluator raises is about the config
            raise ReevaluationError(
                f'test_evaluator cannot be built: {type(error).__name__}: {error}; correct it (--cfg-options)'
            ) from error
    return Evaluators(metrics, wrapper, unbuilt)


def _build(configured: Any, unbuilt: dict[str, str]) -> BaseMetric | None:
    from mmdet.evaluation import CocoMetric

    if isinstance(configured, BaseMetric):
        return configured
    kind = configured.get('type') if isinstance(configured, dict) else None
    if isinstance(kind, str):
        with METRICS.switch_scope_and_registry(configured.get('_scope_')) as registry:
            kind = registry.get(kind)
    if kind is None:
        what = configured.get('type') if isinstance(configured, dict) else configured
        raise ReevaluationError(f'test_evaluator {what!r} is in no registry of metrics; correct its type, or import it')
    try:
        return METRICS.build(configured)
    except Exception as error:  # a file, a package or an argument
        reason = f'{type(error).__name__}: {error}'
        path = configured.get('ann_file')
        if path is None or not (isinstance(kind, type) and issubclass(kind, CocoMetric)):
            unbuilt[kind.__name__] = reason
            return None
        if isinstance(error, FileNotFoundError):
            raise ReevaluationError(
                f'annotation file {path} of test_evaluator does not exist; correct its ann_file'
            ) from None
        if not isinstance(error, (ImportError, RuntimeError)):  # which are about a package
            raise ReevaluationError(f'annotation file {path} of test_evaluator is not a COCO json: {reason}') from error
        unbuilt[kind.__name__] = reason
        return None


def class_names(dataset: BaseDataset | ConcatDataset) -> tuple[str, ...]:
    """Names by label.

    Raises:
        ReevaluationError: the parts of a data set have different ones.
    """
    infos = dataset.metainfo
    infos = infos if isinstance(infos, (list, tuple)) else [infos]
    classes = [tuple(info.get('classes') or ()) for info in infos]
    for number, names in enumerate(classes[1:], 2):
        if names != classes[0]:
            first, other = next(
                (pair for pair in zip(classes[0], names, strict=False) if pair[0] != pair[1]),
                (f'{len(classes[0])} classes', f'{len(names)}'),
            )
            raise ReevaluationError(
                f'the parts of the test set have different classes ({first} in part 1, {other} in part {number}), so a '
                'label means different things in them; give all parts the same metainfo, or evaluate them one by one'
            )
    return classes[0]


def _dataset_meta(dataset: BaseDataset | ConcatDataset, wrapper: MMEngineEvaluator) -> Any:
    info = dataset.metainfo
    if isinstance(info, (list, tuple)) and type(wrapper).evaluate is MMEngineEvaluator.evaluate:
        return info[0]  # the parts differ in something, as VOC2007 and VOC2012 do, and a metric takes one
    return info


def leaves_of(dataset: Any) -> list[Any]:
    """The innermost data sets, which hold the annotations, inside any number of wrappers."""
    inner = getattr(dataset, 'datasets', None) or ([dataset.dataset] if hasattr(dataset, 'dataset') else [])
    return [part for one in inner for part in leaves_of(one)] if inner else [dataset]


def others(
    evaluators: Evaluators, source: Sequence[BaseMetric], ignored: tuple[int, int], max_per_img: int
) -> list[Other]:
    """The configured evaluators whose numbers differ from those in our columns.

    Args:
        evaluators: all of them.
        source: the metrics whose annotations are our ground truth; none where it is the data set's.
        ignored: how many ignored objects there are, and how many of these are of no class.
        max_per_img: the most detections an image that a setting keeps; below 0: no limit.
    """
    found = [Other(name, None, reason) for name, reason in evaluators.unbuilt.items()]
    if not evaluators.one_by_one:
        name = f'{type(evaluators.wrapper).__name__}, which scores several data sets one by one'
        if not _several(evaluators.wrapper):
            name = type(evaluators.wrapper).__name__
        if any('segm' in getattr(metric, 'metrics', ()) for metric in evaluators.metrics):
            name += ' (masks are left out)'
        for metric in evaluators.metrics:
            _prepare(metric)
        return [*found, Other(name, evaluators.wrapper)]
    for metric in evaluators.metrics:
        if _dumps(metric):
            continue
        reasons, computable = _differences(metric, source, ignored, max_per_img)
        if reasons is not None:
            name = type(metric).__name__ + (f' ({", ".join(reasons)})' if reasons else '')
            _prepare(metric)
            evaluator = MMEngineEvaluator([metric])
            evaluator.dataset_meta = evaluators.wrapper.dataset_meta
            found.append(Other(name, evaluator if computable else None))
    return found


def _several(wrapper: MMEngineEvaluator) -> bool:
    return hasattr(wrapper, 'dataset_prefixes')


def _dumps(metric: BaseMetric) -> bool:
    """Whether it writes files and gives no number: not to be called for every row."""
    import mmdet.evaluation.metrics as known

    names = ('DumpProposals', 'DumpODVGResults')
    return isinstance(metric, (DumpResults, *(getattr(known, name) for name in names if hasattr(known, name))))


def _prepare(metric: Any) -> None:
    """There are no masks to score, and no row may overwrite the user's files."""
    if isinstance(getattr(metric, 'metrics', None), list):
        metric.metrics = [one for one in metric.metrics if one != 'segm']
    for name in ('outfile_prefix', 'out_file_path'):
        if getattr(metric, name, None):
            setattr(metric, name, None)


def _differences(
    metric: Any, source: Sequence[BaseMetric], ignored: tuple[int, int], max_per_img: int
) -> tuple[list[str] | None, bool]:
    """The arguments by which a metric differs from our columns (None: it does not), and whether it gives numbers."""
    from mmdet.evaluation import VOCMetric
    from mmdet.evaluation import metrics as known

    coco = [getattr(known, name) for name in ('CocoMetric', 'FasterCocoMetric') if hasattr(known, name)]
    reasons = []
    if _works_as(metric, coco):
        if metric.format_only:
            return ['format_only=True: it computes nothing'], False
        if list(metric.metrics) != ['bbox']:
            reasons.append(f'metric={metric.metrics}; masks are left out' if 'segm' in metric.metrics else
                           f'metric={metric.metrics}')  # fmt: skip
        if not _same(metric.iou_thrs, IOU_THRS):
            reasons.append(f'iou_thrs={np.atleast_1d(metric.iou_thrs).tolist()}')
        if metric.classwise:
            reasons.append('classwise=True: AP of every class is per_class in reevaluation.json, too')
        counted = max(metric.proposal_nums)
        if MAX_DETS not in metric.proposal_nums or (counted != MAX_DETS and not 0 <= max_per_img <= MAX_DETS):
            reasons.append(
                f'proposal_nums={tuple(metric.proposal_nums)}: all but its mAP look at {counted} detections an image, '
                f'ours at {MAX_DETS}'
            )
        if source and metric not in source and metric._coco_api is not None:
            reasons.append('another annotation file than the one the columns are of')
        if source and metric not in source and metric._coco_api is None:
            reasons.append('annotations of the data set, the columns those of an annotation file')
        if metric._coco_api is None and ignored[1]:
            reasons.append(f'it drops the {ignored[1]} ignored objects of no class; here they are of every class')
        elif metric._coco_api is None and ignored[0] and not _works_as(metric, coco[:1]):
            reasons.append(f'it drops the {ignored[0]} ignored objects of the data set')
        return reasons or None, any(one != 'segm' for one in metric.metrics)
    if _works_as(metric, [VOCMetric]):
        if metric.metric != 'mAP':
            reasons.append(f'metric={metric.metric!r}')
        if not _same(metric.iou_thrs, [0.5]):
            reasons.append(f'iou_thrs={metric.iou_thrs}')
        if metric.scale_ranges is not None:
            reasons.append(f'scale_ranges={metric.scale_ranges}')
        return reasons or None, True
    computable = not getattr(metric, 'format_only', False) and getattr(metric, 'metrics', None) != ['segm']
    return [], computable


def _works_as(metric: BaseMetric, kinds: Sequence[type]) -> bool:
    """Whether a metric is of one of these classes, or of a subclass that computes the same."""
    names = ('process', 'compute_metrics', 'evaluate', 'results2json', 'gt_to_coco_json', 'xyxy2xywh')
    return any(
        isinstance(metric, kind)
        and all(getattr(type(metric), name, None) is getattr(kind, name, None) for name in names)
        for kind in kinds
    )


def _same(given: Any, wanted: Any) -> bool:
    values = np.atleast_1d(np.asarray(given, float))
    return len(values) == len(wanted) and bool(np.allclose(values, wanted))


def add_columns(
    found: Sequence[Other],
    rows: Sequence[Any],
    results_of: Callable[[int], Sequence[InstanceData]],
    samples: Sequence[dict[str, Any]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Put the numbers of other evaluators into ``row.metrics`` of all rows, under the names that they give them.

    An evaluator that cannot compute them says why in its ``why_not``. A value that a row lacks is -1.

    Args:
        found: of :func:`others`.
        rows: to fill in.
        results_of: detections of every image under the setting of row ``n``.
        samples: of :func:`data_samples`.
        progress: called with (evaluations done, in all).
    """
    asked = [other for other in found if other.evaluator is not None and not other.why_not]
    for number, row in enumerate(rows if asked else ()):
        results = results_of(number)
        for other in asked:
            if other.why_not:
                continue
            try:
                values = _evaluate(other.evaluator, results, samples)
            except Exception as error:  # an evaluator is a program: whatever it raises is about it
                other.why_not = f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ""}'
                for name in other.columns:
                    for filled in rows:
                        filled.metrics.pop(name, None)
                continue
            for name, value in values.items():
                column = name
                if name not in other.columns:
                    if name in row.metrics:  # of ours, or of another evaluator
                        column = f'{other.name.split(" ")[0].rstrip(",")}/{name}'
                    if column not in other.columns:
                        other.columns.append(column)
                row.metrics[column] = value
        progress(number + 1, len(rows))
    for other in asked:
        if other.why_not:
            other.columns = []
        elif not other.columns:
            other.why_not = 'it gave no number'
    for row in rows:
        for other in asked:
            for column in other.columns:
                row.metrics.setdefault(column, -1.0)


def _evaluate(evaluator: Any, results: Sequence[InstanceData], samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    with quiet(), without_processes():
        for sample, result in zip(samples, results, strict=True):
            one = copy.deepcopy(sample)
            one['pred_instances'] = {key: result[key].clone() for key in ('bboxes', 'scores', 'labels')}
            evaluator.process([one])
        values = evaluator.evaluate(len(samples))
    numbers = {}
    for name, value in values.items():
        if isinstance(value, (torch.Tensor, np.ndarray)) and len(value.reshape(-1)) == 1:
            value = value.item()
        if isinstance(value, (int, float, np.number)):
            numbers[str(name)] = float(value) if math.isfinite(value) else -1.0
    return numbers


def annotated(info: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a data info; mmrotate's data sets without annotations have one without a box."""
    return [one for one in info.get('instances', []) if len(one.get('bbox', ' '))]


def annotated_boxes(instances: Sequence[dict[str, Any]], box_dim: int) -> np.ndarray:
    """(N, 4) ``xyxy`` boxes as they are annotated, float64; or (N, 5) rotated ones as mmrotate's pipelines make them.

    Raises:
        ReevaluationError: they are of another kind.
    """
    boxes = [one['bbox'] for one in instances]
    dims = {len(box) for box in boxes} or {box_dim}
    if box_dim == 4 and dims == {4}:
        return np.array(boxes, np.float64).reshape(-1, 4)
    if box_dim == 5 and dims <= {5, 8}:
        rows = [torch.tensor([box], dtype=torch.float32) for box in boxes]
        rows = [convert_box_type(row, src_type='qbox', dst_type='rbox') if row.shape[1] == 8 else row for row in rows]
        return torch.cat([torch.zeros(0, 5), *rows]).double().numpy()
    kinds = '(x1, y1, x2, y2)' if box_dim == 4 else '(x, y, w, h, angle), or eight for four corners'
    raise ReevaluationError(
        f'boxes of the test set are annotated with {max(dims)} values, and the detector predicts {kinds}: give a data '
        'set with boxes of its kind'
    )


def data_samples(infos: Sequence[dict[str, Any]], shapes: np.ndarray, box_dim: int = 4) -> list[dict[str, Any]]:
    """What mmdet's pipelines and data samples hold of every image, less its detections, in original image scale."""
    samples = []
    for info, (height, width) in zip(infos, shapes.tolist(), strict=True):
        instances = annotated(info)
        kinds = []
        for ignored in (False, True):
            chosen = [one for one in instances if bool(one.get('ignore_flag', 0)) == ignored]
            kinds.append(
                dict(
                    bboxes=torch.tensor(annotated_boxes(chosen, box_dim), dtype=torch.float32),
                    labels=torch.tensor([int(one['bbox_label']) for one in chosen], dtype=torch.int64),
                )
            )
        shape = height, width
        samples.append(
            dict(
                info,
                instances=instances,
                ori_shape=shape,
                img_shape=shape,
                scale_factor=(1.0, 1.0),
                gt_instances=kinds[0],
                ignored_instances=kinds[1],
            )
        )
    return samples


def too_many(num_settings: int, num_images: int, swept: bool) -> str:
    """Why extra columns are left out, if they are."""
    if not swept or num_settings * num_images <= _CHEAP_SWEEP:
        return ''
    return f'left out of a sweep of {num_settings} settings over {num_images} images; run without --sweep for them'


def notes(found: Sequence[Other], voc: bool, box_dim: int = 4) -> list[str]:
    """One line about every configured evaluator whose numbers differ from those in our columns."""
    shown = f"AP, AP50 ... AR100 are COCO's for {'rotated ' if box_dim == 5 else ''}boxes"
    if voc:
        shown += ", VOC07_AP50, VOC07_AP70 and VOC12_AP50 are VOC's"
    lines = []
    for other in found:
        if other.columns:
            more = f' and {len(other.columns) - _NAMED} more' if len(other.columns) > _NAMED else ''
            where = (
                f'its numbers, as it gives them and not in %, are the columns {", ".join(other.columns[:_NAMED])}{more}'
            )
        elif other.why_not:
            where = f'its numbers are missing: {other.why_not.rstrip(".")}'
        else:
            where = 'it has none for boxes alone'
        lines.append(f'{shown}, not the numbers of the configured {other.name}; {where}.')
    return lines


@contextlib.contextmanager
def without_processes() -> Iterator[None]:
    """Threads in the place of the processes that mmdet and mmrotate start for every VOC AP.

    To each of them everything is copied, which costs more than it saves; mmrotate's import torch anew.
    """
    replaced = {
        ('mmdet.evaluation.functional.mean_ap', 'Pool'): ThreadPool,
        ('mmrotate.evaluation.functional.mean_ap', 'get_context'): lambda method: SimpleNamespace(Pool=ThreadPool),
    }
    with _one_by_one:
        known = {place: vars(sys.modules[place[0]])[place[1]] for place in replaced if place[0] in sys.modules}
        try:
            for module, name in known:
                setattr(sys.modules[module], name, replaced[module, name])
            yield
        finally:
            for (module, name), original in known.items():
                setattr(sys.modules[module], name, original)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what pycocotools and evaluators print, and tables that they log, off the screen."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
