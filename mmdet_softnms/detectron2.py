"""Rules in Detectron2: in a LazyConfig, in a yacs config, and in the merge of test-time augmentation.

A LazyConfig takes :class:`SoftNMSOutputLayers` as the box predictor (for one stage, :class:`SoftNMSRetinaNet` or
:class:`SoftNMSFCOS` as the model). A yacs config takes :func:`add_soft_nms_config` and one of the RoI heads below, or
:class:`SoftNMSRetinaNet`; Detectron2 has no yacs config for FCOS.
Needs torch, numba and detectron2; mmdet, mmcv and mmengine are not imported.

Nothing of Detectron2 is patched: each class overrides the one method in which Detectron2 suppresses. No class has
parameters of its own, so checkpoints load unchanged. As in Detectron2, suppression happens at the network's scale;
detections are rescaled afterwards. The RPN keeps hard NMS.

Shapes: R RoIs in an image, K classes, M detections.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNNWithTTA, RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from mmdet_softnms import paper_rules, rules
from mmdet_softnms.post_process import Instances as Candidates
from mmdet_softnms.post_process import suppress_candidates, to_candidates
from mmdet_softnms.rules import HardNMS, Rule, SoftNMS

__all__ = [
    'SoftNMSCascadeROIHeads',
    'SoftNMSFCOS',
    'SoftNMSOutputLayers',
    'SoftNMSROIHeads',
    'SoftNMSRes5ROIHeads',
    'SoftNMSRetinaNet',
    'SoftNMSWithTTA',
    'add_soft_nms_config',
    'build_rule',
    'inference',
    'rule_of',
]

_OURS = ('SoftNMS', 'HardNMS', 'VotedNMS', 'SupportedNMS', 'NoSuppression')
_PAPERS = (
    'MatrixNMS', 'ClusterNMS', 'FastNMS', 'DIoUNMS', 'GidarisNMS', 'WeightedBoxesFusion', 'NonMaximumWeighted',
)  # fmt: skip
_BY_NAME = {name: getattr(rules, name) for name in _OURS} | {name: getattr(paper_rules, name) for name in _PAPERS}


def build_rule(rule: Rule | Mapping[str, Any] | None) -> Rule | None:
    """A rule from what a config holds.

    Args:
        rule: a rule; a dict with its ``type`` (``'SoftNMS'``, ``'mmdet_softnms.SoftNMS'`` or a class) and arguments, of
            which ``rule`` may again be a dict; or None, which is Detectron2's own NMS.

    Raises:
        TypeError, ValueError: it is not a rule, or an argument of it is wrong.
    """
    if isinstance(rule, Mapping):
        arguments = {str(name): value for name, value in rule.items() if name != 'type'}
        kind = rule.get('type')
        cls = _BY_NAME.get(kind.removeprefix('mmdet_softnms.')) if isinstance(kind, str) else kind
        if not callable(cls):
            raise ValueError(f'type of a rule must be a class or one of {", ".join(_BY_NAME)}, got {kind!r}')
        if isinstance(arguments.get('rule'), Mapping):
            arguments['rule'] = build_rule(arguments['rule'])
        rule = cls(**arguments)
    if rule is None:
        return None
    if isinstance(rule, type) or not callable(rule) or not isinstance(getattr(rule, 'params', None), dict):
        raise TypeError(f'rule must be a rule, as SoftNMS(), a dict with its type, or None, got {rule!r:.80}')
    if isinstance(rule, rules.MmcvNMS):
        raise TypeError("MmcvNMS is mmdet's own suppression and needs mmcv; rule=None is Detectron2's own")
    made: Rule = rule
    return made


def inference(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    image_shapes: Sequence[tuple[int, int]],
    score_thresh: float,
    rule: Rule,
    topk_per_image: int,
) -> tuple[list[Instances], list[Tensor]]:
    """Detectron2's ``fast_rcnn_inference``, with a rule where that has ``nms_thresh``.

    RoIs with a box or score that is not finite are dropped, as there; here with a warning.

    Args:
        boxes: of each image, decoded ``xyxy`` boxes (R, 4K), or (R, 4) where box regression is class-agnostic.
        scores: of each image, class probabilities (R, K+1), background last.
        image_shapes: (height, width) of each image.
        score_thresh: candidates with ``score > score_thresh`` take part.
        rule: a rule of :mod:`mmdet_softnms.rules`.
        topk_per_image: at most so many detections; below 0: no limit. 0 is none at all.

    Returns:
        Of each image the detections (``pred_boxes``, ``scores`` never increasing, ``pred_classes``), and a tensor (M,)
        of int64, the rows of ``boxes`` that they come from.
    """
    candidates, rows = [], []
    dropped = 0
    for of_image, probabilities, shape in zip(boxes, scores, image_shapes, strict=True):
        finite = of_image.isfinite().all(dim=1) & probabilities.isfinite().all(dim=1)
        dropped += int((~finite).sum())
        clipped = Boxes(of_image[finite].reshape(-1, 4))
        clipped.clip(shape)
        probabilities = probabilities[finite]
        candidates.append(to_candidates(clipped.tensor.reshape(-1, of_image.shape[1]), probabilities, score_thresh))
        # The row of each candidate, in the order of to_candidates.
        rows.append(finite.nonzero()[:, 0][(probabilities[:, :-1] > score_thresh).nonzero()[:, 0]])
    if dropped:
        warnings.warn(
            f'{dropped} RoIs whose box or scores are not finite were dropped: the network diverged in training, or ran '
            'out of the range of its floating type',
            RuntimeWarning,
            stacklevel=2,
        )
    selected = _select(candidates, image_shapes, rule, topk_per_image)
    return [found for found, _ in selected], [row[keep] for row, (_, keep) in zip(rows, selected, strict=True)]


def _select(
    images: Sequence[Candidates], shapes: Sequence[tuple[int, int]], rule: Rule, most: int
) -> list[tuple[Instances, Tensor]]:
    """Detections of each image, and where each stands among the candidates; at most so many, below 0 all."""
    selected = []
    for (found, keep), shape in zip(suppress_candidates(images, rule, most), shapes, strict=True):
        found, keep = (found, keep) if most else (Candidates(*(part[:0] for part in found)), keep[:0])  # 0: all, there
        boxes, scores, classes = found
        selected.append((Instances(shape, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes), keep))
    return selected


class SoftNMSOutputLayers(FastRCNNOutputLayers):
    """Detectron2's box predictor, with suppression by rule.

    Args:
        input_shape, **kwargs: those of ``FastRCNNOutputLayers``. With a rule, ``test_nms_thresh`` is not used.
        rule: see :func:`build_rule`. It has no default, so that nobody gets hard NMS by leaving it out. The attribute
            ``rule`` may be replaced by another rule at any time.

    Raises:
        TypeError, ValueError: the rule is wrong, or boxes are rotated.
        RuntimeError, when it runs: the RoI heads suppress without it (:attr:`test_nms_thresh`).
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, rule: Rule | Mapping[str, Any] | None, **kwargs: Any) -> None:
        super().__init__(input_shape, **kwargs)
        if len(self.box2box_transform.weights) != 4:
            raise ValueError("SoftNMSOutputLayers takes upright boxes only; rotated ones need Detectron2's own head")
        self.rule = build_rule(rule)

    @property
    def test_nms_thresh(self) -> float:
        """The threshold of Detectron2's own NMS.

        Raises:
            RuntimeError: there is a rule. Whoever asks would suppress in its own way, and leave the rule out.
        """
        if self.rule is not None:
            raise RuntimeError(
                'these RoI heads suppress without asking their predictor, so its rule would not be applied; stock '
                'CascadeROIHeads do: use SoftNMSCascadeROIHeads with rule=...'
            )
        return self._test_nms_thresh

    @test_nms_thresh.setter
    def test_nms_thresh(self, threshold: float) -> None:
        self._test_nms_thresh = threshold

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Arguments from a yacs config that :func:`add_soft_nms_config` has seen."""
        return dict(super().from_config(cfg, input_shape), rule=rule_of(cfg.MODEL.ROI_HEADS))

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Detections of each image and the RoIs they come from; arguments as in Detectron2."""
        if self.rule is None:
            detections: tuple[list[Instances], list[Tensor]] = super().inference(predictions, proposals)
            return detections
        return inference(
            self.predict_boxes(predictions, proposals),
            self.predict_probs(predictions, proposals),
            [image.image_size for image in proposals],
            self.test_score_thresh,
            self.rule,
            self.test_topk_per_image,
        )


