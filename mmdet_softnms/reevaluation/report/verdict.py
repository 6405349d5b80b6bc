"""What to do after a choice, in one sentence, with the lines to paste and what to try next."""

import dataclasses
import inspect
import itertools
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.ops import weights
from mmdet_softnms.reevaluation.choice.selection import Selection
from mmdet_softnms.reevaluation.report.table import baseline_row, telling_label
from mmdet_softnms.reevaluation.result import Reevaluation
from mmdet_softnms.reevaluation.scoring.settings import (
    Setting,
    baseline_in_words,
    config_of,
    method_of,
    paste_block,
    swept_params,
    varied_thresholds,
)
from mmdet_softnms.reevaluation.scoring.sweep import Row
from mmdet_softnms.registry import TASK_UTILS, build_rule, resolve
from mmdet_softnms.rules import HardNMS, MmcvNMS, RotatedSoftNMS, Rule, SoftNMS

_WIDTH = 79


@dataclass(frozen=True)
class Verdict:
    """What a selection comes to.

    Attributes:
        sentence: ``'use SoftNMS gaussian sigma=1: +1.49 AP [+1.04, +1.91]'``, ``'keep hard NMS: ...'`` or
            ``'keep nms iou_threshold=0.7 (config): ...'``; differences in points, with the 95 % interval of the whole
            procedure.
        row: position of the row whose setting is to be used.
    """

    sentence: str
    row: int


def verdict_of(selection: Selection, rows: Sequence[Row]) -> Verdict:
    """Whether to use what was chosen.

    Only a difference from hard NMS whose interval leaves zero out is a reason to change anything, and none is where the
    config's own setting scores as well on the same images.
    """
    worth, chosen = selection.procedure, selection.chosen
    label, criterion = telling_label(rows[chosen], rows), selection.criterion
    gain = f'{100 * (worth.value - worth.baseline):+.2f} {criterion} [{100 * worth.low:+.2f}, {100 * worth.high:+.2f}]'
    own = len(rows) - 1  # the config's is the last row
    baseline = baseline_row(rows[chosen], rows)
    hard = next(number for number, row in enumerate(rows) if row is baseline)
    keep = 'keep' if _is_hard(rows[own].setting) else 'use'
    if chosen == hard:
        return Verdict(f'{keep} hard NMS: none of the settings tried scores better', hard)
    if not worth.significant:
        return Verdict(f'{keep} hard NMS: no significant difference, {gain}', hard)
    if worth.high < 0:
        return Verdict(f'{keep} hard NMS: the tuned suppression is worse, {gain}', hard)
    if selection.settings[own].value >= selection.settings[chosen].value:
        setting = f'{telling_label(rows[own], rows)}: {100 * selection.settings[own].value:.2f} {criterion}'
        return Verdict(f'keep {setting}; none of the settings tried scores better', own)
    return Verdict(f'use {label}: {gain}', chosen)


def selection_text(selection: Selection, result: Reevaluation, cfg: Config, *, paste_anyway: bool = False) -> str:
    """The verdict in the first line, then how it came about, and the config to paste.

    Args:
        selection: what was chosen.
        result: the rows.
        cfg: of the detector.
        paste_anyway: the lines to paste are those of the setting that was chosen, whatever the verdict.
    """
    sentence = verdict_of(selection, result.rows).sentence
    return f'{sentence}\n\n{selection_details(selection, result, cfg, paste_anyway=paste_anyway)}'


def selection_details(selection: Selection, result: Reevaluation, cfg: Config, *, paste_anyway: bool = False) -> str:
    """All of :func:`selection_text` but its first line."""
    worth, rows, settings = selection.procedure, result.rows, selection.settings
    verdict, chosen = verdict_of(selection, rows), selection.chosen
    label = [telling_label(row, rows) for row in rows]
    tried = [number for number, row in enumerate(rows) if row.source == 'table']
    best = max(tried, key=lambda number: settings[number].value)
    naive, own = settings[best], len(rows) - 1  # the config's is the last row
    paragraphs = [
        f'Chosen by {selection.criterion} ({selection.tuned_on}), and scored on images it was not chosen on: '
        f'{100 * worth.value:.2f}, {baseline_in_words(result.settings)} {100 * worth.baseline:.2f}, '
        f'difference {_interval(worth.value - worth.baseline, worth.low, worth.high)}. The 95 % interval is that of '
        f'the whole procedure, choice included ({selection.resamples} paired bootstrap resamples of images).'
    ]
    if len(by_fold := list(dict.fromkeys(selection.chosen_by_fold))) > 1:
        paragraphs.append(f'Chosen in the folds: {"; ".join(label[number] for number in by_fold)}.')
    paragraphs.append(
        f'The best of the {len(tried)} settings on all images, which flatters it: {label[best]}, '
        f"{_interval(naive.value - naive.baseline, naive.low, naive.high)}. The config's own setting "
        f'({label[own].removesuffix(" (config)")}): {100 * settings[own].value:.2f}.'
    )
    if wider := wider_grid(rows[chosen].setting, result.settings):
        paragraphs += [f'At the edge of the grid: {wider[0]} that was tried, so go on from there:', wider[1]]
    shown = chosen if paste_anyway else verdict.row
    what = label[shown]
    if shown in (chosen, own):
        paragraphs.append(f'To paste into the config ({what}):')
    else:
        paragraphs.append(
            f'To paste into the config ({what}; for {label[chosen]}, which tuning chose, say --paste-anyway):'
        )
    text = '\n'.join(_wrapped(one) for one in paragraphs)
    return f'{text}\n\n{paste_block(rows[shown].setting, cfg)}\n'


