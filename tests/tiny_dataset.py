"""A tiny test set around a tiny detector, on disk: configs, a checkpoint, noise images, COCO json and VOC XML.

The objects are (integer) boxes near the detector's own random detections, so that its AP is neither 0 nor 1 and every
comparison of APs has something to compare.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.apis import inference_detector
from mmengine.config import Config

from tests.tiny import build, tiny_config, tiny_rfcn_model

CLASSES = ('ant', 'bee', 'cat', 'dog', 'eel')
SIZES = [(96, 128), (120, 90), (100, 100), (128, 96), (90, 160), (96, 128)]  # height, width in pixels


@dataclass
class Project:
    """Where everything is."""

    coco_config: Path
    voc_config: Path
    checkpoint: Path
    root: Path


def make_project(root: Path, detector: str = 'class-aware') -> Project:
    """Write the data set, both configs and a checkpoint into a folder.

    ``detector``: Faster R-CNN with 'class-aware' or 'class-agnostic' boxes, or 'r-fcn'.
    """
    images = root / 'VOC2007' / 'JPEGImages'
    for folder in (images, root / 'VOC2007' / 'Annotations', root / 'VOC2007' / 'ImageSets' / 'Main'):
        folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    names = [f'{number:06d}' for number in range(1, len(SIZES) + 1)]
    for name, (height, width) in zip(names, SIZES, strict=True):
        blocks = random.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        image = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(images / f'{name}.jpg'), image)

    cfg = tiny_config('SoftNMSRoIHead', num_classes=len(CLASSES))
    cfg.model.roi_head.bbox_head.reg_class_agnostic = detector == 'class-agnostic'
    if detector == 'r-fcn':
        cfg.model = tiny_rfcn_model()
    coco = _with_data(cfg, root, 'coco')
    model = build(coco)
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, root / 'tiny.pth')

    model.cfg, model.dataset_meta = coco, dict(classes=CLASSES)
    objects = {
        name: _objects(model, str(images / f'{name}.jpg'), size) for name, size in zip(names, SIZES, strict=True)
    }
    _write_coco(root / 'coco.json', objects)
    _write_voc(root / 'VOC2007', objects)
    coco.dump(root / 'tiny_coco.py')
    _with_data(cfg, root, 'voc').dump(root / 'tiny_voc.py')
    return Project(root / 'tiny_coco.py', root / 'tiny_voc.py', root / 'tiny.pth', root)


def _with_data(cfg: Config, root: Path, kind: str) -> Config:
    cfg = Config(cfg.to_dict())
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(192, 144), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(
            type='PackDetInputs',
            meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
        ),
    ]
    dataset: dict[str, Any] = dict(
        data_root=f'{root}/', metainfo=dict(classes=CLASSES), test_mode=True, pipeline=pipeline
    )
    if kind == 'coco':
        dataset.update(type='CocoDataset', ann_file='coco.json', data_prefix=dict(img='VOC2007/JPEGImages/'))
        evaluator: dict[str, Any] = dict(type='CocoMetric', ann_file=f'{root}/coco.json', metric='bbox')
    else:
        dataset.update(
            type='VOCDataset',
            ann_file='VOC2007/ImageSets/Main/test.txt',
            data_prefix=dict(sub_data_root='VOC2007/'),
        )
        evaluator = dict(type='VOCMetric', metric='mAP', eval_mode='11points')
    loader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)
    train_set = dict(dataset, test_mode=False, filter_cfg=dict(filter_empty_gt=True))
    cfg.train_dataloader = dict(loader, batch_size=2, dataset=train_set)
    cfg.val_dataloader = cfg.test_dataloader = loader
    cfg.val_evaluator = cfg.test_evaluator = evaluator
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=1)
    cfg.model.backbone.pop('init_cfg', None)
    return cfg


def _objects(model: torch.nn.Module, path: str, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Every third of the best detections, moved by a pixel or two; the last one is difficult."""
    found = inference_detector(model, path).pred_instances
    generator = np.random.default_rng(1)
    objects: list[dict[str, Any]] = []
    for box, label in list(zip(found.bboxes.tolist(), found.labels.tolist(), strict=True))[:24:3]:
        x1, y1, x2, y2 = (round(value) + int(generator.integers(-2, 3)) for value in box)
        x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, size[1] - 1), min(y2, size[0] - 1)
        if x2 - x1 > 4 and y2 - y1 > 4:
            objects.append(dict(bbox=[x1, y1, x2, y2], label=label, difficult=0))
    assert len(objects) >= 3
    objects[-1]['difficult'] = 1
    return objects


def _write_coco(path: Path, objects: dict[str, list[dict[str, Any]]]) -> None:
    annotations = []
    for name, found in objects.items():
        for one in found:
            x1, y1, x2, y2 = one['bbox']
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=int(name),
                    category_id=one['label'] + 1,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1),
                    iscrowd=one['difficult'],
                )
            )
    images = [
        dict(id=int(name), file_name=f'{name}.jpg', height=height, width=width)
        for name, (height, width) in zip(objects, SIZES, strict=True)
    ]
    categories = [dict(id=number, name=name) for number, name in enumerate(CLASSES, 1)]
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def _write_voc(folder: Path, objects: dict[str, list[dict[str, Any]]]) -> None:
    for (name, found), (height, width) in zip(objects.items(), SIZES, strict=True):
        body = ''.join(
            f'<object><name>{CLASSES[one["label"]]}</name><difficult>{one["difficult"]}</difficult><bndbox>'
            + ''.join(
                f'<{key}>{value + 1}</{key}>'
                for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), one['bbox'], strict=True)
            )
            + '</bndbox></object>'
            for one in found
        )
        size = f'<size><width>{width}</width><height>{height}</height><depth>3</depth></size>'
        (folder / 'Annotations' / f'{name}.xml').write_text(f'<annotation>{size}{body}</annotation>')
    (folder / 'ImageSets' / 'Main' / 'test.txt').write_text(''.join(f'{name}\n' for name in objects))
