"""Config and checkpoint to a table: candidates found or made, settings swept, the result in one object."""

import copy
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import mmdet
from filelock import FileLock, Timeout
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import get_dist_info, is_distributed

import mmdet_softnms
from mmdet_softnms.reevaluation.candidates import (
    build_test_set,
    collect,
    content_of,
    differences,
    fingerprint,
    has_mask_head,
    plug,
    start_processes,
)
from mmdet_softnms.reevaluation.metrics import GroundTruth, read_ground_truth
from mmdet_softnms.reevaluation.selection import Objects, Selection, check_choice, select
from mmdet_softnms.reevaluation.settings import Setting, default_settings, sweep_settings
from mmdet_softnms.reevaluation.store import Candidates, CandidateStore, ReevaluationError
from mmdet_softnms.reevaluation.sweep import Row, evaluate_all, match_all

Progress = Callable[[str, int, int], None]  # (what is going on, done, total)


@dataclass
class Session:
    """What a run has in memory, for what is computed on top of the table: choice of settings, pictures."""

    settings: list[Setting]
    candidates: Candidates
    truth: GroundTruth
    image_paths: list[str]


@dataclass
class Reevaluation:
    """The result of one forward pass under several settings."""

    dataset: str
    num_images: int
    num_candidates: int
    masks_left_out: bool
    store: str  # folder of the candidates
    store_bytes: int
    forward_images: int  # that went through the network in this run; 0 where a store was found
    forward_seconds: float
    rows: list[Row]
    notes: list[str]
    session: Session = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As ``reevaluation.json`` holds it."""
        named = {one.name: getattr(self, one.name) for one in fields(self) if one.name != 'session'}
        return named | dict(rows=[asdict(row) for row in self.rows])


def reevaluate(
    cfg: Config,
    checkpoint: str | Path,
    *,
    work_dir: str | Path | None = None,
    score_thr: float = 1e-3,
    max_per_img: int = 100,
    min_score: float = 1e-3,
    sweep: Sequence[str] = (),
    store: str | Path | None = None,
    processes: int | None = None,
    trust_checkpoint: bool = False,
    progress: Progress = lambda what, done, total: None,
    on_row: Callable[[Row, int, int], None] = lambda row, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Reevaluation | None:
    """Score hard, linear and gaussian suppression and the config's own over the config's test set, or a whole sweep.

    The network runs once, and not at all where the work directory or ``store`` holds the candidates already.

    Args:
        cfg: any mmdet config of a supported two-stage detector; not changed.
        checkpoint: its weights.
        work_dir: where candidates are stored, rows of an unfinished sweep are kept and mmengine logs; None: nowhere
            that stays. One run at a time may use it.
        score_thr, max_per_img: shared by the rows of the table; the config's own row keeps its own.
        min_score: of the soft rules.
        sweep: instead of the default rows, see :func:`mmdet_softnms.reevaluation.settings.sweep_settings`.
        store: a store made elsewhere, used as it is; None: the one in the work directory.
        processes: of this machine for the sweep; None: as many as are worth it.
        trust_checkpoint: see :func:`mmdet_softnms.checkpoint.load_checkpoint`.
        progress: called with a description, how much is done, and how much there is.
        on_row: called with (row, rows done, rows in all) after each setting.
        say: called with one line about every store that is used, taken up, or mended.

    Returns:
        The result, baseline first; None on every process but the main one.

    Raises:
        ReevaluationError, CheckpointError: the input cannot be used, or another run is at work in ``work_dir``.
        OSError: no space or no permission; finished shards and rows are kept for the next run.
    """
    plug(cfg, 0.0)  # before anything slow: is it a detector that can be plugged?
    if sweep:
        settings = sweep_settings(sweep, cfg, score_thr, max_per_img, min_score)
    else:
        settings = default_settings(cfg, score_thr, max_per_img, min_score)
    start_processes(cfg.get('launcher', 'none'))
    if is_distributed() and work_dir is None:
        raise ReevaluationError('several processes need a work_dir that all of them see')
    with ExitStack() as stack:
        folder = Path(work_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        if get_dist_info()[0] == 0:
            stack.enter_context(only_run_in(folder))
        dataset = build_test_set(cfg, check_images=store is None)
        truth = read_ground_truth(cfg, dataset)
        img_ids = [dataset.get_data_info(number)['img_id'] for number in range(len(dataset))]
        floor = min(setting.score_thr for setting in settings)
        forward_images, forward_seconds = 0, 0.0
        if store is None:
            collected = collect(
                cfg,
                checkpoint,
                floor,
                folder / 'candidates',
                dataset=dataset,
                work_dir=work_dir,
                trust_checkpoint=trust_checkpoint,
                progress=functools.partial(progress, 'forward pass, batches'),
                say=say,
            )
            used, forward_images, forward_seconds = collected.store, collected.forward_images, collected.forward_seconds
        else:
            used = _given_store(Path(store), fingerprint(cfg, checkpoint, dataset, floor), len(img_ids))
        candidates = used.load()
        if candidates.img_ids != img_ids:
            raise ReevaluationError(f'the images of {used.folder} are not those of the test set in their order')
        rows = evaluate_all(
            candidates,
            settings,
            truth,
            work_dir=folder if work_dir else None,
            identity=_identity(used, truth),
            processes=processes,
            on_row=on_row,
        )
    if get_dist_info()[0] != 0:
        return None
    infos = (dataset.get_data_info(number) for number in range(len(dataset)))
    if not candidates.num_candidates:
        truth.notes.append(no_candidates(str(used.folder)))
    return Reevaluation(
        dataset=f'{type(dataset).__name__} {getattr(dataset, "ann_file", "")}'.strip(),
        num_images=len(candidates),
        num_candidates=candidates.num_candidates,
        masks_left_out=has_mask_head(cfg),
        store=str(used.folder),
        store_bytes=used.num_bytes if used.folder.is_dir() else 0,
        forward_images=forward_images,
        forward_seconds=forward_seconds,
        rows=rows,
        notes=truth.notes,
        session=Session(settings, candidates, truth, [info['img_path'] for info in infos]),
    )


def only_run_in(work_dir: Path) -> FileLock:
    """Take hold of a work directory until the lock is released or this process ends, however it ends.

    Raises:
        ReevaluationError: another run is at work there.
        OSError: it cannot be written.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work_dir / '.lock', is_singleton=True)  # a script may hold it around more than one call
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ReevaluationError(
            f'another run is at work in {work_dir}; wait for it, or give this one another --work-dir'
        ) from None
    return lock


