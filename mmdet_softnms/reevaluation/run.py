"""Config and checkpoint to a table: candidates found or made, settings swept, the result in one object."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import mmdet
from filelock import FileLock, Timeout
from mmengine.dataset import BaseDataset
from mmengine.dist import get_dist_info, is_distributed

import mmdet_softnms
from mmdet_softnms.files import ReevaluationError, clear_temporaries, sha256
from mmdet_softnms.ops import weights
from mmdet_softnms.reevaluation.candidates.fingerprint import differences, execution_differences, fingerprint
from mmdet_softnms.reevaluation.candidates.forward import Collected, collect, start_processes
from mmdet_softnms.reevaluation.candidates.identity import code_of, digest
from mmdet_softnms.reevaluation.candidates.images import ImageReader, image_paths
from mmdet_softnms.reevaluation.candidates.plug import has_mask_head
from mmdet_softnms.reevaluation.candidates.store import CandidateStore, Expected
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.reevaluation.candidates.views import in_words
from mmdet_softnms.reevaluation.choice.plan import plan_choice
from mmdet_softnms.reevaluation.choice.selection import Selection, choose
from mmdet_softnms.reevaluation.report.why import errors_of
from mmdet_softnms.reevaluation.request import Listener, Request
from mmdet_softnms.reevaluation.result import Reevaluation, Session, no_candidates
from mmdet_softnms.reevaluation.scoring import evaluators as configured
from mmdet_softnms.reevaluation.scoring.metrics import GroundTruth, annotated_by, read_ground_truth
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import Row, detections, evaluate_all


def reevaluate(
    request: Request,
    listener: Listener | None = None,
    report: Callable[[Reevaluation, Selection | None], None] = lambda result, selection: None,
) -> Reevaluation | None:
    """Read, collect candidates, score every setting, choose one if that is asked, and report.

    The network runs once, and not at all where the work directory or the request's ``store`` holds the candidates.

    Args:
        request: what is asked.
        listener: hears what is going on.
        report: called last with the result and the selection, while no other run may use the work directory.

    Returns:
        The result, baseline first; None on every process but the main one.

    Raises:
        ReevaluationError, CheckpointError: the input cannot be used, or another run is at work in the work directory.
        OSError: no space or no permission; finished shards and rows are kept for the next run.
    """
    listener = listener or Listener()
    cfg, settings = request.cfg, request.settings
    start_processes(cfg.get('launcher', 'none'))
    if is_distributed() and request.work_dir is None:
        raise ReevaluationError('several processes need a work_dir that all of them see')
    is_main = get_dist_info()[0] == 0
    with ExitStack() as stack:
        folder = Path(request.work_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        if is_main:
            stack.enter_context(only_run_in(folder))
        dataset = build_test_set(cfg, check_images=request.store is None)
        split = plan_choice(request, dataset, listener) if request.select and is_main else None
        evaluators = configured.build_evaluators(cfg, dataset)
        truth = read_ground_truth(cfg, dataset, evaluators)
        collected = _collect(request, folder, dataset, listener)
        candidates = collected.store.load()
        if candidates.img_ids != [dataset.get_data_info(number)['img_id'] for number in range(len(dataset))]:
            raise ReevaluationError(
                f'the images of {collected.store.folder} are not those of the test set in their order'
            )
        candidates = candidates.of_views(request.views)
        rows = evaluate_all(
            candidates,
            settings,
            truth,
            work_dir=folder if request.work_dir else None,
            identity=_identity(collected.store, truth, settings, request.views),
            processes=request.processes,
            on_row=listener.on_row,
            say=listener.say,
        )
        if not is_main:
            return None
        session = Session(candidates, truth, *_images(dataset))
        _add_configured(request, dataset, evaluators, session, rows, listener)
        result = _result(request, dataset, collected, session, rows)
        selection = choose(request, result, split, folder, listener) if request.select else None
        result.errors = errors_of(result, selection)
        report(result, selection)
    return result


def _collect(request: Request, folder: Path, dataset: BaseDataset, listener: Listener) -> Collected:
    """The candidates that the request needs, from its store or from the network."""
    if request.store is not None:
        wanted = fingerprint(request.cfg, request.checkpoint, dataset, request.score_floor)
        return Collected(_given_store(Path(request.store), wanted, Expected.of(dataset), listener.say), 0, 0.0)
    return collect(
        request.cfg,
        request.checkpoint,
        request.score_floor,
        folder / 'candidates',
        dataset=dataset,
        work_dir=request.work_dir,
        trust_checkpoint=request.trust_checkpoint,
        progress=listener.bar('forward pass, batches'),
        say=listener.say,
    )


def _images(dataset: BaseDataset) -> tuple[list[str], ImageReader]:
    paths = (image_paths(dataset.get_data_info(number)) for number in range(len(dataset)))
    return [(path or [''])[0] for path in paths], ImageReader(dataset)


def _add_configured(
    request: Request,
    dataset: BaseDataset,
    evaluators: configured.Evaluators,
    session: Session,
    rows: list[Row],
    listener: Listener,
) -> None:
    """The numbers of the configured evaluators where they are others than ours, and what there is to say of them."""
    candidates, truth, settings = session.candidates, session.truth, request.settings
    others = configured.others(
        evaluators,
        [part.metric for part in annotated_by(evaluators, dataset)],
        (sum(one['iscrowd'] for one in truth.coco['annotations']), truth.no_class_ignores),
        max((setting.max_per_img for setting in settings), key=lambda number: number if number > 0 else float('inf')),
    )
    reason = configured.too_many(len(settings), len(candidates), bool(request.sweep))
    if is_distributed():
        reason = 'left out with several processes; run again without the launcher, the candidates are stored'
    for other in others:
        other.why_not = other.why_not or reason
    infos = [dataset.get_data_info(number) for number in range(len(dataset))] if others else []
    configured.add_columns(
        others,
        rows,
        lambda number: detections(candidates, settings[number]),
        configured.data_samples(infos, candidates.shapes, truth.box_dim) if others else [],
        listener.bar('configured evaluators'),
    )
    truth.notes += configured.notes(others, truth.voc is not None, truth.box_dim)


def _result(
    request: Request, dataset: BaseDataset, collected: Collected, session: Session, rows: list[Row]
) -> Reevaluation:
    store, candidates = collected.store, session.candidates
    notes = list(session.truth.notes)
    if views := request.cfg.get('softnms_views'):
        notes.append(f'Candidates are those of {in_words(views)}, suppressed once.')
    if not candidates.num_candidates:
        notes.append(no_candidates(str(store.folder)))
    return Reevaluation(
        dataset=f'{type(dataset).__name__} {getattr(dataset, "ann_file", "")}'.strip(),
        num_images=len(candidates),
        num_candidates=candidates.num_candidates,
        masks_left_out=has_mask_head(request.cfg),
        store=str(store.folder),
        store_bytes=store.num_bytes if store.folder.is_dir() else 0,
        forward_images=collected.forward_images,
        forward_seconds=collected.forward_seconds,
        rows=rows,
        notes=notes,
        session=session,
        checkpoint_sha256=store.fingerprint['checkpoint'],
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


def _identity(
    store: CandidateStore, truth: GroundTruth, settings: Sequence[Setting], views: Sequence[int]
) -> str | None:
    """What finished rows depend on: candidates, objects, rules, code, and what it computes with.

    None where the code of a rule cannot be told: written in a notebook, say.
    """
    package = Path(mmdet_softnms.__file__).parent
    files = {str(path.relative_to(package)): sha256(path) for path in sorted(package.rglob('*.py'))}
    libraries = [metadata.version(name) for name in ('numpy', 'numba', 'faster-coco-eval', 'torch')]
    rules = [setting.rule for setting in settings]
    code = code_of(*rules, *(weight.function for weight in weights.WEIGHTS.values()))
    if code.unknown:
        return None
    return digest(files, libraries, mmdet.__version__, store.fingerprint, truth, code.files, code.live, list(views))
