"""Measure a published number again: fetch what it names, run this, and read pass, fail or not comparable.

    python tools/reproduce.py NAME [--dry-run] [--weights FILE] [--data-root DIR] [--work-dir DIR] [--cfg-options ...]
    python tools/reproduce.py --list

NAME is a model of the metafiles (configs/*/metafile.yml), where what is published stands with its source and its
tolerance. Data or weights that are missing are named with where to get them, where to put them, and their checksums.
The numbers come from the same re-evaluation as those of tools/reevaluate.py, one run more for each union of scales that
a published number names. DIR/reproduction.json holds all of it.

Exit status: 0 pass, 1 fail or bad input, 2 not comparable (nothing published, a split whose annotations are not
public, other data, other weights, or other settings than the published ones; what was measured is printed).
"""

import argparse
import difflib
import functools
import platform
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet_softnms.cli.arguments import Parser, add_cfg_options, cannot_write, start
from mmdet_softnms.cli.terminal import Terminal
from mmdet_softnms.files import CheckpointError, ReevaluationError

# A clone, or where a wheel carries the configs (pyproject.toml: .mim).
_PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = _PACKAGE / '.mim' if (_PACKAGE / '.mim').is_dir() else _PACKAGE.parent

STATUS = {'pass': 0, 'fail': 1, 'not comparable': 2}


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Command line, in mmdet's style."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', nargs='?', help='a model of the metafiles; --list prints all')
    parser.add_argument('--list', action='store_true', help='print every model with what is published, and its source')
    parser.add_argument('--dry-run', action='store_true', help='check config, data and weights; run no network')
    parser.add_argument('--weights', help='checkpoint, if not where the metafile expects it')
    parser.add_argument('--data-root', help="instead of the config's test_dataloader.dataset.data_root")
    parser.add_argument('--work-dir', help='for reproduction.json and logs; default: work_dirs/reproduce/NAME')
    parser.add_argument('--metafile', help='a metafile or model index of your own; default: that of the project')
    parser.add_argument(
        '--trust-checkpoint', action='store_true', help='unpickle whatever the checkpoint holds (can run its code)'
    )
    add_cfg_options(parser)
    args = parser.parse_args(arguments)
    if (args.name is None) != args.list:
        parser.error('give the NAME of a model, or --list')
    return args


def listing(models: dict[str, Any]) -> str:
    """Every model with what is published for it, in lines of a terminal."""
    lines = []
    for model in models.values():
        lines.append(f'{model.name} ({model.split.name})')
        published = [
            f'{one.row_label}: {one.metric} {one.value:g} %, '
            f'{"not comparable" if one.tolerance is None else f"within {one.tolerance:g} points"}'
            f'{"" if one.split == model.split.name else f", on {one.split}"}; {one.source}'
            for one in model.published
        ]
        for one in published or [f'no published number: {model.unpublished}']:
            lines.append(
                textwrap.fill(one, 79, initial_indent='    ', subsequent_indent='      ', break_long_words=False)
            )
    return '\n'.join(lines)


def load_config(model: Any, args: argparse.Namespace) -> Any:
    """The model's config with the settings of the published number, the data root, and the user's options."""
    from mmdet_softnms.locate import read_config

    cfg = read_config(model.config, model.options)
    try:
        if args.data_root:
            root, old = f'{args.data_root.rstrip("/")}/', cfg.test_dataloader.dataset.data_root
            cfg.test_dataloader.dataset.data_root = root
            evaluators = cfg.test_evaluator
            for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
                if str(evaluator.get('ann_file', '')).startswith(old):
                    evaluator.ann_file = root + evaluator.ann_file.removeprefix(old)
        cfg.merge_from_dict(args.cfg_options)
    except Exception as error:  # a config is a program: whatever it raises is about the config
        raise ReevaluationError(f'config {model.config} cannot be used: {type(error).__name__}: {error}') from error
    cfg.launcher = 'none'
    return cfg


