"""What is compared: settings, the fair default table, and grids over anything a rule takes.

A fair table (DESIGN: all rows share candidates, ``score_thr`` and ``max_per_img``): the baseline is hard NMS at IoU 0.5
at the same low ``score_thr`` as the soft rules; of rotated boxes at IoU 0.1, as in the configs of mmrotate. The
config's own setting is an extra row and never the reference; against the stock ``score_thr`` of 0.05 the low-score tail
would be credited to Soft-NMS. A grid over ``score_thr`` or ``max_per_img`` gets a baseline for each of their values.
"""

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from mmdet_softnms.files import ReevaluationError, did_you_mean
from mmdet_softnms.models.detectron2_wrapper import lines_to_paste
from mmdet_softnms.ops import weights
from mmdet_softnms.reevaluation.candidates.plug import DETECTRON2, box_dim_of, family_of, family_of_head
from mmdet_softnms.reevaluation.candidates.views import pipeline_to_paste
from mmdet_softnms.reevaluation.scoring.grid import AROUND, expanded, flattened, read_spec, read_values
from mmdet_softnms.registry import TASK_UTILS, build_rule, resolve
from mmdet_softnms.rules import (
    HardNMS,
    MmcvNMS,
    NoSuppression,
    RotatedSoftNMS,
    Rule,
    SoftNMS,
    check_box_dim,
    name_of,
    words_of,
)
from mmdet_softnms.yaml_file import YamlError, read_yaml

_PROBES = {  # boxes, by how many values one has
    4: torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 4]]),
    5: torch.tensor([[4.0, 4, 8, 8, 0], [4, 2, 8, 4, 0]]),
}
_RANGED = (*weights.PARAMETERS, 'min_score')


@dataclass(frozen=True)
class Setting:
    """One row to be: a rule with the thresholds around it."""

    rule: Rule
    score_thr: float
    max_per_img: int
    source: str = 'table'  # 'table' or 'config'

    def __post_init__(self) -> None:
        check_thresholds(self.score_thr, self.max_per_img)

    @property
    def name(self) -> str:
        """The rule's name as a config would write it; stock ones by mmdet's own ``type``."""
        return name_of(self.rule)

    @property
    def params(self) -> dict[str, Any]:
        """Everything that distinguishes the row."""
        return {**self.rule.params, 'score_thr': self.score_thr, 'max_per_img': self.max_per_img}

    @property
    def class_agnostic(self) -> bool:
        """Whether boxes of different classes suppress each other."""
        params = self.rule.params
        while 'class_agnostic' not in params and isinstance(params.get('rule'), dict):
            params = params['rule']  # that of the rule inside
        return bool(params.get('class_agnostic', False))

    @property
    def group(self) -> tuple[float, int, bool]:
        """What a baseline has to share with the row for a difference to mean anything."""
        return self.score_thr, self.max_per_img, self.class_agnostic

    @property
    def is_baseline(self) -> bool:
        """Hard NMS at IoU 0.5, or 0.1 of rotated boxes: the reference of its group."""
        if type(self.rule) not in (HardNMS, RotatedSoftNMS) or self.source != 'table':
            return False
        return self.rule.params == _baseline(self.class_agnostic, self.rule.box_dim).params  # type: ignore[attr-defined]

    @property
    def label(self) -> str:
        """``'SoftNMS gaussian sigma=0.5'``: the rule and what sets it apart, without the thresholds around it."""
        return self.label_without({})

    def label_without(self, known: Mapping[str, Any]) -> str:
        """The label without the parameters that have these values, which the reader knows already."""
        telling = {name: value for name, value in self.rule.params.items() if known.get(name, ...) != value}
        return ' '.join([self.name, *words_of(telling)]) + (' (config)' if self.source == 'config' else '')

    def snippet(self, head: str | Mapping[str, Any]) -> str:
        """The lines to paste into a config that has this setting: one of mmdet's, or of Detectron2's where it is its.

        Args:
            head: what the config writes for the head that takes rules: the name of one of ours, or its dict
                (:meth:`mmdet_softnms.reevaluation.candidates.plug.Family.written`).
        """
        written = dict(type=f'mmdet_softnms.{head.split(".")[-1]}') if isinstance(head, str) else head
        head_arguments = ', '.join(f'{name}={value!r}' for name, value in written.items())
        family = family_of_head(written['type'])
        if family is DETECTRON2:
            return lines_to_paste(written['head'], self.rule, self.score_thr, self.max_per_img)
        nms = _written(self.rule)
        opening, closing = (f'{family.key}=dict(', ')') if family.key else ('', '')
        return (
            f'model = dict(\n    {family.part}=dict({head_arguments}),\n    test_cfg=dict({opening}'
            f'score_thr={self.score_thr!r}, max_per_img={self.max_per_img}, nms=dict(\n        _delete_=True, {nms})'
            f'{closing}))'
        )


