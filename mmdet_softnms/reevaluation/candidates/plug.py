"""A user's config as one whose model returns every candidate and suppresses nothing.

What re-evaluation has to know of a kind of detector is one :class:`Family`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mmdet.registry
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.models.places import check_places
from mmdet_softnms.models.roi_heads import SoftNMSMixin, how_to_write
from mmdet_softnms.registry import Resolved, default_scope_of, resolve


@dataclass(frozen=True)
class Family:
    """Detectors whose suppression is done by the same part of the model, with a test_cfg in the same place."""

    name: str
    part: str  # of the model: the head that suppresses
    key: str  # of model.test_cfg, which holds score_thr, max_per_img and nms
    columns: tuple[str, ...]  # what a candidate has
    unused: tuple[str, ...]  # modules of the head that no candidate depends on
    write: Callable[[type], dict[str, Any]]  # what a config writes for a head's class, so that it takes rules

    def head(self, cfg: Config) -> Resolved:
        """The class of a config's head.

        Raises:
            ReevaluationError: there is no such class.
        """
        try:
            return resolve(cfg.model[self.part].type, mmdet.registry.MODELS, default_scope_of(cfg))
        except (KeyError, TypeError, AttributeError) as error:
            raise ReevaluationError(f'model.{self.part}: {error}') from error

    def test_cfg(self, cfg: Config) -> ConfigDict:
        """Where a config has its thresholds and its rule.

        Raises:
            ReevaluationError: it has none.
        """
        found = (cfg.model.get('test_cfg') or {}).get(self.key)
        if not isinstance(found, dict):
            raise ReevaluationError(
                f'model.test_cfg.{self.key} is missing: it has to hold score_thr, max_per_img and nms'
            )
        return found

    def written(self, cfg: Config) -> dict[str, Any]:
        """The lines about the head that a config with a rule needs.

        Raises:
            ReevaluationError: the head cannot take rules.
        """
        head = self.head(cfg)
        try:
            lines = self.write(head.cls)
        except TypeError as error:
            raise ReevaluationError(str(error)) from error
        other = cfg.model[self.part].get('head')
        if other is not None and issubclass(head.cls, SoftNMSMixin):
            lines['head'] = resolve(other, mmdet.registry.MODELS, default_scope_of(cfg)).type
        return lines

    def leave_out_unused(self, model: torch.nn.Module) -> None:
        """Take out what would run after the suppression: mask heads."""
        head = model.get_submodule(self.part)
        for name in self.unused:
            if getattr(head, name, None) is not None:
                setattr(head, name, None)

    def num_classes(self, model: torch.nn.Module) -> int:
        """How many classes a model predicts."""
        heads: Any = model.get_submodule(self.part).bbox_head
        head: Any = heads[-1] if isinstance(heads, torch.nn.ModuleList) else heads
        return int(head.num_classes)


ROI_HEADS = Family(
    name='two-stage detectors',
    part='roi_head',
    key='rcnn',
    columns=('bboxes', 'scores', 'labels'),
    unused=('mask_head', 'mask_roi_extractor', 'mask_iou_head', 'point_head', 'feat_relay_head'),
    write=how_to_write,
)
MASK_PREFIXES = tuple(f'{ROI_HEADS.part}.{name}.' for name in ROI_HEADS.unused)


def family_of(cfg: Config) -> Family:
    """The family of a config's detector.

    Raises:
        ReevaluationError: it belongs to none.
    """
    model = cfg.get('model') or {}
    if not isinstance(model.get(ROI_HEADS.part), dict):
        kind = model.get('type')
        raise ReevaluationError(
            f'the model {getattr(kind, "__name__", kind)} has no {ROI_HEADS.part}, and raw candidates are taken from '
            'RoI heads only: use a two-stage detector'
        )
    return ROI_HEADS


def plug(cfg: Config, score_floor: float) -> Config:
    """A copy of a config whose model returns every candidate with ``score > score_floor`` and suppresses nothing.

    Args:
        cfg: any mmdet config with a supported RoI head; not changed.
        score_floor: smallest ``score_thr`` that will be applied to the candidates.

    Raises:
        ReevaluationError: the model has no RoI head that can be plugged, or its config names a rule in a place that
            cannot take it.
    """
    family = family_of(cfg)
    head, written = family.head(cfg), family.written(cfg)
    try:
        check_places(cfg, ('model',))
    except ValueError as error:
        raise ReevaluationError(str(error)) from error
    cfg = copy.deepcopy(cfg)
    if not issubclass(head.cls, SoftNMSMixin):
        if head.scope is None and 'head' in written:
            written['head'] = head.cls  # which mmengine could not find by its name, where it is not in a module
        cfg.model[family.part].update(written)
    # A config dumped after its model was built repeats test_cfg in the head, and mmdet would merge the two.
    cfg.model[family.part].pop('test_cfg', None)
    thresholds = family.test_cfg(cfg)
    thresholds.score_thr, thresholds.max_per_img = score_floor, -1
    thresholds.nms = ConfigDict(type='mmdet_softnms.NoSuppression')  # assigned, since ConfigDict.update merges
    cfg.default_scope = default_scope_of(cfg)
    return cfg


def has_mask_head(cfg: Config) -> bool:
    """Whether the config's RoI head predicts masks, which re-evaluation leaves out."""
    return cfg.model.roi_head.get('mask_head') is not None


def check_classes(model: torch.nn.Module, cfg: Config, runner: Runner) -> None:
    """Raise a ReevaluationError where a model and its test set differ in the number of classes."""
    num_classes = family_of(cfg).num_classes(model)
    classes = runner.test_loop.dataloader.dataset.metainfo.get('classes', ())
    if num_classes != len(classes):
        raise ReevaluationError(
            f'the model predicts {num_classes} classes but the test set {cfg.test_dataloader.dataset.get("ann_file")} '
            f'has {len(classes)}; correct num_classes or test_dataloader.dataset.metainfo'
        )
