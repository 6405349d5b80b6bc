"""``python -m mmdet_softnms benchmark``: hands over to the package ``benchmarks`` of the clone; wheels leave it out."""

import sys
from collections.abc import Sequence
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run a benchmark, or say where they are."""
    if not (CLONE / 'benchmarks' / '__main__.py').is_file():
        sys.exit(
            'error: the benchmarks are not part of the installed package; '
            'clone the project and run python tools/benchmark.py there'
        )
    sys.path.insert(0, str(CLONE))
    from benchmarks.__main__ import main as run

    run(arguments, prog)
