"""A user's config as one whose model returns every candidate and suppresses nothing.

What re-evaluation has to know of a kind of detector is one :class:`Family`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mmdet.registry
import torch
from mmdet.models import Detectron2Wrapper
from mmdet.models.dense_heads import RTMDetInsHead
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from mmdet_softnms.files import ReevaluationError, first_line
from mmdet_softnms.models import dense_heads, detectron2_wrapper, roi_heads
from mmdet_softnms.models.places import check_places, class_of
from mmdet_softnms.models.takes_rules import TakesRules, plain_of
from mmdet_softnms.reevaluation.candidates.views import wrapped
from mmdet_softnms.registry import default_scope_of, resolve


@dataclass(frozen=True)
class Family:
    """Detectors whose suppression is done by the same part of the model, with a test_cfg in the same place."""

    name: str
    part: str  # of the model: the head that suppresses
    key: str  # of model.test_cfg, where score_thr, max_per_img and nms are; empty: in test_cfg itself
    columns: tuple[str, ...]  # what a candidate has; the last ones where its head or the views give them
    unused: tuple[str, ...]  # modules of the head that no candidate depends on
    write: Callable[[type], dict[str, Any]]  # what a config writes for a head's class, so that it takes rules
    why_not_stored: Callable[[type], str]  # why candidates of a head's class cannot be re-evaluated

    def head(self, cfg: Config) -> type:
        """The class of a config's head.

        Raises:
            ReevaluationError: there is no such class, or it cannot take rules and is asked to.
        """
        try:
            return class_of(cfg.model[self.part], default_scope_of(cfg))
        except (KeyError, TypeError, AttributeError) as error:
            raise ReevaluationError(f'model.{self.part}: {error}') from error

    @property
    def place(self) -> str:
        """Where a config has its thresholds and its rule, in words."""
        return f'model.test_cfg.{self.key}' if self.key else 'model.test_cfg'

    def test_cfg(self, cfg: Config) -> ConfigDict:
        """Where a config has its thresholds and its rule.

        Raises:
            ReevaluationError: it has none.
        """
        found = cfg.model.get('test_cfg') or {}
        found = found.get(self.key) if self.key else found
        if not isinstance(found, dict) or not found:
            raise ReevaluationError(f'{self.place} is missing: it has to hold score_thr, max_per_img and nms')
        return found

    def written(self, cfg: Config) -> dict[str, Any]:
        """The lines about the head that a config with a rule needs.

        Raises:
            ReevaluationError: the head cannot take rules.
        """
        head = self.head(cfg)
        try:
            lines = self.write(head)
        except TypeError as error:
            raise ReevaluationError(str(error)) from error
        if reason := self.why_not_stored(plain_of(head)):
            raise ReevaluationError(reason)
        return lines

    def leave_out_unused(self, model: torch.nn.Module) -> None:
        """Take out what would run after the suppression: mask heads."""
        head = model.get_submodule(self.part)
        for name in self.unused:
            if getattr(head, name, None) is not None:
                setattr(head, name, None)

    def not_needed(self, model: torch.nn.Module) -> tuple[str, ...]:
        """Prefixes of checkpoint entries that a model may lack once :meth:`leave_out_unused` has seen it."""
        return tuple(f'{self.part}.{name}.' for name in self.unused)

    def num_classes(self, model: torch.nn.Module) -> int:
        """How many classes a model predicts."""
        head: Any = model.get_submodule(self.part)
        head = getattr(head, 'bbox_head', head)  # of a RoI head
        head = head[-1] if isinstance(head, torch.nn.ModuleList) else head
        return int(head.num_classes)


ROI_HEADS = Family(
    name='two-stage detectors',
    part='roi_head',
    key='rcnn',
    columns=('bboxes', 'scores', 'labels'),
    unused=('mask_head', 'mask_roi_extractor', 'mask_iou_head', 'point_head', 'feat_relay_head'),
    write=roi_heads.how_to_write,
    why_not_stored=lambda head: '',
)
DENSE_HEADS = Family(
    name='one-stage detectors',
    part='bbox_head',
    key='',
    columns=('bboxes', 'scores', 'labels', 'class_scores'),
    unused=(),
    write=dense_heads.how_to_write,
    why_not_stored=dense_heads.why_not_stored,
)


@dataclass(frozen=True)
class _Detectron2(Family):
    """Models of Detectron2 in mmdet's ``Detectron2Wrapper``, which have their thresholds in Detectron2's config."""

    def head(self, cfg: Config) -> type:
        """The class of the wrapper.

        Raises:
            ReevaluationError: it is one of somebody's own.
        """
        cls: type = resolve(cfg.model.type, mmdet.registry.MODELS, default_scope_of(cfg)).cls
        if cls not in (Detectron2Wrapper, detectron2_wrapper.SoftNMSDetectron2Wrapper):
            raise ReevaluationError(
                f"the model {cls.__name__} wraps Detectron2 in its own way; use mmdet's Detectron2Wrapper, or "
                'mmdet_softnms.SoftNMSDetectron2Wrapper'
            )
        return cls

    @property
    def place(self) -> str:
        """Where a config has its thresholds and its rule, in words."""
        return 'model.detector'

    def detector(self, cfg: Config) -> Any:
        """Detectron2's own config.

        Raises:
            ReevaluationError: it cannot be read.
        """
        self.head(cfg)
        return self._asked(lambda: detectron2_wrapper.read_detector(cfg.model[self.part]))

    def test_cfg(self, cfg: Config) -> ConfigDict:
        """Thresholds and rule of Detectron2's config, under the names that they have in mmdet; a copy."""
        return ConfigDict(self._asked(lambda: detectron2_wrapper.own_test_cfg(cfg.model)))

    def written(self, cfg: Config) -> dict[str, Any]:
        """The wrapper that takes rules, and the class in Detectron2 that does.

        Raises:
            ReevaluationError: it cannot be read, or what it gives cannot be stored.
        """
        detector = self.detector(cfg)
        if detectron2_wrapper.is_retinanet(detector):
            raise ReevaluationError(
                "Detectron2's RetinaNet suppresses boxes before they are clipped to the image, and gives them after: "
                "stored ones would not be those it suppresses. Convert it (detectron2_to_mmdet.py) to mmdet's RetinaNet"
            )
        wrapper = resolve(detectron2_wrapper.SoftNMSDetectron2Wrapper, mmdet.registry.MODELS)
        return dict(type=wrapper.type, head=detectron2_wrapper.head_with_rules(detector))

    def leave_out_unused(self, model: torch.nn.Module) -> None:
        """Nothing: the plugged config has no masks and no keypoints."""

    def not_needed(self, model: torch.nn.Module) -> tuple[str, ...]:
        """Masks and keypoints, and buffers of which Detectron2 itself takes no notice in a file."""
        return self.unused + detectron2_wrapper.not_persistent(model)

    def num_classes(self, model: torch.nn.Module) -> int:
        """How many classes a model predicts."""
        return int(model.num_classes)  # type: ignore[arg-type]

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (ImportError, KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise ReevaluationError(f'{self.place}: {first_line(error)}') from error


DETECTRON2 = _Detectron2(
    name="Detectron2's detectors",
    part='detector',
    key='',
    columns=('bboxes', 'scores', 'labels'),
    unused=tuple(f'd2_model.roi_heads.{name}_' for name in ('mask', 'keypoint')),
    write=lambda head: {},
    why_not_stored=lambda head: '',
)


def family_of(cfg: Config) -> Family:
    """The family of a config's detector.

    Raises:
        ReevaluationError: it belongs to none.
    """
    model = cfg.get('model') or {}
    for family in (ROI_HEADS, DENSE_HEADS):
        if isinstance(model.get(family.part), dict):
            return family
    if model.get('bbox_head_refine'):  # mmrotate's R3Det and S2A-Net
        raise ReevaluationError(
            'a detector that refines (bbox_head_refine) cannot be re-evaluated: its suppression is in the last of a '
            "list of heads; run rules live, as nms=dict(type='mmdet_softnms.RotatedSoftNMS') in the test_cfg, with "
            "mmrotate's own metric"
        )
    kind = model.get('type')
    if isinstance(model.get(DETECTRON2.part), dict) and kind is not None:
        try:
            cls = resolve(kind, mmdet.registry.MODELS, default_scope_of(cfg)).cls
        except (KeyError, TypeError) as error:
            raise ReevaluationError(f'model.type: {error}') from error
        if isinstance(cls, type) and issubclass(cls, Detectron2Wrapper):
            return DETECTRON2
    raise ReevaluationError(
        f'the model {getattr(kind, "__name__", kind)} has no roi_head and no bbox_head, of which raw candidates are '
        'taken: use the config of a two-stage or one-stage detector itself'
    )


def family_of_head(kind: Any) -> Family:
    """The family of the type of a head that takes rules."""
    cls = resolve(kind, mmdet.registry.MODELS).cls
    if issubclass(cls, Detectron2Wrapper):
        return DETECTRON2
    return DENSE_HEADS if issubclass(cls, dense_heads.SoftNMSDenseMixin) else ROI_HEADS


def box_dim_of(cfg: Config) -> int:
    """How many values a box of a config's detector has: 4, or 5 where it is rotated, as mmrotate's are.

    Raises:
        ReevaluationError: it has another number, or there is no such head.
    """
    family = family_of(cfg)
    if family is DETECTRON2:
        return 4
    head, written = family.head(cfg), cfg.model[family.part]
    if family is ROI_HEADS:
        last = written.get('bbox_head') or {}
        last = last[-1] if isinstance(last, (list, tuple)) else last
        box_dim = {'hbox': 4, 'rbox': 5, 'qbox': 8}.get(last.get('predict_box_type', 'hbox'), 4)
        if box_dim == 8:
            raise ReevaluationError(other_boxes(8, 5))
        return box_dim
    try:
        coder = resolve(written['bbox_coder']['type'], mmdet.registry.TASK_UTILS, default_scope_of(cfg)).cls
    except (KeyError, TypeError):  # none in the config: that of the head
        coder = None
    # Heads of mmrotate whose coder does not tell have an angle of their own (FCOS, RTMDet, RepPoints). A head whose
    # boxes turn out to be of another kind is refused with its first image.
    of_mmrotate = any(one.__module__.startswith('mmrotate.') for one in head.__mro__)
    return 5 if of_mmrotate or getattr(coder, 'encode_size', 4) == 5 else 4


def other_boxes(found: int, wanted: int) -> str:
    """What to say of a detector whose boxes have another number of values than those that are re-evaluated."""
    kinds = {4: 'axis-aligned boxes (x1, y1, x2, y2)', 5: 'rotated boxes (x, y, w, h, angle)'}
    return (
        f'the detector predicts {kinds.get(found, f"boxes of {found} values")}, and re-evaluation takes it for one of '
        f'{kinds[wanted]}: stored candidates and metrics would not be its own; run rules live, with its own metric'
    )


def plug(cfg: Config, score_floor: float) -> Config:
    """A copy of a config whose model returns every candidate with ``score > score_floor`` and suppresses nothing.

    Args:
        cfg: any mmdet config with a supported RoI head or dense head; not changed.
        score_floor: smallest ``score_thr`` that will be applied to the candidates.

    Raises:
        ReevaluationError: the model has no head that can be plugged, or its config names a rule in a place that
            cannot take it.
    """
    family = family_of(cfg)
    head, written = family.head(cfg), family.written(cfg)
    try:
        check_places(cfg, ('model',))
    except ValueError as error:
        raise ReevaluationError(str(error)) from error
    cfg = copy.deepcopy(cfg)
    if box_dim_of(cfg) != 4 and cfg.get('softnms_views'):
        raise ReevaluationError(
            'several views of each image (--tta, --scales) are re-evaluated of axis-aligned boxes only: mmdet turns no '
            'rotated boxes back; leave them out'
        )
    if family is DETECTRON2:
        if cfg.get('softnms_views'):
            raise ReevaluationError(
                "several views of each image (--tta, --scales) are re-evaluated of mmdet's own detectors only; "
                'Detectron2 has mmdet_softnms.detectron2.SoftNMSWithTTA'
            )
        cfg.model = detectron2_wrapper.plugged(cfg.model, score_floor)
    else:
        _plug_head(cfg, family, head, written, score_floor)
    cfg.default_scope = default_scope_of(cfg)
    if cfg.get('softnms_views'):
        cfg.model = wrapped(cfg.model)
    return cfg


def _plug_head(cfg: Config, family: Family, head: type, written: dict[str, Any], score_floor: float) -> None:
    """Exchange the head of a config of mmdet's, and its thresholds."""
    if not issubclass(head, TakesRules):
        if 'head' in written and resolve(head, mmdet.registry.MODELS).scope is None:
            written['head'] = head  # which mmengine could not find by its name, where it is not in a module
        cfg.model[family.part].update(written)
    # A config dumped after its model was built repeats test_cfg in the head, and mmdet would merge the two.
    cfg.model[family.part].pop('test_cfg', None)
    thresholds = family.test_cfg(cfg)
    thresholds.score_thr, thresholds.max_per_img = score_floor, -1
    thresholds.nms = ConfigDict(type='mmdet_softnms.NoSuppression')  # assigned, since ConfigDict.update merges


def has_mask_head(cfg: Config) -> bool:
    """Whether the config's head predicts masks, which re-evaluation leaves out."""
    family = family_of(cfg)
    if family is DETECTRON2:
        model = DETECTRON2.detector(cfg).MODEL
        return bool(model.MASK_ON or model.KEYPOINT_ON)
    if family is DENSE_HEADS:
        return issubclass(family.head(cfg), RTMDetInsHead)
    return cfg.model.roi_head.get('mask_head') is not None


def most_candidates(cfg: Config) -> int | None:
    """How many candidates an image can have at most: ``nms_pre`` of each level of each view; None: not known."""
    family = family_of(cfg)
    nms_pre = family.test_cfg(cfg).get('nms_pre', -1) if family is DENSE_HEADS else -1
    if nms_pre <= 0:
        return None
    head = cfg.model.bbox_head
    generator = head.get('anchor_generator') or head.get('prior_generator') or head
    strides = generator.get('strides') or head.get('point_strides') or head.get('featmap_strides') or range(5)
    return int(nms_pre) * len(strides) * (cfg.softnms_views.number if cfg.get('softnms_views') else 1)


def check_classes(model: torch.nn.Module, cfg: Config, runner: Runner) -> None:
    """Raise a ReevaluationError where a model and its test set differ in the number of classes."""
    num_classes = family_of(cfg).num_classes(model)
    classes = runner.test_loop.dataloader.dataset.metainfo.get('classes', ())
    if num_classes != len(classes):
        raise ReevaluationError(
            f'the model predicts {num_classes} classes but the test set {cfg.test_dataloader.dataset.get("ann_file")} '
            f'has {len(classes)}; correct num_classes or test_dataloader.dataset.metainfo'
        )