def add_soft_nms_config(cfg: CfgNode) -> None:
    """Add the keys of pull request #1183, which forks of Detectron2 share, to ``cfg.MODEL.ROI_HEADS``.

    ``SOFT_NMS_ENABLED`` (False: Detectron2's own NMS), ``SOFT_NMS_METHOD`` (``'gaussian'``, ``'linear'``, ``'hard'`` or
    another method of :func:`mmdet_softnms.soft_nms`), ``SOFT_NMS_SIGMA`` (0.5) and ``SOFT_NMS_PRUNE`` (0.001, its
    ``min_score``). The IoU threshold of linear is ``NMS_THRESH_TEST``: set it to 0.3, Detectron2's 0.5 halves the gain.
    ``cfg.MODEL.RETINANET`` gets the same four, for :class:`SoftNMSRetinaNet`.
    """
    for keys in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        keys.SOFT_NMS_ENABLED = False
        keys.SOFT_NMS_METHOD = 'gaussian'
        keys.SOFT_NMS_SIGMA = 0.5
        keys.SOFT_NMS_PRUNE = 0.001


def rule_of(keys: CfgNode) -> Rule | None:
    """The rule that the keys of :func:`add_soft_nms_config` name; None: Detectron2's own NMS.

    Args:
        keys: ``cfg.MODEL.ROI_HEADS`` or ``cfg.MODEL.RETINANET``.

    Raises:
        KeyError: they are not there.
        TypeError, ValueError: the value of one is wrong.
    """
    if 'SOFT_NMS_ENABLED' not in keys:
        raise KeyError('the config has no SOFT_NMS_ENABLED: call add_soft_nms_config(cfg) after get_cfg()')
    if not keys.SOFT_NMS_ENABLED:
        return None
    if keys.SOFT_NMS_METHOD == 'hard':
        return HardNMS(keys.NMS_THRESH_TEST)
    return SoftNMS(
        keys.SOFT_NMS_METHOD,
        iou_threshold=keys.NMS_THRESH_TEST,
        sigma=keys.SOFT_NMS_SIGMA,
        min_score=keys.SOFT_NMS_PRUNE,
    )