def paste_block(setting: Setting, cfg: Config) -> str:
    """The lines to paste into a config, so that a live run gives what a row of its re-evaluation is computed from.

    With several views these are ``tta_model`` and ``tta_pipeline``, for ``tools/test.py --tta``: every view gives all
    its candidates, and the rule suppresses once.
    """
    written = family_of(cfg).written(cfg)
    if not cfg.get('softnms_views'):
        return setting.snippet(written)
    every_candidate = Setting(NoSuppression(), setting.score_thr, -1).snippet(written)
    replaced = '_delete_=True, ' if cfg.softnms_views.had_tta_model else ''
    lines = [
        '# for tools/test.py CONFIG CHECKPOINT --tta',
        every_candidate,
        f"tta_model = dict({replaced}type='mmdet_softnms.SoftNMSTTAModel', tta_cfg=dict(\n"
        f'    max_per_img={setting.max_per_img}, nms=dict({_written(setting.rule)})))',
    ]
    if (pipeline := pipeline_to_paste(cfg)) is not None:
        lines += ['tta_pipeline = [', *(f'    {_python(one)},' for one in pipeline), ']']
    return '\n'.join(lines)


def _python(value: Any) -> str:
    """A value of a config as it is written in a config file."""
    if isinstance(value, Mapping):
        return f'dict({", ".join(f"{key}={_python(each)}" for key, each in value.items())})'
    if isinstance(value, list):
        return f'[{", ".join(map(_python, value))}]'
    if isinstance(value, tuple):
        return f'({", ".join(map(_python, value))}{"," if len(value) == 1 else ""})'
    return repr(f'{value.__module__}.{value.__qualname__}' if isinstance(value, type) else value)


def _written(rule: Rule) -> str:
    """The arguments of the dict that a config writes for a rule."""
    kind = name_of(rule) if isinstance(rule, MmcvNMS) else resolve(type(rule), TASK_UTILS).type
    arguments = {
        name: f'dict({_written(rule.rule)})' if name == 'rule' and hasattr(rule, 'rule') else repr(value)
        for name, value in rule.params.items()
        if not (name == 'offset' and value == 0)
    }
    return ', '.join([f'type={kind!r}', *(f'{name}={value}' for name, value in arguments.items())])


def baseline_of(setting: Setting, settings: Iterable[Setting]) -> Setting | None:
    """The setting that differences refer to: the baseline of its group.

    The config's setting is compared with the first baseline where its group has none; None where there is none at all.
    """
    baselines = [other for other in settings if other.is_baseline]
    for baseline in baselines:
        if baseline.group == setting.group:
            return baseline
    return baselines[0] if setting.source == 'config' and baselines else None


def baseline_in_words(settings: Iterable[Setting]) -> str:
    """``'hard NMS at IoU 0.5'``: what the differences of a table refer to."""
    found = next((one.rule.params['iou_threshold'] for one in settings if one.is_baseline), 0.5)
    return f'hard NMS at IoU {found:g}'


def varied_thresholds(settings: Iterable[Setting]) -> list[str]:
    """The thresholds around the rules of which a table has several values."""
    table = [setting for setting in settings if setting.source == 'table']
    return [name for name in ('score_thr', 'max_per_img') if len({getattr(one, name) for one in table}) > 1]


def check_thresholds(score_thr: float, max_per_img: int) -> None:
    """Raise a ReevaluationError for thresholds out of range."""
    if isinstance(score_thr, bool) or not isinstance(score_thr, (int, float)) or not 0 <= score_thr < 1:
        raise ReevaluationError(f'score_thr must be in [0, 1), got {score_thr!r}')
    if isinstance(max_per_img, bool) or not isinstance(max_per_img, int) or max_per_img < -1:
        raise ReevaluationError(
            f'max_per_img must be a whole number of at least 1, or 0 or -1 for no limit, got {max_per_img!r}'
        )


