"""One forward pass over a test set that keeps what suppression starts from.

The detector is the user's own config with three changes (:func:`plug`): its RoI head becomes the sibling that takes
rules, its rule becomes :class:`mmdet_softnms.rules.NoSuppression`, its mask head is left out. mmengine's Runner does
the rest, so that every dataset, launcher and device mmdet supports is supported here.
"""

import copy
import itertools
import os.path as osp
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset, ConcatDataset
from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from mmdet_softnms.checkpoint import allow_unsafe_loading, check_weights
from mmdet_softnms.registry import METRICS

_PLUGGED_ROI_HEADS = {
    'StandardRoIHead': 'SoftNMSRoIHead',
    'CascadeRoIHead': 'SoftNMSCascadeRoIHead',
    'DoubleHeadRoIHead': 'SoftNMSDoubleHeadRoIHead',
}
_run_numbers = itertools.count()
_MASK_PREFIXES = ('roi_head.mask_head.', 'roi_head.mask_roi_extractor.')


class ReevaluationError(RuntimeError):
    """The input of a re-evaluation cannot be used; the message is one line with the remedy."""


@dataclass
class ImageCandidates:
    """Raw candidates of one test image, boxes in original image scale."""

    img_id: Any
    ori_shape: tuple[int, int]  # height, width in pixels
    candidates: InstanceData  # bboxes (N, 4) float32 xyxy, scores (N,) float32, labels (N,) int64; on the CPU


