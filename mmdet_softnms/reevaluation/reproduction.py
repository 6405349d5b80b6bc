"""Published numbers, what it takes to measure them again, and the verdict.

What is published for a config stands in its metafile, under ``Reproduction``; the test sets it refers to stand in
``configs/datasets.yml``. Values, tolerances and differences are in % of AP ("points") throughout; the metrics of a
re-evaluation are in [0, 1].
"""

import contextlib
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmengine.config import Config

from mmdet_softnms.checkpoint import check_weights
from mmdet_softnms.files import ReevaluationError, sha256
from mmdet_softnms.reevaluation.candidates.fingerprint import build_model
from mmdet_softnms.reevaluation.candidates.plug import family_of, plug
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.reevaluation.scoring.sweep import Row
from mmdet_softnms.yaml_file import YamlError, read_yaml

Verdict = Literal['pass', 'fail', 'not comparable']

#: Options that say where the test set is or how it is read, and leave the numbers alone.
HARMLESS_OPTIONS = (
    'test_dataloader.dataset.data_root',
    'test_dataloader.dataset.ann_file',
    'test_dataloader.dataset.data_prefix',
    'test_dataloader.num_workers',
    'test_dataloader.persistent_workers',
    'test_evaluator.ann_file',
)


@dataclass(frozen=True)
class Published:
    """One published number."""

    row: str | dict[str, Any]  # 'config', or the rule and parameters of a row of the table
    metric: str  # as a re-evaluation names it
    value: float  # %; of a gain: points
    source: str
    split: str  # what it was measured on
    tolerance: float | None  # points; None: not comparable
    because: str  # why that tolerance, or why it is not comparable
    scales: tuple[str, ...] = ()  # of the image, as for ``reevaluate.py --scales``; none: that of the config

    @property
    def row_label(self) -> str:
        """``'config'`` or ``'SoftNMS gaussian sigma=0.5, 6 scales'``."""
        several = f', {len(self.scales)} scales' if self.scales else ''
        if isinstance(self.row, str):
            return self.row + several
        named = {'rule', 'method'}
        words = [str(self.row[key]) for key in ('rule', 'method') if key in self.row]
        words += [f'{key}={value:g}' for key, value in self.row.items() if key not in named]
        return ' '.join(words) + several

    def find(self, rows: Iterable[Row]) -> Row | None:
        """The row of a re-evaluation that this number is about."""
        for row in rows:
            if self.row == 'config' and row.source == 'config':
                return row
            if isinstance(self.row, dict) and row.source != 'config':
                known = {**row.params, 'rule': row.rule}
                if all(known.get(key) == value for key, value in self.row.items()):
                    return row
        return None


@dataclass(frozen=True)
class Split:
    """A test set as it was published."""

    name: str
    fetch: str  # what to fetch and where to put it, its checksums with it
    images: int | None = None
    objects: int | None = None  # annotated ones that count: no crowd, nothing difficult
    annotation_sha256: str = ''  # of a COCO json


@dataclass(frozen=True)
class Weights:
    """A checkpoint as it was published."""

    place: Path | None  # where it is looked for; None: it is not public
    fetch: str  # how to come by it, its checksum with it
    sha256_start: str = ''  # first digits of its SHA-256; empty: none is published


@dataclass(frozen=True)
class Model:
    """One model of a metafile."""

    name: str
    config: Path
    weights: Weights
    split: Split
    published: list[Published]
    unpublished: str  # why there is nothing to compare with, where there is nothing
    options: dict[str, Any] = field(default_factory=dict)  # of the config, as the number was published with

    @property
    def scales(self) -> list[tuple[str, ...]]:
        """What has to be run, once each: the scales of every published number, in their order."""
        return list(dict.fromkeys(one.scales for one in self.published)) or [()]


@dataclass(frozen=True)
class Comparison:
    """A published number beside the measured one."""

    published: Published
    measured: float | None  # %; on the test set of the run, which is another one where published.split is
    verdict: Verdict
    reason: str

    @property
    def difference(self) -> float | None:
        """Measured minus published, in points; None where the two do not compare."""
        if self.measured is None or self.verdict == 'not comparable':
            return None
        return self.measured - self.published.value

    def to_dict(self) -> dict[str, Any]:
        """As ``reproduction.json`` holds it: values in %, difference and tolerance in points."""
        return {
            'row': self.published.row_label,
            'metric': self.published.metric,
            'published': self.published.value,
            'measured': self.measured,
            'difference': self.difference,
            'tolerance': self.published.tolerance,
            'verdict': self.verdict,
            'reason': self.reason,
            'split': self.published.split,
            'scales': list(self.published.scales),
            'source': self.published.source,
        }


