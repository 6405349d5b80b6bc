"""One forward pass over a test set that keeps what suppression starts from.

The detector is the user's own config with three changes (:func:`plug`): its RoI head becomes the sibling that takes
rules, its rule becomes :class:`mmdet_softnms.rules.NoSuppression`, its mask head is left out. mmengine's Runner does
the rest, so that every dataset, launcher and device mmdet supports is supported here. What it gives goes to a
:class:`mmdet_softnms.reevaluation.store.CandidateStore`, shard by shard; a store that is there already is used instead.
"""

import copy
import hashlib
import itertools
import json
import os
import os.path as osp
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mmcv
import mmdet
import mmengine
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.dist import barrier, broadcast_object_list, get_dist_info, init_dist, is_distributed
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch.utils.data import Sampler

from mmdet_softnms.checkpoint import allow_unsafe_loading, check_weights
from mmdet_softnms.reevaluation.store import CandidateStore, ImageCandidates, ReevaluationError, find_stores, sha256
from mmdet_softnms.registry import DATA_SAMPLERS, METRICS

_PLUGGED_ROI_HEADS = {
    'StandardRoIHead': 'SoftNMSRoIHead',
    'CascadeRoIHead': 'SoftNMSCascadeRoIHead',
    'DoubleHeadRoIHead': 'SoftNMSDoubleHeadRoIHead',
}
#: Images a shard, at most; a kill costs one shard's forward passes, and so much is held in memory. A small test
#: set has 16 shards, so that several processes have something to do each.
SHARD_SIZE = 64
_FEWEST_SHARDS = 16
_run_numbers = itertools.count()
_MASK_PREFIXES = ('roi_head.mask_head.', 'roi_head.mask_roi_extractor.')
_PATH_KEYS = ('data_root', 'ann_file', 'data_prefix', 'init_cfg')  # where things lie is not what they are


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

    def __init__(self, folder: str, shards: list[int]) -> None:
        super().__init__(collect_device='cpu')
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
            # Scores of a half-precision model stay exact in float32.
            candidates = InstanceData(
                bboxes=instances['bboxes'].detach().cpu().float(),
                scores=instances['scores'].detach().cpu().float(),
                labels=instances['labels'].detach().cpu(),
            )
            if not (candidates.bboxes.isfinite().all() and candidates.scores.isfinite().all()):
                raise ReevaluationError(
                    f'the network gives values that are not finite, first on image {sample["img_id"]}; it diverged in '
                    'training, or ran out of the range of its floating type'
                )
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


def build_test_set(cfg: Config, check_images: bool = True, split: str = 'test') -> BaseDataset:
    """Build the dataset of ``cfg.test_dataloader`` and check that its annotations and, if wanted, images are there.

    Args:
        cfg: the user's config.
        check_images: whether every image has to be on disk.
        split: ``'val'``: that of ``cfg.val_dataloader`` instead.

    Raises:
        ReevaluationError: no such set in the config; the annotations or an image are missing or damaged; no image;
            image ids that are not unique.
    """
    key = f'{split}_dataloader'
    if cfg.get(key) is None:
        raise ReevaluationError(f'the config has no {key}, so there is nothing to evaluate on')
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    dataset_cfg = copy.deepcopy(cfg[key].dataset)
    remedy = f'put the data there or correct {key}.dataset.data_root / ann_file (--cfg-options)'
    try:
        dataset = DATASETS.build(dataset_cfg)
        dataset.full_init()
    except FileNotFoundError as error:
        raise ReevaluationError(f'the annotations of the {split} set cannot be read: {error}; {remedy}') from error
    except Exception as error:  # whatever a data set raises while it reads its annotations is about them
        raise ReevaluationError(
            f'the {split} set ({dataset_cfg.get("type")}, annotations {_annotations(dataset_cfg)}) cannot be built: '
            f'{type(error).__name__}: {error}; {remedy}'
        ) from error
    if len(dataset) == 0:
        raise ReevaluationError(f'the {split} set {dataset_cfg.get("ann_file")} holds no image')
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    if len({info['img_id'] for info in infos}) < len(infos):
        raise ReevaluationError(f'image ids of the {split} set are not unique; evaluate its parts one by one')
    paths = [info['img_path'] for info in infos if '://' not in info['img_path']]
    if check_images and (missing := [path for path in paths if not osp.isfile(path)]):
        raise ReevaluationError(
            f'{len(missing)} of {len(paths)} {split} images are missing, first {missing[0]}; put them there or correct '
            f'{key}.dataset.data_root / data_prefix (--cfg-options)'
        )
    return dataset


