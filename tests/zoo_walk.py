"""Every config of the installed mmdet: does its detector take rules, and if not, why? ``docs/detectors.md`` is this.

python -m tests.zoo_walk > docs/detectors.md
"""

import contextlib
import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mmdet
import mmdet.registry
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmdet_softnms.models import dense_heads, roi_heads
from mmdet_softnms.registry import resolve

ROOT = Path(mmdet.__file__).parent / '.mim/configs'


@dataclass(frozen=True)
class Verdict:
    """What can be said of the detector of a config."""

    part: str  # 'roi_head', 'bbox_head', or what there is instead
    head: str  # class
    reason: str  # why it cannot take rules; empty: it can
    folder: str


def configs() -> list[Path]:
    return sorted(path for path in ROOT.rglob('*.py') if not {'_base_', '__pycache__'} & set(path.parts))


def detector_of(path: Path) -> Any:
    """The detector of a config file, also of a tracker or a teacher with its student; None: it has no model."""
    cfg = Config.fromfile(path, import_custom_modules=False)
    model = cfg.get('model')
    return model.detector if isinstance(model, dict) and isinstance(model.get('detector'), dict) else model


def verdict(path: Path) -> Verdict | None:
    """None where a file is only a part of configs: it has no model, or none with a type."""
    try:
        model = detector_of(path)
    except (FileNotFoundError, ModuleNotFoundError) as error:  # a base that is not in mmdet's package, or mmpretrain's
        missing = 'mmpretrain' if 'mmpretrain' in str(error) else 'a file that mmdet does not bring'
        folder = path.relative_to(ROOT).parts[0]
        return Verdict('none', path.stem, f'{path.stem} cannot be read: its base needs {missing}', folder)
    if not isinstance(model, dict) or 'type' not in model:
        return None

    def class_of(head: Any) -> Any:
        return resolve(head['type'], mmdet.registry.MODELS, 'mmdet').cls

    def found(part: str, cls: Any, reason: str) -> Verdict:
        return Verdict(part, getattr(cls, '__name__', str(cls)), reason, path.relative_to(ROOT).parts[0])

    if isinstance(model.get('roi_head'), dict):
        head = model.roi_head
        cls = class_of(head)
        reason = roi_heads.why_not(cls)
        boxes = head.get('bbox_head')
        for each in boxes if isinstance(boxes, list) else [boxes] if boxes else []:
            if not reason and class_of(each)._predict_by_feat_single is not BBoxHead._predict_by_feat_single:
                reason = f'{cls.__name__} with {class_of(each).__name__}, which post-processes in its own way'
        return found('roi_head', cls, reason)
    for part in ('bbox_head', 'mask_head'):
        if isinstance(model.get(part), dict):
            return found(part, class_of(model[part]), dense_heads.why_not(class_of(model[part])))
    if isinstance(model.get('panoptic_head'), dict):
        return found('panoptic_head', class_of(model.panoptic_head), dense_heads.why_not(class_of(model.panoptic_head)))
    if isinstance(model.get('rpn_head'), dict):
        return found('rpn_head', class_of(model.rpn_head), dense_heads.why_not(class_of(model.rpn_head)))
    return found('none', class_of(model), f'{class_of(model).__name__} has no head that predicts boxes')


@contextlib.contextmanager
def files_read_once() -> Iterator[None]:
    """mmengine reads a base anew for each of the hundreds of configs that name it."""
    read, known = Config._file2dict, dict[tuple[Any, ...], bytes]()

    def once(filename: str, *options: Any, **named: Any) -> Any:
        key = (os.path.abspath(filename), *options, *named.values())
        if key not in known:
            known[key] = pickle.dumps(read(filename, *options, **named))
        return pickle.loads(known[key])  # a copy: what is read is merged into

    with mock.patch.object(Config, '_file2dict', staticmethod(once)):
        yield


def walk() -> list[Verdict]:
    register_all_modules()
    with files_read_once():
        return [found for path in configs() if (found := verdict(path)) is not None]


def table(verdicts: list[Verdict]) -> str:
    """The page."""
    supported = [each for each in verdicts if not each.reason]
    lines = [
        '# Which detectors of mmdet take rules',
        '',
        f'Every config of mmdet {mmdet.__version__}, {len(verdicts)} of them with a model: {len(supported)} take '
        'rules, the others say why not when they are built. Made by `python -m tests.zoo_walk > docs/detectors.md`; '
        '`tests/test_models/test_zoo.py` walks again.',
        '',
        '## They take rules',
        '',
        '| head | how it is written | configs | folders of `mmdet::` |',
        '|---|---|---|---|',
    ]
    for part, kind in (('roi_head', 'SoftNMSRoIHead'), ('bbox_head', 'SoftNMSDenseHead')):
        for head in sorted({each.head for each in supported if each.part == part}):
            mine = [each for each in supported if (each.part, each.head) == (part, head)]
            named = {'StandardRoIHead': 'SoftNMSRoIHead', 'CascadeRoIHead': 'SoftNMSCascadeRoIHead'}
            named['DoubleHeadRoIHead'] = 'SoftNMSDoubleHeadRoIHead'
            other = '' if head in named else f", head='{head}'"
            written = f"{part}=dict(type='mmdet_softnms.{named.get(head, kind)}'{other})"
            lines.append(f'| {head} | `{written}` | {len(mine)} | {_folders(mine)} |')
    lines += ['', '## They do not', '', '| head | why | configs | folders |', '|---|---|---|---|']
    refused = [each for each in verdicts if each.reason]
    for head, reason in sorted({(each.head, each.reason) for each in refused}):
        mine = [each for each in refused if (each.head, each.reason) == (head, reason)]
        reason = reason.removeprefix(f'{head} cannot be plugged: ')
        lines.append(f'| {head} | {reason} | {len(mine)} | {_folders(mine)} |')
    return '\n'.join(lines) + '\n'


def _folders(verdicts: list[Verdict]) -> str:
    names = sorted({each.folder for each in verdicts})
    return ', '.join(names[:6]) + (f' and {len(names) - 6} more' if len(names) > 6 else '')


if __name__ == '__main__':
    sys.stdout.write(table(walk()))
