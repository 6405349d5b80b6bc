"""One forward pass over a test set that keeps what suppression starts from.

The detector is the user's own config with three changes (:func:`plug`): its RoI head becomes the sibling that takes
rules, its rule becomes :class:`mmdet_softnms.rules.NoSuppression`, its mask head is left out. mmengine's Runner does
the rest, so that every dataset, launcher and device mmdet supports is supported here. What it gives goes to a
:class:`mmdet_softnms.reevaluation.candidates.store.CandidateStore`, shard by shard; a store that is there already is
used instead.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import barrier, broadcast_object_list, get_dist_info, init_dist, is_distributed
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch.utils.data import Sampler

from mmdet_softnms.checkpoint import LoadedWeights, allow_unsafe_loading, check_weights
from mmdet_softnms.files import ReevaluationError, clear_temporaries, first_line
from mmdet_softnms.locate import lists_for_tuples
from mmdet_softnms.models.detectron2_wrapper import SoftNMSDetectron2Wrapper
from mmdet_softnms.reevaluation.candidates.fingerprint import (
    differences,
    drop_weight_initialisation,
    execution_differences,
    fingerprint,
)
from mmdet_softnms.reevaluation.candidates.identity import digest
from mmdet_softnms.reevaluation.candidates.images import ImageReader
from mmdet_softnms.reevaluation.candidates.plug import (
    box_dim_of,
    check_classes,
    family_of,
    most_candidates,
    other_boxes,
    plug,
)
from mmdet_softnms.reevaluation.candidates.store import CandidateStore, Expected, ImageCandidates, find_stores
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.registry import DATA_SAMPLERS, METRICS

#: Images a shard, at most; a kill costs one shard's forward passes, and so much is held in memory. A small test
#: set has 16 shards, so that several processes have something to do each.
SHARD_SIZE = 64
_FEWEST_SHARDS = 16
_SHARD_ROWS = 4_000_000  # candidates a shard, at most: 150 MB of memory
_run_numbers = itertools.count()


@DATA_SAMPLERS.register_module()
class ShardSampler(Sampler):
    """Indices of the images of unfinished shards, every process its own shards.

    mmengine's DefaultSampler would deal out images one by one, and no process would ever hold a whole shard.
    """

    def __init__(self, dataset: Any, folder: str, shards: list[int], seed: int | None = None) -> None:
        store = CandidateStore.open(Path(folder))
        self._indices = [index for shard in _own(shards) for index in store.images_of(shard)]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def set_epoch(self, epoch: int) -> None:
        """Nothing is shuffled (mmengine's sampler interface)."""


@METRICS.register_module()
class CandidateCollector(BaseMetric):
    """Evaluator that writes the predictions of a forward pass to a store, in the order of :class:`ShardSampler`."""

    default_prefix = 'candidates'

    def __init__(self, folder: str, shards: list[int], box_dim: int = 4) -> None:
        super().__init__(collect_device='cpu')
        self._box_dim = box_dim
        self._store = CandidateStore.open(Path(folder))
        self._shards = _own(shards)
        self._images: list[ImageCandidates] = []

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep one batch of predictions (mmengine's evaluator interface)."""
        for sample in data_samples:
            if 'img_id' not in sample:
                raise ReevaluationError(
                    "the test pipeline drops img_id; add it to PackDetInputs' meta_keys so that predictions find "
                    'their ground truth'
                )
            instances = sample['pred_instances']
            # Scores of a half-precision model stay exact in float32. Heads of mmrotate may give its own kind of boxes.
            candidates = InstanceData(
                bboxes=get_box_tensor(instances['bboxes']).detach().cpu().float(),
                scores=instances['scores'].detach().cpu().float(),
                labels=instances['labels'].detach().cpu(),
            )
            if candidates.bboxes.shape[1] != self._box_dim:  # of a head whose boxes are not known before it predicts
                raise ReevaluationError(other_boxes(candidates.bboxes.shape[1], self._box_dim))
            if 'class_scores' in instances:
                candidates.class_scores = instances['class_scores'].detach().cpu().float()
            if 'views' in instances:
                candidates.views = instances['views'].detach().cpu()
            if not (candidates.bboxes.isfinite().all() and candidates.scores.isfinite().all()):
                raise not_finite(sample)
            height, width = sample['ori_shape'][:2]
            self._images.append(ImageCandidates(sample['img_id'], (int(height), int(width)), candidates))
            if len(self._images) == len(self._store.images_of(self._shards[0])):
                self._store.write(self._shards.pop(0), self._images)
                self._images = []

    def evaluate(self, size: int) -> dict[str, float]:
        """Nothing to gather: what this process saw is on disk (mmengine's evaluator interface)."""
        assert not self._shards, f'the test loop ended before shards {self._shards}'
        return {}

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Not reached, see :meth:`evaluate`."""
        return {}


def _own(shards: list[int]) -> list[int]:
    rank, world_size = get_dist_info()
    return shards[rank::world_size]


class _ProgressHook(Hook):
    """Tells a callback (done, total) after every batch of the test loop."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self._progress = progress

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._progress(batch_idx + 1, len(runner.test_dataloader))


@dataclass
class Collected:
    """The candidates of a test set, and what it took to have them."""

    store: CandidateStore
    forward_images: int  # how many went through the network in this run; 0: all were there already
    forward_seconds: float


def collect(
    cfg: Config,
    checkpoint: str | Path,
    score_floor: float,
    folder: str | Path,
    *,
    dataset: BaseDataset | None = None,
    work_dir: str | Path | None = None,
    trust_checkpoint: bool = False,
    shard_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Collected:
    """Find every candidate above a score in a store, or run the network over the config's test set and store them.

    Args:
        cfg: the user's config; not changed.
        checkpoint: weights that fit it entirely.
        score_floor: candidates with ``score > score_floor`` are needed, in [0, 1).
        folder: holds stores, each in a folder of its own, named by its fingerprint.
        dataset: the test set where it is built already (:func:`build_test_set`).
        work_dir: where mmengine logs; None: nowhere that stays.
        trust_checkpoint: see :func:`mmdet_softnms.checkpoint.load_checkpoint`.
        shard_size: images a shard of a new store, None: 64, or fewer for a small test set; rounded up to whole
            batches, so that a run taken up again has the same batches.
        progress: called with (batches done, batches in all) of this process.
        say: called with one line about every store that is used, taken up, or mended.

    Returns:
        The finished store, on every process.

    Raises:
        ReevaluationError, CheckpointError: the input cannot be used.
        OSError: the store cannot be written; finished shards stay, and the next run takes them up.
    """
    dataset = build_test_set(cfg) if dataset is None else dataset
    most = most_candidates(cfg)
    shard_size = shard_size or min(SHARD_SIZE, -(-len(dataset) // _FEWEST_SHARDS), max(1, _SHARD_ROWS // (most or 1)))
    expected = Expected.of(dataset)
    plan: list[Any] = [None]
    if get_dist_info()[0] == 0:
        store, shards, lines = _find_or_create(
            Path(folder), fingerprint(cfg, checkpoint, dataset, score_floor), expected, shard_size
        )
        for line in lines:
            say(line)
        if shards and most:
            each = 'each level of each view' if cfg.get('softnms_views') else 'each level'
            size = (9 + 4 * box_dim_of(cfg)) * most * len(dataset) / 1e9
            say(
                f'at most {most:,} candidates an image (nms_pre of {each}), so {len(dataset):,} images take up to '
                f'{size:.2g} GB; less where scores do not exceed {score_floor:g}'
            )
        plan = [(str(store.folder), shards)]
    broadcast_object_list(plan)
    store_folder, shards = plan[0]
    store = CandidateStore.open(Path(store_folder))
    start = time.perf_counter()
    if shards:
        _forward(cfg, checkpoint, score_floor, store, shards, work_dir, trust_checkpoint, progress)
        barrier()
        if problems := store.check(expected) if get_dist_info()[0] == 0 else {}:
            raise ReevaluationError(
                f'{store.folder}: {_list(problems)} after the forward pass; is the folder on a disk all processes see?'
            )
    num_images = sum(len(store.images_of(shard)) for shard in shards)
    return Collected(store, num_images, time.perf_counter() - start if shards else 0.0)


def _find_or_create(
    folder: Path, wanted: dict[str, Any], expected: Expected, shard_size: int
) -> tuple[CandidateStore, list[int], list[str]]:
    """The store to use, its unfinished shards, and what there is to say."""
    own = folder / digest({key: value for key, value in wanted.items() if key != 'number'})[:12]
    for place in (folder, *folder.glob('*/')):
        clear_temporaries(place)
    num_images = len(expected.img_ids)
    mine = _open(own, wanted, num_images)
    others = [store for store in find_stores(folder) if store.folder != own]
    fitting = [
        store for store in others if store.num_images == num_images and not differences(store.fingerprint, wanted)
    ]
    problems = mine.check(expected) if mine else None
    said = []
    if wanted['unknown']:
        what = ', '.join(wanted['unknown'][:3])
        said.append(f'{what} cannot be read here, so stored candidates are not used: the network runs over all images')
        fitting = []
    elif mine is None or problems:
        for store in fitting:
            # The same candidates, but for last bits and some below the floor: finished ones serve as they are.
            if not store.check(expected):
                how = execution_differences(store.fingerprint, wanted)
                line = f'stored candidates found: {store.folder} (made with {how}); no forward pass is needed'
                return store, [], [line]
    if not own.is_dir() and not said and (strangers := [store for store in others if store not in fitting]):
        reason = differences(strangers[-1].fingerprint, wanted) or 'number of images'
        said.append(f'{len(strangers)} stored candidates in {folder} are of another {reason}: not used')
    if own.exists() and mine is None and not wanted['unknown']:
        said.append(f'{own / "store.json"} is damaged: written anew')
    batch_size = wanted['execution']['batch_size']
    whole_batches = -(-shard_size // batch_size) * batch_size
    store = mine or CandidateStore.create(own, wanted, num_images, whole_batches)
    if problems is None:
        problems = store.check(expected)
    for shard, problem in problems.items():
        if problem != 'missing' and not wanted['unknown']:
            images = store.images_of(shard)
            said.append(f'{store.path_of(shard)} {problem}; images {images[0]} to {images[-1]} are computed anew')
    if not problems:
        said.append(f'stored candidates found: {store.folder}; no forward pass is needed')
    elif len(problems) < store.num_shards:
        done = store.num_shards - len(problems)
        said.append(f'{store.folder}: {done} of {store.num_shards} shards are there; the run is taken up')
    return store, list(problems), said


def _open(folder: Path, wanted: dict[str, Any], num_images: int) -> CandidateStore | None:
    """The store of exactly this fingerprint in a folder; None where there is none that can be opened."""
    try:
        store = CandidateStore.open(folder)
    except ReevaluationError:
        return None
    return store if store.fingerprint == wanted and store.num_images == num_images else None


def _list(problems: dict[int, str]) -> str:
    return '; '.join(f'shard {shard} {problem}' for shard, problem in list(problems.items())[:3])


def _forward(
    cfg: Config,
    checkpoint: str | Path,
    score_floor: float,
    store: CandidateStore,
    shards: list[int],
    work_dir: str | Path | None,
    trust_checkpoint: bool,
    progress: Callable[[int, int], None],
) -> None:
    """Run the network over the images of some shards and write them."""
    plugged = plug(cfg, score_floor)
    place = dict(folder=str(store.folder), shards=shards)
    plugged.test_evaluator = dict(type='mmdet_softnms.CandidateCollector', box_dim=box_dim_of(cfg), **place)
    plugged.test_dataloader.sampler = dict(type='mmdet_softnms.ShardSampler', **place)
    for key in ('batch_sampler', 'drop_last'):
        plugged.test_dataloader.pop(key, None)
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg'):
        plugged.pop(key, None)
    plugged.pop('val_evaluator', None)
    plugged.pop('auto_scale_lr', None)
    plugged.load_from, plugged.resume = str(checkpoint), False
    plugged.log_level = 'ERROR'
    # A name of its own: mmengine keeps visualizers by name, with the folder of the first run in a process.
    plugged.visualizer = dict(type='Visualizer', name=f'reevaluation_{next(_run_numbers)}')
    plugged.setdefault('test_cfg', dict(type='TestLoop'))
    drop_weight_initialisation(plugged.model)
    if is_distributed() and not torch.cuda.is_available():
        # mmengine would wrap the model with the CUDA device of LOCAL_RANK.
        plugged.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
    with tempfile.TemporaryDirectory() as temporary:
        plugged.work_dir = str(work_dir or temporary)
        try:
            # As mmdet's tools/test.py: a runner of the user's own, if there is one.
            runner = RUNNERS.build(plugged) if plugged.get('runner_type') else Runner.from_cfg(plugged)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise ReevaluationError(f'the model of the config cannot be built: {first_line(error)}') from error
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model = model.module if isinstance(model, BaseTTAModel) else model
        check_classes(model, cfg, runner)
        family = family_of(cfg)
        family.leave_out_unused(model)
        # Checked here, loaded by the Runner, whose hooks (an average of weights, say) take part as in a live run.
        check_weights(model, checkpoint, trust=trust_checkpoint, ignore=family.not_needed(model))
        if trust_checkpoint:
            allow_unsafe_loading()
        runner.register_hook(LoadedWeights())  # mmengine only logs a weight that it could not copy
        _refuse_values_that_are_not_finite(model)
        runner.register_hook(_ProgressHook(progress))
        try:
            runner.test()
        except ReevaluationError:
            raise
        except Exception as error:
            dataset = runner.test_loop.dataloader.dataset
            numbers = [number for shard in shards for number in store.images_of(shard)]
            if path := ImageReader(dataset).first_unreadable(numbers):
                raise ReevaluationError(
                    f'image {path} cannot be read; replace it, or take it out of the set'
                ) from error
            if reason := _known(error, cfg, runner):
                raise ReevaluationError(reason) from error
            raise


def _known(error: Exception, cfg: Config, runner: Runner) -> str:
    """What to say of an error in mmdet's or mmcv's code that the config brought about; empty for any other."""
    if reason := lists_for_tuples(cfg.filename, error):
        return reason
    types = {getattr(parameter, 'dtype', None) for parameter in runner.model.parameters()}
    if isinstance(error, RuntimeError) and (
        getattr(runner.test_loop, 'fp16', False) or types & {torch.float16, torch.bfloat16}
    ):
        return f'the network cannot run in half precision here ({first_line(error)}); use test_cfg.fp16=False, or a GPU'
    return ''


def _refuse_values_that_are_not_finite(model: Any) -> None:
    """Stop at the first image for which the RPN or a dense head gives NaN: mmdet drops such boxes without a word.

    What the RoI head makes of NaN is seen by :class:`CandidateCollector`.
    """
    batch: list[Any] = []

    def remember(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        batch[:] = kwargs.get('data_samples') or []

    def look(module: Any, args: Any, outputs: Any) -> None:
        for maps in outputs if isinstance(outputs, (list, tuple)) else ():
            for one in maps if isinstance(maps, (list, tuple)) else [maps]:
                if not isinstance(one, torch.Tensor) or one.isfinite().all():
                    continue
                if one.dim() == 2 and len(batch) > 1:  # RoIs of all images
                    raise not_finite(dict(img_id=' or '.join(str(each.img_id) for each in batch)))
                number = int((~one.isfinite()).flatten(1).any(1).nonzero()[0]) if one.dim() > 2 else 0
                raise not_finite(batch[number].metainfo if number < len(batch) else {})

    model.register_forward_pre_hook(remember, with_kwargs=True)
    # A RoI head's bbox_head is not the model's.
    heads: list[Any] = [getattr(model, name, None) for name in ('rpn_head', 'bbox_head')]
    if isinstance(model, SoftNMSDetectron2Wrapper):  # where RoIs are dropped, too
        heads = list(model.layers_before_suppression())
    for head in heads:
        if isinstance(head, torch.nn.Module):
            head.register_forward_hook(look)


def not_finite(image: Mapping[str, Any]) -> ReevaluationError:
    """What to say of a network that gives NaN or infinity, first on an image."""
    return ReevaluationError(
        f'the network gives values that are not finite, first on image {image.get("img_id")}; it diverged in '
        'training, or ran out of the range of its floating type'
    )


def start_processes(launcher: str) -> None:
    """Join the other processes of a launcher (``'none'``: there are none), before anything is divided among them.

    mmengine's own function assumes GPUs: it sets a CUDA device.

    Raises:
        ReevaluationError: a launcher that needs GPUs where there are none.
    """
    if launcher == 'none' or is_distributed():
        return
    if torch.cuda.is_available():
        init_dist(launcher)
    elif launcher == 'pytorch':
        torch.distributed.init_process_group('gloo')
    else:
        raise ReevaluationError(f'--launcher {launcher} needs GPUs; without them start it by torchrun (pytorch)')
