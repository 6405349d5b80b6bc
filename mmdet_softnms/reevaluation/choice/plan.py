"""How to choose among the rows of a re-evaluation, checked before anything slow."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import is_distributed

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.candidates.images import ImageReader
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.reevaluation.choice.resampling import CRITERIA


@dataclass(frozen=True)
class Plan:
    """How to choose among the rows of a re-evaluation, checked before anything slow.

    Attributes:
        criterion, num_folds, resamples: see :func:`mmdet_softnms.reevaluation.choice.selection.select`.
        val_set: the tuning split; None: fold by fold over the test set.
        val_cfg: a config whose test set it is.
    """

    criterion: str
    num_folds: int
    resamples: int
    val_set: BaseDataset | None = None
    val_cfg: Config | None = None


def plan_choice(
    cfg: Config,
    *,
    criterion: str = 'AP',
    num_folds: int = 5,
    resamples: int = 1000,
    tune_on: str = 'auto',
    check_images: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Check what :func:`choose` is to do, and find the images to tune on.

    Args:
        cfg: as of :func:`reevaluate`.
        criterion, num_folds, resamples: see :func:`mmdet_softnms.reevaluation.choice.selection.select`.
        tune_on: 'val': tune on the config's ``val_dataloader``, which costs a forward pass over it; 'folds': k-fold
            over the test set; 'auto': 'val' where it can be read and shares no image with the test set, else 'folds'.
        check_images: of the test set; False where its candidates come from elsewhere.
        say: called with one line where 'auto' cannot use the ``val_dataloader``.

    Raises:
        ReevaluationError: too few images or resamples, an unknown criterion; 'val' is not there, is damaged, or shares
            images with the test set.
    """
    dataset = build_test_set(cfg, check_images)
    folds = Plan(criterion, num_folds, resamples)
    split = None if tune_on == 'folds' else _tuning_split(cfg, dataset, required=tune_on == 'val', say=say)
    check_choice(criterion, resamples, num_folds if split is None else None, len(dataset))
    return folds if split is None else replace(folds, val_set=split[0], val_cfg=split[1])


def _tuning_split(
    cfg: Config, dataset: BaseDataset, required: bool, say: Callable[[str], None]
) -> tuple[BaseDataset, Config] | None:
    """The ``val_dataloader``'s data set, with a config whose test set it is; None where it cannot serve."""
    if not required and (cfg.get('val_dataloader') is None or cfg.get('val_evaluator') is None):
        return None
    try:
        val_set = build_test_set(cfg, split='val')
    except ReevaluationError as error:
        if required:
            raise
        say(f'not tuned on val_dataloader, but by folds over the test set: {error}')
        return None
    common = len(set(image_identities(dataset)) & set(image_identities(val_set)))
    if common:
        if required:
            raise ReevaluationError(
                f'{common} of {len(val_set)} images of val_dataloader are test images too, and tuning on what is '
                'reported flatters; use --tune-on folds, or name another split (--cfg-options)'
            )
        return None
    if is_distributed():
        raise ReevaluationError(
            'a tuning split needs a second forward pass, and the other processes will be done; run --select without '
            'the launcher (candidates of the test set that are stored are found), or give --tune-on folds'
        )
    val_cfg = copy.deepcopy(cfg)
    val_cfg.test_dataloader, val_cfg.test_evaluator = cfg.val_dataloader, cfg.get('val_evaluator')
    return val_set, val_cfg


def image_identities(dataset: BaseDataset) -> list[str]:
    """What tells an image from others: its content, or its place where it cannot be read here."""
    reader = ImageReader(dataset)
    places = (' '.join(reader.paths(number)) for number in range(len(dataset)))
    return [content or place for content, place in zip(reader.contents(), places, strict=True)]


def check_choice(criterion: str, resamples: int, num_folds: int | None, num_images: int) -> None:
    """Raise a ReevaluationError for what :func:`select` cannot do; ``num_folds`` None: there is a tuning split."""
    if criterion not in CRITERIA:
        raise ReevaluationError(f'--select takes {", ".join(CRITERIA)}, got {criterion}')
    if resamples < 1000:
        raise ReevaluationError(f'a bootstrap of {resamples} resamples says little; give at least 1000')
    if num_folds is not None and num_images < 2:
        raise ReevaluationError('a single image cannot be divided into folds: nothing to choose on and report on')
    if num_folds is not None and not 2 <= num_folds <= num_images:
        raise ReevaluationError(f'{num_folds} folds of {num_images} images are not possible; give 2 to {num_images}')