def default_settings(
    cfg: Config, score_thr: float, max_per_img: int, min_score: float, class_agnostic: bool = False
) -> list[Setting]:
    """Hard NMS (the baseline), linear and gaussian Soft-NMS with the paper's parameters, and the config's own setting.

    ``class_agnostic``: boxes of different classes suppress each other in every row but the config's.

    Raises:
        ReevaluationError: a threshold is out of range, or the thresholds of the config are unusable.
    """
    check_thresholds(score_thr, max_per_img)
    box_dim = box_dim_of(cfg)
    rules = [_baseline(class_agnostic, box_dim), *_default_soft_rules(min_score, class_agnostic, box_dim)]
    return [*(Setting(rule, score_thr, max_per_img) for rule in rules), own_setting(cfg)]


def own_setting(cfg: Config) -> Setting:
    """The config's own setting.

    Raises:
        ReevaluationError: the thresholds of the config are unusable.
    """
    family = family_of(cfg)
    try:
        own = family.test_cfg(cfg)
        if not family.key:  # what mmdet's dense heads take where nothing is written; YOLOX has no max_per_img
            own = dict(score_thr=0.0, max_per_img=-1) | own
        if cfg.get('softnms_views'):
            own = {'score_thr': own['score_thr'], 'max_per_img': -1} | cfg.tta_model.tta_cfg
        return Setting(build_rule(own['nms']), own['score_thr'], own['max_per_img'], source='config')
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        place = family.place.removeprefix('model.')
        raise ReevaluationError(f"the config's own suppression ({place}) cannot be used: {error}") from error


def _baseline(class_agnostic: bool, box_dim: int) -> Rule:
    if box_dim == 5:
        return RotatedSoftNMS('hard', iou_threshold=0.1, min_score=0.0, class_agnostic=class_agnostic)
    return HardNMS(iou_threshold=0.5, class_agnostic=class_agnostic)


def _default_soft_rules(min_score: float, class_agnostic: bool, box_dim: int) -> list[Rule]:
    kind = RotatedSoftNMS if box_dim == 5 else SoftNMS
    try:
        return [
            kind('linear', iou_threshold=0.3, min_score=min_score, class_agnostic=class_agnostic),
            kind('gaussian', sigma=0.5, min_score=min_score, class_agnostic=class_agnostic),
        ]
    except (TypeError, ValueError) as error:
        raise ReevaluationError(f'the suppression settings cannot be used: {error}') from error


#: What ``--select`` chooses from when no grid is given; of rotated boxes.
DEFAULT_SWEEP = ('recommended',)
ROTATED_SWEEP = ('rotated',)


def sweep_settings(
    specs: Sequence[str],
    cfg: Config,
    score_thr: float,
    max_per_img: int,
    min_score: float,
    class_agnostic: bool = False,
) -> list[Setting]:
    """The settings of a grid, a baseline before each group of ``score_thr`` and ``max_per_img``, then the config's.

    Class-agnostic rules are a group with a baseline of their own.

    Args:
        specs: each ``RULE.PARAMETER=VALUES``, ``score_thr=VALUES``, ``max_per_img=VALUES`` or ``min_score=VALUES``, the
            path of a YAML file, or the name of a preset (grid.py). VALUES are ``first:last:step`` with both ends, or a
            list with commas. All parameters of one rule are crossed with each other; different rules are not; the three
            thresholds are crossed with everything. RULE is a registered rule (``SoftNMS``, ``HardNMS``,
            ``package.Rule``) or mmdet's ``nms`` or ``soft_nms``. Where SoftNMS has no ``method``, a parameter
            sweeps the first rule of :data:`mmdet_softnms.ops.weights.WEIGHTS` that takes it: ``iou_threshold`` the
            linear one, ``sigma`` the gaussian. A rule inside a rule is ``VotedNMS.rule=SoftNMS`` (which
            it is by default), its parameters ``VotedNMS.rule.sigma=VALUES``. The file holds ``rules``, a list of
            ``{type: ..., parameter: VALUES or list, rule: {...}}``, and the thresholds.
        cfg: the user's config.
        score_thr, max_per_img, min_score, class_agnostic: where they are not swept.

    Raises:
        ReevaluationError: a spec cannot be read; a rule or a parameter is unknown, out of range, or has no effect.
    """
    grids, around = _read_specs(specs)
    box_dim = box_dim_of(cfg)
    defaults: dict[str, list[Any]] = dict(score_thr=[score_thr], max_per_img=[max_per_img], min_score=[min_score])
    around = defaults | around
    settings: dict[Any, Setting] = {}
    for group in itertools.product(around['score_thr'], around['max_per_img']):
        rules: list[Rule] = []
        for floor in around['min_score']:
            if grids:
                rules += [rule for name, grid in grids for rule in _rules(name, grid, floor, class_agnostic, box_dim)]
            else:
                rules += _default_soft_rules(floor, class_agnostic, box_dim)
        found = [Setting(rule, *group) for rule in rules]
        for agnostic in sorted({setting.class_agnostic for setting in found}):
            mine = [setting for setting in found if setting.class_agnostic == agnostic]
            for setting in [Setting(_baseline(agnostic, box_dim), *group), *mine]:
                settings.setdefault((setting.name, str(setting.params)), setting)
    return [*settings.values(), own_setting(cfg)]


