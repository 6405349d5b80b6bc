"""mmdet's dense heads (RTMDet, YOLOX, RetinaNet, FCOS, ATSS, ...) with the suppression of ``test_cfg.nms`` by rule.

Nearly all of them end in ``_bbox_post_process``. The mixin asks that for candidates (``with_nms=False``: boxes decoded
and rescaled, score factors multiplied in, small boxes removed) and applies the rule by
:func:`mmdet_softnms.post_process.suppress_candidates`. It has no parameters, so checkpoints load unchanged, and an
unscoped ``nms.type`` is left to mmdet, so the same head is its own baseline.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import mmdet.registry
import torch
from mmdet.models import dense_heads as mmdets
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.base_mask_head import BaseMaskHead
from mmdet.models.roi_heads import BaseRoIHead
from mmdet.structures.bbox import BaseBoxes, get_box_tensor
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_softnms.models.takes_rules import TakesRules, combined, plain_of
from mmdet_softnms.post_process import Instances, suppress_candidates
from mmdet_softnms.registry import MODELS, resolve
from mmdet_softnms.rules import HardNMS, NoSuppression, Rule, SoftNMS


class SoftNMSDenseMixin(TakesRules):
    """Put before an mmdet dense head in the bases: ``class MyHead(SoftNMSDenseMixin, ATSSHead)``.

    The head must end in ``_bbox_post_process`` of mmdet's ``BaseDenseHead`` or ``YOLOXHead``, in
    ``_bbox_mask_post_process`` of ``RTMDetInsHead``, or in ``_bboxes_nms`` of ``CornerHead``. ``max_per_img`` of 0 or
    less, or none, is no limit (mmdet's dense heads would cut one detection, or all, off); YOLOX obeys it, too.

    Heads of mmrotate predict rotated boxes (N, 5), for which the rule is :class:`mmdet_softnms.rules.RotatedSoftNMS`.
    Candidates whose box or score is not finite are dropped; the head says once how many of a batch, and where first.

    Raises:
        TypeError: there is no ``nms`` in test_cfg, or the head never reaches one of these methods.
        KeyError, TypeError, ValueError: ``test_cfg.nms`` names no registered rule or does not fit it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self, 'loss_cls'):
            self.loss_cls = None  # BaseDenseHead reads it when predicting; SSDHead has none (mmdet #11063)
        self._dropped: list[tuple[dict[str, Any] | None, int]] = []  # image and how many candidates, of this batch
        if getattr(getattr(self, 'bbox_coder', None), 'encode_size', 4) == 5:
            self.box_dim = 5  # rotated
        elif plain_of(type(self)).__module__.startswith('mmdet.'):  # others may make rotated boxes of anything
            self.box_dim = 4
        self.look_for_rule(('nms',), 'model.test_cfg')
        if self._rule is not None and self._nms_cfg is not None:
            _warn_of_inherited_threshold(self._rule, self._nms_cfg)

    def predict_by_feat(self, *args: Any, **kwargs: Any) -> list[InstanceData]:
        """As in mmdet; a TypeError where a head of somebody's suppresses without asking the rule."""
        self._reached = False
        self._dropped = []
        metas = kwargs.get('batch_img_metas') or []
        if not self._warned and self.rule_of(self.test_cfg) is not None:
            self._dropped += zip(metas, _scores_that_are_no_numbers(self, *args, **kwargs), strict=False)
        results: list[InstanceData] = super().predict_by_feat(*args, **kwargs)  # type: ignore[misc]
        if results and not self._reached:
            raise TypeError(
                f'{type(self).__name__} cannot take rules: its predict_by_feat does not end in _bbox_post_process, '
                'and suppresses in its own way'
            )
        if dropped := [one for one in self._dropped if one[1]]:
            place = {id(meta): number for number, meta in enumerate(metas)}
            dropped.sort(key=lambda one: place.get(id(one[0]), len(place)))
            self.warn_of_dropped(*zip(*dropped, strict=True))
        return results

    def _bbox_post_process(
        self,
        results: InstanceData,
        cfg: ConfigDict,
        rescale: bool = False,
        with_nms: bool = True,
        img_meta: dict[str, Any] | None = None,
    ) -> InstanceData:
        self._reached = True
        rule = self.rule_of(cfg) if with_nms else None
        if rule is not None:
            results = self._with_class_scores(self._with_finite_boxes(results, rule, img_meta), rule)
        results = super()._bbox_post_process(  # type: ignore[misc]
            results=results, cfg=cfg, rescale=rescale, with_nms=with_nms and rule is None, img_meta=img_meta
        )
        if rule is None:
            return results
        found, keep = self._suppress(results, rule, cfg, img_meta)
        results = results[keep]
        if isinstance(results.bboxes, BaseBoxes):  # some heads of mmrotate go on with their own kind of boxes
            results.bboxes = type(results.bboxes)(found.bboxes, clone=False)
        else:
            results.bboxes = found.bboxes
        results.scores = found.scores
        return results

    def _bbox_mask_post_process(
        self,
        results: InstanceData,
        mask_feat: Tensor,
        cfg: ConfigDict,
        rescale: bool = False,
        with_nms: bool = True,
        img_meta: dict[str, Any] | None = None,
    ) -> InstanceData:
        """RTMDet-Ins: masks of what the rule leaves; none for raw candidates."""
        self._reached = True
        rule = self.rule_of(cfg) if with_nms else None
        if rule is not None:
            results = self._with_finite_boxes(results, rule, img_meta)
            # Boxes as the rule has to see them, from a copy: masks are computed from what is not rescaled.
            numbered = InstanceData(**dict(results.items()), number=_numbers(results.scores))
            boxes = super()._bbox_post_process(  # type: ignore[misc]
                results=self._with_class_scores(numbered, rule),
                cfg=cfg,
                rescale=rescale,
                with_nms=False,
                img_meta=img_meta,
            )
            if isinstance(rule, NoSuppression):
                for name in set(boxes.keys()) - {'bboxes', 'scores', 'labels', 'class_scores'}:
                    boxes.pop(name)
                return boxes
            found, keep = self._suppress(boxes, rule, cfg, img_meta)
            results.pop('score_factors', None)
            results = results[boxes.number[keep]]
            results.scores, results.number = found.scores, _numbers(found.scores)
            # mmcv's batched_nms with None only sorts.
            cfg = copy.deepcopy(cfg)
            cfg.update(nms=None, max_per_img=len(keep), min_bbox_size=-1)
        results = super()._bbox_mask_post_process(  # type: ignore[misc]
            results=results, mask_feat=mask_feat, cfg=cfg, rescale=rescale, with_nms=with_nms, img_meta=img_meta
        )
        if rule is not None:
            if len(keep):
                results = results[results.number.argsort()]  # of equal scores, too
            results.bboxes, results.scores = found.bboxes, found.scores
            results.pop('number')
        return results

    def _bboxes_nms(self, bboxes: Tensor, labels: Tensor, cfg: ConfigDict) -> tuple[Tensor, Tensor]:
        """CornerNet and CentripetalNet: boxes (N, 5), the score last, and labels (N,)."""
        self._reached = True
        rule = self.rule_of(cfg)
        if rule is None:
            return super()._bboxes_nms(bboxes, labels, cfg)  # type: ignore[misc, no-any-return]
        candidates = InstanceData(bboxes=bboxes[:, :4], scores=bboxes[:, 4].contiguous(), labels=labels)
        found, _ = self._suppress(candidates, rule, cfg, None)
        return torch.cat([found.bboxes, found.scores[:, None]], 1), found.labels

    def _with_finite_boxes(self, results: InstanceData, rule: Rule, img_meta: dict[str, Any] | None) -> InstanceData:
        """Drop the others here and count them: where there is a min_bbox_size, mmdet drops them without a word."""
        finite = get_box_tensor(results.bboxes).isfinite().all(dim=1)
        if isinstance(rule, NoSuppression) or bool(finite.all()):  # who asks for every candidate looks for himself
            return results
        self._dropped.append((img_meta, int((~finite).sum())))
        return results[finite]

    def _with_class_scores(self, results: InstanceData, rule: Rule) -> InstanceData:
        """For who collects candidates: the number that mmdet asks whether it is above score_thr, if not the score."""
        if isinstance(rule, NoSuppression):
            if isinstance(self, mmdets.YOLOXHead):  # asks >= of the product: > of the next number above
                results.class_scores = _next_above(results.scores.float())
            elif 'score_factors' in results:
                results.class_scores = results.scores
        return results

    def _suppress(
        self, candidates: InstanceData, rule: Rule, cfg: ConfigDict, img_meta: dict[str, Any] | None
    ) -> tuple[Instances, Tensor]:
        image = Instances(get_box_tensor(candidates.bboxes), candidates.scores, candidates.labels.long())

        def count(dropped: Sequence[int]) -> None:
            self._dropped.append((img_meta, dropped[0]))

        return suppress_candidates([image], rule, cfg.get('max_per_img', -1), count)[0]


