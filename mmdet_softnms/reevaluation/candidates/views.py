"""Several views of each image, scales and flips, whose boxes are taken together before one suppression."""

import copy
import itertools
import re
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config, ConfigDict

from mmdet_softnms.files import ReevaluationError

_SCALE = re.compile(r'([1-9]\d{0,4})x([1-9]\d{0,4})')
_META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')


def with_views(
    cfg: Config, tta: bool, scales: Sequence[str], flip: bool, views: Sequence[int] = (), split: str = 'test'
) -> Config:
    """A copy of a config whose test set gives several views of each image, in ``tta_pipeline`` and ``tta_model``.

    Args:
        cfg: the user's config; returned as it is if no views are asked for.
        tta: take the ``tta_pipeline`` and ``tta_model`` of the config, as ``tools/test.py --tta``.
        scales: instead, resize each image to each of these, as ``'480x800'``: shorter and longer side at most, the
            ratio kept.
        flip: each scale flipped, too.
        views: those that the rows are about, by number from 0; empty: all. Every view is stored.
        split: ``'val'``: the views of the images of ``val_dataloader`` instead.

    Raises:
        ReevaluationError: the config has none, a scale cannot be read, both are asked for, or there is no such view.
    """
    if not tta and not scales:
        if flip:
            raise ReevaluationError('--flip belongs to --scales: say which, as --scales 480x800')
        if views:
            raise ReevaluationError('--views chooses among the views of --tta or --scales: give one of them')
        return cfg
    if tta and (scales or flip):
        raise ReevaluationError("--tta takes the config's views, --scales others: give one of them")
    had_tta_model = isinstance(cfg.get('tta_model'), dict)
    cfg = copy.deepcopy(cfg)
    if tta and not (had_tta_model and cfg.get('tta_pipeline')):
        raise ReevaluationError('the config has no tta_model and tta_pipeline; give --scales 480x800 576x900 instead')
    if cfg.get(f'{split}_dataloader') is None:
        raise ReevaluationError(f'the config has no {split}_dataloader, so there is nothing to evaluate on')
    pipeline: Any = None
    for dataset in _datasets(cfg[f'{split}_dataloader'].dataset):
        # A copy each: mmcv's TestTimeAug writes what it builds into the lists of its config.
        pipeline = copy.deepcopy(cfg.tta_pipeline) if tta else _pipeline(dataset.pipeline, scales, flip)
        dataset.pipeline = pipeline
    every = views_of(pipeline)
    if missing := sorted(set(views) - set(range(len(every)))):
        raise ReevaluationError(
            f'there is no view {missing[0]}: the views of an image are numbered 0 to {len(every) - 1} in the order of '
            'the pipeline'
        )
    if scales:
        thresholds = cfg.model.get('test_cfg') or {}
        thresholds = thresholds.get('rcnn', thresholds)
        cfg.tta_model = dict(
            type='mmdet_softnms.SoftNMSTTAModel',
            tta_cfg=dict(nms=thresholds.get('nms'), max_per_img=thresholds.get('max_per_img', -1)),
        )
    # For :func:`mmdet_softnms.reevaluation.candidates.plug.plug` and for what is pasted.
    cfg.softnms_views = dict(
        number=len(every), chosen=sorted(set(views)), had_tta_model=had_tta_model, own_pipeline=tta
    )
    return cfg


def views_of(pipeline: Sequence[Any]) -> list[list[Any]]:
    """The transforms of each view, in the order in which mmcv's ``TestTimeAug`` makes them.

    Raises:
        ReevaluationError: the pipeline does not make views by exactly one ``TestTimeAug``.
    """
    several = [one for one in pipeline if _name(one) == 'TestTimeAug']
    if len(several) != 1:
        raise ReevaluationError(
            f'the tta_pipeline is {", ".join(map(_name, pipeline))}, and one TestTimeAug has to make its views'
        )
    return [list(one) for one in itertools.product(*several[0]['transforms'])]


def pipeline_to_paste(cfg: Config) -> list[Any] | None:
    """The ``tta_pipeline`` with which a live run has the views of a config; None: the one that the config has."""
    chosen = cfg.softnms_views.chosen
    if cfg.softnms_views.own_pipeline and not chosen:
        return None
    pipeline: list[Any] = copy.deepcopy(_datasets(cfg.test_dataloader.dataset)[0].pipeline)
    if chosen:
        every = views_of(pipeline)
        position = next(number for number, one in enumerate(pipeline) if _name(one) == 'TestTimeAug')
        only = [dict(type='Compose', transforms=every[number]) for number in chosen]
        pipeline[position] = dict(pipeline[position], transforms=[only])
    return pipeline


def in_words(views: ConfigDict) -> str:
    """Which views the rows are about; ``views``: of the config that :func:`with_views` made."""
    if not views.chosen:
        return f'all {views.number} views of each image'
    several = 'views' if len(views.chosen) > 1 else 'view'
    return f'{several} {", ".join(map(str, views.chosen))} of the {views.number} of each image'


def wrapped(model: ConfigDict) -> ConfigDict:
    """The config of a model that returns the candidates of all views with the number of each's view."""
    nothing = dict(nms=dict(type='mmdet_softnms.NoSuppression'), max_per_img=-1)
    return ConfigDict(type='mmdet_softnms.SoftNMSTTAModel', tta_cfg=nothing, module=model)


def _datasets(dataset: ConfigDict) -> list[ConfigDict]:
    """The innermost data sets, where mmdet's tools/test.py exchanges the pipeline, too."""
    inner = dataset.get('datasets') or ([dataset.dataset] if 'dataset' in dataset else [])
    return [each for one in inner for each in _datasets(one)] if inner else [dataset]


def _pipeline(pipeline: Sequence[Any], scales: Sequence[str], flip: bool) -> list[Any]:
    names = [_name(one) for one in pipeline]
    if 'Resize' not in names or 'PackDetInputs' not in names:
        raise ReevaluationError(
            f'--scales exchanges the Resize of the test pipeline, which is {", ".join(names)}: use --tta with a '
            'tta_pipeline'
        )
    position = names.index('Resize')
    resizes = []
    for scale in scales:
        if not (found := _SCALE.fullmatch(scale)):
            raise ReevaluationError(f'--scales takes shorter x longer side in pixels, as 480x800, got {scale}')
        resizes.append(dict(pipeline[position], scale=tuple(sorted(map(int, found.groups()), reverse=True))))
    rest: list[Any] = []
    for name, one in zip(names[position + 1 :], pipeline[position + 1 :], strict=True):
        if name == 'Pad':  # to one size, which is not that of every scale
            rest.append([dict(type=one['type'], size_divisor=32, pad_val=one.get('pad_val', 0))])
        elif name == 'PackDetInputs':
            rest.append([dict(one, meta_keys=tuple(dict.fromkeys((*one.get('meta_keys', ()), *_META))))])
        elif name != 'LoadAnnotations':  # which would be resized; the evaluators take them from the data set
            rest.append([one])
    flips = [dict(type='RandomFlip', prob=prob) for prob in ((0.0, 1.0) if flip else (0.0,))]
    before = [one for name, one in zip(names[:position], pipeline, strict=False) if name != 'LoadAnnotations']
    return [*before, dict(type='TestTimeAug', transforms=[resizes, flips, *rest])]


def _name(transform: Any) -> str:
    kind = transform['type']
    return kind.__name__ if isinstance(kind, type) else str(kind).split('.')[-1]
