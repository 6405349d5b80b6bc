"""Many settings over the same candidates: every core of the machine, every rank of a launcher, and nothing done twice.

joblib runs the settings in processes of this machine, or wherever ``joblib.parallel_config`` says: on a Dask or Ray
cluster, for example. Each finished row is appended to ``sweep-partial-RANK.jsonl`` in the work directory, so that an
interrupted sweep goes on where it stopped; the files are deleted once ``reevaluation.json`` holds all rows.
"""

import functools
import json
import math
import os
import pickle
import platform
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from mmengine.dist import all_gather_object, barrier, broadcast_object_list, get_dist_info
from mmengine.structures import InstanceData

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.ops import weights
from mmdet_softnms.post_process import suppress
from mmdet_softnms.reevaluation.candidates.identity import digest
from mmdet_softnms.reevaluation.candidates.store import Candidates, ImageCandidates
from mmdet_softnms.reevaluation.scoring.matching import Matches, Objects, match
from mmdet_softnms.reevaluation.scoring.metrics import AP_NAMES, COCO_STATS, RECALLS, Evaluator, GroundTruth
from mmdet_softnms.reevaluation.scoring.settings import Setting

#: Below so many image evaluations (15 to 30 s), starting processes costs more than it saves.
_WORTH_PROCESSES = 20_000
_LARGEST_PARTIAL = 1 << 30  # bytes


@dataclass
class Row:
    """What a setting scores; metrics in [0, 1], unrounded, -1 where undefined."""

    setting: Setting
    metrics: dict[str, float]
    seconds: float  # spent on suppression, all images together
    metric_seconds: float  # spent on scoring
    per_class: dict[str, float]  # AP of every class with an object
    precision: dict[str, list[float]]  # per IoU threshold: mean precision over classes at recall 0, 0.01, ... 1

    @property
    def rule(self) -> str:
        """Name of the rule."""
        return self.setting.name

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the rule, with the thresholds around it."""
        return self.setting.params

    @property
    def source(self) -> str:
        """``'table'`` or ``'config'``."""
        return self.setting.source

    def to_dict(self) -> dict[str, Any]:
        """As files hold it."""
        measured = {one.name: getattr(self, one.name) for one in fields(self) if one.name != 'setting'}
        return dict(rule=self.rule, params=self.params, source=self.source, **measured)


def detections(images: Iterable[ImageCandidates], setting: Setting) -> list[InstanceData]:
    """Detections of every image under a setting, by the same function a live model uses."""
    found = (suppress(image.candidates, setting.rule, setting.score_thr, setting.max_per_img) for image in images)
    return [InstanceData(**one._asdict()) for one in found]


def evaluate(candidates: Sequence[ImageCandidates], setting: Setting, evaluator: Evaluator) -> Row:
    """Suppress the candidates of every image and score the detections."""
    start = time.perf_counter()
    results = detections(candidates, setting)
    suppressed = time.perf_counter()
    scores = evaluator(results)
    scored = time.perf_counter()
    return Row(setting, scores.metrics, suppressed - start, scored - suppressed, scores.per_class, scores.precision)


def evaluate_all(
    candidates: Candidates,
    settings: Sequence[Setting],
    truth: GroundTruth,
    *,
    work_dir: Path | None = None,
    identity: str | None = '',
    processes: int | None = None,
    on_row: Callable[[Row, int, int], None] = lambda row, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Rows of all settings, in their order, on every process.

    Args:
        candidates: of the whole test set.
        settings: what to apply.
        truth: the ground truth of the same images.
        work_dir: where finished rows are kept until all are there; None: nowhere.
        identity: of candidates, ground truth and code; kept rows of another are not used. None: it cannot be told, so
            no row is kept.
        processes: of this machine together; None: what ``joblib.parallel_config`` says where it is used, else one a
            core, or this one alone where there is little to do.
        on_row: called with (row, rows done, rows in all) of this rank after each row.
        say: called with one line about each file of kept rows that cannot be read.
    """
    rank, world_size = get_dist_info()
    work_dir = work_dir if identity is not None else None
    done: list[Any] = [_read_partial(work_dir, identity, settings, say) if work_dir and rank == 0 else {}]
    broadcast_object_list(done)
    rows: dict[int, Row] = done[0]
    own = [number for number in range(len(settings)) if number not in rows][rank::world_size]
    partial = work_dir / f'sweep-partial-{rank}.jsonl' if work_dir else None
    if partial and own:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial = None if partial.is_dir() else partial  # that was said above
    for number, row in rows.items():
        on_row(row, number + 1, len(settings))
    finished = len(rows)
    mine = {}
    sharers = all_gather_object(platform.node()).count(platform.node())  # ranks on this machine
    with closing(_run(_evaluate, candidates, settings, own, truth, processes, sharers)) as results:
        for number, row in results:
            mine[number] = row
            if partial:
                _append(partial, dict(identity=identity, setting=_key(settings[number]), row=row.to_dict()))
            finished += 1
            on_row(row, finished, len(rows) + len(own))
    barrier()
    for part in all_gather_object(mine):
        rows |= part
    for number, row in rows.items():
        row.setting = settings[number]  # not the copy that came back from another process
    return [rows[number] for number in range(len(settings))]