def load_models(path: Path, project: Path) -> dict[str, Model]:
    """Read every model of a model index or of a single metafile, by name.

    Args:
        path: a ``model-index.yml`` or a metafile; its paths are relative to its own folder. ``Datasets`` of a
            metafile of your own adds to ``configs/datasets.yml``.
        project: the root of this project, with ``configs/datasets.yml``.

    Raises:
        ReevaluationError: a file is missing or not of this form.
    """
    index = _read(path)
    metafiles = [_read(path.parent / name) for name in _strings(index, 'Import', path)] or [index]
    datasets = _read(project / 'configs/datasets.yml')
    raws: list[Any] = []
    for metafile in metafiles:
        try:
            datasets.update(_get(metafile, 'Datasets', dict, {}))
            raws += _get(metafile, 'Models', list, [])
        except TypeError as error:
            raise ReevaluationError(f'metafile {path} cannot be used: {error}') from error
    models: dict[str, Model] = {}
    for raw in raws:
        name = raw.get('Name') if isinstance(raw, dict) else raw
        try:
            model = _model(raw, datasets, path.parent)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ReevaluationError(
                f'model {name!s:.80} of {path} cannot be used: {type(error).__name__} {error} in its Reproduction'
            ) from error
        if model.name in models:
            raise ReevaluationError(f'model {model.name} appears twice in {path}; rename one of the two')
        models[model.name] = model
    return models


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise YamlError(f'it holds {content!r:.60}, not keys and values')
    except YamlError as error:
        raise ReevaluationError(f'metafile {path} cannot be read: {error}') from error
    return content


def _strings(index: dict[str, Any], key: str, path: Path) -> list[str]:
    value = index.get(key) or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ReevaluationError(f'metafile {path} cannot be used: {key} has to be a list of files, got {value!r:.60}')
    return value


_REQUIRED = object()


