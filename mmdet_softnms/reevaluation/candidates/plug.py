"""A user's config as one whose model returns every candidate and suppresses nothing."""

import copy
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from mmdet_softnms.files import ReevaluationError

_PLUGGED_ROI_HEADS = {
    'StandardRoIHead': 'SoftNMSRoIHead',
    'CascadeRoIHead': 'SoftNMSCascadeRoIHead',
    'DoubleHeadRoIHead': 'SoftNMSDoubleHeadRoIHead',
}
MASK_PREFIXES = ('roi_head.mask_head.', 'roi_head.mask_roi_extractor.')


def plug(cfg: Config, score_floor: float) -> Config:
    """A copy of a config whose model returns every candidate with ``score > score_floor`` and suppresses nothing.

    Args:
        cfg: any mmdet config with a supported RoI head; not changed.
        score_floor: smallest ``score_thr`` that will be applied to the candidates.

    Raises:
        ReevaluationError: the model has no RoI head that can be plugged.
    """
    cfg = copy.deepcopy(cfg)
    roi_head = cfg.get('model', {}).get('roi_head')
    if roi_head is None:
        raise ReevaluationError(
            f'the model {cfg.get("model", {}).get("type")} has no roi_head, and raw candidates are taken from RoI '
            'heads only: use a two-stage detector'
        )
    scope, _, name = roi_head.type.rpartition('.')
    if scope in ('', 'mmdet') and name in _PLUGGED_ROI_HEADS:
        roi_head.type = f'mmdet_softnms.{_PLUGGED_ROI_HEADS[name]}'
    elif scope != 'mmdet_softnms':
        raise ReevaluationError(
            f'{roi_head.type} cannot be plugged: it suppresses in its own way. Supported RoI heads: '
            f'{", ".join(_PLUGGED_ROI_HEADS)} and those of mmdet_softnms'
        )
    # A config dumped after its model was built repeats test_cfg in the head, and mmdet would merge the two.
    for part in ('mask_head', 'mask_roi_extractor', 'test_cfg'):
        roi_head.pop(part, None)
    rcnn = cfg.model.test_cfg.rcnn
    rcnn.score_thr, rcnn.max_per_img = score_floor, -1
    rcnn.nms = ConfigDict(type='mmdet_softnms.NoSuppression')  # assigned, since ConfigDict.update merges
    return cfg


def has_mask_head(cfg: Config) -> bool:
    """Whether the config's RoI head predicts masks, which re-evaluation leaves out."""
    return cfg.model.roi_head.get('mask_head') is not None


def check_classes(model: torch.nn.Module, cfg: Config, runner: Runner) -> None:
    heads: Any = model.get_submodule('roi_head.bbox_head')
    num_classes = (heads[-1] if isinstance(heads, torch.nn.ModuleList) else heads).num_classes
    classes = runner.test_loop.dataloader.dataset.metainfo.get('classes', ())
    if num_classes != len(classes):
        raise ReevaluationError(
            f'the model predicts {num_classes} classes but the test set {cfg.test_dataloader.dataset.get("ann_file")} '
            f'has {len(classes)}; correct num_classes or test_dataloader.dataset.metainfo'
        )
