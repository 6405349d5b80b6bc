"""Where a config may name a rule, checked before a model is built.

mmcv evaluates ``nms.type`` at the first image wherever our RoI heads do not look at it, and says ``NameError``. Here it
is one sentence, with what to write instead. mmengine's Runner by itself, without the commands of this package, ends at
the first image (:func:`mmdet_softnms.registry.explain_to_mmcv`); with ``NameError`` only where nothing of this package
is imported.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import mmdet.registry
from mmengine.config import Config

from mmdet_softnms.models.roi_heads import SoftNMSMixin, check_arguments, how_to_write, parameters_of, why_not
from mmdet_softnms.registry import build_rule, default_scope_of, is_stock, resolve

_BELONGS = 'a rule belongs in model.test_cfg.rcnn.nms of a two-stage detector, beside a RoI head that takes rules'
_REMEDIES = {
    'rpn': "write type='nms', iou_threshold=0.7",
    'rpn_proposal': "write type='nms', iou_threshold=0.7",
    'tta_cfg': "write type='nms' or type='soft_nms'",
}


def check_places(cfg: Config, parts: tuple[str, ...] = ('model', 'tta_model')) -> None:
    """Raise where a rule stands in a place that cannot take it, or its RoI head does not fit.

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
                    _check_rule(path, node, parents, default_scope_of(cfg))
                if isinstance(node.get('roi_head'), Mapping):
                    _check_head(path, node, default_scope_of(cfg))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f'{".".join(path)}: {error}') from error


def _dicts(node: Any, path: tuple[str, ...], parents: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Every dict below a node, with its path and the dicts around it."""
    if isinstance(node, Mapping):
        yield path, node, parents
        for name, value in node.items():
            yield from _dicts(value, (*path, str(name)), (*parents, node))
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _dicts(value, path, parents)


def _check_rule(path: tuple[str, ...], nms: Mapping[str, Any], parents: tuple[Any, ...], scope: str) -> None:
    if is_stock(nms):
        return
    kind = resolve(nms['type'], mmdet.registry.TASK_UTILS, scope).name
    if path[-3:-1] == ('test_cfg', 'rcnn'):
        head = parents[-3].get('roi_head')
    elif path[-3:-1] == ('roi_head', 'test_cfg'):
        head = parents[-2]
    else:
        remedy = _REMEDIES.get(path[-2], "write type='nms'")
        raise ValueError(f"{kind} cannot stand here, where mmdet takes mmcv's functions only: {remedy}; {_BELONGS}")
    if head is None:
        raise ValueError(f'{kind} cannot stand here, since the model has no roi_head; {_BELONGS}')
    cls = _class_of(head, scope)
    if not issubclass(cls, SoftNMSMixin):
        if reason := why_not(cls):
            raise ValueError(f'{kind} cannot stand here: {reason}')
        written = ', '.join(f'{name}={value!r}' for name, value in how_to_write(cls).items())
        raise ValueError(
            f'{kind} needs a RoI head that takes rules, not {cls.__name__}: write roi_head=dict({written})'
        )
    build_rule(nms)


def _class_of(head: Mapping[str, Any], scope: str) -> type:
    """The class of a RoI head, with the one in ``head`` where our general head is asked for another."""
    cls: type = resolve(head['type'], mmdet.registry.MODELS, scope).cls
    if head.get('head') is not None and issubclass(cls, SoftNMSMixin):
        other: type = resolve(head['head'], mmdet.registry.MODELS, scope).cls
        return other if issubclass(other, SoftNMSMixin) else type(cls.__name__, (SoftNMSMixin, other), {})
    return cls


def _check_head(path: tuple[str, ...], detector: Mapping[str, Any], scope: str) -> None:
    cls = _class_of(detector['roi_head'], scope)
    if not issubclass(cls, SoftNMSMixin) or 'type' not in detector:
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