def measure(
    cfg: Any,
    checkpoint: Path,
    work_dir: Path,
    terminal: Terminal,
    trust_checkpoint: bool = False,
    scales: tuple[str, ...] = (),
) -> Any:
    """Re-evaluate, and show how far it is."""
    from mmdet_softnms.reevaluation.request import Listener, Request
    from mmdet_softnms.reevaluation.run import reevaluate

    request = Request(cfg, checkpoint, work_dir, trust_checkpoint=trust_checkpoint, scales=scales)
    return reevaluate(request, Listener(terminal.progress, terminal.on_row, terminal.say))


def to_table(model: Any, comparisons: Sequence[Any], *, width: int = 80, plain: bool = False) -> Any:
    """Published beside measured, in %; below it, why one of them does not compare where others do."""
    from rich.text import Text

    from mmdet_softnms.reevaluation.report.table import GAP, empty_table

    notes = dict.fromkeys(one.reason for one in comparisons if one.verdict == 'not comparable')
    if all(one.verdict == 'not comparable' for one in comparisons):
        notes = {}  # the verdict says it
    lines = [('row', 'metric', 'published', 'measured', 'difference', 'tolerance', 'verdict')]
    for one in comparisons:
        published = one.published
        numbers = [published.value, one.measured, one.difference, published.tolerance]
        formats = ('{:g}', '{:.2f}', '{:+.2f}', '{:g}')
        cells = ['-' if number is None else text.format(number) for text, number in zip(formats, numbers, strict=True)]
        elsewhere = f', published on {published.split}' if published.split != model.split.name else ''
        lines.append((published.row_label + elsewhere, published.metric, *cells, one.verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[0] = max(min(widths[0], width - sum(widths[1:]) - GAP * (len(widths) - 1)), 12)  # what is longer is folded
    table = empty_table(f'{model.name} on {model.split.name}', '\n'.join(notes), plain)
    for number, (name, wide) in enumerate(zip(lines[0], widths, strict=True)):
        right = 2 <= number <= 5
        table.add_column(name, width=wide, overflow='fold', justify='right' if right else 'left', no_wrap=number > 0)
    for line in lines[1:]:
        table.add_row(*map(Text, line))  # as it is: what a metafile holds may look like markup
    return table


def versions() -> dict[str, str]:
    """Of everything the numbers depend on."""
    import mmcv
    import mmdet
    import mmengine
    import torch

    import mmdet_softnms

    modules = (torch, mmcv, mmengine, mmdet, mmdet_softnms)
    return {'python': platform.python_version(), **{module.__name__: module.__version__ for module in modules}}


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Check, measure, compare, write; the exit status."""
    from mmdet_softnms.checkpoint import allow_unsafe_loading, forbid_unsafe_loading, local_checkpoint
    from mmdet_softnms.files import sha256, write_json
    from mmdet_softnms.reevaluation import reproduction
    from mmdet_softnms.reevaluation.scoring.sweep import forget_partial

    index = Path(args.metafile) if args.metafile else PROJECT / 'model-index.yml'
    models = reproduction.load_models(index, PROJECT)
    if args.list:
        terminal.print(listing(models))
        return 0
    if args.name not in models:
        similar = difflib.get_close_matches(args.name, models, n=3)
        hint = f'did you mean {" or ".join(similar)}? ' if similar else ''
        raise ReevaluationError(f'no model {args.name} in {index.name}; {hint}--list prints all names')
    model = models[args.name]
    checkpoint = model.weights.place
    allow_unsafe_loading() if args.trust_checkpoint else forbid_unsafe_loading()

    cfg = load_config(model, args)
    caveats = [reproduction.check_options(args.cfg_options)]
    problems: list[str] = []  # all that is missing, not only the first of it
    try:
        caveats.append(reproduction.check_data(cfg, model.split))
    except ReevaluationError as error:
        problems.append(str(error))
    try:
        if args.weights:
            checkpoint = local_checkpoint(args.weights, trust=args.trust_checkpoint)
        if checkpoint is None:
            raise ReevaluationError(f'there is no checkpoint of {model.name} to fetch: {model.weights.fetch}')
        caveats.append(reproduction.check_checksum(checkpoint, model.weights))
        if args.dry_run:
            reproduction.check_model(cfg, checkpoint, trust=args.trust_checkpoint)
    except (ReevaluationError, CheckpointError) as error:
        problems.append(str(error))
    if problems or checkpoint is None:
        raise ReevaluationError('\nerror: '.join(problems))
    caveats = [caveat for caveat in caveats if caveat]

    if args.dry_run:
        for one in model.published:
            state = f'within {one.tolerance:g}' if one.tolerance is not None else f'not comparable: {one.because}'
            terminal.print(f'published: {one.row_label} {one.metric} {one.value:g} on {one.split}, {state}')
        terminal.print(f'dry run: config, data ({model.split.name}) and weights ({checkpoint}) are there and fit')
        if not caveats and any(one.tolerance is not None for one in model.published):
            terminal.print('a run would compare')
            return 0
        why = '; '.join(caveats) or model.unpublished or 'see above'
        terminal.print(f'a run would not be comparable: {why}')
        return STATUS['not comparable']

    work_dir = args.work_dir = Path(args.work_dir or Path('work_dirs/reproduce') / model.name)
    terminal.keep_log(work_dir / 'reproduction.log')
    terminal.log(f'reproduce {model.name} with {checkpoint}')
    results = {}
    comparisons: list[Any] = []
    for scales in model.scales:
        if scales:
            terminal.print(f'the union of {len(scales)} scales of each image: {" ".join(scales)}')
        folder = work_dir / f'scales_{"_".join(scales)}' if scales else work_dir
        results[scales] = measure(cfg, checkpoint, folder, terminal, args.trust_checkpoint, scales)
        comparisons += reproduction.compare(model, results[scales].rows, caveats, scales)
    verdict, reason = reproduction.overall(model, comparisons)
    content = {
        'name': model.name,
        'verdict': verdict,
        'reason': reason,
        'split': model.split.name,
        'num_images': results[model.scales[0]].num_images,
        'checkpoint': str(checkpoint),
        'checkpoint_sha256': sha256(checkpoint),
        'options': {**model.options, **args.cfg_options},
        'comparisons': [one.to_dict() for one in comparisons],
        'rows': [
            {**{key: getattr(row, key) for key in ('rule', 'params', 'metrics', 'source')}, 'scales': list(scales)}
            for scales, result in results.items()
            for row in result.rows
        ],
        'versions': versions(),
    }
    write_json(work_dir / 'reproduction.json', content)
    for folder in work_dir, *work_dir.glob('scales_*'):
        forget_partial(folder)  # the next run measures again
    if comparisons:
        terminal.print_table(functools.partial(to_table, model, comparisons))
    else:
        (own,) = (row.metrics for row in results[()].rows if row.source == 'config')
        names = [key for key in ('AP', 'VOC07_AP50', 'VOC07_AP70') if key in own]
        numbers = ', '.join(f'{key} {100 * own[key]:.2f}' for key in names)
        terminal.print(f'measured: {numbers}')
    terminal.print(f'{verdict}: {reason}', 'bold')
    terminal.print(f'written: {work_dir / "reproduction.json"}')
    return STATUS[verdict]


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run; one clear line for each thing that is missing or wrong, nothing half-written ever."""
    args = parse_args(arguments, prog)
    try:
        with Terminal() as terminal:
            start(args, 'reevaluate')
            return run(args, terminal)
    except (ReevaluationError, CheckpointError) as error:
        sys.exit(f'error: {error}')
    except OSError as error:
        work_dir = Path(args.work_dir or 'work_dirs/reproduce')
        sys.exit(cannot_write(error, work_dir) or f'error: {error}; earlier results are intact')
    except KeyboardInterrupt:
        print('interrupted: nothing was written, earlier results are intact', file=sys.stderr)
        sys.exit(130)
