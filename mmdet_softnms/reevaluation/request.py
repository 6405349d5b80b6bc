"""What is asked of a re-evaluation, made and checked in one place, from the command line or from Python."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.locate import local_checkpoint
from mmdet_softnms.reevaluation.candidates.plug import box_dim_of, plug
from mmdet_softnms.reevaluation.candidates.views import with_views
from mmdet_softnms.reevaluation.scoring.metrics import CRITERIA
from mmdet_softnms.reevaluation.scoring.settings import (
    DEFAULT_SWEEP,
    ROTATED_SWEEP,
    Setting,
    default_settings,
    sweep_settings,
)


def _ignore(*_: Any) -> None:
    """The callback where none is given."""


@dataclass
class Listener:
    """Callbacks that follow a re-evaluation.

    Attributes:
        progress: called with the name of a step, how much of it is done, and how much there is.
        on_row: called with a finished row, rows done, and rows in all.
        say: called with one line about every store that is used, taken up, or mended.
    """

    progress: Callable[[str, int, int], None] = _ignore
    on_row: Callable[[Any, int, int], None] = _ignore
    say: Callable[[str], None] = _ignore

    def bar(self, what: str) -> Callable[[int, int], None]:
        """``progress`` of one step: called with (done, total)."""
        return lambda done, total: self.progress(what, done, total)


@dataclass(frozen=True)
class Request:
    """One question to a detector: what would every other suppression have given?

    Attributes:
        cfg: any mmdet config of a supported detector; not changed.
        checkpoint: its weights: a path, a URL, or whatever else mmengine's loader takes; afterwards the local file.
        work_dir: where candidates are stored, rows of an unfinished sweep are kept and mmengine logs; None: nowhere
            that stays. One run at a time may use it.
        score_thr, max_per_img: shared by the rows of the table; the config's own row keeps its own.
        min_score: of the soft rules.
        class_agnostic: boxes of different classes suppress each other, in every row but the config's own.
        sweep: instead of the default rows, see :func:`mmdet_softnms.reevaluation.scoring.settings.sweep_settings`.
        store: a store made elsewhere, used as it is; None: the one in the work directory.
        processes: of this machine for the sweep; None: those of ``joblib.parallel_config`` inside one, else as many as
            are worth starting.
        trust_checkpoint: see :func:`mmdet_softnms.checkpoint.load_checkpoint`.
        select: choose a setting by this metric, one of :data:`CRITERIA`; None: choose nothing.
        folds: of the choice, where there is no tuning split.
        resamples: of its bootstrap, at least 1,000.
        tune_on: 'val': tune on the config's ``val_dataloader``, which costs a forward pass over it; 'folds': k-fold
            over the test set; 'auto': 'val' where it can be read and shares no image with the test set, else 'folds'.
        tta: re-evaluate the union of the views of the config's ``tta_pipeline``.
        scales: re-evaluate the union of these scales, as ``'480x800'``; with ``flip`` each flipped, too.
        views: only those views of them, by number from 0 in the order of the pipeline; empty: all.
        settings: what is scored; follows from the others.

    Raises:
        ReevaluationError: the detector cannot be plugged, a setting is out of range or unknown, or the choice cannot be
            made so.
        CheckpointError: there is no such checkpoint.
    """

    cfg: Config
    checkpoint: str | Path
    work_dir: str | Path | None = None
    score_thr: float = 1e-3
    max_per_img: int = 100
    min_score: float = 1e-3
    class_agnostic: bool = False
    sweep: tuple[str, ...] = ()
    store: str | Path | None = None
    processes: int | None = None
    trust_checkpoint: bool = False
    select: str | None = None
    folds: int = 5
    resamples: int = 1000
    tune_on: str = 'auto'
    tta: bool = False
    scales: tuple[str, ...] = ()
    flip: bool = False
    views: tuple[int, ...] = ()
    settings: tuple[Setting, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # as a frozen dataclass does it itself
        set_(self, 'cfg', with_views(self.cfg, self.tta, self.scales, self.flip, self.views))
        plug(self.cfg, 0.0)  # before anything slow: is this a detector that can be plugged?
        if self.select is not None:
            check_choice(self.select, self.resamples)
        if self.tune_on not in ('auto', 'val', 'folds'):
            raise ReevaluationError(f'--tune-on takes auto, val or folds, got {self.tune_on}')
        thresholds = self.score_thr, self.max_per_img, self.min_score, self.class_agnostic
        usual = ROTATED_SWEEP if box_dim_of(self.cfg) == 5 else DEFAULT_SWEEP
        sweep = tuple(self.sweep) or (usual if self.select else ())
        settings = sweep_settings(sweep, self.cfg, *thresholds) if sweep else default_settings(self.cfg, *thresholds)
        set_(self, 'sweep', sweep)
        set_(self, 'settings', tuple(settings))
        set_(self, 'checkpoint', Path(local_checkpoint(self.checkpoint, trust=self.trust_checkpoint)))

    @property
    def score_floor(self) -> float:
        """Candidates above it are needed."""
        return min(setting.score_thr for setting in self.settings)


def check_choice(criterion: str, resamples: int, num_folds: int | None = None, num_images: int | None = None) -> None:
    """Raise a ReevaluationError for a choice that cannot be made.

    ``num_folds``: None where there is a tuning split, or it is not known yet; else ``num_images`` are divided.
    """
    if criterion not in CRITERIA:
        raise ReevaluationError(f'--select takes {", ".join(CRITERIA)}, got {criterion}')
    if resamples < 1000:
        raise ReevaluationError(f'a bootstrap of {resamples} resamples says little; give at least 1000')
    if num_folds is None or num_images is None:
        return
    if num_images < 2:
        raise ReevaluationError('a single image cannot be divided into folds: nothing to choose on and report on')
    if not 2 <= num_folds <= num_images:
        raise ReevaluationError(f'{num_folds} folds of {num_images} images are not possible; give 2 to {num_images}')
