"""Stored candidates to a table: which settings are compared, and what each of them scores.

A fair table (DESIGN: all rows share candidates, ``score_thr`` and ``max_per_img``): the baseline is hard NMS at IoU 0.5
at the same low ``score_thr`` as the soft rules. The config's own setting is an extra row and never the reference;
against the stock ``score_thr`` of 0.05 the low-score tail would be credited to Soft-NMS.
"""

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.datasets import XMLDataset
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.structures import InstanceData

from mmdet_softnms.post_process import suppress
from mmdet_softnms.reevaluation.candidates import (
    ImageCandidates,
    ReevaluationError,
    build_test_set,
    collect,
    ground_truth,
    has_mask_head,
    plug,
)
from mmdet_softnms.reevaluation.metrics import UnroundedCocoMetric, UnroundedVOCMetric
from mmdet_softnms.rules import HardNMS, MmcvNMS, Rule, SoftNMS, build_rule

Progress = Callable[[str, int, int], None]  # (what is going on, done, total)


@dataclass(frozen=True)
class Setting:
    """One row to be: a rule with the thresholds around it."""

    rule: Rule
    score_thr: float
    max_per_img: int
    source: str = 'table'  # 'table' or 'config'

    @property
    def name(self) -> str:
        """The rule's name as a config would write it; stock ones by mmdet's own ``type``."""
        return self.rule.nms_type if isinstance(self.rule, MmcvNMS) else type(self.rule).__name__

    @property
    def params(self) -> dict[str, Any]:
        """Everything that distinguishes the row."""
        return {**self.rule.params, 'score_thr': self.score_thr, 'max_per_img': self.max_per_img}


@dataclass
class Row:
    """One row of a re-evaluation."""

    rule: str
    params: dict[str, Any]
    metrics: dict[str, float]  # in [0, 1], unrounded; -1 where undefined
    seconds: float  # spent on suppression, all images together
    source: str  # 'table' or 'config'


@dataclass
class Reevaluation:
    """The result of one forward pass under several settings."""

    dataset: str
    num_images: int
    num_candidates: int
    masks_left_out: bool
    forward_seconds: float
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """As ``reevaluation.json`` holds it."""
        return asdict(self)


def default_settings(cfg: Config, score_thr: float, max_per_img: int, min_score: float) -> list[Setting]:
    """Hard NMS (the baseline), linear and gaussian Soft-NMS with the paper's parameters, and the config's own setting.

    Raises:
        ReevaluationError: a threshold is out of range, or ``test_cfg.rcnn`` of the config is unusable.
    """
    if not 0 <= score_thr < 1:
        raise ReevaluationError(f'score_thr must be in [0, 1), got {score_thr}')
    if max_per_img < 1 and max_per_img != -1:
        raise ReevaluationError(f'max_per_img must be at least 1, or -1 for no limit, got {max_per_img}')
    try:
        rules: list[Rule] = [
            HardNMS(iou_threshold=0.5),
            SoftNMS('linear', iou_threshold=0.3, min_score=min_score),
            SoftNMS('gaussian', sigma=0.5, min_score=min_score),
        ]
        own = cfg.model.test_cfg.rcnn
        own_setting = Setting(build_rule(own.nms), own.score_thr, own.max_per_img, source='config')
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReevaluationError(f'the suppression settings cannot be used: {error}') from error
    return [*(Setting(rule, score_thr, max_per_img) for rule in rules), own_setting]


def detections(images: Iterable[ImageCandidates], setting: Setting) -> list[InstanceData]:
    """Detections of every image under a setting, by the same function a live model uses."""
    return [suppress(image.candidates, setting.rule, setting.score_thr, setting.max_per_img) for image in images]


