"""What candidates depend on, so that stored ones are used only for what they are."""

import copy
import os
import os.path as osp
import sys
import uuid
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import mmcv
import mmdet
import mmengine
import mmengine.fileio as fileio
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import FUNCTIONS, HOOKS, LOOPS, MODELS, RUNNERS, init_default_scope
from mmengine.structures import BaseDataElement

from mmdet_softnms.files import ReevaluationError, first_line, sha256
from mmdet_softnms.locate import local_checkpoint
from mmdet_softnms.models.takes_rules import TakesRules
from mmdet_softnms.reevaluation.candidates.identity import LIBRARIES, Code, code_of, digest, model_state
from mmdet_softnms.reevaluation.candidates.images import ImageReader, image_paths, parts_of, transforms_of
from mmdet_softnms.reevaluation.candidates.plug import box_dim_of, other_boxes, plug

#: Keys of a config that the forward pass does not read, and why.
_IRRELEVANT = {
    'test_evaluator': 'replaced by the collector of candidates',
    'optim_wrapper': 'of training',
    'param_scheduler': 'of training',
    'auto_scale_lr': 'of training',
    'visualizer': 'replaced; draws',
    'vis_backends': 'of the visualizer',
    'log_processor': 'logs',
    'log_level': 'logs',
    'work_dir': 'where things are written',
    'experiment_name': 'where things are written',
    'load_from': 'replaced by the checkpoint, whose content is hashed',
    'resume': 'of training',
    'launcher': 'how processes are started',
    'filename': 'where the config lies',
    'softnms_views': 'which views the rows are about; all are stored',
}
_IRRELEVANT_PREFIXES = ('train_', 'val_')  # other loops, loaders and pipelines
_HOOKS_WITHOUT_EFFECT = (
    'CheckpointHook', 'DetVisualizationHook', 'DistSamplerSeedHook', 'IterTimerHook', 'LoggerHook',
    'ParamSchedulerHook',
)  # fmt: skip
#: Of the loader: how many processes load; the batch size is part of ``execution``; the sampler is replaced.
_LOADER_IRRELEVANT = (
    'batch_size', 'num_workers', 'persistent_workers', 'prefetch_factor', 'pin_memory', 'sampler', 'batch_sampler',
    'drop_last', 'timeout',
)  # fmt: skip
#: Where a data set lies; what was read from there is hashed.
_PLACES = ('data_root', 'ann_file', 'data_prefix', 'proposal_file', 'backend_args', 'file_client_args')
#: Of a data info: objects, which mmdet's test pipelines only pass on to the evaluator.
_OBJECTS = ('instances', 'xml_path')
_WORDS = dict(
    config='config',
    checkpoint='checkpoint',
    dataset='dataset',
    images='content of the images',
    inputs='input of the network',
    live='code in memory',
)


