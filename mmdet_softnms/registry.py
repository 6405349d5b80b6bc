"""Registries of the plugin, and what a ``type`` of a config stands for.

The registries are children of mmengine's root, so that ``type='mmdet_softnms.X'`` resolves under any
``default_scope``. mmengine imports this module by itself when it meets the scope, and ``locations`` when it looks a
name up: no config needs ``custom_imports``, and mmdet is imported when a model is asked for, not before.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from mmdet_softnms import paper_rules
from mmdet_softnms.files import did_you_mean
from mmdet_softnms.rules import HardNMS, MmcvNMS, NoSuppression, RotatedSoftNMS, Rule, SoftNMS, SupportedNMS, VotedNMS

_INSTALL = (
    'mmdet_softnms needs mmdet 3.x with mmcv and mmengine to plug into a detector ({}); install either '
    'onedl-mmdetection or mmdet, see "Installation" in the README. The operator alone, mmdet_softnms.soft_nms, and the '
    'rules work without them.'
)
try:
    from mmengine import registry as root
    from mmengine.config.lazy import LazyAttr, LazyObject
    from mmengine.registry import DefaultScope, Registry
except ImportError as error:
    raise ImportError(_INSTALL.format(error)) from error

MODELS = Registry(
    'model',
    parent=root.MODELS,
    scope='mmdet_softnms',
    locations=[
        'mmdet_softnms.models.roi_heads',
        'mmdet_softnms.models.dense_heads',
        'mmdet_softnms.models.tta',
        'mmdet_softnms.models.detectron2_wrapper',
        'mmdet_softnms.models.rfcn',
        'mmdet_softnms.models.caffe',
        'mmdet_softnms.models.mxnet',
        'mmdet_softnms.models.reduced_roi_extractor',
    ],
)
TASK_UTILS = Registry(
    'task util',
    parent=root.TASK_UTILS,
    scope='mmdet_softnms',
    locations=['mmdet_softnms.models.caffe', 'mmdet_softnms.models.mxnet'],
)
METRICS = Registry(
    'metric',
    parent=root.METRICS,
    scope='mmdet_softnms',
    locations=['mmdet_softnms.reevaluation.candidates.forward'],
)
DATA_SAMPLERS = Registry(
    'data sampler',
    parent=root.DATA_SAMPLERS,
    scope='mmdet_softnms',
    locations=['mmdet_softnms.reevaluation.candidates.forward'],
)
_RULES: tuple[type, ...] = (
    SoftNMS,
    HardNMS,
    RotatedSoftNMS,
    VotedNMS,
    SupportedNMS,
    NoSuppression,
    MmcvNMS,
    paper_rules.MatrixNMS,
    paper_rules.ClusterNMS,
    paper_rules.FastNMS,
    paper_rules.DIoUNMS,
    paper_rules.GidarisNMS,
    paper_rules.WeightedBoxesFusion,
    paper_rules.NonMaximumWeighted,
)
for _rule in _RULES:
    TASK_UTILS.register_module(module=_rule)


def require_mmdet() -> None:
    """Raise an ImportError of one sentence where mmdet, mmcv or mmcv's compiled operators are missing."""
    try:
        import mmcv
        import mmdet.registry  # noqa: F401
    except ImportError as error:
        raise ImportError(_INSTALL.format(error)) from error
    try:
        import mmcv.ops
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f'mmcv {mmcv.__version__} is installed without its compiled ops ({error}), so no detector can run; build '
            'it after torch with "pip install --no-build-isolation", as tools/quickstart.sh does.'
        ) from error


class NotRegisteredError(KeyError):
    """A ``type`` that no registry holds; the message is one line with the remedy."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote it


@dataclass(frozen=True)
class Resolved:
    """What a ``type`` of a config stands for."""

    scope: str | None  # of the registry that holds it; None: it is not registered
    name: str  # there, or of the class itself
    cls: Any  # the class or function

    @property
    def type(self) -> str:
        """What a config may write, whatever its ``default_scope``: with scope, or with module if not registered."""
        return f'{self.scope or self.cls.__module__}.{self.name}'


def default_scope_of(cfg: Mapping[str, Any]) -> str:
    """The scope of a config's unscoped names; mmdet where it names none."""
    scope: str = cfg.get('default_scope') or 'mmdet'
    return scope


