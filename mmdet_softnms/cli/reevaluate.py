"""One forward pass, every answer: re-evaluate a detector's checkpoint under other suppressions.

    python tools/reevaluate.py CONFIG CHECKPOINT [--work-dir DIR] [--cfg-options KEY=VALUE ...] [--launcher ...]
    python tools/reevaluate.py CONFIG CHECKPOINT --sweep SoftNMS.sigma=0.1:1.0:0.1 SoftNMS.iou_threshold=0.1:0.7:0.1
    python tools/reevaluate.py CONFIG CHECKPOINT --select

Prints a table and writes DIR/reevaluation.json, report.html and report.md. The network's raw candidates are stored in
DIR/candidates as they come: a run that was interrupted is taken up, and the next question needs no forward pass.
CONFIG is any mmdet config of a detector that suppresses: nearly all with RoI heads or dense heads, R-FCN, Detectron2's
two-stage detectors in mmdet's wrapper. Nothing in it has to be changed.
"""

import argparse
import functools
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mmdet_softnms.cli.arguments import Parser, add_cfg_options, at_least, cannot_write, start
from mmdet_softnms.cli.terminal import Terminal
from mmdet_softnms.files import CheckpointError, ReevaluationError
from mmdet_softnms.reevaluation.scoring.grid import expanded, read_spec