def _annotations(dataset_cfg: ConfigDict) -> str:
    """Where they are: of VOC the first XML file that cannot be parsed, of anything else the annotation file."""
    root, ann_file = dataset_cfg.get('data_root') or '', str(dataset_cfg.get('ann_file', ''))
    path = ann_file if osp.isabs(ann_file) else osp.join(root, ann_file)
    if osp.splitext(path)[1] == '.txt' and osp.isfile(path):
        images = osp.join(root, dataset_cfg.get('data_prefix', {}).get('sub_data_root', ''))
        for name in Path(path).read_text().split():
            xml = osp.join(images, dataset_cfg.get('ann_subdir', 'Annotations'), f'{name}.xml')
            try:
                ElementTree.parse(xml)
            except (OSError, ElementTree.ParseError):
                return xml
    return path


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
    shard_size = shard_size or min(SHARD_SIZE, -(-len(dataset) // _FEWEST_SHARDS))
    plan: list[Any] = [None]
    if get_dist_info()[0] == 0:
        store, shards, lines = _find_or_create(
            Path(folder), fingerprint(cfg, checkpoint, dataset, score_floor), len(dataset), shard_size
        )
        for line in lines:
            say(line)
        plan = [(str(store.folder), shards)]
    broadcast_object_list(plan)
    store_folder, shards = plan[0]
    store = CandidateStore.open(Path(store_folder))
    start = time.perf_counter()
    if shards:
        _forward(cfg, checkpoint, score_floor, store, shards, work_dir, trust_checkpoint, progress)
        barrier()
        if problems := store.check() if get_dist_info()[0] == 0 else {}:
            raise ReevaluationError(
                f'{store.folder}: {_list(problems)} after the forward pass; is the folder on a disk all processes see?'
            )
    num_images = sum(len(store.images_of(shard)) for shard in shards)
    return Collected(store, num_images, time.perf_counter() - start if shards else 0.0)


def fingerprint(cfg: Config, checkpoint: str | Path, dataset: BaseDataset, score_floor: float) -> dict[str, Any]:
    """What candidates depend on, as ``store.json`` holds it.

    ``config``, ``checkpoint``, ``dataset``, ``images`` and ``score_floor`` say which candidates they are: SHA-256 of
    model, test pipeline, hooks and loop (paths left out); of the checkpoint file; of classes, image ids and file names;
    of the content of all images (None where one is not on this machine's disk). ``execution`` says what moves their
    last bits: the same network differs by 8e-8 between 1 and 2 threads.
    """
    plugged = plug(cfg, 0.0)
    parts = ('model', 'custom_hooks', 'custom_imports', 'test_cfg')
    described = {part: plugged.get(part) for part in parts} | {'dataset': plugged.test_dataloader.dataset}
    infos = [dataset.get_data_info(number) for number in range(len(dataset))]
    names = [[info['img_id'], osp.basename(info['img_path'])] for info in infos]
    content = content_of([info['img_path'] for info in infos])
    return dict(
        config=_hash(_without_paths(Config(described).to_dict())),
        checkpoint=sha256(checkpoint),
        dataset=_hash([list(dataset.metainfo.get('classes', ())), names]),
        images=None if None in content else _hash(content),
        score_floor=score_floor,
        execution=dict(
            batch_size=cfg.test_dataloader.get('batch_size', 1),
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu',
            torch=torch.__version__,
            mmcv=mmcv.__version__,
            mmdet=mmdet.__version__,
            mmengine=mmengine.__version__,
        ),
    )


def content_of(paths: Sequence[str]) -> list[str | None]:
    """The SHA-256 of each file; None for what is not on this machine's disk. On all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda path: sha256(path) if osp.isfile(path) else None, paths))


def _find_or_create(
    folder: Path, wanted: dict[str, Any], num_images: int, shard_size: int
) -> tuple[CandidateStore, list[int], list[str]]:
    """The store to use, its unfinished shards, and what there is to say."""
    own = folder / _hash(wanted)[:12]
    others = [store for store in find_stores(folder) if store.folder != own]
    fitting = [store for store in others if not differences(store.fingerprint, wanted)]
    mine = _check(own, wanted)
    if mine is None or mine.check():
        for store in fitting:
            # The same candidates, but for last bits and some below the floor: finished ones serve as they are.
            if not store.check():
                how = _execution(store.fingerprint, wanted)
                line = f'stored candidates found: {store.folder} (made with {how}); no forward pass is needed'
                return store, [], [line]
    said = []
    if not own.is_dir() and (strangers := [store for store in others if store not in fitting]):
        reason = differences(strangers[-1].fingerprint, wanted)
        said.append(f'{len(strangers)} stored candidates in {folder} are of another {reason}: not used')
    if own.is_dir() and mine is None:
        said.append(f'{own / "store.json"} is damaged: written anew')
    batch_size = wanted['execution']['batch_size']
    whole_batches = -(-shard_size // batch_size) * batch_size
    store = mine or CandidateStore.create(own, wanted, num_images, whole_batches)
    problems = store.check()
    for shard, problem in problems.items():
        if problem != 'missing':
            images = store.images_of(shard)
            said.append(f'{store.path_of(shard)} {problem}; images {images[0]} to {images[-1]} are computed anew')
    if not problems:
        said.append(f'stored candidates found: {store.folder}; no forward pass is needed')
    elif len(problems) < store.num_shards:
        done = store.num_shards - len(problems)
        said.append(f'{store.folder}: {done} of {store.num_shards} shards are there; the run is taken up')
    return store, list(problems), said


def _check(folder: Path, wanted: dict[str, Any]) -> CandidateStore | None:
    """The store of exactly this fingerprint in a folder; None where there is none that can be opened."""
    try:
        store = CandidateStore.open(folder)
    except ReevaluationError:
        return None
    return store if store.fingerprint == wanted else None


def _execution(have: dict[str, Any], wanted: dict[str, Any]) -> str:
    """How the making of stored candidates differs, in words."""
    made = [f'{key} {value}' for key, value in have['execution'].items() if wanted['execution'].get(key) != value]
    if have['score_floor'] != wanted['score_floor']:
        made.append(f'score floor {have["score_floor"]:g}')
    return ', '.join(made)


def differences(have: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What makes stored candidates others than those wanted, in words; empty where nothing does.

    Images that are not there cannot tell: they are compared where both fingerprints know them.
    """
    names = [key for key in ('config', 'checkpoint', 'dataset') if have.get(key) != wanted[key]]
    if have.get('images') != wanted['images'] and None not in (have.get('images'), wanted['images']):
        names.append('content of the images')
    names += ['score floor'] if have['score_floor'] > wanted['score_floor'] else []
    return ' and '.join(names)


def _list(problems: dict[int, str]) -> str:
    return '; '.join(f'shard {shard} {problem}' for shard, problem in list(problems.items())[:3])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


def _without_paths(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_paths(value) for key, value in content.items() if key not in _PATH_KEYS}
    return [_without_paths(value) for value in content] if isinstance(content, (list, tuple)) else content


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
    plugged.test_evaluator = dict(type='mmdet_softnms.CandidateCollector', **place)
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
    _drop_weight_initialisation(plugged.model)
    if is_distributed() and not torch.cuda.is_available():
        # mmengine would wrap the model with the CUDA device of LOCAL_RANK.
        plugged.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
    with tempfile.TemporaryDirectory() as temporary:
        plugged.work_dir = str(work_dir or temporary)
        try:
            runner = Runner.from_cfg(plugged)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise ReevaluationError(f'the model of the config cannot be built: {error}') from error
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        _check_classes(model, cfg, runner)
        # Checked here, loaded by the Runner, whose hooks (an average of weights, say) take part as in a live run.
        check_weights(model, checkpoint, trust=trust_checkpoint, ignore=_MASK_PREFIXES)
        if trust_checkpoint:
            allow_unsafe_loading()
        runner.register_hook(_ProgressHook(progress))
        try:
            runner.test()
        except ReevaluationError:
            raise
        except Exception as error:
            dataset = runner.test_loop.dataloader.dataset
            numbers = [number for shard in shards for number in store.images_of(shard)]
            if path := _first_unreadable(dataset.get_data_info(number)['img_path'] for number in numbers):
                raise ReevaluationError(
                    f'image {path} cannot be read; replace it, or take it out of the set'
                ) from error
            raise


def _first_unreadable(paths: Iterable[str]) -> str | None:
    """The first image on disk that is none; looked for after a failure only."""
    for path in paths:
        try:
            if osp.isfile(path) and mmcv.imread(path) is None:
                return path
        except Exception:  # OpenCV raises errors of its own for an empty file
            return path
    return None


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