def resolve(kind: Any, registry: Registry, default_scope: str | None = None) -> Resolved:
    """Look a ``type`` up: a name with or without scope (``'X'``, ``'a.X'``, ``'a.b.X'``), class, function, LazyObject.

    Args:
        kind: the ``type``.
        registry: a registry of the tree in which it is looked for.
        default_scope: of unscoped names; None: mmengine's current one, or mmdet.

    Raises:
        NotRegisteredError: there is no such name.
        TypeError: it is neither a name nor something that can be called.
    """
    if isinstance(kind, (LazyAttr, LazyObject)):
        kind = kind.build()
    if isinstance(kind, str):
        cls = _look_up(kind, registry, default_scope)
    elif callable(kind):
        cls = kind
    else:
        raise TypeError(f'type must be a name, a class or a function, got {kind!r}')
    scope, name = _place_of(cls, registry.root)
    return Resolved(scope, name or str(getattr(cls, '__qualname__', type(cls).__name__)), cls)


def _look_up(name: str, registry: Registry, default_scope: str | None) -> Any:
    current = DefaultScope.get_current_instance()
    scope = default_scope or (current.scope_name if current is not None else 'mmdet')
    try:
        with registry.switch_scope_and_registry(scope) as place:
            found = place.get(name)
    except (RuntimeError, ValueError):  # mmengine's two ways of saying that there is no such name
        found = None
    if found is None:
        similar = _similar(name, registry.root)
        raise NotRegisteredError(
            f'{name} is not registered: no {registry.root.name} has that name, or its scope is missing'
            + (f'; is it {similar}?' if similar else '')
        )
    return found


def _similar(name: str, root: Registry) -> str:
    """The registered name most like another, with its scope; empty where none is."""
    root.children[MODELS.scope].import_from_location()
    known = {
        one: f'{registry.scope}.{one}'
        for registry in (*root.children.values(), root.children[MODELS.scope])  # ours before another's
        for one in registry.module_dict
    }
    return next((known[one] for one in difflib.get_close_matches(name.rpartition('.')[2], known, 1, 0.8)), '')


def _place_of(cls: Any, registry: Registry) -> tuple[str | None, str | None]:
    """Scope and name under which a tree of registries holds a class."""
    for name, found in registry.module_dict.items():
        if found is cls:
            return registry.scope, name
    for child in registry.children.values():
        if (place := _place_of(cls, child)) != (None, None):
            return place
    return None, None


def _kind_of(nms_cfg: Mapping[str, Any]) -> Any:
    if not isinstance(nms_cfg, Mapping):
        raise TypeError(f"nms must be a dict with a type, as dict(type='mmdet_softnms.SoftNMS'), got {nms_cfg!r}")
    kind = nms_cfg.get('type', 'nms')
    kind = kind.build() if isinstance(kind, (LazyAttr, LazyObject)) else kind
    if not isinstance(kind, str) and not callable(kind):
        raise TypeError(f'nms.type must be a name, a class or a function, got {kind!r}')
    return kind


def _mmcv_function(name: str) -> Any:
    """The function that mmcv's ``batched_nms`` finds under an unscoped name; None where it finds none."""
    return getattr(importlib.import_module('mmcv.ops.nms'), name, None)


