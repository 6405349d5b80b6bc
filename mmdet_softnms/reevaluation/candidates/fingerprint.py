"""What candidates depend on, so that stored ones are used only for what they are."""

import hashlib
import json
import os
import os.path as osp
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mmcv
import mmdet
import mmengine
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset

from mmdet_softnms.files import sha256
from mmdet_softnms.reevaluation.candidates.plug import plug

_PATH_KEYS = ('data_root', 'ann_file', 'data_prefix', 'init_cfg')  # where things lie is not what they are


def fingerprint(cfg: Config, checkpoint: str | Path, dataset: BaseDataset, score_floor: float) -> dict[str, Any]:
    """What candidates depend on, as ``store.json`` holds it.

    ``config``, ``checkpoint``, ``dataset``, ``images`` and ``score_floor`` say which candidates they are: SHA-256 of
    model, test pipeline, hooks and loop (paths left out); of the checkpoint file; of classes, image ids and file names;
    of the content of all images (None where one is not on this machine's disk). ``execution`` says what moves their
    last bits: the same network differs by 8e-8 between 1 and 2 threads.
    """
    plugged = plug(cfg, 0.0)
    parts = ('model', 'custom_hooks', 'custom_imports', 'test_cfg')
    described = {part: plugged.get(part) for part in parts} | {'dataset': plugged.test_dataloader.dataset}
    infos = [dataset.get_data_info(number) for number in range(len(dataset))]
    names = [[info['img_id'], osp.basename(info['img_path'])] for info in infos]
    content = content_of([info['img_path'] for info in infos])
    return dict(
        config=hash_of(_without_paths(Config(described).to_dict())),
        checkpoint=sha256(checkpoint),
        dataset=hash_of([list(dataset.metainfo.get('classes', ())), names]),
        images=None if None in content else hash_of(content),
        score_floor=score_floor,
        execution=dict(
            batch_size=cfg.test_dataloader.get('batch_size', 1),
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu',
            torch=torch.__version__,
            mmcv=mmcv.__version__,
            mmdet=mmdet.__version__,
            mmengine=mmengine.__version__,
        ),
    )


def content_of(paths: Sequence[str]) -> list[str | None]:
    """The SHA-256 of each file; None for what is not on this machine's disk. On all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda path: sha256(path) if osp.isfile(path) else None, paths))


def execution_differences(have: dict[str, Any], wanted: dict[str, Any]) -> str:
    """How the making of stored candidates differs, in words."""
    made = [f'{key} {value}' for key, value in have['execution'].items() if wanted['execution'].get(key) != value]
    if have['score_floor'] != wanted['score_floor']:
        made.append(f'score floor {have["score_floor"]:g}')
    return ', '.join(made)


def differences(have: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What makes stored candidates others than those wanted, in words; empty where nothing does.

    Images that are not there cannot tell: they are compared where both fingerprints know them.
    """
    names = [key for key in ('config', 'checkpoint', 'dataset') if have.get(key) != wanted[key]]
    if have.get('images') != wanted['images'] and None not in (have.get('images'), wanted['images']):
        names.append('content of the images')
    names += ['score floor'] if have['score_floor'] > wanted['score_floor'] else []
    return ' and '.join(names)


def hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


def _without_paths(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_paths(value) for key, value in content.items() if key not in _PATH_KEYS}
    return [_without_paths(value) for value in content] if isinstance(content, (list, tuple)) else content
