"""Why a setting changed the AP: TIDE's errors of the baseline, of the config and of the best or the chosen setting."""

from collections.abc import Sequence
from typing import Any

from mmdet_softnms.reevaluation.choice.selection import Selection
from mmdet_softnms.reevaluation.report.table import baseline_row, best_row
from mmdet_softnms.reevaluation.result import Reevaluation
from mmdet_softnms.reevaluation.scoring.errors import KINDS, errors
from mmdet_softnms.reevaluation.scoring.matching import Objects
from mmdet_softnms.reevaluation.scoring.sweep import Row, detections

#: What each kind of error is, for people.
MEANING = dict(
    classification='well placed on an object, but of another class',
    localisation='the right class, but placed badly (IoU 0.1 to 0.5)',
    both='placed badly, and of another class',
    duplicate='a second detection of an object that is found already',
    background='on no object (IoU at most 0.1)',
    missed='objects that nothing finds, not even badly placed or with another class',
)


def compared_rows(rows: Sequence[Row], selection: Selection | None) -> dict[str, Row]:
    """The rows that the report is about: the ``baseline``, the ``best`` (or the ``chosen``), and the ``config``'s.

    The second is missing where a selection keeps the baseline and there is no other row to show.
    """
    chosen = None if selection is None else rows[selection.chosen]
    kind = 'best' if chosen is None or chosen.setting.is_baseline else 'chosen'
    after = best_row(rows) if chosen is None or kind == 'best' else chosen
    baseline = baseline_row(after, rows) or rows[0]
    found = {'baseline': baseline}
    if after is not baseline:
        found[kind] = after
    config = next((row for row in rows if row.source == 'config'), None)
    if config is not None:
        found['config'] = config
    return found


def errors_of(result: Reevaluation, selection: Selection | None = None) -> dict[str, dict[str, Any]]:
    """TIDE's errors of the compared rows, as ``reevaluation.json`` holds them.

    Returns:
        By row (``baseline``, ``best`` or ``chosen``, ``config``): ``rule`` and ``params``, and what
        :func:`mmdet_softnms.reevaluation.scoring.errors.errors` gives.
    """
    objects = Objects.of(result.session.truth)
    return {
        name: dict(
            rule=row.rule, params=row.params, **errors(detections(result.session.candidates, row.setting), objects)
        )
        for name, row in compared_rows(result.rows, selection).items()
    }


def lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """The errors before and after, for a terminal: one line that sums up, and a line for each kind; at most 80 wide."""
    names = list(found)
    text = ['Why: AP50 points that mending all errors of a kind would add (TIDE)']
    text.append(' ' * 15 + ''.join(f'{name:>18}' for name in names))
    text += [f'{kind:<15}' + ''.join(f'{_value(found, name, kind):>18}' for name in names) for kind in KINDS]
    return text


def sentence(found: dict[str, dict[str, Any]]) -> str:
    """The largest change of an error each way, in words; nothing where there is no other row."""
    after = next((name for name in ('chosen', 'best') if name in found), None)
    if after is None:
        return ''
    before = found['baseline']['dAP']
    changes = {kind: 100 * (found[after]['dAP'][kind] - before[kind]) for kind in KINDS}
    words = []
    for kind, word in ((min(KINDS, key=changes.__getitem__), 'less'), (max(KINDS, key=changes.__getitem__), 'more')):
        if abs(changes[kind]) >= 0.005 and (changes[kind] > 0) == (word == 'more'):
            words.append(f'{abs(changes[kind]):.2f} points {word} are lost to {_PLURAL[kind]}')
    return f'At IoU 0.5, {" and ".join(words)} than with hard NMS.' if words else 'No kind of error changed at IoU 0.5.'


_PLURAL = dict(
    classification='wrong classes',
    localisation='bad placement',
    both='wrong class and bad placement together',
    duplicate='duplicates',
    background='detections of background',
    missed='missed objects',
)


def _value(found: dict[str, dict[str, Any]], name: str, kind: str) -> str:
    value = 100 * found[name]['dAP'][kind]
    if name == 'baseline':
        return f'{value:.2f}'
    difference = round(value - 100 * found['baseline']['dAP'][kind], 2) + 0.0  # never -0.00
    return f'{value:.2f} ({difference:+.2f})'


def markdown(found: dict[str, dict[str, Any]]) -> list[str]:
    """The same as a table of Markdown."""
    heading = ['error', *found]
    text = ['| ' + ' | '.join(heading) + ' |', '|---' + '|--:' * len(found) + '|']
    return text + [f'| {kind} | ' + ' | '.join(_value(found, name, kind) for name in found) + ' |' for kind in KINDS]
