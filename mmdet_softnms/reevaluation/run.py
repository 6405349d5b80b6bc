"""Config and checkpoint to a table: candidates found or made, settings swept, the result in one object."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import mmdet
from filelock import FileLock, Timeout
from mmengine.config import Config
from mmengine.dist import get_dist_info, is_distributed

import mmdet_softnms
from mmdet_softnms.checkpoint import local_checkpoint
from mmdet_softnms.files import ReevaluationError, clear_temporaries, sha256
from mmdet_softnms.reevaluation.candidates.fingerprint import differences, execution_differences, fingerprint
from mmdet_softnms.reevaluation.candidates.forward import collect, start_processes
from mmdet_softnms.reevaluation.candidates.identity import code_of, digest
from mmdet_softnms.reevaluation.candidates.images import ImageReader, image_paths
from mmdet_softnms.reevaluation.candidates.plug import has_mask_head, plug
from mmdet_softnms.reevaluation.candidates.store import CandidateStore, Expected
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.reevaluation.result import Progress, Reevaluation, Session, no_candidates
from mmdet_softnms.reevaluation.scoring import evaluators as configured
from mmdet_softnms.reevaluation.scoring.metrics import GroundTruth, annotated_by, read_ground_truth
from mmdet_softnms.reevaluation.scoring.settings import Setting, default_settings, sweep_settings
from mmdet_softnms.reevaluation.scoring.sweep import Row, detections, evaluate_all


def reevaluate(
    cfg: Config,
    checkpoint: str | Path,
    *,
    work_dir: str | Path | None = None,
    score_thr: float = 1e-3,
    max_per_img: int = 100,
    min_score: float = 1e-3,
    class_agnostic: bool = False,
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
        checkpoint: its weights: a path, a URL, or whatever else mmengine's loader takes.
        work_dir: where candidates are stored, rows of an unfinished sweep are kept and mmengine logs; None: nowhere
            that stays. One run at a time may use it.
        score_thr, max_per_img: shared by the rows of the table; the config's own row keeps its own.
        min_score: of the soft rules.
        class_agnostic: boxes of different classes suppress each other, in every row but the config's own.
        sweep: instead of the default rows, see :func:`mmdet_softnms.reevaluation.scoring.settings.sweep_settings`.
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
    checkpoint = local_checkpoint(checkpoint, trust=trust_checkpoint)
    if sweep:
        settings = sweep_settings(sweep, cfg, score_thr, max_per_img, min_score, class_agnostic)
    else:
        settings = default_settings(cfg, score_thr, max_per_img, min_score, class_agnostic)
    start_processes(cfg.get('launcher', 'none'))
    if is_distributed() and work_dir is None:
        raise ReevaluationError('several processes need a work_dir that all of them see')
    with ExitStack() as stack:
        folder = Path(work_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        if get_dist_info()[0] == 0:
            stack.enter_context(only_run_in(folder))
        dataset = build_test_set(cfg, check_images=store is None)
        evaluators = configured.build_evaluators(cfg, dataset)
        truth = read_ground_truth(cfg, dataset, evaluators)
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
            used = _given_store(Path(store), fingerprint(cfg, checkpoint, dataset, floor), Expected.of(dataset), say)
        candidates = used.load()
        if candidates.img_ids != img_ids:
            raise ReevaluationError(f'the images of {used.folder} are not those of the test set in their order')
        rows = evaluate_all(
            candidates,
            settings,
            truth,
            work_dir=folder if work_dir else None,
            identity=_identity(used, truth, settings),
            processes=processes,
            on_row=on_row,
            say=say,
        )
    if get_dist_info()[0] != 0:
        return None
    infos = [dataset.get_data_info(number) for number in range(len(dataset))]
    paths = [image_paths(info) for info in infos]
    others = configured.others(
        evaluators,
        [part.metric for part in annotated_by(evaluators, dataset)],
        (sum(one['iscrowd'] for one in truth.coco['annotations']), truth.no_class_ignores),
        max((setting.max_per_img for setting in settings), key=lambda number: number if number > 0 else float('inf')),
    )
    reason = configured.too_many(len(settings), len(candidates), bool(sweep))
    if is_distributed():
        reason = 'left out with several processes; run again without the launcher, the candidates are stored'
    for other in others:
        other.why_not = other.why_not or reason
    configured.add_columns(
        others,
        rows,
        lambda number: detections(candidates, settings[number]),
        configured.data_samples(infos, candidates.shapes) if others else [],
        functools.partial(progress, 'configured evaluators'),
    )
    truth.notes += configured.notes(others, truth.voc is not None)
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
        session=Session(settings, candidates, truth, [(path or [''])[0] for path in paths], ImageReader(dataset)),
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
    clear_temporaries(work_dir)
    return lock


def _given_store(
    folder: Path, wanted: dict[str, Any], expected: Expected, say: Callable[[str], None]
) -> CandidateStore:
    store = CandidateStore.open(folder)
    another = 'give another store, or leave --store out'
    num_images = len(expected.img_ids)
    if store.num_images != num_images:
        raise ReevaluationError(f'{folder} holds {store.num_images} images but the test set {num_images}; {another}')
    have = store.fingerprint
    reason = differences({**have, 'score_floor': wanted['score_floor']}, wanted, elsewhere=True)
    if not reason and have['score_floor'] > wanted['score_floor']:
        raise ReevaluationError(
            f'{folder} holds candidates above {have["score_floor"]:g} only, and a score_thr of '
            f'{wanted["score_floor"]:g} is asked for; raise it, or leave --store out'
        )
    if reason:
        raise ReevaluationError(f'{folder} was made with another {reason} than what is given; {another}')
    if problems := store.check(expected):
        shard, problem = next(iter(problems.items()))
        raise ReevaluationError(
            f'{folder}: {len(problems)} of {store.num_shards} shards cannot be used ({store.path_of(shard).name} '
            f'{problem}); {another}'
        )
    if unknown := sorted({*have['unknown'], *wanted['unknown']}):
        say(f'{folder} is taken on your word: {", ".join(map(str, unknown[:3]))} cannot be compared')
    if how := execution_differences(have, wanted):
        say(f'{folder} was made with {how}')
    return store


def _identity(store: CandidateStore, truth: GroundTruth, settings: Sequence[Setting]) -> str | None:
    """What finished rows depend on: candidates, objects, rules, code, and what it computes with.

    None where the code of a rule cannot be told: written in a notebook, say.
    """
    package = Path(mmdet_softnms.__file__).parent
    files = {str(path.relative_to(package)): sha256(path) for path in sorted(package.rglob('*.py'))}
    libraries = [metadata.version(name) for name in ('numpy', 'numba', 'faster-coco-eval', 'torch')]
    rules = [setting.rule for setting in settings]
    code = code_of(*rules)
    if code.unknown:
        return None
    return digest(files, libraries, mmdet.__version__, store.fingerprint, truth, code.files, code.live)
