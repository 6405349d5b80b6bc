"""Test-time augmentation in which a rule suppresses once: the union of what every view of an image gives."""

from collections.abc import Mapping
from typing import Any

import torch
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from mmdet_softnms.post_process import Instances, suppress_candidates
from mmdet_softnms.registry import MODELS, build_rule, is_stock
from mmdet_softnms.rules import NoSuppression, name_of


@MODELS.register_module()
class SoftNMSTTAModel(DetTTAModel):
    """mmdet's ``DetTTAModel`` with a rule in ``tta_cfg.nms``.

    mmdet turns the boxes of flipped views back and lays all views together; then the rule is applied once. Each view is
    post-processed by the model's test_cfg before that. For the union of *all* boxes, as in the Soft-NMS paper, let it
    suppress nothing: ``nms=dict(_delete_=True, type='mmdet_softnms.NoSuppression'), max_per_img=-1`` beside a head that
    takes rules. With mmdet's hard NMS there it is mmdet's way.

    Args:
        tta_cfg: ``nms`` and ``max_per_img`` (0 or less: no limit).
        **kwargs: of ``DetTTAModel``: ``module`` is the detector.

    Raises:
        ValueError: views would be suppressed softly, too: their scores would decay twice; or the rule is of rotated
            boxes, which mmdet does not turn back.
        KeyError, TypeError: ``tta_cfg.nms`` names no registered rule or does not fit it.
    """

    def __init__(self, tta_cfg: Any = None, **kwargs: Any) -> None:
        super().__init__(tta_cfg=tta_cfg, **kwargs)
        self._rule = None if is_stock(tta_cfg['nms']) else build_rule(tta_cfg['nms'])
        if tta_cfg.get('max_per_img', -1) <= 0:  # mmdet takes [:max_per_img], and would lose the last detection
            self.tta_cfg = ConfigDict(tta_cfg, max_per_img=None)
        if self._rule is not None:
            if getattr(self._rule, 'box_dim', 4) != 4:
                raise ValueError(f'{name_of(self._rule)} cannot stand in tta_cfg: mmdet turns no rotated boxes back')
            for part in self.module.modules():
                check_views(getattr(part, 'test_cfg', None))

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        """Detections of one image from the data samples of its views, boxes in original image scale."""
        if self._rule is None:
            return super()._merge_single_sample(data_samples)
        views = [sample.pred_instances for sample in data_samples]
        if 'masks' in views[0]:
            raise TypeError('masks of several views cannot be merged: use a detector without mask head')
        boxes, scores = self.merge_aug_bboxes(
            [view.bboxes for view in views], [view.scores for view in views], [each.metainfo for each in data_samples]
        )
        union = Instances(boxes, scores, torch.cat([view.labels for view in views]))
        ((found, keep),) = suppress_candidates([union], self._rule, self.tta_cfg.get('max_per_img') or -1)
        results = InstanceData(**found._asdict())
        if isinstance(self._rule, NoSuppression):  # for who collects candidates
            results.views = torch.cat([torch.full_like(view.labels, number) for number, view in enumerate(views)])[keep]
            if all('class_scores' in view for view in views):
                results.class_scores = torch.cat([view.class_scores for view in views])[keep]
        merged = data_samples[0]
        merged.pred_instances = results
        return merged


def check_views(test_cfg: Any) -> None:
    """Raise a ValueError where a test_cfg of the model decays scores before ``tta_cfg.nms`` does it again."""
    nms = test_cfg.get('nms') if isinstance(test_cfg, Mapping) else None
    if not isinstance(nms, Mapping):
        return
    kind = nms['type'] if is_stock(nms) and 'type' in nms else type(build_rule(nms)).__name__
    if kind == 'soft_nms' or not (is_stock(nms) or kind == NoSuppression.__name__):
        raise ValueError(
            f'{kind} in test_cfg.nms of the model and a rule in tta_cfg.nms: scores would decay twice. Keep the rule '
            "in tta_cfg and write nms=dict(_delete_=True, type='mmdet_softnms.NoSuppression') in test_cfg, or mmdet's "
            "type='nms'"
        )
