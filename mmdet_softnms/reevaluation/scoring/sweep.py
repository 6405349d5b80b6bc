"""Many settings over the same candidates: every core of the machine, every rank of a launcher, and nothing done twice.

Each finished row is appended to ``sweep-partial-RANK.jsonl`` in the work directory, so that an interrupted sweep goes
on where it stopped; the files are deleted once ``reevaluation.json`` holds all rows.
"""

import functools
import json
import math
import multiprocessing
import os
import pickle
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, barrier, broadcast_object_list, get_dist_info
from mmengine.structures import InstanceData

from mmdet_softnms.files import ReevaluationError
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
        processes: of this machine together; None: one a core, or none beside this one where there is little to do.
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
    for number, row in _run(_evaluate, candidates, settings, own, truth, processes, sharers):
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
    for number, found in _run(_match, candidates, settings, list(range(len(settings))), truth, processes):
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
) -> Iterator[tuple[int, Any]]:
    """Work on some settings, here or in processes, and yield results as they come; ``sharers``: ranks on this host."""
    if processes is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        processes = max(1, cores // sharers) if len(numbers) * len(candidates) >= _WORTH_PROCESSES else 1
    processes = min(processes, len(numbers))
    if processes <= 1:
        scorer = _Scorer(candidates, truth)
        for number in numbers:
            yield number, work(scorer, settings[number])
        return
    # Started anew, not forked: this process may hold CUDA, OpenMP threads and a data loader. The candidates are mapped.
    with tempfile.TemporaryDirectory(prefix='mmdet_softnms_') as folder:
        candidates.share(Path(folder))
        (Path(folder) / 'truth.pickle').write_bytes(pickle.dumps(truth))
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context('spawn'), _start_worker, (folder,))
        try:
            futures = {pool.submit(_work, work, settings[number]): number for number in numbers}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise ReevaluationError(
                'a process of the sweep died (out of memory?); finished rows are kept: run again, with --processes 1 '
                "if memory is short. A script of your own that calls this needs if __name__ == '__main__':"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: list[_Scorer] = []  # of a worker process: its one scorer


def _start_worker(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and says so once
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    torch.set_num_threads(1)
    truth = pickle.loads((Path(folder) / 'truth.pickle').read_bytes())
    _worker[:] = [_Scorer(Candidates.shared(Path(folder)), truth)]


def _end_with_parent(folder: str) -> None:
    """A killed parent closes nothing: its workers would wait for it for ever, and what they share would stay."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _work(work: Callable[[_Scorer, Setting], Any], setting: Setting) -> Any:
    return work(_worker[0], setting)