def _given_store(folder: Path, wanted: dict[str, Any], num_images: int) -> CandidateStore:
    store = CandidateStore.open(folder)
    another = 'give another store, or leave --store out'
    if problems := store.check():
        shard, problem = next(iter(problems.items()))
        raise ReevaluationError(
            f'{folder}: {len(problems)} of {store.num_shards} shards cannot be used ({store.path_of(shard).name} '
            f'{problem}); {another}'
        )
    if store.num_images != num_images:
        raise ReevaluationError(f'{folder} holds {store.num_images} images but the test set {num_images}; {another}')
    if store.fingerprint['score_floor'] > wanted['score_floor']:
        raise ReevaluationError(
            f'{folder} holds candidates above {store.fingerprint["score_floor"]:g} only, and a score_thr of '
            f'{wanted["score_floor"]:g} is asked for; raise it, or leave --store out'
        )
    if reason := differences(store.fingerprint, wanted):
        raise ReevaluationError(f'{folder} was made with another {reason} than what is given; {another}')
    return store


def _identity(store: CandidateStore, truth: GroundTruth) -> str:
    """What finished rows depend on: candidates, objects, the code of this package, and what it computes with."""
    package = Path(mmdet_softnms.__file__).parent
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(package.rglob('*.py'))]
    libraries = [metadata.version(name) for name in ('numpy', 'numba', 'faster-coco-eval', 'torch')]
    content = json.dumps(
        [code, libraries, mmdet.__version__, store.fingerprint, truth.classes, truth.coco, truth.voc is None],
        default=repr,
    )
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """How to choose among the rows of a re-evaluation, checked before anything slow.

    Attributes:
        criterion, num_folds, resamples: see :func:`mmdet_softnms.reevaluation.selection.select`.
        val_set: the tuning split; None: fold by fold over the test set.
        val_cfg: a config whose test set it is.
    """

    criterion: str
    num_folds: int
    resamples: int
    val_set: BaseDataset | None = None
    val_cfg: Config | None = None