def _read_specs(specs: Sequence[str]) -> tuple[list[tuple[str, dict[str, list[Any]]]], dict[str, list[Any]]]:
    grids: dict[str, dict[str, list[Any]]] = {}
    listed: list[tuple[str, dict[str, list[Any]]]] = []
    around: dict[str, list[Any]] = {}
    for spec in expanded(specs):
        read = read_spec(spec)
        if isinstance(read, Path):
            found, thresholds = _read_file(read)
            listed += found
            for threshold, several in thresholds.items():
                _add(around, threshold, several)
        else:
            rule, parameter, values = read
            _add(grids.setdefault(rule, {}) if rule else around, parameter, values)
    return [*listed, *grids.items()], around


def _add(grid: dict[str, list[Any]], name: str, values: list[Any]) -> None:
    """Values of a parameter, also of one that was named before."""
    grid[name] = [*grid.get(name, []), *(value for value in values if value not in grid.get(name, []))]


def _read_file(path: Path) -> tuple[list[tuple[str, dict[str, list[Any]]]], dict[str, list[Any]]]:
    try:
        content = read_yaml(path)
    except YamlError as error:
        raise ReevaluationError(f'sweep file {path} cannot be read: {error}') from error
    if not isinstance(content, dict) or set(content) - {'rules', *AROUND}:
        raise ReevaluationError(f'sweep file {path} may hold rules, {", ".join(AROUND)} and nothing else')

    def values(raw: Any) -> list[Any]:
        if not isinstance(raw, list):
            return read_values(str(raw), f'{raw!s:.80} in {path}')
        if not raw or not all(isinstance(value, (bool, int, float, str)) for value in raw):
            raise ReevaluationError(f'{raw!r:.80} in {path} is not a list of values; write [0.1, 0.2] or 0.1:1.0:0.1')
        return raw

    grids = []
    rules = content.get('rules') or []
    if not isinstance(rules, list):
        raise ReevaluationError(
            f'rules in {path} has to be a list of {{type: SoftNMS, sigma: 0.1:1.0:0.1}}, got {rules!r:.80}'
        )
    for entry in rules:
        if not isinstance(entry, dict) or not all(
            isinstance(one, str) for one in (entry.get('type'), *flattened(entry))
        ):
            raise ReevaluationError(
                f'{entry!r:.80} in {path} is not a rule; write {{type: SoftNMS, sigma: 0.1:1.0:0.1}}'
            )
        parameters = flattened(entry)
        grids.append((parameters.pop('type'), {key: values(raw) for key, raw in parameters.items()}))
    return grids, {name: values(content[name]) for name in AROUND if name in content}


def _rules(
    name: str, grid: Mapping[str, list[Any]], min_score: float, class_agnostic: bool, box_dim: int
) -> list[Rule]:
    """Every rule of a grid, those that come out the same once."""
    grid = dict(grid)
    kind = _scoped(name)
    swept = list(grid)
    inside = _place_of_soft_nms(kind, grid)
    if inside is not None and f'{inside}method' not in grid:
        methods = [method_of(parameter) for parameter in weights.PARAMETERS if f'{inside}{parameter}' in grid]
        if methods:
            grid = {f'{inside}method': methods, **grid}  # rows of one method together
    if class_agnostic and 'class_agnostic' not in grid:
        grid['class_agnostic'] = [True]  # a rule that has no such argument says so
    _check_names(name, kind, {one: grid[one] for one in swept})
    rules: dict[str, Rule] = {}
    for values in itertools.product(*grid.values()):
        arguments = dict(zip(grid, values, strict=True))
        try:
            rule = build_rule(config_of(kind, arguments, min_score))
            innermost = rule
            while hasattr(innermost, 'rule'):
                innermost = innermost.rule
            if isinstance(innermost, MmcvNMS):  # which takes any number
                SoftNMS(**{name: value for name, value in innermost.params.items() if name in _RANGED})
            check_box_dim(rule, box_dim)
            probe = _PROBES[box_dim]
            rule(probe, probe[:, 3] / 10, probe.new_zeros(2, dtype=torch.int64), -1)  # mmdet's own check when called
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise ReevaluationError(f'sweep over {name} with {arguments}: {error}') from error
        rules.setdefault(str(rule.params), rule)
    for parameter in swept:
        if len(grid[parameter]) > 1 and not any(_uses(rule.params, parameter) for rule in rules.values()):
            raise ReevaluationError(
                f'a sweep over {name}.{parameter} changes nothing: {next(iter(rules.values())).params} does not use it'
            )
    return list(rules.values())