def forget_partial(work_dir: Path) -> None:
    """Delete the kept rows of a sweep that is complete."""
    for path in work_dir.glob('sweep-partial-*.jsonl'):
        if not path.is_dir():
            path.unlink(missing_ok=True)


def _key(setting: Setting) -> str:
    """What tells a setting from others: the whole rule, also what it does not list among its parameters."""
    return digest(setting.source, setting.params, type(setting.rule), vars(setting.rule))


def _append(path: Path, content: dict[str, Any]) -> None:
    line = f'\n{json.dumps(content)}\n'.encode()  # begun anew, should the last line be one that a kill cut
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)


def _read_partial(
    work_dir: Path, identity: str | None, settings: Sequence[Setting], say: Callable[[str], None]
) -> dict[int, Row]:
    numbers = {_key(setting): number for number, setting in enumerate(settings)}
    rows = {}
    for path in sorted(work_dir.glob('sweep-partial-*.jsonl')):
        try:
            if not path.is_file() or path.stat().st_size > _LARGEST_PARTIAL:
                raise OSError('it is not a file, or too large')
            lines = path.read_bytes().split(b'\n')
        except OSError as error:
            say(f'{path} is ignored: {error}')
            continue
        ignored = 0
        for line in filter(None, lines):
            try:
                content = json.loads(line)
                if content['identity'] == identity and content['setting'] in numbers:
                    number = numbers[content['setting']]
                    rows[number] = _row(content['row'], settings[number])
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                ignored += 1  # a line that a kill cut, or anything else
        if ignored:
            say(f'{path}: {ignored} lines are not finished rows and are ignored')
    return rows


def _row(content: dict[str, Any], setting: Setting) -> Row:
    """A row as a file holds it.

    Raises:
        TypeError, ValueError, KeyError: it is not a row of that setting.
    """
    about = content.pop('rule'), content.pop('source'), content.pop('params')
    row = Row(setting, **content)
    if about != (setting.name, setting.source, _plain(setting.params)):
        raise ValueError('it is of another setting')
    numbers = [row.seconds, row.metric_seconds, *row.metrics.values(), *row.per_class.values()]
    numbers += [value for curve in row.precision.values() for value in curve]
    if any(isinstance(value, bool) or not math.isfinite(value) for value in numbers):
        raise ValueError('not every number is finite')
    if not {*COCO_STATS, *AP_NAMES} <= set(row.metrics) or any(not -1 <= each <= 1 for each in row.metrics.values()):
        raise ValueError('metrics are missing or out of range')
    if any(len(curve) != len(RECALLS) for curve in row.precision.values()):
        raise ValueError('a curve is cut')
    return row


def _plain(params: dict[str, Any]) -> Any:
    return json.loads(json.dumps(params, default=repr))


def match_all(
    candidates: Candidates,
    settings: Sequence[Setting],
    truth: GroundTruth,
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Matches]:
    """Detections of every setting matched to the objects, for choosing one; arguments as in :func:`evaluate_all`."""
    matches = {}
    with closing(_run(_match, candidates, settings, list(range(len(settings))), truth, processes)) as results:
        for number, found in results:
            matches[number] = found
            progress(len(matches), len(settings))
    return [matches[number] for number in range(len(settings))]


class _Scorer:
    """What a process needs to work on settings; each part made when it is first used."""

    def __init__(self, candidates: Candidates, truth: GroundTruth) -> None:
        self.candidates, self.truth = candidates, truth

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.truth)

    @functools.cached_property
    def objects(self) -> Objects:
        return Objects.of(self.truth)