def plan_choice(
    cfg: Config,
    *,
    criterion: str = 'AP',
    num_folds: int = 5,
    resamples: int = 1000,
    tune_on: str = 'auto',
    check_images: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Check what :func:`choose` is to do, and find the images to tune on.

    Args:
        cfg: as of :func:`reevaluate`.
        criterion, num_folds, resamples: see :func:`mmdet_softnms.reevaluation.selection.select`.
        tune_on: 'val': tune on the config's ``val_dataloader``, which costs a forward pass over it; 'folds': k-fold
            over the test set; 'auto': 'val' where it can be read and shares no image with the test set, else 'folds'.
        check_images: of the test set; False where its candidates come from elsewhere.
        say: called with one line where 'auto' cannot use the ``val_dataloader``.

    Raises:
        ReevaluationError: too few images or resamples, an unknown criterion; 'val' is not there, is damaged, or shares
            images with the test set.
    """
    dataset = build_test_set(cfg, check_images)
    folds = Plan(criterion, num_folds, resamples)
    split = None if tune_on == 'folds' else _tuning_split(cfg, dataset, required=tune_on == 'val', say=say)
    check_choice(criterion, resamples, num_folds if split is None else None, len(dataset))
    return folds if split is None else replace(folds, val_set=split[0], val_cfg=split[1])


def _tuning_split(
    cfg: Config, dataset: BaseDataset, required: bool, say: Callable[[str], None]
) -> tuple[BaseDataset, Config] | None:
    """The ``val_dataloader``'s data set, with a config whose test set it is; None where it cannot serve."""
    if not required and (cfg.get('val_dataloader') is None or cfg.get('val_evaluator') is None):
        return None
    try:
        val_set = build_test_set(cfg, split='val')
    except ReevaluationError as error:
        if required:
            raise
        say(f'not tuned on val_dataloader, but by folds over the test set: {error}')
        return None
    common = len(set(_images(dataset)) & set(_images(val_set)))
    if common:
        if required:
            raise ReevaluationError(
                f'{common} of {len(val_set)} images of val_dataloader are test images too, and tuning on what is '
                'reported flatters; use --tune-on folds, or name another split (--cfg-options)'
            )
        return None
    if is_distributed():
        raise ReevaluationError(
            'a tuning split needs a second forward pass, and the other processes will be done; run --select without '
            'the launcher (candidates of the test set that are stored are found), or give --tune-on folds'
        )
    val_cfg = copy.deepcopy(cfg)
    val_cfg.test_dataloader, val_cfg.test_evaluator = cfg.val_dataloader, cfg.get('val_evaluator')
    return val_set, val_cfg


def _images(dataset: BaseDataset) -> list[str]:
    """What tells an image from others: its content, or its place where it is not on this machine's disk."""
    paths = [dataset.get_data_info(number)['img_path'] for number in range(len(dataset))]
    return [content or path for content, path in zip(content_of(paths), paths, strict=True)]


def choose(
    result: Reevaluation,
    plan: Plan,
    checkpoint: str | Path,
    work_dir: str | Path,
    *,
    processes: int | None = None,
    trust_checkpoint: bool = False,
    progress: Progress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Selection:
    """Choose among the rows of a re-evaluation, honestly (:mod:`mmdet_softnms.reevaluation.selection`).

    Args:
        result: of :func:`reevaluate`.
        plan: of :func:`plan_choice` with the same config.
        checkpoint, work_dir, processes, trust_checkpoint, progress, say: as of :func:`reevaluate`.

    Raises:
        ReevaluationError: there is no candidate to choose by.
    """
    session = result.session
    if not result.num_candidates:
        raise ReevaluationError(f'nothing can be chosen: {no_candidates(result.store)}')
    threads = processes or os.cpu_count() or 1
    matches = match_all(
        session.candidates, session.settings, session.truth, processes=processes,
        progress=functools.partial(progress, 'matching'),
    )  # fmt: skip
    tuning = None
    if plan.val_set is not None and plan.val_cfg is not None:
        truth = read_ground_truth(plan.val_cfg, plan.val_set)
        collected = collect(
            plan.val_cfg,
            checkpoint,
            min(setting.score_thr for setting in session.settings),
            Path(work_dir) / 'candidates',
            dataset=plan.val_set,
            trust_checkpoint=trust_checkpoint,
            progress=functools.partial(progress, 'forward pass on the tuning split, batches'),
            say=say,
        )
        found = match_all(collected.store.load(), session.settings, truth, processes=processes)
        tuning = found, Objects.of(truth)
    selection = select(
        session.settings,
        matches,
        Objects.of(session.truth),
        tuning=tuning,
        criterion=plan.criterion,
        num_folds=plan.num_folds,
        resamples=plan.resamples,
        threads=threads,
        progress=functools.partial(progress, 'bootstrap'),
    )
    for difference, row in zip(selection.settings, result.rows, strict=True):
        if abs(difference.value - row.metrics[plan.criterion]) > 1e-9:
            raise RuntimeError(
                f'{row.params}: {plan.criterion} is {row.metrics[plan.criterion]} by faster-coco-eval, but '
                f'{difference.value} by the matching of the bootstrap; please report this'
            )
    return selection


def no_candidates(store: str) -> str:
    """What to say where the network found nothing at all."""
    return (
        f'{store} holds not one candidate above the smallest score_thr; is this the checkpoint of this config, and did '
        'its training diverge?'
    )
