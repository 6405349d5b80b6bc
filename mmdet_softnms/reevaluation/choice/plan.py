"""The images on which a setting is chosen, found before anything slow runs."""

import copy
from dataclasses import dataclass

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import is_distributed

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.candidates.images import ImageReader
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.reevaluation.candidates.views import with_views
from mmdet_softnms.reevaluation.request import Listener, Request, check_choice


@dataclass(frozen=True)
class TuningSplit:
    """Images to tune on that are not those reported on."""

    dataset: BaseDataset
    cfg: Config  # whose test set it is


def plan_choice(request: Request, dataset: BaseDataset, listener: Listener) -> TuningSplit | None:
    """The split to tune on; None: fold by fold over the test set.

    Args:
        request: with a ``select``.
        dataset: the test set.
        listener: told where 'auto' cannot use the ``val_dataloader``.

    Raises:
        ReevaluationError: too few images; 'val' is not there, is damaged, or shares images with the test set.
    """
    split = None if request.tune_on == 'folds' else _tuning_split(request, dataset, listener)
    check_choice(request.select or '', request.resamples, request.folds if split is None else None, len(dataset))
    return split


def _tuning_split(request: Request, dataset: BaseDataset, listener: Listener) -> TuningSplit | None:
    cfg, required = request.cfg, request.tune_on == 'val'
    if not required and (cfg.get('val_dataloader') is None or cfg.get('val_evaluator') is None):
        return None
    try:
        cfg = with_views(cfg, request.tta, request.scales, request.flip, request.views, split='val')
        val_set = build_test_set(cfg, split='val')
    except ReevaluationError as error:
        if required:
            raise
        listener.say(f'not tuned on val_dataloader, but by folds over the test set: {error}')
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
    return TuningSplit(val_set, val_cfg)


def image_identities(dataset: BaseDataset) -> list[str]:
    """What identifies each image: its content, or its path where it cannot be read here."""
    reader = ImageReader(dataset)
    places = (' '.join(reader.paths(number)) for number in range(len(dataset)))
    return [content or place for content, place in zip(reader.contents(), places, strict=True)]