def evaluate(
    images: list[ImageCandidates],
    setting: Setting,
    evaluators: list[BaseMetric],
    instances: dict[Any, list[dict[str, Any]]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Row:
    """Suppress the candidates of every image and score the detections.

    Args:
        images: the candidates; each image of the test set once.
        setting: what to apply.
        evaluators: see :func:`build_evaluators`; used up one after the other, and usable again afterwards.
        instances: ground truth by image id, see :func:`mmdet_softnms.reevaluation.candidates.ground_truth`.
        progress: called with (images done, images in all).
    """
    seconds = 0.0
    for done, image in enumerate(images, 1):
        start = time.perf_counter()
        (result,) = detections([image], setting)
        seconds += time.perf_counter() - start
        sample = _with_ground_truth(image, result, instances[image.img_id])
        for evaluator in evaluators:
            evaluator.process({}, [sample])
        progress(done, len(images))
    metrics: dict[str, float] = {}
    for evaluator in evaluators:
        # Not evaluator.evaluate(): under a launcher it would wait for processes that have nothing to do here.
        metrics.update(evaluator.compute_metrics(evaluator.results))
        evaluator.results.clear()
    return Row(setting.name, setting.params, metrics, seconds, setting.source)


def build_evaluators(cfg: Config, dataset: BaseDataset) -> list[BaseMetric]:
    """COCO metrics for every dataset, and both VOC metrics where the dataset or its evaluator is VOC's.

    Raises:
        ReevaluationError: the annotation file of the config's evaluator does not exist.
    """
    configured = cfg.get('test_evaluator') or []
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    by_type = {evaluator.get('type', '').split('.')[-1]: evaluator for evaluator in configured}
    ann_file = by_type.get('CocoMetric', {}).get('ann_file')
    if ann_file is not None and not Path(ann_file).is_file():
        raise ReevaluationError(f'annotation file {ann_file} of test_evaluator does not exist; correct its ann_file')
    evaluators: list[BaseMetric] = [UnroundedCocoMetric(ann_file)]
    if isinstance(dataset, XMLDataset) or 'VOCMetric' in by_type:
        evaluators.append(UnroundedVOCMetric())
    for evaluator in evaluators:
        evaluator.dataset_meta = dataset.metainfo
    return evaluators


def reevaluate(
    cfg: Config,
    checkpoint: str | Path,
    *,
    work_dir: str | Path | None = None,
    score_thr: float = 1e-3,
    max_per_img: int = 100,
    min_score: float = 1e-3,
    trust_checkpoint: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Reevaluation | None:
    """Run the network once over the config's test set and score hard, linear and gaussian suppression and its own.

    Args:
        cfg: any mmdet config of a supported two-stage detector; not changed.
        checkpoint: its weights.
        work_dir: where mmengine logs.
        score_thr, max_per_img: shared by the rows of the table; the config's own row keeps its own.
        min_score: of the soft rules.
        trust_checkpoint: see :func:`mmdet_softnms.checkpoint.load_checkpoint`.
        progress: called with a description, how much is done, and how much there is.

    Returns:
        The result, baseline first; None on every process but the main one.

    Raises:
        ReevaluationError, CheckpointError: the input cannot be used.
    """
    plug(cfg, 0.0)  # before anything slow: is it a detector that can be plugged?
    settings = default_settings(cfg, score_thr, max_per_img, min_score)
    dataset = build_test_set(cfg)
    instances = ground_truth(dataset)
    evaluators = build_evaluators(cfg, dataset)
    start = time.perf_counter()
    images = collect(
        cfg,
        checkpoint,
        min(setting.score_thr for setting in settings),
        work_dir=work_dir,
        trust_checkpoint=trust_checkpoint,
        progress=functools.partial(progress, 'forward pass'),
    )
    forward_seconds = time.perf_counter() - start
    if not images:
        return None
    rows = []
    for number, setting in enumerate(settings, 1):
        report = functools.partial(progress, f'evaluation {number}/{len(settings)}: {setting.name}')
        rows.append(evaluate(images, setting, evaluators, instances, report))
    return Reevaluation(
        dataset=f'{type(dataset).__name__} {getattr(dataset, "ann_file", "")}'.strip(),
        num_images=len(images),
        num_candidates=sum(len(image.candidates) for image in images),
        masks_left_out=has_mask_head(cfg),
        forward_seconds=forward_seconds,
        rows=rows,
    )


def _with_ground_truth(image: ImageCandidates, result: InstanceData, instances: list[dict[str, Any]]) -> dict[str, Any]:
    """What mmdet's evaluators read of a data sample."""

    def gather(ignored: bool) -> dict[str, torch.Tensor]:
        chosen = [instance for instance in instances if bool(instance.get('ignore_flag', 0)) == ignored]
        return dict(
            bboxes=torch.tensor([instance['bbox'] for instance in chosen], dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([instance['bbox_label'] for instance in chosen], dtype=torch.int64),
        )

    return dict(
        img_id=image.img_id,
        ori_shape=image.ori_shape,
        pred_instances=dict(bboxes=result.bboxes, scores=result.scores, labels=result.labels),
        gt_instances=gather(ignored=False),
        ignored_instances=gather(ignored=True),
        instances=instances,
    )
