"""mmdet's RoI heads with the suppression of ``test_cfg.rcnn.nms`` taken from the rule registry.

The mixin asks mmdet for raw results (``rcnn_test_cfg=None``, mmdet's own contract for test-time augmentation) and
applies :func:`mmdet_softnms.post_process.post_process`. It has no parameters, so checkpoints load unchanged, and an
unscoped ``nms.type`` is left to mmdet, so the same head is its own baseline.
"""

import copy
import inspect
from typing import Any

from mmdet.models.roi_heads import CascadeRoIHead, DoubleHeadRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_softnms.post_process import post_process
from mmdet_softnms.registry import MODELS
from mmdet_softnms.rules import Rule, build_rule, is_stock


class SoftNMSMixin:
    """Put before an mmdet RoI head in the bases: ``class MyRoIHead(SoftNMSMixin, StandardRoIHead)``.

    The head must follow mmdet's contract: ``predict_bbox(..., rcnn_test_cfg=None)`` returns every RoI's boxes (R, 4K)
    or (R, 4) and scores (R, K+1).

    Raises:
        TypeError: an argument belongs to another RoI head (Grid, Trident, MultiInstance, Sparse R-CNN, ...), or the
            bbox head post-processes in its own way (SABL), so that raw results would lose something.
        KeyError, TypeError, ValueError: ``test_cfg.nms`` names no registered rule or does not fit it.
    """

    test_cfg: ConfigDict | None
    bbox_head: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_foreign_arguments(type(self), kwargs)
        super().__init__(*args, **kwargs)
        _refuse_foreign_bbox_heads(type(self), self.bbox_head)
        self._nms_cfg: ConfigDict | None = None
        self._rule: Rule | None = None
        self._rule_of(self.test_cfg)  # what is wrong with it is said now, not at the first image

    def predict_bbox(
        self,
        x: tuple[Tensor, ...],
        batch_img_metas: list[dict[str, Any]],
        rpn_results_list: list[InstanceData],
        rcnn_test_cfg: ConfigDict | None,
        rescale: bool = False,
        **kwargs: Any,
    ) -> list[InstanceData]:
        """Detections of each image, suppressed by the rule in ``rcnn_test_cfg.nms``; arguments as in mmdet's heads.

        ``rcnn_test_cfg=None`` returns the raw results, as in mmdet.
        """
        rule = self._rule_of(rcnn_test_cfg)
        results = super().predict_bbox(  # type: ignore[misc]
            x,
            batch_img_metas,
            rpn_results_list,
            rcnn_test_cfg=rcnn_test_cfg if rule is None else None,
            rescale=rescale,
            **kwargs,
        )
        if rule is None or rcnn_test_cfg is None:
            return results
        return [
            post_process(raw.bboxes, raw.scores, rule, rcnn_test_cfg.score_thr, rcnn_test_cfg.max_per_img)
            for raw in results
        ]

    def _rule_of(self, rcnn_test_cfg: ConfigDict | None) -> Rule | None:
        """The rule of ``rcnn_test_cfg.nms``; None where the suppression is mmdet's own business.

        Built anew when the config has changed: in a notebook it is edited in place.
        """
        nms_cfg = None if rcnn_test_cfg is None else rcnn_test_cfg.get('nms')
        if nms_cfg is None or is_stock(nms_cfg):
            return None
        if self._nms_cfg != nms_cfg:
            self._rule = build_rule(nms_cfg)
            self._nms_cfg = copy.deepcopy(nms_cfg)
        return self._rule


@MODELS.register_module()
class SoftNMSRoIHead(SoftNMSMixin, StandardRoIHead):
    """mmdet's ``StandardRoIHead`` (Fast, Faster, Mask R-CNN) with suppression by rule."""


@MODELS.register_module()
class SoftNMSCascadeRoIHead(SoftNMSMixin, CascadeRoIHead):
    """mmdet's ``CascadeRoIHead`` with suppression by rule."""


@MODELS.register_module()
class SoftNMSDoubleHeadRoIHead(SoftNMSMixin, DoubleHeadRoIHead):
    """mmdet's ``DoubleHeadRoIHead`` with suppression by rule."""


def _refuse_foreign_arguments(head: type, kwargs: dict[str, Any]) -> None:
    known: set[str] = set()
    for base in head.__mro__:
        if '__init__' in vars(base) and base is not SoftNMSMixin:
            parameters = inspect.signature(vars(base)['__init__']).parameters.values()
            known.update(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    if foreign := sorted(set(kwargs) - known):
        raise TypeError(
            f'{head.__name__} takes no {", ".join(foreign)}: the config belongs to another RoI head. Supported are '
            "mmdet's StandardRoIHead, CascadeRoIHead and DoubleHeadRoIHead; Grid, Trident, MultiInstance, Sparse "
            'R-CNN and the like suppress in their own way and cannot be plugged.'
        )


def _refuse_foreign_bbox_heads(head: type, bbox_head: nn.Module) -> None:
    for each in bbox_head if isinstance(bbox_head, nn.ModuleList) else [bbox_head]:
        for method in ('predict_by_feat', '_predict_by_feat_single'):
            if getattr(type(each), method, None) is not getattr(BBoxHead, method):
                raise TypeError(
                    f'{head.__name__} cannot be used with {type(each).__name__}: it post-processes in its own way '
                    "(SABLHead multiplies score factors in), which mmdet's raw results lose. Keep its own RoI head."
                )