_HEADLESS = (
    'SoftNMSDenseHead needs the name of the head that is to take rules: write '
    "bbox_head=dict(type='mmdet_softnms.SoftNMSDenseHead', head='RTMDetSepBNHead')"
)


def _scores_that_are_no_numbers(head: Any, maps: Sequence[Tensor], *others: Any, **kwargs: Any) -> list[int]:
    """Of each image, the candidates whose class score is NaN: it exceeds no score_thr, so mmdet never shows them.

    ``maps``: what the head's ``predict_by_feat`` takes first, a map (B, ..., H, W) of each level.
    """
    if isinstance(head, mmdets.YOLOXHead):  # one candidate a place; of class score times objectness
        levels = [
            one.isnan().any(1) | objectness.isnan().any(1) for one, objectness in zip(maps, others[1], strict=True)
        ]
    elif isinstance(head, mmdets.YOLOV3Head):  # (x, y, w, h, objectness, classes) of each prior
        parted = [one.unflatten(1, (head.num_base_priors, head.num_attrib)).isnan() for one in maps]
        gated = head.test_cfg.get('conf_thr', -1) > 0
        levels = [one[:, :, 5:] | one[:, :, 4:5] if gated else one[:, :, 5:] for one in parted]
    elif isinstance(head, mmdets.ATSSVLFusionHead):  # of tokens: one candidate a place, of whatever class
        levels = [one.isnan().any(-1) for one in maps]
    else:  # CornerNet takes the maps of its last stage
        levels = [one.isnan() for one in (maps[-1:] if isinstance(head, mmdets.CornerHead) else maps)]
    counts: list[int] = torch.stack([one.flatten(1).sum(1) for one in levels]).sum(0).tolist()
    return counts


