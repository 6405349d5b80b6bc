"""One forward pass, several suppressions: re-evaluate a two-stage detector's checkpoint with Soft-NMS.

    python tools/reevaluate.py CONFIG CHECKPOINT [--work-dir DIR] [--cfg-options KEY=VALUE ...] [--launcher ...]

Prints a table and writes DIR/reevaluation.json. CONFIG is any mmdet config of a detector with a standard, cascade or
double-head RoI head; nothing in it has to be changed.
"""

import argparse
import hashlib
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone without installing


def parse_args() -> argparse.Namespace:
    """Command line, in mmdet's style."""
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='mmdet config')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('--work-dir', help='for reevaluation.json and logs; default: work_dirs/NAME_OF_CONFIG')
    parser.add_argument('--score-thr', type=float, default=1e-3, help='shared by the rows of the table (%(default)s)')
    parser.add_argument('--max-per-img', type=int, default=100, help='shared by the rows of the table (%(default)s)')
    parser.add_argument('--min-score', type=float, default=1e-3, help='of the soft rules (%(default)s)')
    parser.add_argument(
        '--trust-checkpoint', action='store_true', help='unpickle whatever the checkpoint holds (can run its code)'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='overrides, key=value')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def run(args: argparse.Namespace) -> None:
    """Re-evaluate, print the table, write the file."""
    from mmengine.config import Config
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from mmdet_softnms import __version__
    from mmdet_softnms.checkpoint import allow_unsafe_loading, forbid_unsafe_loading, load_checkpoint
    from mmdet_softnms.reevaluation.candidates import ReevaluationError
    from mmdet_softnms.reevaluation.engine import reevaluate
    from mmdet_softnms.reevaluation.report import to_table, write_json

    if not Path(args.config).is_file():
        raise ReevaluationError(f'config {args.config} does not exist')
    try:
        cfg = Config.fromfile(args.config)
        cfg.merge_from_dict(args.cfg_options)
    except Exception as error:  # a config is a program: whatever it raises is about the config
        raise ReevaluationError(f'config {args.config} cannot be read: {type(error).__name__}: {error}') from error
    allow_unsafe_loading() if args.trust_checkpoint else forbid_unsafe_loading()
    load_checkpoint(args.checkpoint, trust=args.trust_checkpoint)  # before anything slow
    cfg.launcher = args.launcher
    work_dir = Path(args.work_dir or Path('work_dirs') / Path(args.config).stem)

    console = Console(stderr=True)
    # Drawn from this thread: mmdet's VOC evaluation forks, and a fork must not meet another thread holding a lock.
    bar = Progress(
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn('left'), TimeRemainingColumn(), console=console, auto_refresh=False,
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    drawn = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal drawn
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done)
        if done == total or time.monotonic() - drawn > 0.1:
            bar.refresh()
            drawn = time.monotonic()

    with bar:
        result = reevaluate(
            cfg,
            args.checkpoint,
            work_dir=work_dir,
            score_thr=args.score_thr,
            max_per_img=args.max_per_img,
            min_score=args.min_score,
            trust_checkpoint=args.trust_checkpoint,
            progress=progress,
        )
    if result is None:  # not the main process
        return
    content = {
        'config': args.config,
        'checkpoint': args.checkpoint,
        'checkpoint_sha256': hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest(),
        'version': __version__,
        **result.to_dict(),
    }
    write_json(work_dir / 'reevaluation.json', content)
    out = Console()
    Console(width=max(out.width, 180)).print(to_table(result))
    print(f'written: {work_dir / "reevaluation.json"}')


def main() -> None:
    """Run; one clear line and a non-zero exit status for bad input, nothing half-written ever."""
    try:
        from mmdet_softnms.registry import MODELS  # noqa: F401
    except ImportError as error:
        sys.exit(f'error: {error}')
    from mmdet_softnms.checkpoint import CheckpointError
    from mmdet_softnms.reevaluation.candidates import ReevaluationError

    args = parse_args()
    warnings.filterwarnings('ignore', category=UserWarning, module='mmengine|mmdet|mmcv|torch')
    try:
        run(args)
    except (ReevaluationError, CheckpointError) as error:
        sys.exit(f'error: {error}')
    except OSError as error:
        sys.exit(f'error: {error}; earlier results are intact')
    except KeyboardInterrupt:
        print('interrupted: nothing was written, earlier results are intact', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