def _evaluate(scorer: _Scorer, setting: Setting) -> Row:
    return evaluate(scorer.candidates, setting, scorer.evaluator)


def _match(scorer: _Scorer, setting: Setting) -> Matches:
    return match(detections(scorer.candidates, setting), scorer.objects)


def _run(
    work: Callable[[_Scorer, Setting], Any],
    candidates: Candidates,
    settings: Sequence[Setting],
    numbers: list[int],
    truth: GroundTruth,
    processes: int | None,
    sharers: int = 1,
) -> Generator[tuple[int, Any], None, None]:
    """Work on some settings, here or in processes, and yield results as they come; ``sharers``: ranks on this host."""
    configured = joblib.effective_n_jobs(None)  # above 1 inside the caller's joblib.parallel_config
    is_local = processes is not None or configured <= 1
    if processes is None and is_local:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        processes = max(1, cores // sharers) if len(numbers) * len(candidates) >= _WORTH_PROCESSES else 1
    processes = min(processes or configured, len(numbers))
    if processes <= 1:
        scorer = _Scorer(candidates, truth)
        for number in numbers:
            yield number, work(scorer, settings[number])
        return
    parent = os.getpid() if is_local else None  # processes of a cluster are not ours to end
    shared = _share(candidates, truth)
    calls = [joblib.delayed(_work)(work, number, settings[number], parent, *shared) for number in numbers]
    results = _unordered(calls, processes)
    try:
        for result in results:  # noqa: UP028  (yield from would close them itself, with the warnings)
            yield result
    except BrokenProcessPool as error:
        raise ReevaluationError(
            'a process of the sweep died (out of memory?); finished rows are kept: run again, with --processes 1 '
            'if memory is short'
        ) from error
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # joblib's, about the settings that are not finished
            results.close()


def _unordered(calls: list[Any], processes: int) -> Generator[Any, None, None]:
    """Results as they come, or, where the backend cannot do that, of as many calls at a time as there are processes."""
    # Copy-on-write, because torch does not like arrays that it may not write to.
    options: dict[str, Any] = dict(n_jobs=processes, batch_size=1, pre_dispatch='all', mmap_mode='c')
    try:
        parallel = joblib.Parallel(return_as='generator_unordered', **options)
    except ValueError:  # Ray's backend can only return lists
        with joblib.Parallel(**options) as parallel:
            for first in range(0, len(calls), processes):
                yield from parallel(calls[first : first + processes])
    else:
        yield from parallel(calls)


def _share(candidates: Candidates, truth: GroundTruth) -> list[Any]:
    """The arguments of :func:`_work` that every setting needs.

    Arrays, the pickle itself being one: joblib maps large ones into the memory of processes on this machine, and a
    cluster's backend sends each of them once, not with every setting.
    """
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps((candidates, truth), protocol=5, buffer_callback=buffers.append)
    # A process that is started anew knows only the rules that the package itself registers.
    added = [weight for weight in weights.WEIGHTS.values() if weight.function.__module__ != weights.__name__]
    return [uuid.uuid4().hex, added, np.frombuffer(content, np.uint8), *(np.asarray(each.raw()) for each in buffers)]


_of_thread = threading.local()  # of a worker: the scorer of the sweep that it works for; Dask's have several threads
_is_watched: list[int] = []  # the process whose end ends this one


def _work(
    work: Callable[[_Scorer, Setting], Any],
    number: int,
    setting: Setting,
    parent: int | None,
    sweep: str,
    added: list[weights.Weight],
    content: np.ndarray,
    *buffers: np.ndarray,
) -> tuple[int, Any]:
    if parent is not None and not _is_watched:
        _is_watched.append(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and says so once
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
        torch.set_num_threads(1)
    if getattr(_of_thread, 'sweep', None) != sweep:
        weights.WEIGHTS.update({weight.name: weight for weight in added})
        buffers = tuple(each if each.flags.writeable else each.copy() for each in buffers)  # Ray's are not
        _of_thread.sweep, _of_thread.scorer = sweep, _Scorer(*pickle.loads(content.data, buffers=buffers))
    return number, work(_of_thread.scorer, setting)


def _end_with_parent(parent: int) -> None:
    """A killed parent ends nothing: its workers would wait for it for ever, and what they share would stay."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