def _numbers(values: Tensor) -> Tensor:
    return torch.arange(len(values), device=values.device)


def _next_above(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.full_like(values, torch.inf))


@MODELS.register_module()
class SoftNMSDenseHead(SoftNMSDenseMixin):
    """A dense head of mmdet, or of the same contract, with suppression by rule.

    Args:
        head: its name or class (``'RTMDetSepBNHead'``, ``'mypackage.MyHead'``); the result is that head, of class
            :func:`with_rules` of it.
        **kwargs: the arguments of the head.

    Raises:
        TypeError: ``head`` is missing or cannot take rules.
    """

    def __new__(cls, *args: Any, head: Any = None, **kwargs: Any) -> Any:
        """``head`` with suppression by rule."""
        if head is None:
            raise TypeError(_HEADLESS)
        return with_rules(resolve(head, mmdet.registry.MODELS).cls)(*args, **kwargs)


def with_rules(head: type) -> type:
    """A dense head's class with the mixin before it, the same one each time; a head that has the mixin as it is.

    Raises:
        TypeError: the head does not follow the contract of :class:`SoftNMSDenseMixin`.
    """
    if reason := why_not(head):
        raise TypeError(reason)
    return combined(SoftNMSDenseMixin, head)


#: Heads of mmdet that cannot take rules, and why; the first that fits.
_REFUSED: tuple[tuple[tuple[str, ...], str], ...] = (
    (('DETRHead', 'MaskFormerHead'), 'it predicts a set and removes no duplicates: there is nothing to suppress'),
    (('CenterNetHead',), 'it takes the peaks of a heat map and removes no duplicates: there is nothing to suppress'),
    (('EmbeddingRPNHead',), 'its proposals are learned and never suppressed'),
    (
        ('RPNHead', 'CascadeRPNHead'),
        'it makes proposals, of which Soft-NMS loses some (AP50 of a Faster R-CNN fell from 54.6 to 52.6)',
    ),
    (('YOLACTHead',), 'it suppresses by its own Fast NMS'),
    (('PAAHead',), 'it votes with the scores of the boxes that its own suppression removes'),
    (('GuidedAnchorHead',), 'it suppresses by multiclass_nms inside its own _predict_by_feat_single'),
    (('SOLOHead',), 'it suppresses masks by its own Matrix NMS'),
    (('CLRHead',), 'it suppresses lanes, not boxes'),
)