def _get(raw: Any, key: str, kinds: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
    """An entry of a metafile.

    Raises:
        KeyError, TypeError: it is not there, not of these types, or a number that is not finite.
    """
    if not isinstance(raw, dict):
        raise TypeError(f'{raw!r:.60} holds no {key}')
    value = raw[key] if default is _REQUIRED else raw.get(key, default)
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    if value is not default and (not fits or (isinstance(value, float) and not math.isfinite(value))):
        names = ' or '.join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise TypeError(f'{key} has to be of type {names}, got {value!r:.60}')
    return value


_NUMBER = (int, float)


def _model(raw: dict[str, Any], datasets: dict[str, Any], root: Path) -> Model:
    about = _get(raw, 'Reproduction', dict)
    name = _get(about, 'Data', str)
    data = _get(datasets, name, dict)
    split = Split(
        name,
        _get(data, 'Fetch', str),
        _get(data, 'Images', int, None),
        _get(data, 'Objects', int, None),
        _get(data, 'Annotation SHA-256', str, ''),
    )
    published = []
    for one in _get(about, 'Published', list, []):
        tolerance = _get(one, 'Tolerance', _NUMBER, None)
        row = _get(one, 'Row', (str, dict), 'config')
        if isinstance(row, dict):
            for key in row:
                _get(row, key, str if key in ('rule', 'method') else _NUMBER)
        published.append(
            Published(
                row,
                _get(one, 'Metric', str),
                float(_get(one, 'Value', _NUMBER)),
                _get(one, 'Source', str),
                _get(one, 'Split', str, split.name),
                tolerance,
                _get(one, 'Because' if tolerance is not None else 'Not Comparable', str),
                tuple(map(str, _get(one, 'Scales', list, []))),
            )
        )
    return Model(
        name=_get(raw, 'Name', str),
        config=root / _get(raw, 'Config', str),
        weights=_weights(_get(raw, 'Weights', str, None), _get(about, 'Weights', dict, {}), root),
        split=split,
        published=published,
        unpublished='' if published else _get(about, 'Unpublished', str),
        options=_get(about, 'Options', dict, {}),
    )


def _weights(public: str | None, about: dict[str, str], root: Path) -> Weights:
    """``Weights`` of a model: a URL, a file, or nothing where ``Reproduction`` says how to come by them."""
    if public is None and 'Checkpoint' not in about:
        return Weights(None, _get(about, 'Fetch', str))
    if public is not None and '://' not in public:
        return Weights(root / public, 'it belongs to the metafile: restore it')
    name = _get(about, 'Checkpoint', str) if public is None else public.rsplit('/', 1)[1]
    # OpenMMLab's publishing tool appends the first digits of the file's own SHA-256 to its name.
    digits = re.search(r'-([0-9a-f]{8})\.pth$', name)
    start = digits[1] if digits else ''
    checksum = f'its SHA-256 begins with {start}' if start else 'no checksum is published'
    fetch = _get(about, 'Fetch', str) if public is None else f'fetch {public} and put it there ({checksum})'
    return Weights(Path('checkpoints') / name, fetch, start)


def check_options(options: Iterable[str]) -> str:
    """Why a run with these overrides of the config cannot be compared with published numbers; empty if it can."""
    changed = [key for key in options if not key.startswith(HARMLESS_OPTIONS)]
    return f'--cfg-options changes {", ".join(changed)}' if changed else ''


def check_data(cfg: Config, split: Split) -> str:
    """Why the config's test set is not the published one; empty if it is.

    Raises:
        ReevaluationError: it is not there; the message says what to fetch.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            dataset = build_test_set(cfg)
    except ReevaluationError as error:
        raise ReevaluationError(f'{error}. {split.name}: {split.fetch}') from error
    objects = sum(
        not instance.get('ignore_flag', 0)
        for number in range(len(dataset))
        for instance in dataset.get_data_info(number).get('instances', [])
    )
    for what, found, expected in (('images', len(dataset), split.images), ('objects', objects, split.objects)):
        if expected is not None and found != expected:
            return f'the test set has {found} {what}, {split.name} has {expected}'
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    for path in (dataset.ann_file, *(evaluator.get('ann_file') for evaluator in evaluators)):
        if path and split.annotation_sha256 and Path(path).is_file() and sha256(path) != split.annotation_sha256:
            return f'{path} is not the annotation file of {split.name}: its SHA-256 differs'
    return ''


def check_checksum(path: Path, weights: Weights) -> str:
    """Why a checkpoint is not the published one; empty if it is, or if no checksum is published.

    Raises:
        ReevaluationError: it is not there, or bears the published name and has another content.
    """
    if not path.is_file():
        raise ReevaluationError(f'checkpoint {path} does not exist; {weights.fetch}, or name yours by --weights')
    digits = sha256(path)
    if digits.startswith(weights.sha256_start):
        return ''
    found = f'the SHA-256 of {path} begins with {digits[:8]}, that of the published weights with {weights.sha256_start}'
    if weights.place is not None and path.name == weights.place.name:
        raise ReevaluationError(f'{found}: the file is damaged; {weights.fetch}')
    return found


def check_model(cfg: Config, checkpoint: Path, *, trust: bool = False) -> None:
    """Build the model as a run does, without running it.

    Raises:
        ReevaluationError: it cannot be built, or its RoI head not be re-evaluated.
        CheckpointError: the weights are not its own.
    """
    model = build_model(plug(cfg, 0.0))
    family = family_of(cfg)
    family.leave_out_unused(model)
    check_weights(model, checkpoint, trust=trust, ignore=family.not_needed(model))


def compare(
    model: Model, rows: Sequence[Row], caveats: Sequence[str], scales: tuple[str, ...] = ()
) -> list[Comparison]:
    """Judge every published number of a model that a run is about.

    Args:
        model: what is published.
        rows: of the re-evaluation; none after a dry run, which measures nothing.
        caveats: why this run cannot be compared with what is published; usually there is no reason.
        scales: of the run, one of ``model.scales``.
    """
    return [_compare(published, rows, caveats) for published in model.published if published.scales == scales]


def _compare(published: Published, rows: Sequence[Row], caveats: Sequence[str]) -> Comparison:
    row = published.find(rows)
    measured = None if row is None else row.metrics.get(published.metric)
    if measured is not None and not measured >= 0:  # COCO's -1 or a NaN: no such object
        measured = None
    measured = None if measured is None else 100 * measured
    if published.tolerance is None:
        return Comparison(published, measured, 'not comparable', published.because)
    if caveats:
        return Comparison(published, measured, 'not comparable', '; '.join(caveats))
    if measured is None:
        return Comparison(published, None, 'not comparable', f'nothing was measured for its {published.metric}')
    difference = measured - published.value
    within = abs(difference) <= published.tolerance + 1e-9  # decimal numbers are not exact in binary
    reason = f'{difference:+.2f} is {"within" if within else "beyond"} {published.tolerance:g} ({published.because})'
    return Comparison(published, measured, 'pass' if within else 'fail', reason)


def overall(model: Model, comparisons: Sequence[Comparison]) -> tuple[Verdict, str]:
    """``fail`` if one number fails, ``pass`` if all that compare pass, else ``not comparable``; and why."""
    by_verdict: dict[str, list[Comparison]] = {'fail': [], 'pass': [], 'not comparable': []}
    for comparison in comparisons:
        by_verdict[comparison.verdict].append(comparison)
    if failed := by_verdict['fail']:
        return 'fail', '; '.join(f'{one.published.row_label} {one.published.metric}: {one.reason}' for one in failed)
    if passed := by_verdict['pass']:
        return 'pass', f'{len(passed)} of {len(comparisons)} published numbers, each within its tolerance'
    reasons = dict.fromkeys(one.reason for one in comparisons)
    return 'not comparable', '; '.join(reasons) or f'no published number: {model.unpublished}'
