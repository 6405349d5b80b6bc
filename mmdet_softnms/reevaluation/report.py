"""A re-evaluation as people and programs read it: the table and ``reevaluation.json``."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from mmdet_softnms.reevaluation.engine import Reevaluation
from mmdet_softnms.reevaluation.store import write_whole
from mmdet_softnms.reevaluation.sweep import Row

#: Columns of the table; those no row has are left out.
COLUMNS = ('AP', 'AP50', 'AP75', 'AR100', 'VOC07_AP50', 'VOC12_AP50')


def to_table(result: Reevaluation) -> Table:
    """The rows in percent, baseline on top, each variant's difference to it in points beside its value."""
    notes = [
        f'{result.num_images} images, {result.num_candidates} candidates, in %; differences to the first row.',
        'Rows of the table share score_thr and max_per_img; the last row is the setting of the config.',
    ]
    if result.masks_left_out:
        notes.append('Masks are left out: boxes are suppressed and evaluated in original image scale.')
    table = Table(title=result.dataset, caption='\n'.join(notes), caption_justify='left')
    columns = [column for column in COLUMNS if column in result.rows[0].metrics]
    table.add_column('rule', no_wrap=True)
    for column in ('score_thr', 'max_per_img', *columns, 'suppression s'):
        table.add_column(column, justify='right', no_wrap=True)
    baseline = result.rows[0]
    for row in result.rows:
        table.add_row(
            row_label(row),
            f'{row.params["score_thr"]:g}',
            str(row.params['max_per_img']),
            *(_cell(row.metrics[column], baseline.metrics[column], row is baseline) for column in columns),
            f'{row.seconds:.2f}',
            end_section=row is baseline,
        )
    return table


def row_label(row: Row) -> str:
    """``'SoftNMS gaussian sigma=0.5'``: the rule and what sets it apart, thresholds around it left to their columns."""
    params = {name: value for name, value in row.params.items() if name not in ('score_thr', 'max_per_img')}
    if not params.get('offset', 1):
        del params['offset']
    words = [str(params.pop('method'))] if 'method' in params else []
    words += [f'{name}={value:g}' if isinstance(value, float) else f'{name}={value}' for name, value in params.items()]
    return ' '.join([row.rule, *words]) + (' (config)' if row.source == 'config' else '')


def _cell(value: float, reference: float, is_reference: bool) -> str:
    if value < 0:  # COCO's "no such object"
        return '-'
    return f'{100 * value:.2f}' if is_reference else f'{100 * value:.2f} {100 * (value - reference):+.2f}'


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; an earlier one stays until the new one is complete.

    Raises:
        OSError: no permission or no space; the earlier file is intact.
    """
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + '\n').encode())