def fingerprint(cfg: Config, checkpoint: str | Path, dataset: BaseDataset, score_floor: float) -> dict[str, Any]:
    """What candidates depend on, as ``store.json`` holds it: everything the forward pass reads.

    * ``config``: every key but those that it does not read; paths left out.
    * ``checkpoint``, ``images``: content; None for images where one cannot be read here.
    * ``dataset``, ``infos``: classes, image ids and names; every other entry of the data infos (proposals, say).
    * ``files``: content of every file that model or pipeline name.
    * ``inputs``: of the network, where transforms are not mmdet's and may read files that no config names; else None.
    * ``code``, ``live``: source files of the classes and functions that take part, and what of them is in memory.
    * ``versions`` of what is compiled.
    * ``unknown``: what cannot be read or hashed; candidates that depend on such things are never reused.

    ``execution`` says what moves last bits: the same network differs by 8e-8 between 1 and 2 threads.

    Raises:
        ReevaluationError: the model cannot be plugged or built.
    """
    plugged = plug(cfg, 0.0)
    unknown: list[str] = []
    model = build_model(plugged)
    code = _code(plugged, model, dataset)
    unknown += [f'the source of {name}' for name in code.unknown]
    files: dict[str, str] = {}
    described = _described(plugged, code.foreign)
    config = digest(_with_contents(described, files, unknown))
    images = ImageReader(dataset).contents()
    inputs = None
    transforms = code_of(*(type(one) for one in transforms_of(dataset)))
    if transforms.foreign or None in images:
        try:
            inputs = digest(*_inputs(dataset))
        except Exception:  # whatever a pipeline raises: the forward pass will say it
            unknown.append('an image' if None in images else 'what the test pipeline gives')
    infos = _infos(dataset, code.foreign, unknown)
    return dict(
        config=config,
        checkpoint=sha256(local_checkpoint(checkpoint)),
        dataset=digest(dataset.metainfo.get('classes', ()), infos.pop('img_id', None), infos.pop('img_path', None)),
        infos=infos,
        images=None if None in images else digest(images),
        inputs=inputs,
        files=files,
        code=code.files,
        live=digest(code.live, model_state(model)),
        versions=_versions(code.files),
        unknown=sorted(set(unknown)),
        # Candidates of what cannot be compared equal no others.
        number=uuid.uuid4().hex if unknown else '',
        score_floor=score_floor,
        execution=dict(
            batch_size=cfg.test_dataloader.get('batch_size', 1),
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu',
        ),
    )


def build_model(plugged: Config) -> torch.nn.Module:
    """The model of a plugged config without its weights.

    Raises:
        ReevaluationError: it cannot be built, or its boxes are of another kind than its config says.
    """
    init_default_scope(plugged.get('default_scope') or 'mmdet')
    wanted = 4 if plugged.get('softnms_views') else box_dim_of(plugged)
    model = copy.deepcopy(plugged.model)
    drop_weight_initialisation(model)
    if plugged.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', plugged.data_preprocessor)
    try:
        built: torch.nn.Module = MODELS.build(model)
    except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ReevaluationError(f'the model of the config cannot be built: {first_line(error)}') from error
    for part in built.modules():
        if isinstance(part, TakesRules) and part.box_dim not in (None, wanted):
            raise ReevaluationError(other_boxes(part.box_dim, wanted))
    return built


def drop_weight_initialisation(model: ConfigDict) -> None:
    """The checkpoint brings every weight, so nothing has to be fetched from a model hub first."""
    for value in model.values():
        if isinstance(value, dict):
            if value.get('init_cfg') and value['init_cfg'].get('type') == 'Pretrained':
                value['init_cfg'] = None
            drop_weight_initialisation(value)


def differences(have: dict[str, Any], wanted: dict[str, Any], *, elsewhere: bool = False) -> str:
    """How stored candidates differ from those wanted, in words; empty where they do not.

    Images are compared only where both fingerprints know them.

    Args:
        have, wanted: as of :func:`fingerprint`; ``have`` may be anything that a file held.
        elsewhere: the store was made on another machine, on the user's word: versions and OpenMMLab's code may differ.
    """
    if not _fits(have, wanted):
        return 'version of mmdet_softnms'
    names = [words for key, words in _WORDS.items() if have[key] != wanted[key]]
    for key in ('images', 'inputs'):
        if None in (have[key], wanted[key]) and _WORDS[key] in names:
            names.remove(_WORDS[key])
    names += [f'content of {key}' for key in _different(have['files'], wanted['files'])]
    names += [f'{key} of the data set' for key in _different(have['infos'], wanted['infos'])]
    names += [f'code of {key}' for key in _different(have['code'], wanted['code'])]
    names += [f'version of {key}' for key in _different(have['versions'], wanted['versions'])]
    passed_over = ('version of', *(f'code of {key}' for key in LIBRARIES), _WORDS['live']) if elsewhere else ()
    names = [name for name in names if not name.startswith(passed_over)]
    if 'dataset' in names:  # whatever else follows from it
        names = [name for name in names if name not in (_WORDS['images'], _WORDS['inputs']) and 'data set' not in name]
    if len(names) > 1 and _WORDS['live'] in names:
        names.remove(_WORDS['live'])
    names += ['score floor'] if have['score_floor'] > wanted['score_floor'] else []
    return ' and '.join(names if len(names) < 5 else [*names[:3], f'{len(names) - 3} more'])


