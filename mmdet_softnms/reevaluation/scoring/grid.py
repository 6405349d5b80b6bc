"""How a sweep is written: ``RULE.PARAMETER=VALUES``. Standard library alone: a command line is checked before torch."""

import math
from pathlib import Path
from typing import Any

from mmdet_softnms.files import ReevaluationError, did_you_mean

AROUND = ('score_thr', 'max_per_img', 'min_score')  # swept by themselves, whatever the rule


def read_spec(spec: str) -> tuple[str, str, list[Any]] | Path:
    """Rule, parameter and values; the rule is empty for the thresholds of AROUND. Or the path of a YAML file.

    Raises:
        ReevaluationError: it is neither.
    """
    name, equals, values = spec.partition('=')
    if not equals and Path(spec).suffix in ('.yml', '.yaml'):
        return Path(spec)
    rule, _, parameter = name.rpartition('.')
    if name in AROUND or (equals and rule):
        return rule, parameter, read_values(values, spec)
    raise ReevaluationError(
        f'{spec!r} is not a sweep; write RULE.PARAMETER=VALUES (SoftNMS.sigma=0.1:1.0:0.1), '
        f'{", ".join(f"{one}=VALUES" for one in AROUND)}, or the path of a YAML file'
        f'{did_you_mean(name, AROUND)}'
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