@METRICS.register_module()
class CandidateCollector(BaseMetric):
    """Evaluator that keeps the predictions of a forward pass; ``images`` holds them on the main process afterwards."""

    default_prefix = 'candidates'

    def __init__(self) -> None:
        super().__init__(collect_device='cpu')
        self.images: list[ImageCandidates] = []

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep one batch of predictions (mmengine's evaluator interface)."""
        for sample in data_samples:
            if 'img_id' not in sample:
                raise ReevaluationError(
                    "the test pipeline drops img_id; add it to PackDetInputs' meta_keys so that predictions find "
                    'their ground truth'
                )
            instances = sample['pred_instances']
            # Scores of a half-precision model stay exact in float32.
            candidates = InstanceData(
                bboxes=instances['bboxes'].detach().cpu().float(),
                scores=instances['scores'].detach().cpu().float(),
                labels=instances['labels'].detach().cpu(),
            )
            height, width = sample['ori_shape'][:2]
            self.results.append(ImageCandidates(sample['img_id'], (int(height), int(width)), candidates))

    def compute_metrics(self, results: list[ImageCandidates]) -> dict[str, float]:
        """Keep what all processes collected, in dataset order (mmengine's evaluator interface)."""
        self.images = results
        return {'images': len(results), 'boxes': sum(len(image.candidates) for image in results)}


class _ProgressHook(Hook):
    """Tells a callback (done, total) after every batch of the test loop."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self._progress = progress

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._progress(batch_idx + 1, len(runner.test_dataloader))


def plug(cfg: Config, score_floor: float) -> Config:
    """A copy of a config whose model returns every candidate with ``score > score_floor`` and suppresses nothing.

    Args:
        cfg: any mmdet config with a supported RoI head; not changed.
        score_floor: smallest ``score_thr`` that will be applied to the candidates.

    Raises:
        ReevaluationError: the model has no RoI head that can be plugged.
    """
    cfg = copy.deepcopy(cfg)
    roi_head = cfg.get('model', {}).get('roi_head')
    if roi_head is None:
        raise ReevaluationError(
            f'the model {cfg.get("model", {}).get("type")} has no roi_head, and raw candidates are taken from RoI '
            'heads only: use a two-stage detector'
        )
    scope, _, name = roi_head.type.rpartition('.')
    if scope in ('', 'mmdet') and name in _PLUGGED_ROI_HEADS:
        roi_head.type = f'mmdet_softnms.{_PLUGGED_ROI_HEADS[name]}'
    elif scope != 'mmdet_softnms':
        raise ReevaluationError(
            f'{roi_head.type} cannot be plugged: it suppresses in its own way. Supported RoI heads: '
            f'{", ".join(_PLUGGED_ROI_HEADS)} and those of mmdet_softnms'
        )
    # A config dumped after its model was built repeats test_cfg in the head, and mmdet would merge the two.
    for part in ('mask_head', 'mask_roi_extractor', 'test_cfg'):
        roi_head.pop(part, None)
    rcnn = cfg.model.test_cfg.rcnn
    rcnn.score_thr, rcnn.max_per_img = score_floor, -1
    rcnn.nms = ConfigDict(type='mmdet_softnms.NoSuppression')  # assigned, since ConfigDict.update merges
    return cfg


def has_mask_head(cfg: Config) -> bool:
    """Whether the config's RoI head predicts masks, which re-evaluation leaves out."""
    return cfg.model.roi_head.get('mask_head') is not None


def build_test_set(cfg: Config) -> BaseDataset:
    """Build the dataset of ``cfg.test_dataloader`` and check that its files are there.

    Raises:
        ReevaluationError: no test set in the config; the annotation file or an image is missing; no image; image ids
            that are not unique.
    """
    if cfg.get('test_dataloader') is None:
        raise ReevaluationError('the config has no test_dataloader, so there is nothing to evaluate on')
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    dataset_cfg = cfg.test_dataloader.dataset
    try:
        dataset = DATASETS.build(dataset_cfg)
        dataset.full_init()
    except FileNotFoundError as error:
        raise ReevaluationError(
            f'the annotations of the test set cannot be read: {error}; put the data there or correct '
            'test_dataloader.dataset.data_root / ann_file (--cfg-options)'
        ) from error
    if len(dataset) == 0:
        raise ReevaluationError(f'the test set {dataset_cfg.get("ann_file")} holds no image')
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    if len({info['img_id'] for info in infos}) < len(infos):
        raise ReevaluationError('image ids of the test set are not unique; evaluate its parts one by one')
    paths = [info['img_path'] for info in infos if '://' not in info['img_path']]
    if missing := [path for path in paths if not osp.isfile(path)]:
        raise ReevaluationError(
            f'{len(missing)} of {len(paths)} test images are missing, first {missing[0]}; put them there or correct '
            'test_dataloader.dataset.data_root / data_prefix (--cfg-options)'
        )
    return dataset


def ground_truth(dataset: BaseDataset | ConcatDataset) -> dict[Any, list[dict[str, Any]]]:
    """Annotated instances of every image by image id, as mmdet's datasets parse them, in original image scale.

    Each instance holds ``bbox`` (xyxy), ``bbox_label`` and ``ignore_flag`` (1 for crowd and difficult objects).

    Raises:
        ReevaluationError: not one object is annotated.
    """
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    instances = {info['img_id']: info.get('instances', []) for info in infos}
    if not any(instances.values()):
        raise ReevaluationError('the test set has no annotated object, so nothing can be evaluated (a test-dev split?)')
    return instances


def collect(
    cfg: Config,
    checkpoint: str | Path,
    score_floor: float,
    *,
    work_dir: str | Path | None = None,
    trust_checkpoint: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ImageCandidates]:
    """Run the network once over the config's test set and keep every candidate above a score.

    Args:
        cfg: the user's config; not changed.
        checkpoint: weights that fit it entirely.
        score_floor: candidates with ``score > score_floor`` are kept, in [0, 1).
        work_dir: where mmengine logs; None: nowhere that stays.
        trust_checkpoint: see :func:`mmdet_softnms.checkpoint.load_checkpoint`.
        progress: called with (batches done, batches in all).

    Returns:
        The candidates of every image in dataset order; an empty list on every process but the main one.

    Raises:
        ReevaluationError, CheckpointError: the input cannot be used.
    """
    plugged = plug(cfg, score_floor)
    plugged.test_evaluator = dict(type='mmdet_softnms.CandidateCollector')
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg'):
        plugged.pop(key, None)
    plugged.pop('val_evaluator', None)
    plugged.pop('auto_scale_lr', None)
    plugged.load_from, plugged.resume = str(checkpoint), False
    plugged.log_level = 'ERROR'
    # A name of its own: mmengine keeps visualizers by name, with the folder of the first run in a process.
    plugged.visualizer = dict(type='Visualizer', name=f'reevaluation_{next(_run_numbers)}')
    plugged.setdefault('test_cfg', dict(type='TestLoop'))
    _drop_weight_initialisation(plugged.model)
    if plugged.get('launcher', 'none') != 'none' and not torch.cuda.is_available():
        _distribute_on_cpu(plugged)
    with tempfile.TemporaryDirectory() as temporary:
        plugged.work_dir = str(work_dir or temporary)
        runner = Runner.from_cfg(plugged)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        _check_classes(model, cfg, runner)
        # Checked here, loaded by the Runner, whose hooks (an average of weights, say) take part as in a live run.
        check_weights(model, checkpoint, trust=trust_checkpoint, ignore=_MASK_PREFIXES)
        if trust_checkpoint:
            allow_unsafe_loading()
        runner.register_hook(_ProgressHook(progress))
        runner.test()
    return runner.test_evaluator.metrics[0].images if is_main_process() else []


def _distribute_on_cpu(cfg: Config) -> None:
    """mmengine's own launcher assumes GPUs: it sets a CUDA device, and wraps the model with one."""
    if cfg.launcher != 'pytorch':
        raise ReevaluationError(f'--launcher {cfg.launcher} needs GPUs; without them start it by torchrun (pytorch)')
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)


def _check_classes(model: torch.nn.Module, cfg: Config, runner: Runner) -> None:
    heads: Any = model.get_submodule('roi_head.bbox_head')
    num_classes = (heads[-1] if isinstance(heads, torch.nn.ModuleList) else heads).num_classes
    classes = runner.test_loop.dataloader.dataset.metainfo.get('classes', ())
    if num_classes != len(classes):
        raise ReevaluationError(
            f'the model predicts {num_classes} classes but the test set {cfg.test_dataloader.dataset.get("ann_file")} '
            f'has {len(classes)}; correct num_classes or test_dataloader.dataset.metainfo'
        )


def _drop_weight_initialisation(model: ConfigDict) -> None:
    """The checkpoint brings every weight, so nothing has to be fetched from a model hub first."""
    for value in model.values():
        if isinstance(value, dict):
            if value.get('init_cfg') and value['init_cfg'].get('type') == 'Pretrained':
                value['init_cfg'] = None
            _drop_weight_initialisation(value)