def why_not(head: Any) -> str:
    """Why a class cannot take rules as a dense head, in one sentence; empty where it can."""
    name = getattr(head, '__name__', repr(head))
    start = f'{name} cannot be plugged: '
    if not inspect.isclass(head):
        return f'{start}it is not a class'
    if head is SoftNMSDenseHead:
        return _HEADLESS
    for names, reason in _REFUSED:
        if issubclass(head, tuple(_classes(names))):
            return start + reason
    if issubclass(head, BaseRoIHead):
        return f"{start}it is a RoI head; write roi_head=dict(type='mmdet_softnms.SoftNMSRoIHead', head={name!r})"
    if issubclass(head, BaseMaskHead):
        return f'{start}it predicts masks, not boxes'
    if not issubclass(head, BaseDenseHead):
        return f'{start}it is not a dense head of mmdet (a subclass of its BaseDenseHead)'
    if not issubclass(head, SoftNMSDenseMixin) and not _ends_in_a_seam(head):
        return f'{start}its _bbox_post_process is not that of BaseDenseHead or YOLOXHead, and suppresses in its own way'
    return ''


def why_not_stored(head: type) -> str:
    """Why candidates of a head that takes rules cannot stand for those of other thresholds; empty where they can."""
    start = f'{head.__name__} takes rules, but cannot be re-evaluated: '
    if issubclass(head, mmdets.CornerHead):
        return f'{start}it ignores score_thr, which the rows of a re-evaluation have in common'
    if issubclass(head, mmdets.CondInstBboxHead):
        return f'{start}its mask head would run for every candidate'
    if issubclass(head, mmdets.ATSSVLFusionHead):
        return f'{start}it hides the class score, which score_thr refers to'
    return ''


def _classes(names: tuple[str, ...]) -> Iterator[type]:
    for name in names:
        if found := getattr(mmdets, name, None):  # CLRHead, for one, is not in every version
            yield found


def _ends_in_a_seam(head: Any) -> bool:
    if issubclass(head, mmdets.CornerHead):
        return bool(head._bboxes_nms is mmdets.CornerHead._bboxes_nms)
    if issubclass(head, mmdets.RTMDetInsHead):
        return bool(head._bbox_mask_post_process is mmdets.RTMDetInsHead._bbox_mask_post_process)
    return head._bbox_post_process in (BaseDenseHead._bbox_post_process, mmdets.YOLOXHead._bbox_post_process)


def how_to_write(head: type) -> dict[str, Any]:
    """What a config writes for a head with rules: ``head``, too, where its class does not have the mixin by itself."""
    head = plain_of(head)
    if reason := why_not(head):
        raise TypeError(reason)
    kind = resolve(head, mmdet.registry.MODELS).type
    if issubclass(head, SoftNMSDenseMixin):
        return dict(type=kind)
    return dict(type=resolve(SoftNMSDenseHead, MODELS).type, head=kind)


def _warn_of_inherited_threshold(rule: Rule, nms_cfg: ConfigDict) -> None:
    """Linear Soft-NMS with the base config's threshold, 0.45 to 0.65, which merging puts before ``method``."""
    keys = list(nms_cfg)
    if not isinstance(rule, SoftNMS) or isinstance(rule, HardNMS) or 'iou_threshold' not in rule.params:
        return
    # A dumped config has its keys in alphabetical order, whoever wrote them.
    if keys[:2] == ['type', 'iou_threshold'] and 'method' in keys:
        warnings.warn(
            f'linear Soft-NMS decays above iou_threshold={nms_cfg["iou_threshold"]} here; if test_cfg.nms inherits '
            'that from the base config, write nms=dict(_delete_=True, ...) with a threshold for it (0.3 in the paper)',
            stacklevel=4,
        )