def method_of(parameter: str) -> str:
    """The method of SoftNMS that a swept parameter means: the first rule that takes it."""
    return next(name for name, weight in weights.WEIGHTS.items() if parameter in weight.parameters)


def _scoped(name: str) -> str:
    return name if name in ('nms', 'soft_nms') or '.' in name else f'mmdet_softnms.{name}'


def _place_of_soft_nms(kind: str, grid: Mapping[str, list[Any]]) -> str | None:
    """What stands before the parameters of SoftNMS in a grid: nothing, ``'rule.'`` where it is inside, or None."""
    place = ''
    while kind not in ('mmdet_softnms.SoftNMS', 'mmdet_softnms.RotatedSoftNMS'):
        inside = grid.get(f'{place}rule', ['SoftNMS'])
        if 'rule' not in _parameters(kind) or len(inside) > 1:
            return None
        kind, place = _scoped(inside[0]), f'{place}rule.'
    return place


def config_of(kind: str, arguments: Mapping[str, Any], min_score: float) -> dict[str, Any]:
    """The dict of a rule, with those of the rules inside; ``min_score`` where one takes it and none is given.

    ``arguments``: those of a rule inside as ``rule.NAME``, as a sweep writes them.
    """
    written = {name: value for name, value in arguments.items() if not name.startswith('rule.')}
    inside = {name.removeprefix('rule.'): value for name, value in arguments.items() if name.startswith('rule.')}
    if inside or 'rule' in _parameters(kind):
        written['rule'] = config_of(_scoped(written.get('rule', 'SoftNMS')), inside, min_score)
    if kind == 'soft_nms' or 'min_score' in _parameters(kind):
        written.setdefault('min_score', min_score)
    return dict(type=kind, **written)


def swept_params(rule: Rule) -> dict[str, Any]:
    """The parameters of a rule as a sweep writes them: ``rule``, the name of the one inside, and ``rule.NAME``."""
    flat: dict[str, Any] = {}
    for name, value in rule.params.items():
        if name == 'rule' and hasattr(rule, 'rule'):
            flat |= {name: name_of(rule.rule), **{f'rule.{one}': own for one, own in swept_params(rule.rule).items()}}
        else:
            flat[name] = value
    return flat


def _uses(params: Any, parameter: str) -> bool:
    for name in parameter.split('.'):
        if not isinstance(params, Mapping) or name not in params:
            return False
        params = params[name]
    return True


def _check_names(name: str, kind: str, grid: Mapping[str, list[Any]]) -> None:
    """Raise a ReevaluationError for a rule or a parameter that does not exist, in a rule inside a rule, too."""
    if kind == f'{TASK_UTILS.scope}.{name}' and TASK_UTILS.get(kind) is None:
        rules = [
            one for one, cls in TASK_UTILS.module_dict.items() if any('__call__' in vars(base) for base in cls.__mro__)
        ]
        known = [*(one for one in rules if one not in ('MmcvNMS', 'NoSuppression')), 'nms', 'soft_nms']
        raise ReevaluationError(
            f'--sweep: {name} is not a registered rule{did_you_mean(name, known) or "; there are " + ", ".join(known)}'
        )
    known = list(_parameters(kind))
    inside = {one.removeprefix('rule.'): values for one, values in grid.items() if one.startswith('rule.')}
    if inside and 'rule' in known:
        inner = str(grid.get('rule', ['SoftNMS'])[0])
        _check_names(inner, _scoped(inner), inside)
        grid = {one: values for one, values in grid.items() if not one.startswith('rule.')}
    for one in grid:
        if known and one not in known:
            remedy = f'; write {one}=VALUES, without the rule' if one in AROUND else did_you_mean(one, known)
            raise ReevaluationError(f'--sweep: {name} takes {", ".join(known)}, not {one}{remedy}')


def _parameters(kind: str) -> Iterable[str]:
    rule = TASK_UTILS.get(kind) if '.' in kind else None
    return inspect.signature(rule).parameters if rule is not None else ()