class _PredictorOfConfig:
    """Before a head of one stage in the bases: the predictor that the head builds from a yacs config takes a rule."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)  # type: ignore[misc]
        # Detectron2 hard-codes the class of the predictor.
        channels = arguments['box_predictor'].cls_score.in_features
        arguments['box_predictor'] = SoftNMSOutputLayers(cfg, ShapeSpec(channels=channels))
        return arguments


@ROI_HEADS_REGISTRY.register()
class SoftNMSROIHeads(_PredictorOfConfig, StandardROIHeads):
    """``MODEL.ROI_HEADS.NAME`` of Fast, Faster, Mask and Keypoint R-CNN with FPN."""


@ROI_HEADS_REGISTRY.register()
class SoftNMSRes5ROIHeads(_PredictorOfConfig, Res5ROIHeads):
    """``MODEL.ROI_HEADS.NAME`` of C4 models."""


@ROI_HEADS_REGISTRY.register()
class SoftNMSCascadeROIHeads(CascadeROIHeads):
    """Cascade R-CNN, for LazyConfig and yacs.

    Args:
        rule: see :func:`build_rule`; used once, on the boxes of the last stage. Attribute ``rule``.
        **kwargs: those of ``CascadeROIHeads``.
    """

    @configurable
    def __init__(self, *, rule: Rule | Mapping[str, Any] | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rule = build_rule(rule)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from a yacs config that :func:`add_soft_nms_config` has seen."""
        return dict(super().from_config(cfg, input_shape), rule=rule_of(cfg.MODEL.ROI_HEADS))

    def _forward_box(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances] | None = None
    ) -> Any:
        """Losses in training; detections of each image otherwise."""
        if self.training or self.rule is None:
            return super()._forward_box(features, proposals, targets)
        levels = [features[name] for name in self.box_in_features]
        image_shapes = [image.image_size for image in proposals]
        scores_of_stages = []
        boxes: list[Tensor] = []
        for stage, predictor in enumerate(self.box_predictor):
            if stage:
                proposals = self._create_proposals_from_boxes(boxes, image_shapes)
            predictions = self._run_stage(levels, proposals, stage)
            boxes = predictor.predict_boxes(predictions, proposals)
            scores_of_stages.append(predictor.predict_probs(predictions, proposals))
        # As Detectron2 averages them, to the last bit.
        scores = [sum(image) * (1.0 / self.num_cascade_stages) for image in zip(*scores_of_stages, strict=True)]
        return inference(
            boxes, scores, image_shapes, predictor.test_score_thresh, self.rule, predictor.test_topk_per_image
        )[0]


