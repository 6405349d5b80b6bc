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
        SystemExit: with one line, if mmdet, a config or a checkpoint cannot be used: the one that is named, or one
            that the Runner loads by the config.
    """
    try:
        from mmdet_softnms.registry import require_mmdet

        require_mmdet()
    except ImportError as error:
        sys.exit(f'error: {error}')
    import mmdet

    from mmdet_softnms.checkpoint import allow_unsafe_loading, forbid_unsafe_loading, load_checkpoint
    from mmdet_softnms.files import CheckpointError, ReevaluationError
    from mmdet_softnms.locate import lists_for_tuples, local_config, read_config
    from mmdet_softnms.models.places import check_places

    package = Path(mmdet.__file__).parent
    candidates = [package / '.mim' / 'tools' / name, package.parent / 'tools' / name]
    script = next((path for path in candidates if path.is_file()), None)
    if script is None:
        sys.exit(f'error: this mmdet carries no tools/{name} (looked in {candidates[0].parent}); reinstall its wheel')

    trust = TRUST_FLAG in sys.argv
    sys.argv = [str(script), *(argument for argument in sys.argv[1:] if argument != TRUST_FLAG)]
    args = runpy.run_path(str(script), run_name='parse_only')['parse_args']()
    allow_unsafe_loading() if trust else forbid_unsafe_loading()
    try:
        # Its name, not its content, so that the script reads it as ever.
        sys.argv = [local_config(args.config) if argument == args.config else argument for argument in sys.argv]
        checkpoint = getattr(args, 'checkpoint', None) or getattr(args, 'resume', None)
        if checkpoint not in (None, 'auto') and not trust:
            load_checkpoint(checkpoint)  # before anything slow
        cfg = read_config(args.config, args.cfg_options)
        try:
            check_places(cfg)
        except ValueError as error:
            sys.exit(f'error: {error}')
        runpy.run_path(str(script), run_name='__main__')
    except (CheckpointError, ReevaluationError) as error:
        sys.exit(f'error: {error}')
    except TypeError as error:
        if reason := lists_for_tuples(args.config, error):
            sys.exit(f'error: {reason}')
        raise
