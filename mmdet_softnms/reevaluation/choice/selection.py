"""Which setting to use, and what choosing it is worth: tuning on some images, reporting on others, with intervals.

Glossary: *setting* s, *image* i, *fold* f, *resample* b. ``weights[b, i]``: how often image i was drawn in b.

The best of 50 settings on some images is partly luck on those images. So settings are chosen on images other than
those they are scored on: on a split of its own, or fold by fold (for each fold the setting that is best on all other
folds; the detections of all folds are pooled and scored once). The interval comes from a paired bootstrap over images
(Efron and Tibshirani 1993, percentiles), and each resample goes through the whole procedure again, choice included:
it is the interval of the procedure, not of a setting somebody happened to like. An image drawn twice stays in its
fold.

Rules rescale scores, so what is pooled is ranked by places: each detection by its place among those of its class under
its own fold's setting on all images. That looks at no object, so it tells nothing of which setting is good; and where
all folds choose alike, the AP is that of the setting.

Detections are matched to objects once (:func:`match`), exactly as COCO does at all areas and 100 detections; what a
resample changes is only how much each image counts. With equal weights the AP is
faster-coco-eval's, which :func:`choose` checks every time.
"""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.candidates.forward import collect
from mmdet_softnms.reevaluation.choice.plan import TuningSplit
from mmdet_softnms.reevaluation.choice.resampling import bootstrap_weights, by_rank, pool_folds, weighted_ap
from mmdet_softnms.reevaluation.request import Listener, Request, check_choice
from mmdet_softnms.reevaluation.result import Reevaluation, no_candidates
from mmdet_softnms.reevaluation.scoring.matching import Matches, Objects
from mmdet_softnms.reevaluation.scoring.metrics import read_ground_truth
from mmdet_softnms.reevaluation.scoring.settings import Setting, baseline_in_words, baseline_of
from mmdet_softnms.reevaluation.scoring.sweep import match_all


@dataclass
class Difference:
    """A setting, or the whole procedure, against its baseline; points are in [-1, 1]."""

    name: str
    value: float
    baseline: float
    low: float  # 95 % interval of value - baseline
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass
class Selection:
    """What tuning gives, honestly.

    Attributes:
        criterion: what was chosen by.
        tuned_on: in words.
        procedure: the whole procedure against the baseline.
        settings: every setting against its baseline, all images of the report split; what tuning on the same images
            that are reported would claim is the best of these.
        chosen: position of the setting to use, chosen on all tuning images.
        chosen_by_fold: position by fold; empty where the tuning split is another.
        resamples: of the bootstrap.
    """

    criterion: str
    tuned_on: str
    procedure: Difference
    settings: list[Difference]
    chosen: int
    chosen_by_fold: list[int]
    resamples: int

    def to_dict(self) -> dict[str, Any]:
        """As ``reevaluation.json`` holds it."""
        return asdict(self) | dict(significant=self.procedure.significant)


