"""The test set of a config, built by mmdet and checked before anything slow."""

import copy
import os.path as osp
from pathlib import Path
from xml.etree import ElementTree

from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.candidates.images import ImageReader
from mmdet_softnms.registry import default_scope_of


def build_test_set(cfg: Config, check_images: bool = True, split: str = 'test') -> BaseDataset:
    """Build the dataset of ``cfg.test_dataloader`` and check that its annotations and, if wanted, images are there.

    Args:
        cfg: the user's config.
        check_images: whether every image that is read from disk has to be there.
        split: ``'val'``: that of ``cfg.val_dataloader`` instead.

    Raises:
        ReevaluationError: no such set in the config; the annotations or an image are missing or damaged; no image;
            image ids that are not unique.
    """
    key = f'{split}_dataloader'
    if cfg.get(key) is None:
        raise ReevaluationError(f'the config has no {key}, so there is nothing to evaluate on')
    init_default_scope(default_scope_of(cfg))
    dataset_cfg = copy.deepcopy(cfg[key].dataset)
    remedy = f'put the data there or correct {key}.dataset.data_root / ann_file (--cfg-options)'
    try:
        dataset = DATASETS.build(dataset_cfg)
        dataset.full_init()
    except FileNotFoundError as error:
        raise ReevaluationError(f'the annotations of the {split} set cannot be read: {error}; {remedy}') from error
    except Exception as error:  # whatever a data set raises while it reads its annotations is about them
        if 'registry' in str(error):  # mmengine's words for a type that it does not find
            remedy = 'correct its types, default_scope or custom_imports'
        raise ReevaluationError(
            f'the {split} set ({dataset_cfg.get("type")}, annotations {_annotations(dataset_cfg)}) cannot be built: '
            f'{type(error).__name__}: {error}; {remedy}'
        ) from error
    if len(dataset) == 0:
        raise ReevaluationError(f'the {split} set {dataset_cfg.get("ann_file")} holds no image')
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    if any('img_id' not in info for info in infos):  # ODVGDataset, say
        raise ReevaluationError(
            f'the {split} set ({dataset_cfg.get("type")}) gives its images no img_id, without which no detection finds '
            'its ground truth; use a data set class with image ids, as CocoDataset'
        )
    if len({info['img_id'] for info in infos}) < len(infos):
        raise ReevaluationError(f'image ids of the {split} set are not unique; evaluate its parts one by one')
    # Images that a storage backend reads (backend_args) are left to the forward pass, which names the first one.
    reader = ImageReader(dataset)
    missing = [paths[0] for number in range(len(infos)) if check_images and (paths := reader.missing(number))]
    if missing:
        raise ReevaluationError(
            f'{len(missing)} of {len(infos)} {split} images are missing, first {missing[0]}; put them there or correct '
            f'{key}.dataset.data_root / data_prefix (--cfg-options)'
        )
    return dataset


def _annotations(dataset_cfg: ConfigDict) -> str:
    """Where they are: of VOC the first XML file that cannot be parsed, of anything else the annotation file."""
    root, ann_file = dataset_cfg.get('data_root') or '', str(dataset_cfg.get('ann_file', ''))
    path = ann_file if osp.isabs(ann_file) else osp.join(root, ann_file)
    if osp.splitext(path)[1] == '.txt' and osp.isfile(path):
        images = osp.join(root, dataset_cfg.get('data_prefix', {}).get('sub_data_root', ''))
        for name in Path(path).read_text().split():
            xml = osp.join(images, dataset_cfg.get('ann_subdir', 'Annotations'), f'{name}.xml')
            try:
                ElementTree.parse(xml)
            except (OSError, ElementTree.ParseError):
                return xml
    return path