def execution_differences(have: dict[str, Any], wanted: dict[str, Any]) -> str:
    """How the making of stored candidates differs, in words."""
    made = []
    for part in ('execution', 'versions'):
        made += [f'{key} {value}' for key, value in have[part].items() if wanted[part].get(key) != value]
    made += [f"another {key}'s code" for key in LIBRARIES if have['code'].get(key) != wanted['code'].get(key)]
    if have['score_floor'] != wanted['score_floor']:
        made.append(f'score floor {have["score_floor"]:g}')
    return ', '.join(made)


def _fits(have: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether something read from a file has the form of a fingerprint."""
    for key, value in wanted.items():
        other = have.get(key)
        if key in ('images', 'inputs'):
            if key not in have or not isinstance(other, (str, type(None))):
                return False
        elif key == 'score_floor':
            if isinstance(other, bool) or not isinstance(other, (int, float)):
                return False
        elif type(other) is not type(value):
            return False
    return True


def _different(have: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [key for key in sorted({*have, *wanted}, key=str) if have.get(key) != wanted.get(key)]


def _described(plugged: Config, foreign: bool) -> dict[str, Any]:
    """Every key of a config that the forward pass reads.

    Variables of the config file that mmengine does not know are read by nothing but other people's code.
    """
    content = {
        key: value
        for key, value in plugged.to_dict().items()
        if key not in _IRRELEVANT and key not in _PLACES and not key.startswith(_IRRELEVANT_PREFIXES)
    }
    if not foreign:
        read = ['model', 'test_dataloader', 'test_cfg', 'default_hooks', 'custom_hooks', 'custom_imports', 'env_cfg']
        read += ['data_preprocessor', 'default_scope', 'randomness', 'model_wrapper_cfg', 'compile', 'runner_type']
        content = {key: content[key] for key in read if key in content}
    content['default_scope'] = content.get('default_scope') or 'mmdet'
    content['default_hooks'] = {
        key: hook for key, hook in (content.get('default_hooks') or {}).items() if _has_effect(hook)
    }
    # The samplers and assigners of training. Losses stay: their kind decides the activation of the scores.
    content['model'] = _without(content['model'], ('init_cfg', 'train_cfg'))  # every weight is the checkpoint's
    loader = {key: value for key, value in content['test_dataloader'].items() if key not in _LOADER_IRRELEVANT}
    loader['dataset'] = _without(loader['dataset'], _PLACES)
    content['test_dataloader'] = loader
    return content


def _has_effect(hook: Any) -> bool:
    return bool(hook) and not (isinstance(hook, dict) and str(hook.get('type')).split('.')[-1] in _HOOKS_WITHOUT_EFFECT)


def _without(content: Any, names: tuple[str, ...]) -> Any:
    if isinstance(content, dict):
        return {key: _without(value, names) for key, value in content.items() if key not in names}
    return [_without(value, names) for value in content] if isinstance(content, (list, tuple)) else content


def _with_contents(content: Any, files: dict[str, str], unknown: list[str]) -> Any:
    """A config with each string that names a file replaced by the file's name; its content goes to ``files``."""
    if isinstance(content, dict):
        return {key: _with_contents(value, files, unknown) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_with_contents(value, files, unknown) for value in content]
    if not isinstance(content, str) or not content:
        return content
    name = osp.basename(content.rstrip('/'))
    if '://' in content:
        try:
            files[name] = digest(fileio.get(content))
        except Exception:  # backends raise what they like
            unknown.append(content)
        return name
    if osp.isfile(content):
        files[name] = digest(files.get(name), sha256(content)) if name in files else sha256(content)
        return name
    if osp.sep in content and osp.isdir(content):  # too much to read, perhaps: names, sizes and times
        files[name] = digest(sorted(_listing(content)))
        return name
    return content


def _listing(root: str) -> Iterator[tuple[str, int, int]]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = osp.join(folder, name)
            if osp.isfile(path):
                stat = os.stat(path)
                yield osp.relpath(path, root), stat.st_size, stat.st_mtime_ns


def _code(plugged: Config, model: torch.nn.Module, dataset: BaseDataset) -> Code:
    """Of what takes part in the forward pass: model, data set, pipeline, hooks, loop, and ``custom_imports``."""
    roots: list[Any] = [model, [type(part) for part in parts_of(dataset)], type(dataset), transforms_of(dataset)]
    hooks = [*(plugged.get('default_hooks') or {}).values(), *(plugged.get('custom_hooks') or [])]
    named = [(HOOKS, hook.get('type') if isinstance(hook, dict) else hook) for hook in hooks if _has_effect(hook)]
    named += [(LOOPS, (plugged.get('test_cfg') or {}).get('type')), (RUNNERS, plugged.get('runner_type'))]
    for registry, kind in named:
        with registry.switch_scope_and_registry(None) as place:  # of the default scope, as where it is built
            thing = place.get(kind) if isinstance(kind, str) else kind
        if thing is not None:
            roots.append(thing)
    collate = plugged.test_dataloader.get('collate_fn')
    collate = collate.get('type') if isinstance(collate, dict) else collate  # which mmengine looks up without a scope
    roots.append(FUNCTIONS.get(collate) if isinstance(collate, str) else collate)
    imports = (plugged.get('custom_imports') or {}).get('imports') or []
    return code_of(*roots, modules=[imports] if isinstance(imports, str) else list(imports))


def _inputs(dataset: BaseDataset) -> Iterator[str]:
    """What the pipeline gives for each image, but where its files lie."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(value) for key, value in item.items() if not str(key).endswith('path')}
        if isinstance(item, (list, tuple)):
            return [plain(value) for value in item]
        if isinstance(item, BaseDataElement):
            return [plain(dict(item.metainfo_items())), plain(dict(item.items()))]
        return item

    for number in range(len(dataset)):
        yield digest(plain(dataset[number]))


def _infos(dataset: BaseDataset, foreign: bool, unknown: list[str]) -> dict[str, str]:
    """Hash of each entry of the data infos over all images; of files that are named, the content."""
    entries: dict[str, list[str]] = {}
    roots = sorted({str(getattr(part, 'data_root', '') or '') for part in parts_of(dataset)} - {''}, key=len)

    def plain(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(str(name), each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(key, each) for each in value]
        if isinstance(value, str) and (osp.sep in value or '.' in value):
            if osp.isfile(value):
                return sha256(value)
            if '://' in value and key.endswith('path'):
                unknown.append(f'{key} {value}')
            for root in reversed(roots):
                value = value.removeprefix(root)
        return value

    for number in range(len(dataset)):
        info = dict(dataset.get_data_info(number))
        info['img_path'] = [osp.basename(path) for path in image_paths(info)]
        for key, value in info.items():
            if key != 'sample_idx' and (foreign or key not in _OBJECTS):
                entries.setdefault(key, []).append(digest(value if key == 'img_path' else plain(key, value)))
    return {key: digest(values) for key, values in entries.items()}


def _versions(code: Collection[str]) -> dict[str, str]:
    """Of what does the arithmetic and decodes images; ``code``: the packages that take part."""
    versions = {one.__name__: one.__version__ for one in (torch, mmcv, mmdet, mmengine, np)}
    for name in ('detectron2', 'mmrotate'):
        if name in code:
            versions[name] = sys.modules[name].__version__
    others = ['fvcore'] if 'detectron2' in code else []
    for name in ('torchvision', 'Pillow', 'opencv-python', 'opencv-python-headless', *others):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
