"""Runs one of mmdet's own scripts with the plugin importable and unsafe unpickling forbidden.

mmdet ships its ``tools`` inside the package, so there is nothing to copy and every flag is mmdet's, on either stack.
What can be wrong with a config or a checkpoint is said before mmengine's Runner writes the whole config to the screen.
"""

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone without installing

TRUST_FLAG = '--trust-checkpoint'


def run(name: str) -> None:
    """Run ``tools/NAME`` of the installed mmdet as ``__main__``, with this process's arguments.

    One flag is ours: ``--trust-checkpoint`` unpickles checkpoints that hold more than zoo checkpoints do.

    Raises:
        SystemExit: with one line, if mmdet, a config or a checkpoint cannot be used: the one that is named, or one
            that the Runner loads by the config. ``test.py`` refuses a checkpoint of another model, which mmengine
            would only log, and evaluate what was not loaded at random.
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
        _check(cfg, getattr(args, 'checkpoint', None), trust)
        runpy.run_path(str(script), run_name='__main__')
    except (CheckpointError, ReevaluationError) as error:
        sys.exit(f'error: {error}')
    except TypeError as error:
        if reason := lists_for_tuples(args.config, error):
            sys.exit(f'error: {reason}')
        raise


def _check(cfg: Any, checkpoint: str | None, trust: bool) -> None:
    """Build what the Runner is going to build, and hold the checkpoint against it.

    Args:
        cfg: the config, with the options of the command line.
        checkpoint: whose weights have to be those of the model; None: of a training, which may begin with any.
        trust: see :func:`mmdet_softnms.checkpoint.load_checkpoint`.

    Raises:
        ReevaluationError, CheckpointError: one line.
    """
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    from mmdet_softnms.checkpoint import check_weights, load_checkpoint
    from mmdet_softnms.files import ReevaluationError, first_line
    from mmdet_softnms.models.places import check_places
    from mmdet_softnms.registry import build_rule, default_scope_of

    try:
        check_places(cfg)
        nms = ((cfg.model.get('test_cfg') or {}).get('rcnn') or {}).get('nms')
        if nms is not None:
            build_rule(nms)  # one of mmcv's, too, which would say at the first image that an argument is misspelt
    except (KeyError, TypeError, ValueError) as error:
        raise ReevaluationError(str(error)) from error
    init_default_scope(default_scope_of(cfg))
    for part in ('test_dataloader',) if checkpoint else ('train_dataloader', 'val_dataloader'):
        _check_dataset(part, (cfg.get(part) or {}).get('dataset'))
    if checkpoint is None:
        return
    try:
        model = MODELS.build(copy.deepcopy(cfg.model))
    except Exception as error:  # whatever a model raises
        raise ReevaluationError(f'the model of the config cannot be built: {first_line(error)}') from error
    weights = load_checkpoint(checkpoint, trust=trust)['state_dict']
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys  # its layers may know older names
    except RuntimeError:  # other shapes
        missing = ['some']
    if missing:
        check_weights(model, checkpoint, trust=trust, ignore=('',))  # more than the model needs does no harm


def _check_dataset(part: str, dataset_cfg: Any) -> None:
    """Raise a ReevaluationError for a data set whose type or arguments are wrong, or whose annotations are not there.

    Those inside of another one (repeated, joined) are left to mmdet: they would read their annotations here.
    """
    from mmdet.registry import DATASETS

    from mmdet_softnms.files import ReevaluationError, first_line

    if dataset_cfg is None or 'dataset' in dataset_cfg or 'datasets' in dataset_cfg:
        return
    try:
        dataset = DATASETS.build({**copy.deepcopy(dataset_cfg), 'lazy_init': True})
    except Exception as error:  # whatever a data set raises
        if "'lazy_init'" in str(error):  # one of the user's own that knows no such thing
            return
        raise ReevaluationError(f'{part}.dataset cannot be built: {first_line(error)}') from error
    path = getattr(dataset, 'ann_file', None)
    if isinstance(path, str) and path and not dataset_cfg.get('backend_args') and not Path(path).exists():
        raise ReevaluationError(
            f'annotation file {path} of {part}.dataset does not exist; put the data there or correct data_root / '
            'ann_file (--cfg-options)'
        )