TABLE_FORMATS = ('.csv', '.tex', '.md')  # of mmdet_softnms.reevaluation.report.export_table, which needs numpy


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Command line, in mmdet's style."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='mmdet config')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('--work-dir', help='for results, candidates and logs; default: work_dirs/NAME_OF_CONFIG')
    parser.add_argument('--score-thr', type=float, default=1e-3, help='shared by the rows of the table (%(default)s)')
    parser.add_argument('--max-per-img', type=int, default=100, help='shared by the rows of the table (%(default)s)')
    parser.add_argument('--min-score', type=float, default=1e-3, help='of the soft rules (%(default)s)')
    parser.add_argument(
        '--class-agnostic', action='store_true', help='boxes of different classes suppress each other, in every row'
    )
    parser.add_argument(
        '--sweep',
        nargs='+',
        action='extend',
        default=[],
        type=sweep,
        metavar='GRID',
        help='RULE.PARAMETER=VALUES, score_thr=VALUES, max_per_img=VALUES, min_score=VALUES, a YAML file, or a preset '
        '(recommended, rotated, all-rules); VALUES: first:last:step or a list with commas; in a rule of a rule: '
        'VotedNMS.rule.sigma=VALUES',
    )
    parser.add_argument(
        '--select',
        nargs='?',
        const='AP',
        choices=['AP', 'AP50', 'AP75'],
        help='choose a setting by this metric (AP), and say what the choice is worth on images it was not tuned on',
    )
    parser.add_argument('--folds', type=at_least(2), default=5, help='of --select without a tuning split (%(default)s)')
    parser.add_argument('--resamples', type=at_least(1), default=1000, help='of its bootstrap (%(default)s)')
    parser.add_argument(
        '--tune-on',
        choices=['auto', 'val', 'folds'],
        default='auto',
        help="of --select: the config's val_dataloader, or k-fold over the test set; auto: val if it is another split",
    )
    parser.add_argument(
        '--paste-anyway',
        action='store_true',
        help='with --select: the lines to paste are those of the chosen setting, even if hard NMS is as good',
    )
    parser.add_argument(
        '--out',
        nargs='+',
        action='extend',
        default=[],
        type=table_file,
        metavar='FILE',
        help='tables for papers: NAME.csv (unrounded), NAME.tex, NAME.md, each with NAME_per-class.* beside it',
    )
    parser.add_argument('--tta', action='store_true', help="union of the views of the config's tta_pipeline")
    parser.add_argument(
        '--scales', nargs='+', default=(), metavar='480x800', help='union of these scales of each image'
    )
    parser.add_argument('--flip', action='store_true', help='with --scales: each flipped, too')
    parser.add_argument('--views', nargs='+', type=int, default=(), help='only these views, numbered from 0')
    parser.add_argument('--store', help='candidates made elsewhere (a folder DIR/candidates/...), taken as they are')
    parser.add_argument('--processes', type=at_least(1), help='for sweeps; default: one a core where it is worth it')
    parser.add_argument(
        '--trust-checkpoint', action='store_true', help='unpickle whatever the checkpoint holds (can run its code)'
    )
    add_cfg_options(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args(arguments)
    args.work_dir = Path(args.work_dir or Path('work_dirs') / Path(args.config).stem)
    if args.paste_anyway and not args.select:
        parser.error('--paste-anyway belongs to --select')
    if not 0 <= args.score_thr < 1:
        parser.error(f'--score-thr: score_thr must be in [0, 1), got {args.score_thr:g}')
    if not 0 <= args.min_score <= 1:
        parser.error(f'--min-score: min_score must be in [0, 1], got {args.min_score:g}')
    if args.max_per_img < -1:
        parser.error(f'--max-per-img: max_per_img must be at least 1, or 0 or -1 for no limit, got {args.max_per_img}')
    given = sys.argv[1:] if arguments is None else arguments
    args.command = [*(prog or 'python tools/reevaluate.py').split(), *given]
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def sweep(text: str) -> str:
    """A grid as it was given, if it can be read; whether the rule exists is seen later."""
    try:
        read = next(read_spec(one) for one in expanded([text]))
    except ReevaluationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if isinstance(read, Path) and not read.is_file():
        raise argparse.ArgumentTypeError(f'sweep file {text} does not exist')
    return text


def table_file(text: str) -> str:
    """The name of a table of a known format; whether it can be written is seen later."""
    if Path(text).suffix not in TABLE_FORMATS:
        raise argparse.ArgumentTypeError(f'{text}: the name has to end in {", ".join(TABLE_FORMATS)}')
    return text


def run(args: argparse.Namespace, terminal: Terminal) -> None:
    """Re-evaluate, print the table, write the files."""
    from mmengine.dist import is_main_process

    from mmdet_softnms.checkpoint import allow_unsafe_loading, forbid_unsafe_loading, load_checkpoint, local_checkpoint
    from mmdet_softnms.locate import read_config
    from mmdet_softnms.reevaluation.candidates.forward import start_processes
    from mmdet_softnms.reevaluation.report.export_table import check_out
    from mmdet_softnms.reevaluation.request import Listener, Request
    from mmdet_softnms.reevaluation.run import reevaluate

    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    allow_unsafe_loading() if args.trust_checkpoint else forbid_unsafe_loading()
    checkpoint = local_checkpoint(args.checkpoint, trust=args.trust_checkpoint)  # fetched or asked for once
    load_checkpoint(checkpoint, trust=args.trust_checkpoint)  # before anything slow
    asked = {one.name: getattr(args, one.name) for one in fields(Request) if one.init and hasattr(args, one.name)}
    request = Request(cfg, **asked | dict(checkpoint=checkpoint))
    check_out(args.out)
    start_processes(args.launcher)
    terminal.quiet = not is_main_process()
    if not terminal.quiet:
        terminal.keep_log(args.work_dir / 'reevaluation.log')
        terminal.log(shlex.join(args.command))
    reevaluate(
        request,
        Listener(terminal.progress, terminal.on_row, terminal.say),
        lambda result, selection: write(args, request, result, selection, terminal),
    )


def write(args: argparse.Namespace, request: Any, result: Any, selection: Any, terminal: Terminal) -> None:
    """Everything a reader gets: verdict and table on the screen, the JSON, the report, the tables for papers."""
    from mmdet_softnms import __version__
    from mmdet_softnms.files import write_json
    from mmdet_softnms.reevaluation.report import why
    from mmdet_softnms.reevaluation.report.export_table import write_tables
    from mmdet_softnms.reevaluation.report.page import write_report
    from mmdet_softnms.reevaluation.report.table import to_table
    from mmdet_softnms.reevaluation.report.verdict import selection_text, verdict_of
    from mmdet_softnms.reevaluation.scoring.sweep import forget_partial

    work_dir = request.work_dir
    content = {
        'config': args.config,
        'checkpoint': args.checkpoint,
        'version': __version__,
        **result.to_dict(),
    }
    chosen = verdict = details = ''
    if selection is not None:
        verdict = verdict_of(selection, result.rows).sentence
        content['selection'] = {'verdict': verdict, **selection.to_dict()}
        chosen = selection_text(selection, result, request.cfg, paste_anyway=args.paste_anyway)
        details = chosen.removeprefix(verdict).strip('\n')
    write_json(work_dir / 'reevaluation.json', content)
    if verdict:
        terminal.print(f'{verdict}\n', 'bold')
    most = max(shutil.get_terminal_size().lines - 15, 20) if terminal.out.isatty() else None
    terminal.print_table(functools.partial(to_table, result, selection, most_rows=most))
    if 'best' in result.errors or 'chosen' in result.errors:
        terminal.print('\n'.join(why.lines(result.errors)) + '\n')
    if details:
        terminal.print(f'{details}\n')
    command = shlex.join(args.command)
    title = Path(args.config).stem
    pages = write_report(
        work_dir, result, title=title, command=command, selection=selection, selection_words=chosen, cfg=request.cfg,
        checkpoint=args.checkpoint,
    )  # fmt: skip
    tables = write_tables(args.out, result, selection, title=title)
    forget_partial(work_dir)
    written = [str(work_dir / 'reevaluation.json'), *(page.name for page in pages), *map(str, tables)]
    terminal.print(f'written: {", ".join(written)}')


def _run(args: argparse.Namespace, terminal: Terminal) -> None:
    """:func:`run`; what a signal raised ends it even where mmengine made another error of it.

    Its Runner writes the config into the log, and calls a SyntaxError whatever is raised meanwhile.
    """
    try:
        run(args, terminal)
    except Exception as error:
        stopped: BaseException | None = error
        while stopped is not None and not isinstance(stopped, (KeyboardInterrupt, SystemExit)):
            stopped = stopped.__context__
        if stopped is None:
            raise
        raise stopped from None


def _listen_to_scheduler() -> None:
    """SIGTERM ends this process by an exception, and a process that it forks (mmdet's VOC evaluation) as ever."""
    signal.signal(signal.SIGTERM, _terminated)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _terminated(number: int, frame: object) -> None:
    """What a scheduler sends before it kills: an exception, so that processes and temporary files are cleared away."""
    sys.exit('terminated: earlier results are intact; run again, and finished shards and rows are taken up')


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run; one clear line and a non-zero exit status for bad input, nothing half-written ever."""
    args = parse_args(arguments, prog)
    try:
        with Terminal(sweep=bool(args.sweep or args.select)) as terminal:
            start(args, 'reevaluate')
            _listen_to_scheduler()
            _run(args, terminal)
    except (ReevaluationError, CheckpointError) as error:
        sys.exit(f'error: {error}')
    except OSError as error:
        sys.exit(
            cannot_write(error, args.work_dir)
            or f'error: {error}; earlier results are intact, and finished shards and rows are taken up by the next run'
        )
    except KeyboardInterrupt:
        print(
            'interrupted: earlier results are intact; run again, and finished shards and rows are taken up',
            file=sys.stderr,
        )
        sys.exit(130)
