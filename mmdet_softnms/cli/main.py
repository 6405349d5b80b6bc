"""``python -m mmdet_softnms COMMAND`` and the console script ``mmdet-softnms COMMAND``."""

import sys
from collections.abc import Sequence
from importlib import import_module

import mmdet_softnms
from mmdet_softnms.cli.arguments import Parser

COMMANDS = {
    'reevaluate': 'one forward pass, every answer: a checkpoint under other suppressions',
    'reproduce': 'measure a published number again',
    'export': 'the post-processing of a two-stage detector as ONNX',
    'benchmark': 'measure the operator against its alternatives (in a clone of the project)',
}


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Hand the rest of the command line to a command."""
    parser = Parser(
        prog='python -m mmdet_softnms', description='Soft-NMS for MMDetection 3.x.', epilog='COMMAND --help says more.'
    )
    parser.add_argument('--version', action='version', version=mmdet_softnms.__version__)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND', title='commands')
    for name, words in COMMANDS.items():
        commands.add_parser(name, help=words, add_help=False)
    given = list(sys.argv[1:] if arguments is None else arguments)
    args, _ = parser.parse_known_args(given[:1])
    command: int | None = import_module(f'mmdet_softnms.cli.{args.command}').main(
        given[1:], prog=f'{parser.prog} {args.command}'
    )
    return command
