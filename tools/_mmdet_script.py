"""Runs one of mmdet's own scripts with the plugin importable and unsafe unpickling forbidden.

mmdet ships its ``tools`` inside the package, so there is nothing to copy and every flag is mmdet's, on either stack.
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone without installing

TRUST_FLAG = '--trust-checkpoint'


def run(name: str) -> None:
    """Run ``tools/NAME`` of the installed mmdet as ``__main__``, with this process's arguments.

    One flag is ours: ``--trust-checkpoint`` unpickles checkpoints that hold more than zoo checkpoints do.

    Raises:
        SystemExit: with one line, if mmdet, a config or a checkpoint cannot be used.
    """
    try:
        from mmdet_softnms.registry import require_mmdet

        require_mmdet()
    except ImportError as error:
        sys.exit(f'error: {error}')
    import mmdet

    from mmdet_softnms.checkpoint import CheckpointError, allow_unsafe_loading, forbid_unsafe_loading, load_checkpoint

    package = Path(mmdet.__file__).parent
    candidates = [package / '.mim' / 'tools' / name, package.parent / 'tools' / name]
    script = next((path for path in candidates if path.is_file()), None)
    if script is None:
        sys.exit(f'error: this mmdet carries no tools/{name} (looked in {candidates[0].parent}); reinstall its wheel')

    trust = TRUST_FLAG in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != TRUST_FLAG]
    paths = [argument for argument in sys.argv[1:] if not argument.startswith('-') and '=' not in argument]
    for path in paths:
        if path.endswith('.py') and not Path(path).is_file():
            sys.exit(f'error: config {path} does not exist')
    if trust:
        allow_unsafe_loading()
    else:
        forbid_unsafe_loading()
        try:
            for path in paths:
                if path.endswith('.pth'):
                    load_checkpoint(path)
        except CheckpointError as error:
            sys.exit(f'error: {error}')
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name='__main__')