class _Misplaced:
    """Stands where mmcv evaluates ``mmdet_softnms.SoftNMS``, in places that our heads do not see."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> '_Misplaced':
        if name.startswith('_'):
            raise AttributeError(name)
        return _Misplaced(f'{self._name}.{name}')

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{self._name} cannot stand where mmdet takes mmcv's functions only: write type='nms' in rpn.nms (soft "
            "proposals lose AP) and tta_model=dict(type='mmdet_softnms.SoftNMSTTAModel', ...) for test-time "
            'augmentation; other rules belong in test_cfg.rcnn.nms, beside a RoI head that takes them, as '
            "roi_head=dict(type='mmdet_softnms.SoftNMSRoIHead'), or in test_cfg.nms beside "
            "bbox_head=dict(type='mmdet_softnms.SoftNMSDenseHead', head=...)"
        )


def explain_to_mmcv() -> None:
    """Make one sentence of the ``NameError`` with which mmcv meets a rule in ``rpn.nms`` or ``tta_cfg.nms``.

    mmcv's ``batched_nms`` evaluates ``nms.type`` among the names of its module. What works there works as before.
    """
    vars(importlib.import_module('mmcv.ops.nms')).setdefault(TASK_UTILS.scope, _Misplaced(TASK_UTILS.scope))


def is_stock(nms_cfg: Mapping[str, Any] | None) -> bool:
    """Whether ``nms`` of a test_cfg is mmdet's own business: None, no type, a name of mmcv's, or a function.

    Raises:
        NotRegisteredError: an unscoped name that mmcv does not know, a rule whose scope was forgotten, say.
        TypeError: it is no dict, or its type neither a name nor something that can be called.
    """
    if nms_cfg is None:
        return True
    kind = _kind_of(nms_cfg)
    if not isinstance(kind, str):
        return not inspect.isclass(kind) and _place_of(kind, TASK_UTILS.root) == (None, None)
    if '.' in kind:
        return False
    if not callable(_mmcv_function(kind)):
        if scopes := [scope for scope, names in _registered().items() if kind in names]:
            raise NotRegisteredError(f"nms.type={kind!r} lacks its scope: write type='{scopes[0]}.{kind}'")
        raise NotRegisteredError(
            f"nms.type={kind!r} is not one of mmcv's functions (nms, soft_nms) and not a registered rule; rules are "
            f'written with their scope, as mmdet_softnms.SoftNMS'
        )
    return True


def _registered() -> dict[str, list[str]]:
    """Names in every task util registry that is loaded, ours first."""
    others = {scope: list(child.module_dict) for scope, child in TASK_UTILS.root.children.items()}
    return {TASK_UTILS.scope: list(TASK_UTILS.module_dict)} | others


def build_rule(nms_cfg: Mapping[str, Any] | None) -> Rule:
    """Build the rule that ``nms`` of a test_cfg names; stock types become :class:`mmdet_softnms.rules.MmcvNMS`.

    None, which mmdet takes for no suppression, becomes one, too.
    An argument ``rule`` that is a dict is a rule inside a rule, and built as well.

    Raises:
        TypeError: an argument the rule does not have (often a key inherited from a base config: the message says how
            to drop it), or a type that is not a rule.
        NotRegisteredError: no rule of that name is registered.
    """
    if nms_cfg is None:
        return MmcvNMS(None)
    kind = _kind_of(nms_cfg)
    arguments = {name: value for name, value in nms_cfg.items() if name != 'type'}
    if is_stock(nms_cfg):
        return _tried(MmcvNMS(kind, **arguments))
    if isinstance(kind, str) and kind.startswith('mmcv.ops.'):  # written out in full, or dumped by mmengine
        return _tried(MmcvNMS(kind.rpartition('.')[2], **arguments))
    cls = resolve(kind, TASK_UTILS).cls
    if isinstance(arguments.get('rule'), Mapping):  # a rule inside a rule
        arguments['rule'] = build_rule(arguments['rule'])
    try:
        rule: Rule = cls(**arguments)
    except TypeError as error:
        remedy = _meant(error, cls) or '. Keys of the base config are merged in unless the dict says _delete_=True.'
        raise TypeError(f'nms = {dict(nms_cfg)} of test_cfg does not fit its rule: {error}{remedy}') from error
    if not callable(rule):
        raise TypeError(f'nms.type={kind!r} is not a suppression rule: use mmdet_softnms.SoftNMS or one of your own')
    return rule


def _tried(rule: MmcvNMS) -> MmcvNMS:
    """A stock rule that its function takes; mmcv itself would say so at the first image.

    Raises:
        TypeError: an argument that the function does not have, or one that is missing.
    """
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 4]])
    if rule.nms_type == 'nms_rotated':
        boxes = torch.nn.functional.pad(boxes, (0, 1))  # an angle
    try:
        rule(boxes, boxes[:, 2] / 10, torch.zeros(2, dtype=torch.int64), -1)
    except TypeError as error:
        remedy = _meant(error, _mmcv_function(rule.nms_type))
        if rule.nms_type == 'nms' and {'method', 'sigma', 'min_score'} & set(rule.params):
            remedy = f"; for Soft-NMS write type='{TASK_UTILS.scope}.SoftNMS'"
        raise TypeError(f"nms = {rule.params} does not fit mmcv's {rule.nms_type}: {error}{remedy}") from error
    return rule


def _meant(error: TypeError, function: Any) -> str:
    """The parameter that a misspelt one is like."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return did_you_mean(found[1], inspect.signature(function).parameters) if found and callable(function) else ''
