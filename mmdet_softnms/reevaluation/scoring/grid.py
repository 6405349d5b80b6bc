"""How a sweep is written: ``RULE.PARAMETER=VALUES``. Standard library alone: a command line is checked before torch."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmdet_softnms.files import ReevaluationError, did_you_mean

AROUND = ('score_thr', 'max_per_img', 'min_score')  # swept by themselves, whatever the rule


#: A name for several specs. ``recommended``: about 20 settings of soft, strongest and voted rules that do not rescale
#: scores. ``all-rules``: every rule of axis-aligned boxes, at the parameters of its paper or of
#: docs/rules.md. ``rotated``: settings of the rule of rotated boxes.
PRESETS: dict[str, tuple[str, ...]] = {
    'recommended': (
        'SoftNMS.decay=product,strongest',
        'SoftNMS.iou_threshold=0.3,0.4,0.5',
        'SoftNMS.sigma=0.3,0.5,0.7',
        'VotedNMS.rule.decay=product,strongest',
        'VotedNMS.rule.iou_threshold=0.3',
        'VotedNMS.rule.sigma=0.5',
        'VotedNMS.tolerance=0.025,0.05',
    ),
    'rotated': (
        'RotatedSoftNMS.decay=product,strongest',
        'RotatedSoftNMS.iou_threshold=0.1,0.2,0.3',
        'RotatedSoftNMS.sigma=0.3,0.5,0.7',
    ),
    'all-rules': (
        'SoftNMS.decay=product,strongest',
        'SoftNMS.iou_threshold=0.3',
        'SoftNMS.sigma=0.5',
        'VotedNMS.rule.decay=product,strongest',
        'VotedNMS.rule.iou_threshold=0.3',
        'VotedNMS.rule.sigma=0.5',
        'SupportedNMS.rule=SoftNMS,VotedNMS',
        'HardNMS.iou_threshold=0.5',
        'VotedNMS.tolerance=0.025',
        'MatrixNMS.kernel=gaussian,linear',
        'ClusterNMS.penalty=none,spm,spm_d',
        'ClusterNMS.weighted=false,true',
        'FastNMS.iou_threshold=0.5',
        'DIoUNMS.decay=hard,gaussian',
        'GidarisNMS.vote_threshold=0.5',
        'WeightedBoxesFusion.iou_threshold=0.55',
        'NonMaximumWeighted.iou_threshold=0.5',
    ),
}


def expanded(specs: Iterable[str]) -> list[str]:
    """Specs, with those of a preset in the place of its name."""
    return [one for spec in specs for one in PRESETS.get(spec, (spec,))]


def flattened(rule: Mapping[Any, Any]) -> dict[Any, Any]:
    """A rule of a sweep file: ``{rule: {type: A, sigma: 1}}``, a rule in a rule, is ``{rule: A, rule.sigma: 1}``."""
    flat = {}
    for name, value in rule.items():
        if name == 'rule' and isinstance(value, Mapping):
            inside = {'type': 'SoftNMS', **flattened(value)}
            flat[name] = [inside.pop('type')]
            flat |= {f'rule.{one}': values for one, values in inside.items()}
        else:
            flat[name] = value
    return flat


def read_spec(spec: str) -> tuple[str, str, list[Any]] | Path:
    """Rule, parameter and values; the rule is empty for the thresholds of AROUND. Or the path of a YAML file.

    Raises:
        ReevaluationError: it is neither.
    """
    name, equals, values = spec.partition('=')
    if not equals and Path(spec).suffix in ('.yml', '.yaml'):
        return Path(spec)
    rule, _, parameter = name.rpartition('.')
    if '.rule.' in name:  # of a rule inside the rule
        rule, _, parameter = name.partition('.rule.')
        parameter = f'rule.{parameter}'
    if name in AROUND or (equals and rule):
        return rule, parameter, read_values(values, spec)
    raise ReevaluationError(
        f'{spec!r} is not a sweep; write RULE.PARAMETER=VALUES (SoftNMS.sigma=0.1:1.0:0.1), '
        f'{", ".join(f"{one}=VALUES" for one in AROUND)}, the path of a YAML file, or one of the presets '
        f'{", ".join(PRESETS)}{did_you_mean(name, [*AROUND, *PRESETS])}'
    )


def read_values(text: str, spec: str) -> list[Any]:
    """``'0.1:0.3:0.1'`` or ``'0.1,0.2,0.3'`` as a list; both ends belong to a range."""
    if ':' in text:
        try:
            first, last, step = (_number(word) for word in text.split(':'))
            steps = math.floor((last - first) / step + 1e-9)
        except (TypeError, ValueError, ZeroDivisionError, OverflowError):
            steps = -1
        if not 0 <= steps < 10_000 or step <= 0:
            raise ReevaluationError(f'{spec!r}: a range is first:last:step, as 0.1:1.0:0.1 (both ends are taken)')
        return [type(first + step)(round(first + number * step, 10)) for number in range(steps + 1)]
    words = text.split(',')
    if not all(words):
        raise ReevaluationError(f'{spec!r} has an empty value; write VALUES as 0.1,0.2 or 0.1:1.0:0.1')
    values = []
    for word in words:
        try:
            values.append(_number(word))
        except ValueError:
            values.append({'true': True, 'false': False}.get(word.lower(), word))
    return values


def _number(word: str) -> Any:
    try:
        return int(word)
    except ValueError:
        return float(word)