def select(
    settings: Sequence[Setting],
    matches: Sequence[Matches],
    objects: Objects,
    *,
    tuning: tuple[Sequence[Matches], Objects] | None = None,
    criterion: str = 'AP',
    num_folds: int = 5,
    resamples: int = 1000,
    seed: int = 0,
    threads: int = 1,
    labels: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    pooled_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Selection:
    """Choose a setting and say what the choice is worth.

    Args:
        settings: what to choose from, each with a baseline of its group among them. The config's own row is reported,
            but never chosen: it is not of the grid.
        matches: of each setting on the images to report on.
        objects: of these images.
        tuning: matches and objects on a split of its own to tune on; None: k-fold over the images.
        criterion: one of :data:`CRITERIA`.
        num_folds: without a tuning split.
        resamples: of the bootstrap, at least 1,000.
        seed: of folds and resamples.
        threads: to use.
        labels: what the settings are called.
        progress: called with (settings done, settings in all).
        pooled_progress: without a tuning split, called after that with (choices of the folds scored, choices in all).

    Raises:
        ReevaluationError: too few images or resamples, an unknown criterion.
    """
    counts = objects.counts
    num_images = len(counts)
    check_choice(criterion, resamples, num_folds if tuning is None else None, num_images)
    random = np.random.default_rng(seed)
    folds = random.permutation(num_images) % num_folds
    weights = bootstrap_weights(num_images, resamples, seed + 1)
    baseline_numbers = [_baseline_number(setting, settings) for setting in settings]
    grid = np.array([number for number, setting in enumerate(settings) if setting.source != 'config'])
    run = functools.partial(_in_threads, threads=threads, progress=progress)
    with_folds = num_folds if tuning is None else 0
    jobs = [functools.partial(weighted_ap, one, counts, weights, folds, with_folds, criterion) for one in matches]
    if tuning is not None:
        tuning_matches, tuning_counts = tuning[0], tuning[1].counts
        tuning_weights = bootstrap_weights(len(tuning_counts), resamples, seed + 2)
        nowhere = np.zeros(len(tuning_counts), np.int64)
        jobs += [
            functools.partial(weighted_ap, one, tuning_counts, tuning_weights, nowhere, 0, criterion)
            for one in tuning_matches
        ]
    values = run(jobs)
    report = np.stack([value[:, -1] for value in values[: len(settings)]], 1)  # (B + 1, S), all images
    names = list(labels or (setting.name for setting in settings))
    each = [
        _difference(name, report[:, number], report[:, baseline_numbers[number]]) for number, name in enumerate(names)
    ]
    if tuning is not None:
        tuned = np.stack([value[:, -1] for value in values[len(settings) :]], 1)
        best = grid[tuned[:, grid].argmax(1)]
        rows = np.arange(resamples + 1)
        procedure = _difference('procedure', report[rows, best], report[rows, np.array(baseline_numbers)[best]])
        return Selection(criterion, 'a split of its own', procedure, each, int(best[0]), [], resamples)
    without = np.stack([value[:, :-1] for value in values], 2)  # (B + 1, folds, S)
    best = grid[without[:, :, grid].argmax(2)]  # (B + 1, folds)
    ranked = [by_rank(one) for one in matches]
    pooled = _pooled_ap(ranked, best, objects, weights, folds, criterion, threads, pooled_progress)
    pooled_baseline = _pooled_ap(ranked, np.array(baseline_numbers)[best], objects, weights, folds, criterion, threads)
    return Selection(
        criterion,
        f'{num_folds}-fold over images',
        _difference('procedure', pooled, pooled_baseline),
        each,
        int(grid[report[0, grid].argmax()]),
        best[0].tolist(),
        resamples,
    )


def _pooled_ap(
    matches: Sequence[Matches],
    best: np.ndarray,
    objects: Objects,
    weights: np.ndarray,
    folds: np.ndarray,
    criterion: str,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """(B + 1,) AP of pooled out-of-fold detections; resamples that chose alike are scored together.

    ``matches``: whose scores can be ranked together (:func:`by_rank`).
    """
    result = np.empty(len(best))
    choices, which = np.unique(best, axis=0, return_inverse=True)
    which = which.reshape(-1)

    def job(number: int) -> np.ndarray:
        pooled = pool_folds(matches, choices[number].tolist(), folds, objects.image_order)
        return weighted_ap(pooled, objects.counts, weights[which == number], folds, 0, criterion)[:, -1]

    jobs = [functools.partial(job, number) for number in range(len(choices))]
    for number, values in enumerate(_in_threads(jobs, threads, progress)):
        result[which == number] = values
    return result


def _in_threads(
    jobs: Sequence[Callable[[], np.ndarray]],
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[np.ndarray]:
    """Results of all jobs in order; the kernels let go of the interpreter's lock."""
    results = []
    with ThreadPoolExecutor(threads) as pool:
        for done, result in enumerate(pool.map(lambda job: job(), jobs), 1):
            results.append(result)
            progress(done, len(jobs))
    return results


def _baseline_number(setting: Setting, settings: Sequence[Setting]) -> int:
    baseline = baseline_of(setting, settings)
    if baseline is None:
        words = baseline_in_words(settings)
        raise ReevaluationError(f'there is no {words} with score_thr, max_per_img of {setting.group[:2]}')
    return next(number for number, other in enumerate(settings) if other is baseline)


def _difference(name: str, values: np.ndarray, baseline: np.ndarray) -> Difference:
    low, high = np.percentile(values[1:] - baseline[1:], [2.5, 97.5])
    return Difference(name, float(values[0]), float(baseline[0]), float(low), float(high))


def choose(
    request: Request, result: Reevaluation, split: TuningSplit | None, folder: Path, listener: Listener
) -> Selection:
    """Choose among the rows of a re-evaluation, honestly (:mod:`mmdet_softnms.reevaluation.choice.selection`).

    Args:
        request: what was asked, with a ``select``.
        result: its rows.
        split: of :func:`mmdet_softnms.reevaluation.choice.plan.plan_choice`.
        folder: for the candidates of the split.
        listener: hears of the progress.

    Raises:
        ReevaluationError: there is no candidate to choose by.
    """
    if not result.num_candidates:
        raise ReevaluationError(f'nothing can be chosen: {no_candidates(result.store)}')
    settings, session = result.settings, result.session
    matches = match_all(
        session.candidates, settings, session.truth, processes=request.processes, progress=listener.bar('matching')
    )
    tuning = None
    if split is not None:
        truth = read_ground_truth(split.cfg, split.dataset)
        collected = collect(
            split.cfg,
            request.checkpoint,
            request.score_floor,
            folder / 'candidates',
            dataset=split.dataset,
            trust_checkpoint=request.trust_checkpoint,
            progress=listener.bar('forward pass on the tuning split, batches'),
            say=listener.say,
        )
        found = match_all(
            collected.store.load().of_views(request.views),
            settings,
            truth,
            processes=request.processes,
            progress=listener.bar('matching on the tuning split'),
        )
        tuning = found, Objects.of(truth)
    assert request.select is not None
    selection = select(
        settings,
        matches,
        Objects.of(session.truth),
        tuning=tuning,
        criterion=request.select,
        num_folds=request.folds,
        resamples=request.resamples,
        threads=request.processes or os.cpu_count() or 1,
        progress=listener.bar('bootstrap'),
        pooled_progress=listener.bar('bootstrap of the choice'),
    )
    for difference, row in zip(selection.settings, result.rows, strict=True):
        if abs(difference.value - row.metrics[request.select]) > 1e-9:
            raise RuntimeError(
                f'{row.params}: {request.select} is {row.metrics[request.select]} by faster-coco-eval, but '
                f'{difference.value} by the matching of the bootstrap; please report this'
            )
    return selection
