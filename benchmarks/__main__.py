"""The command line of the benchmarks: ``python tools/benchmark.py COMMAND``. One file of this package a command.

All on the same drawn candidates (benchmarks/drawn.py), in one run, in turns.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f'{value} is not positive')
    return value


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Every option of every command; nothing is imported for it but the standard library."""
    result = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = result.add_subparsers(dest='command', required=True, metavar='COMMAND')
    op = commands.add_parser('op', help='the operator against all others, on the CPU or a GPU')
    sizes = [100, 1000, 10000, 100000]
    op.add_argument('--sizes', type=positive, nargs='+', default=sizes, help='candidates')
    op.add_argument('--classes', type=positive, nargs='+', default=[20, 80, 1203], help='classes')
    op.add_argument('--dense', type=positive, nargs='*', default=sizes, help='candidates of the two one-class scenes')
    op.add_argument('--wanted', type=int, nargs='+', default=[100, 300, -1], help='max_num; -1: no limit')
    op.add_argument(
        '--clock', choices=['wall', 'cpu'], default='wall', help='cpu: time of the process, where others work'
    )
    op.add_argument('--tensorflow', metavar='PYTHON', help='interpreter of an environment that has TensorFlow')
    stage = commands.add_parser('stage', help="logits to detections, against mmdet's own stage with hard NMS")
    stage.add_argument('--score-thr', type=float, nargs='+', default=[0.05, 0.01, 1e-3, 1e-4], help='thresholds')
    growth = commands.add_parser('growth', help='time and memory against sizes, with fitted exponents and a plot')
    growth.add_argument('--largest', type=positive, default=102_400, help='candidates (default: 102,400)')
    serving = commands.add_parser('serving', help='import, warmup(), and batches of images')
    serving.add_argument('--images', type=positive, nargs='+', default=[1, 2, 4, 8, 16], help='in a batch')
    pool = commands.add_parser('pool', help='position-sensitive RoI pooling against the naive form and torchvision')
    sweep = commands.add_parser('sweep', help='many settings over the stored candidates of a test set')
    sweep.add_argument('--images', type=positive, default=5000, help='of the drawn test set (default: 5000)')
    sweep.add_argument('--candidates', type=positive, default=1500, help='of each image (default: 1500)')
    sweep.add_argument('--settings', type=positive, default=50, help='to sweep over (default: 50)')
    sweep.add_argument('--processes', type=positive, help='default: one a core')
    for command in (op, stage):
        command.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='where it runs (default: cpu)')
    for command in (op, pool):
        command.add_argument('--seconds', type=float, default=2.0, help='to spend on a row, at least (default: 2)')
    for command in (stage, growth, serving):
        command.add_argument('--seconds', type=float, default=1.0, help='to spend on a point (default: 1)')
    for command in (op, stage, growth, serving, sweep):
        command.add_argument('--out', type=Path, metavar='DIR', help='write benchmark_COMMAND.json and more there')
    return result


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run a benchmark; one clear line if it is interrupted."""
    options = parser(prog).parse_args(arguments)
    try:
        from mmdet_softnms.ops import warmup

        warmup()  # otherwise the first row's first call may compile the kernels, and count as a slow peer
        import_module(f'benchmarks.{options.command}').run(options)
    except KeyboardInterrupt:
        sys.exit('interrupted; nothing was written')


if __name__ == '__main__':
    main()