class _OneStage:
    """Before a one-stage detector in the bases."""

    def __init__(self, *, rule: Rule | Mapping[str, Any] | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rule = build_rule(rule)

    def inference_single_image(
        self, anchors: list[Boxes], box_cls: list[Tensor], box_delta: list[Tensor], image_size: tuple[int, int]
    ) -> Instances:
        """Detections of an image; arguments, one tensor for each level, as in Detectron2."""
        this: Any = self
        if self.rule is None:
            return super().inference_single_image(anchors, box_cls, box_delta, image_size)  # type: ignore[misc]
        found = this._decode_multi_level_predictions(
            anchors, box_cls, box_delta, this.test_score_thresh, this.test_topk_candidates, image_size
        )
        candidates = Candidates(found.pred_boxes.tensor, found.scores, found.pred_classes)
        return _select([candidates], [image_size], self.rule, this.max_detections_per_image)[0][0]


@META_ARCH_REGISTRY.register()
class SoftNMSRetinaNet(_OneStage, RetinaNet):
    """RetinaNet, for LazyConfig and yacs (``MODEL.META_ARCHITECTURE``).

    Args:
        rule: see :func:`build_rule`. Attribute ``rule``.
        **kwargs: those of ``RetinaNet``. With a rule, ``test_nms_thresh`` is not used.
    """

    @configurable
    def __init__(self, *, rule: Rule | Mapping[str, Any] | None, **kwargs: Any) -> None:
        super().__init__(rule=rule, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments from a yacs config that :func:`add_soft_nms_config` has seen."""
        return dict(super().from_config(cfg), rule=rule_of(cfg.MODEL.RETINANET))


class SoftNMSFCOS(_OneStage, FCOS):
    """FCOS, for LazyConfig; arguments as :class:`SoftNMSRetinaNet`."""


class SoftNMSWithTTA(GeneralizedRCNNWithTTA):
    """Test-time augmentation with the rule where the views are merged, and hard NMS within each view.

    A score that is decayed twice is too low; so a rule of the model itself is set aside while it looks at the views.

    Args:
        cfg, model, tta_mapper, batch_size: those of ``GeneralizedRCNNWithTTA``; a stock model will do.
        rule: see :func:`build_rule`. None: that of the config, or Detectron2's own NMS where ``SOFT_NMS_ENABLED`` is
            False.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: Any = None,
        batch_size: int = 3,
        rule: Rule | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(cfg, model, tta_mapper, batch_size)
        self.rule = rule_of(cfg.MODEL.ROI_HEADS) if rule is None else build_rule(rule)

    def _get_augmented_boxes(self, augmented_inputs: list[Any], tfms: list[Any]) -> Any:
        with _without_rule(self.model):
            return super()._get_augmented_boxes(augmented_inputs, tfms)

    def _merge_detections(
        self, all_boxes: Tensor, all_scores: list[Tensor], all_classes: list[Tensor], shape_hw: tuple[int, int]
    ) -> Instances:
        if self.rule is None:
            return super()._merge_detections(all_boxes, all_scores, all_classes, shape_hw)
        num_classes = self.cfg.MODEL.ROI_HEADS.NUM_CLASSES
        scores = all_boxes.new_zeros(len(all_boxes), num_classes + 1, dtype=torch.float32)
        for row, label, score in zip(scores, all_classes, all_scores, strict=True):
            row[label] = score
        most = self.cfg.TEST.DETECTIONS_PER_IMAGE
        return inference([all_boxes], [scores], [shape_hw], 1e-8, self.rule, most)[0][0]


@contextmanager
def _without_rule(model: nn.Module) -> Iterator[None]:
    """Detectron2's own NMS in a model, for a while."""
    with_rule = [
        (part, part.rule) for part in model.modules() if isinstance(part, (SoftNMSOutputLayers, SoftNMSCascadeROIHeads))
    ]
    try:
        for part, _ in with_rule:
            part.rule = None
        yield
    finally:
        for part, rule in with_rule:
            part.rule = rule
