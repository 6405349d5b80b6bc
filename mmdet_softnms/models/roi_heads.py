"""mmdet's RoI heads with the suppression of ``test_cfg.rcnn.nms`` taken from the rule registry.

The mixin asks mmdet for raw results (``rcnn_test_cfg=None``, mmdet's own contract for test-time augmentation) and
applies :func:`mmdet_softnms.post_process.post_process`. It has no parameters, so checkpoints load unchanged, and an
unscoped ``nms.type`` is left to mmdet, so the same head is its own baseline.
"""

import functools
import inspect
from typing import Any

import mmdet.registry
from mmdet.models import roi_heads as mmdets
from mmdet.models.roi_heads import BaseRoIHead, CascadeRoIHead, DoubleHeadRoIHead, StandardRoIHead, TridentRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.structures.bbox import get_box_type
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_softnms.models.takes_rules import TakesRules, combined, plain_of
from mmdet_softnms.post_process import post_process
from mmdet_softnms.registry import MODELS, explain_to_mmcv, resolve

explain_to_mmcv()


class SoftNMSMixin(TakesRules):
    """Put before an mmdet RoI head in the bases: ``class MyRoIHead(SoftNMSMixin, StandardRoIHead)``.

    The head must follow mmdet's contract: ``predict_bbox(..., rcnn_test_cfg=None)`` returns every RoI's boxes (R, 4K)
    or (R, 4) and scores (R, K+1). Where boxes are rotated, as in mmrotate, they are (R, 5K) or (R, 5).

    Candidates whose box or score is not finite are dropped; the head warns of the first ones.

    Raises:
        TypeError: an argument belongs to another RoI head (Grid, Trident, MultiInstance, Sparse R-CNN, ...) or is
            missing, or the bbox head post-processes in its own way (SABL), so that raw results would lose something.
        KeyError, TypeError, ValueError: ``test_cfg.nms`` names no registered rule or does not fit it.
    """

    bbox_head: nn.Module
    #: Whose raw results are all that their own suppression takes.
    raw_bbox_heads: tuple[type[BBoxHead], ...] = (BBoxHead,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not args:
            check_arguments(type(self), set(kwargs))
        super().__init__(*args, **kwargs)
        _refuse_foreign_bbox_heads(type(self), self.bbox_head)
        last: Any = self.bbox_head[-1] if isinstance(self.bbox_head, nn.ModuleList) else self.bbox_head
        self.box_dim = get_box_type(last.predict_box_type)[1].box_dim
        self.look_for_rule(('score_thr', 'max_per_img', 'nms'), 'model.test_cfg.rcnn')

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
        rule = self.rule_of(rcnn_test_cfg)
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
        images = post_process(
            [raw.bboxes for raw in results],
            [raw.scores for raw in results],
            rule,
            rcnn_test_cfg.score_thr,
            rcnn_test_cfg.max_per_img,
            functools.partial(self.warn_of_dropped, batch_img_metas),
        )
        return [InstanceData(**image._asdict()) for image in images]


@MODELS.register_module()
class SoftNMSRoIHead(SoftNMSMixin, StandardRoIHead):
    """mmdet's ``StandardRoIHead`` (Fast, Faster, Mask R-CNN) with suppression by rule, or another RoI head with it.

    Args:
        head: the name or class of another RoI head of the same contract (``'DynamicRoIHead'``, ``'mypackage.MyHead'``);
            the result is that head, of class :func:`with_rules` of it.
        **kwargs: the arguments of the head.
    """

    def __new__(cls, *args: Any, head: Any = None, **kwargs: Any) -> Any:
        """``head`` with suppression by rule."""
        made = cls if head is None else with_rules(resolve(head, mmdet.registry.MODELS).cls)
        return super().__new__(cls) if issubclass(cls, made) else made(*args, **kwargs)

    def __init__(self, *args: Any, head: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@MODELS.register_module()
class SoftNMSCascadeRoIHead(SoftNMSMixin, CascadeRoIHead):
    """mmdet's ``CascadeRoIHead`` with suppression by rule."""


@MODELS.register_module()
class SoftNMSDoubleHeadRoIHead(SoftNMSMixin, DoubleHeadRoIHead):
    """mmdet's ``DoubleHeadRoIHead`` with suppression by rule."""


#: Heads with a class of their own in a config; others are ``dict(type='mmdet_softnms.SoftNMSRoIHead', head=...)``.
NAMED = {
    StandardRoIHead: SoftNMSRoIHead,
    CascadeRoIHead: SoftNMSCascadeRoIHead,
    DoubleHeadRoIHead: SoftNMSDoubleHeadRoIHead,
}


@functools.cache
def with_rules(head: type) -> type:
    """A RoI head's class with the mixin before it, the same one each time; a head that has the mixin as it is.

    Raises:
        TypeError: the head does not follow the contract of :class:`SoftNMSMixin`.
    """
    if inspect.isclass(head) and issubclass(head, SoftNMSMixin):
        return head
    if reason := why_not(head):
        raise TypeError(reason)
    if head in NAMED:
        return NAMED[head]
    return combined(SoftNMSMixin, head)


def why_not(head: Any) -> str:
    """Why a class cannot take rules, in one sentence; empty where it can."""
    name = getattr(head, '__name__', repr(head))
    if not inspect.isclass(head) or not issubclass(head, BaseRoIHead):
        return f'{name} cannot be plugged: it is not a RoI head of mmdet (a subclass of its BaseRoIHead)'
    if issubclass(head, TridentRoIHead):
        return f'{name} cannot be plugged: it suppresses a second time, over its branches'
    raw = getattr(head, 'predict_bbox', None)
    if raw not in (StandardRoIHead.predict_bbox, CascadeRoIHead.predict_bbox):
        return (
            f'{name} cannot be plugged: its predict_bbox is not that of StandardRoIHead or CascadeRoIHead, and '
            'suppresses in its own way. If it returns raw results for rcnn_test_cfg=None, write '
            f'class MyRoIHead(SoftNMSMixin, {name}) and use that'
        )
    return ''


def how_to_write(head: type) -> dict[str, Any]:
    """What a config writes for a head with rules: ``type``, and ``head`` where it has no class of its own."""
    head = plain_of(head)
    made = with_rules(head)
    ours = resolve(made, mmdet.registry.MODELS)
    if made is head or made in NAMED.values():
        return dict(type=ours.type)
    return dict(type=resolve(SoftNMSRoIHead, MODELS).type, head=resolve(head, mmdet.registry.MODELS).type)


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """What a class can be given by name, bases included as far as ``**kwargs`` hand on."""
    known: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if '__init__' in vars(base) and base not in (SoftNMSMixin, SoftNMSRoIHead):
            parameters = list(inspect.signature(vars(base)['__init__']).parameters.values())[1:]
            for p in parameters:
                if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                    known.setdefault(p.name, p)
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return known


def _lacking(head: type, names: set[str]) -> list[str]:
    return sorted(name for name, p in parameters_of(head).items() if p.default is p.empty and name not in names)


def _takes(head: type, names: set[str]) -> bool:
    return not _lacking(head, names) and names <= set(parameters_of(head))


def check_arguments(head: type, names: set[str]) -> None:
    """Raise a TypeError where these are the arguments of another head, and name the one they fit."""
    if _takes(head, names):
        return
    foreign = sorted(names - set(parameters_of(head)))
    problem = f'takes no {", ".join(foreign)}' if foreign else f'needs {", ".join(_lacking(head, names))}'
    start = f'{head.__name__} {problem}: the config belongs to another RoI head'
    others = [getattr(mmdets, name) for name in mmdets.__all__ if name.endswith('RoIHead')]
    fitting = [other for other in [*NAMED, *others] if not why_not(other) and _takes(other, names)]
    if fitting:
        written = ', '.join(f'{name}={value!r}' for name, value in how_to_write(fitting[0]).items())
        raise TypeError(f'{start}, {fitting[0].__name__}. Write roi_head=dict({written}).')
    if {'anchor_generator', 'in_channels', 'feat_channels'} & names:
        raise TypeError(
            f'{head.__name__} is a RoI head and cannot be the bbox_head of a one-stage detector; it takes no '
            f'{", ".join(foreign)}. Write '
            "bbox_head=dict(type='mmdet_softnms.SoftNMSDenseHead', head=...) with the name of mmdet's head."
        )
    raise TypeError(
        f'{start}. It can be one of mmdet that has the predict_bbox of StandardRoIHead or CascadeRoIHead; Grid, '
        'Trident, MultiInstance, Sparse R-CNN and the like suppress in their own way and cannot be plugged.'
    )


def _refuse_foreign_bbox_heads(head: type[SoftNMSMixin], bbox_head: nn.Module) -> None:
    for each in bbox_head if isinstance(bbox_head, nn.ModuleList) else [bbox_head]:
        for method in ('predict_by_feat', '_predict_by_feat_single'):
            known = [getattr(cls, method) for cls in head.raw_bbox_heads]
            if getattr(type(each), method, None) not in known:
                raise TypeError(
                    f'{head.__name__} cannot be used with {type(each).__name__}: it post-processes in its own way '
                    "(SABLHead multiplies score factors in), which mmdet's raw results lose. Keep its own RoI head."
                )
