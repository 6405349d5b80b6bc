"""Where a config may name a rule, checked before a model is built.

mmcv evaluates ``nms.type`` at the first image wherever our heads do not look at it, and says ``NameError``. Here it is
one sentence, with what to write instead. mmengine's Runner by itself, without the commands of this package, ends at
the first image (:func:`mmdet_softnms.registry.explain_to_mmcv`); with ``NameError`` only where nothing of this package
is imported.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import mmdet.registry
from mmengine.config import Config

from mmdet_softnms.models import dense_heads, roi_heads
from mmdet_softnms.models.roi_heads import check_arguments, parameters_of
from mmdet_softnms.models.takes_rules import TakesRules
from mmdet_softnms.models.tta import SoftNMSTTAModel, check_views
from mmdet_softnms.registry import build_rule, default_scope_of, is_stock, resolve

_BELONGS = (
    'a rule belongs in model.test_cfg.rcnn.nms of a two-stage detector, beside a RoI head that takes rules, or in '
    'model.test_cfg.nms beside a dense head that does'
)
_REMEDIES = {
    'rpn': "write type='nms', iou_threshold=0.7",
    'rpn_proposal': "write type='nms', iou_threshold=0.7",
    'tta_cfg': "write tta_model=dict(type='mmdet_softnms.SoftNMSTTAModel', ...), or type='nms' or 'soft_nms' here",
}
#: Of each part of a detector that may suppress: what its heads with rules can say of themselves.
_KINDS = {'roi_head': roi_heads, 'bbox_head': dense_heads}


def check_places(cfg: Config, parts: tuple[str, ...] = ('model', 'tta_model')) -> None:
    """Raise where a rule stands in a place that cannot take it, or its head does not fit.

    Args:
        cfg: a config.
        parts: of it, those that are going to be built.

    Raises:
        ValueError: one line with the place and the remedy.
    """
    for part in parts:
        for path, node, parents in _dicts(cfg.get(part), (part,), ()):
            try:
                if path[-1] == 'nms' and parents:
                    _check_rule(path, node, parents, cfg)
                if isinstance(node.get('roi_head'), Mapping):
                    _check_roi_head(node, default_scope_of(cfg))
                elif isinstance(node.get('bbox_head'), Mapping):
                    _check_dense_head(node, default_scope_of(cfg))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f'{".".join(path)}: {error}') from error


def class_of(head: Mapping[str, Any], scope: str) -> type:
    """The class that a head of a config is going to have, with rules or without.

    Raises:
        KeyError, TypeError: there is no such class, or it cannot take rules and is to have them.
    """
    cls: type = resolve(head['type'], mmdet.registry.MODELS, scope).cls
    if head.get('head') is not None and cls in (roi_heads.SoftNMSRoIHead, dense_heads.SoftNMSDenseHead):
        other: type = resolve(head['head'], mmdet.registry.MODELS, scope).cls
        return (roi_heads if cls is roi_heads.SoftNMSRoIHead else dense_heads).with_rules(other)
    return cls


def _dicts(node: Any, path: tuple[str, ...], parents: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Every dict below a node, with its path and the dicts around it."""
    if isinstance(node, Mapping):
        yield path, node, parents
        for name, value in node.items():
            yield from _dicts(value, (*path, str(name)), (*parents, node))
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _dicts(value, path, parents)


def _check_rule(path: tuple[str, ...], nms: Mapping[str, Any], parents: tuple[Any, ...], cfg: Config) -> None:
    if is_stock(nms):
        return
    scope = default_scope_of(cfg)
    kind = resolve(nms['type'], mmdet.registry.TASK_UTILS, scope).name
    if path[-2] == 'tta_cfg' and issubclass(class_of(parents[-2], scope), SoftNMSTTAModel):
        build_rule(nms)
        for _, test_cfg, _ in _dicts(cfg.get('model'), ('model',), ()):
            check_views(test_cfg)
        return
    if path[-3:-1] == ('test_cfg', 'rcnn'):
        part, detector = 'roi_head', parents[-3]
    elif path[-2] == 'test_cfg' and path[-3] in _KINDS:
        part, detector = path[-3], parents[-3]
    elif path[-2] == 'test_cfg' and 'roi_head' not in parents[-2]:
        part, detector = 'bbox_head', parents[-2]
    else:
        remedy = _REMEDIES.get(path[-2], "write type='nms'")
        raise ValueError(f"{kind} cannot stand here, where mmdet takes mmcv's functions only: {remedy}; {_BELONGS}")
    heads = _KINDS[part]
    refining = detector.get('bbox_head_refine') if part == 'bbox_head' else None
    head = refining[-1] if refining else detector.get(part)  # mmrotate's R3Det and S2A-Net: the last one suppresses
    if head is None:
        raise ValueError(f'{kind} cannot stand here, since the model has no {part}; {_BELONGS}')
    cls = class_of(head, scope)
    if not issubclass(cls, TakesRules):
        if reason := heads.why_not(cls):
            raise ValueError(f'{kind} cannot stand here: {reason}')
        written = ', '.join(f'{name}={value!r}' for name, value in heads.how_to_write(cls).items())
        what = 'RoI' if part == 'roi_head' else 'dense'
        write = f'dict({written}, ...) as the last of bbox_head_refine' if refining else f'{part}=dict({written})'
        raise ValueError(f'{kind} needs a {what} head that takes rules, not {cls.__name__}: write {write}')
    build_rule(nms)


def _check_roi_head(detector: Mapping[str, Any], scope: str) -> None:
    cls = class_of(detector['roi_head'], scope)
    if not issubclass(cls, TakesRules) or 'type' not in detector:
        return
    model = resolve(detector['type'], mmdet.registry.MODELS, scope).cls
    if 'roi_head' not in parameters_of(model):
        raise ValueError(f'{model.__name__} takes no roi_head; {_BELONGS}')
    if 'rcnn' not in (detector.get('test_cfg') or {}):
        raise ValueError('test_cfg.rcnn is missing: it has to hold score_thr, max_per_img and nms')
    nms = detector['test_cfg']['rcnn'].get('nms')
    if nms is not None and not isinstance(nms, Mapping):
        build_rule(nms)  # says what is wrong
    check_arguments(cls, set(detector['roi_head']) - {'type', '_scope_', 'head'} | {'train_cfg', 'test_cfg'})


def _check_dense_head(detector: Mapping[str, Any], scope: str) -> None:
    head = detector['bbox_head']
    cls = class_of(head, scope) if 'type' in head else None
    if cls is None or not issubclass(cls, TakesRules):
        return
    if reason := dense_heads.why_not(cls):
        raise ValueError(reason)
    nms = (detector.get('test_cfg') or {}).get('nms')
    if nms is None:
        raise ValueError('test_cfg.nms is missing')
    if not isinstance(nms, Mapping):
        build_rule(nms)