def _wrapped(text: str) -> str:
    """Text in lines of a terminal; a command to copy stays in one."""
    if text.startswith('--'):
        return f'    {text}'
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _interval(value: float, low: float, high: float) -> str:
    return f'{100 * value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]'


def _is_hard(setting: Setting) -> bool:
    rule = setting.rule
    if isinstance(rule, MmcvNMS):
        return rule.nms_type in ('nms', 'nms_rotated')
    return type(rule) is HardNMS or (type(rule) is RotatedSoftNMS and rule.params['method'] == 'hard')


def wider_grid(chosen: Setting, settings: Sequence[Setting]) -> tuple[str, str] | None:
    """What parameter of a setting is at the edge of its grid, in words, and the ``--sweep`` that goes on from there.

    None where it is inside, nothing was swept, or the edge is that of what the parameter can be.
    """
    table = [one for one in settings if one.source == 'table' and one.name == chosen.name]
    words, specs = [], []
    params = _params(chosen)
    for name, value in params.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        others = [_params(one) for one in table]
        values = sorted({one[name] for one in others if {**one, name: value} == params})
        if len(values) < 2 or value not in (values[0], values[-1]):
            continue
        further = [one for one in _further(value, values) if _can_be(chosen, name, one)]
        if further:
            words.append(f'{name}={value:g} is the {"largest" if value == values[-1] else "smallest"}')
            specs.append(f'{_written(chosen, name)}={_values([value, *further])}')
    if not specs:
        return None
    fixed = _fixed(chosen, table, {spec.partition('=')[0] for spec in specs})
    return ' and '.join(words), f'--sweep {shlex.join([*specs, *fixed])}'


def _params(setting: Setting) -> dict[str, Any]:
    """Everything that distinguishes a row, as a sweep writes it."""
    around = dict(score_thr=setting.score_thr, max_per_img=setting.max_per_img)
    return {**swept_params(setting.rule), **around}


def _further(value: float, values: Sequence[float]) -> list[float]:
    """Values beyond the last or the first one of a grid, nearest first."""
    count = min(max(len(values) - 1, 3), 10)
    if value == values[-1]:
        step = values[-1] - values[-2]
        return [round(value + number * step, 10) for number in range(1, count + 1)]
    step = values[1] - values[0]
    if value - step > 1e-9:
        steps = (round(value - number * step, 10) for number in range(1, count + 1))
        return [one for one in steps if one > 0]
    return [] if isinstance(value, int) else [value / 2, value / 4, value / 8]


def _can_be(setting: Setting, name: str, value: Any) -> bool:
    """Whether a parameter or threshold of a setting takes a value."""
    try:
        if name in ('score_thr', 'max_per_img'):
            dataclasses.replace(setting, **{name: value})
        else:
            build_rule(config_of(_kind(setting), swept_params(setting.rule) | {name: value}, 0.0))
            if isinstance(setting.rule, MmcvNMS) and name in ('iou_threshold', 'sigma', 'min_score'):
                SoftNMS(**{name: value})  # mmcv takes any number
    except (TypeError, ValueError, ReevaluationError):
        return False
    return True


def _kind(setting: Setting) -> str:
    rule = setting.rule
    return rule.nms_type if isinstance(rule, MmcvNMS) else resolve(type(rule), TASK_UTILS).type


def _written(setting: Setting, name: str) -> str:
    """A parameter as ``--sweep`` names it."""
    return name if name in ('score_thr', 'max_per_img') else f'{_kind(setting).removeprefix("mmdet_softnms.")}.{name}'


def _fixed(chosen: Setting, table: Sequence[Setting], swept: set[str]) -> list[str]:
    """What else a sweep has to say, so that all but the swept parameters are those of a setting."""
    defaults, params = _defaults(chosen.rule), swept_params(chosen.rule)
    place, soft = '', chosen.rule
    while hasattr(soft, 'rule'):
        place, soft = f'{place}rule.', soft.rule
    telling = [name for name in soft.params if name in weights.PARAMETERS]
    telling = [name for name in telling if method_of(name) == soft.params.get('method')]
    if type(soft) in (SoftNMS, RotatedSoftNMS) and any(_written(chosen, place + name) in swept for name in telling):
        del params[f'{place}method']  # which a swept parameter says by itself
    found = []
    for name, value in params.items():
        several = any(swept_params(one.rule).get(name) != value for one in table)
        if _written(chosen, name) not in swept and (several or name not in defaults or defaults[name] != value):
            found.append(f'{_written(chosen, name)}={value:g}' if isinstance(value, float) else
                         f'{_written(chosen, name)}={value}')  # fmt: skip
    found += [f'{name}={getattr(chosen, name):g}' for name in varied_thresholds(table) if name not in swept]
    return found


def _defaults(rule: Rule) -> dict[str, Any]:
    """What a sweep need not say, by the names of :func:`swept_params`."""
    defaults = {name: one.default for name, one in inspect.signature(type(rule)).parameters.items()}
    if hasattr(rule, 'rule'):
        defaults |= dict(rule='SoftNMS', **{f'rule.{name}': value for name, value in _defaults(rule.rule).items()})
    return defaults


def _values(values: Sequence[float]) -> str:
    """Values as a range where they are evenly spaced, else as a list."""
    values = sorted(values)
    steps = {round(after - before, 9) for before, after in itertools.pairwise(values)}
    if len(values) > 2 and len(steps) == 1:
        return f'{values[0]:g}:{values[-1]:g}:{steps.pop():g}'
    return ','.join(f'{value:g}' for value in values)
