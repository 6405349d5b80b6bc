"""Our numbers beside the evaluators that mmengine builds, for every data set class of mmdet that needs no download."""

import copy
import json
import pickle
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.reevaluation.report.table import cell, columns_of
from mmdet_softnms.reevaluation.scoring import evaluators as configured
from mmdet_softnms.reevaluation.scoring.metrics import Evaluator, annotated_by, read_ground_truth

register_all_modules()
CLASSES = ('ant', 'bee', 'cat')
COCO_JSON = (
    'CocoDataset', 'CityscapesDataset', 'DeepFashionDataset', 'iSAIDDataset', 'Objects365V1Dataset',
    'Objects365V2Dataset', 'V3DetDataset', 'ADE20KInstanceDataset',
)  # fmt: skip
XML = ('XMLDataset', 'VOCDataset', 'WIDERFaceDataset')
OTHERS = ('CrowdHumanDataset', 'BaseDetDataset', 'LVISV05Dataset', 'LVISDataset', 'LVISV1Dataset', 'OpenImagesDataset')
#: Why the other classes of mmdet's registry are not compared.
NOT_COMPARED = {
    'DODDataset': 'needs the package d_cube',
    'DSDLDetDataset': 'needs the package dsdl',
    'OneDLDataset': 'needs the package onedl',
    'OpenImagesChallengeDataset': 'its is_group_ofs is not what OpenImagesMetric reads (is_group_of)',
    **dict.fromkeys(
        ('Flickr30kDataset', 'MDETRStyleRefCocoDataset', 'RefCocoDataset', 'ODVGDataset', 'CocoCaptionDataset'),
        'phrases or captions, not classes',
    ),
    **dict.fromkeys(('CocoPanopticDataset', 'ADE20KPanopticDataset'), 'panoptic segmentation'),
    **dict.fromkeys(('BaseSegDataset', 'ADE20KSegDataset', 'CocoSegDataset'), 'semantic segmentation'),
    **dict.fromkeys(('BaseVideoDataset', 'MOTChallengeDataset', 'YouTubeVISDataset'), 'videos'),
    'ReIDDataset': 're-identification',
    **dict.fromkeys(('ConcatDataset', 'MultiImageMixDataset'), 'a wrapper: see the tests of several data sets'),
}


def test_every_data_set_class_is_compared_or_has_a_reason():
    ours = {name for name, kind in DATASETS.module_dict.items() if kind.__module__.startswith('mmdet.')}
    assert ours <= {*COCO_JSON, *XML, *OTHERS, *NOT_COMPARED}


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """Objects and, a little beside them, detections of five images, in every format."""
    root = tmp_path_factory.mktemp('stock')
    random = np.random.default_rng(0)
    images, annotations, found = [], [], {}
    for folder in ('JPEGImages', 'Annotations', 'faces'):
        (root / folder).mkdir()
    for number in range(5):
        name = f'{number + 1:06d}'
        cv2.imwrite(str(root / 'JPEGImages' / f'{name}.jpg'), np.zeros((200, 200, 3), np.uint8))
        images.append(dict(id=10 * (number + 1), file_name=f'{name}.jpg', height=200, width=200))
        boxes, labels = [], []
        for position in range(6):
            x, y, w, h = map(int, (*random.integers(0, 130, 2), *random.integers(12, 60, 2)))
            label = int(random.integers(0, 3))
            annotations.append(
                dict(id=len(annotations) + 1, image_id=images[-1]['id'], category_id=label, bbox=[x, y, w, h],
                     area=w * h * 0.35, iscrowd=int(position == 5))
            )  # fmt: skip
            for _ in range(2):
                boxes.append(np.array([x, y, x + w, y + h]) + random.normal(0, 2.5, 4))
                labels.append(label if random.random() < 0.9 else (label + 1) % 3)
        found[name] = boxes, labels, np.round(random.random(len(boxes)), 4)
    return SimpleNamespace(root=root, images=images, annotations=annotations, found=found)


def _coco(drawn, kind='CocoDataset', evaluator=None, ids=(3, 9, 5), order=(0, 1, 2), change=None, **more):
    """A COCO json with sparse category ids, in this order in the file."""
    annotations = [dict(one, category_id=ids[one['category_id']]) for one in drawn.annotations]
    categories = [dict(id=ids[label], name=CLASSES[label]) for label in order]
    content = dict(images=copy.deepcopy(drawn.images), annotations=annotations, categories=categories)
    if change:
        change(content)
    path = drawn.root / f'coco{len(list(drawn.root.glob("*.json")))}.json'
    path.write_text(json.dumps(content))
    if kind == 'V3DetDataset':
        (drawn.root / 'names.txt').write_text('\n'.join(CLASSES))
        more['label_file'] = 'names.txt'
    dataset = dict(
        type=kind, data_root=f'{drawn.root}/', ann_file=path.name, data_prefix=dict(img='JPEGImages/'),
        metainfo=dict(classes=CLASSES), test_mode=True, pipeline=[], **more,
    )  # fmt: skip
    metric = dict(type='CocoMetric', ann_file=str(path), proposal_nums=(1, 10, 100))
    return _config(dataset, metric if evaluator is None else evaluator(metric))


def _config(dataset, evaluator):
    return Config(dict(test_dataloader=dict(dataset=dataset), test_evaluator=evaluator))


def _score(cfg, drawn):
    """Our row and notes beside what mmengine's own evaluator says of the same detections."""
    dataset = build_test_set(cfg, check_images=False)
    evaluators = configured.build_evaluators(cfg, dataset)
    truth = read_ground_truth(cfg, dataset, evaluators)
    infos = [dataset.get_data_info(number) for number in range(len(dataset))]
    results = []
    for info in infos:
        boxes, labels, scores = drawn.found[info['img_path'].split('/')[-1].split('.')[0]]
        results.append(
            InstanceData(
                bboxes=torch.tensor(np.array(boxes), dtype=torch.float32),
                scores=torch.tensor(scores, dtype=torch.float32),
                labels=torch.tensor([truth.classes.index(CLASSES[label]) for label in labels]),
            )
        )
    samples = configured.data_samples(infos, np.full((len(infos), 2), 200))
    row = SimpleNamespace(metrics=Evaluator(truth)(results).metrics)
    ignored = sum(one['iscrowd'] for one in truth.coco['annotations']), truth.no_class_ignores
    source = [part.metric for part in annotated_by(evaluators, dataset)]
    others = configured.others(evaluators, source, ignored, 100)
    configured.add_columns(others, [row], lambda number: results, samples)
    notes = truth.notes + configured.notes(others, truth.voc is not None)

    def stock():
        """As a test loop does, with evaluators of its own."""
        with configured.quiet():
            one = Runner.build_evaluator(None, copy.deepcopy(cfg.test_evaluator))
            one.dataset_meta = dataset.metainfo
            for sample, result in zip(samples, results, strict=True):
                one.process([dict(copy.deepcopy(sample), pred_instances=dict(result.items()))])
            return one.evaluate(len(samples))

    return row.metrics, notes, stock


def _same_as_coco(metrics, stock, prefix='coco/'):
    names = dict(AP='mAP', AP50='mAP_50', AP75='mAP_75', APs='mAP_s', APm='mAP_m', APl='mAP_l')
    assert 0.1 < metrics['AP'] < 0.95
    for ours, theirs in names.items():
        assert metrics[ours] == pytest.approx(stock[f'{prefix}bbox_{theirs}'], abs=5.1e-4), ours


@pytest.mark.parametrize('kind', COCO_JSON)
@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1)])
def test_data_sets_of_coco_json(drawn, kind, order):
    """Objects365 sorts its categories by id, every other keeps the file's order; mmdet's metric must be told so."""
    sort = kind.startswith('Objects365V1') or kind.startswith('Objects365V2')
    cfg = _coco(drawn, kind, lambda metric: dict(metric, sort_categories=sort), order=order)
    metrics, notes, stock = _score(cfg, drawn)
    _same_as_coco(metrics, stock())
    assert notes == []


@pytest.mark.usefixtures('voc_in_one_process')
@pytest.mark.parametrize('kind', XML)
@pytest.mark.parametrize('mode', ['11points', 'area'])
def test_data_sets_of_voc_xml(drawn, kind, mode):
    for image in drawn.images:
        objects = ''.join(
            f'<object><name>{CLASSES[one["category_id"]]}</name><difficult>{one["iscrowd"]}</difficult><bndbox>'
            f'<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>'
            for one in drawn.annotations
            if one['image_id'] == image['id']
            for x, y, w, h in [one['bbox']]
        )
        size = '<size><width>200</width><height>200</height><depth>3</depth></size>'
        path = drawn.root / 'Annotations' / f'{image["file_name"][:-4]}.xml'
        path.write_text(f'<annotation><folder>faces</folder>{size}{objects}</annotation>')
    (drawn.root / 'test.txt').write_text('\n'.join(image['file_name'][:-4] for image in drawn.images))
    prefix = dict(img='') if kind == 'WIDERFaceDataset' else dict(sub_data_root='')
    dataset = dict(
        type=kind, data_root=f'{drawn.root}/', ann_file='test.txt', data_prefix=prefix,
        metainfo=dict(classes=CLASSES), test_mode=True, pipeline=[],
    )  # fmt: skip
    metrics, notes, stock = _score(_config(dataset, dict(type='VOCMetric', eval_mode=mode)), drawn)
    ours = metrics['VOC07_AP50' if mode == '11points' else 'VOC12_AP50']
    assert 0.1 < ours == pytest.approx(stock()['pascal_voc/mAP'], abs=1e-6)
    assert notes == []
    metrics, notes, stock = _score(_config(dataset, dict(type='VOCMetric', iou_thrs=[0.5, 0.7])), drawn)  # 11 points
    theirs = stock()
    assert metrics['pascal_voc/mAP'] == pytest.approx(theirs['pascal_voc/mAP'])
    for name in ('AP50', 'AP70'):  # it rounds each to three decimals, and their mean not at all
        assert metrics[f'VOC07_{name}'] == pytest.approx(theirs[f'pascal_voc/{name}'], abs=5.1e-4)
    assert (metrics['VOC07_AP50'] + metrics['VOC07_AP70']) / 2 == pytest.approx(theirs['pascal_voc/mAP'], abs=1e-9)
    assert 0.1 < metrics['VOC07_AP70'] < metrics['VOC07_AP50'] - 0.01
    assert 'VOCMetric (iou_thrs=[0.5, 0.7])' in notes[0] and 'pascal_voc/AP70' in notes[0]


def test_crowdhuman(drawn):
    """An ignored object has label -1 there: it is one of every class; MR and JI are extra columns."""
    lines = []
    for image in drawn.images:
        boxes = [
            dict(tag='person' if one['iscrowd'] == 0 else 'mask', fbox=one['bbox'], hbox=one['bbox'], vbox=one['bbox'],
                 extra=dict(ignore=one['iscrowd']))
            for one in drawn.annotations if one['image_id'] == image['id']
        ]  # fmt: skip
        lines.append(json.dumps(dict(ID=image['file_name'][:-4], gtboxes=boxes)))
    (drawn.root / 'val.odgt').write_text('\n'.join(lines))
    dataset = dict(
        type='CrowdHumanDataset', data_root=f'{drawn.root}/', ann_file='val.odgt', data_prefix=dict(img='JPEGImages/'),
        metainfo=dict(classes=('person',)), test_mode=True, pipeline=[],
    )  # fmt: skip
    people = SimpleNamespace(found={name: (one[0], [0] * 12, one[2]) for name, one in drawn.found.items()})
    cfg = _config(dataset, dict(type='CrowdHumanMetric', ann_file=str(drawn.root / 'val.odgt'), metric=['AP', 'MR']))
    renamed = pytest.MonkeyPatch()
    renamed.setitem(globals(), 'CLASSES', ('person',))
    try:
        metrics, notes, stock = _score(cfg, people)
        expected = stock()
    finally:
        renamed.undo()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert 'not the numbers of the configured CrowdHumanMetric; its numbers' in notes[0]
    assert 'crowd_human/mAP, crowd_human/mMR' in notes[0] and metrics['AP'] > 0.1


@pytest.mark.parametrize('kind', ['LVISV05Dataset', 'LVISV1Dataset'])
def test_lvis(drawn, kind, monkeypatch):
    """Federated AP is extra columns: detections of classes that nobody looked for on an image do not count."""
    monkeypatch.setattr(np, 'float', float, raising=False)  # the package lvis is older than numpy 1.24

    def change(content):
        for number, image in enumerate(content['images']):
            image['coco_url'] = f'http://images.cocodataset.org/{image["file_name"]}'
            image.update(neg_category_ids=[3] if number else [], not_exhaustive_category_ids=[9] if number == 1 else [])
        content['annotations'] = [one for one in content['annotations'] if one['iscrowd'] == 0]
        for category, frequency in zip(content['categories'], 'rcf', strict=True):
            category['frequency'] = frequency

    cfg = _coco(drawn, kind, lambda metric: dict(type='LVISMetric', ann_file=metric['ann_file']), change=change)
    metrics, notes, stock = _score(cfg, drawn)
    expected = stock()
    assert len(expected) > 8 and {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert 'not the numbers of the configured LVISMetric; its numbers' in notes[0] and 'lvis/bbox_AP' in notes[0]
    assert 0.1 < metrics['AP'] != pytest.approx(metrics['lvis/bbox_AP'], abs=1e-3)


def test_open_images(drawn):
    """A bee is an ant there; what is neither annotated nor verified on an image does not count; groups are one."""
    root = drawn.root
    (root / 'labels.csv').write_text(''.join(f'/m/{name},{name}\n' for name in CLASSES))
    tree = [dict(LabelName='/m/ant', Subcategory=[dict(LabelName='/m/bee')]), dict(LabelName='/m/cat')]
    (root / 'hierarchy.txt').write_text(json.dumps(dict(LabelName='/m/entity', Subcategory=tree)))
    metas = [dict(filename=image['file_name'], ori_shape=(200, 200, 3)) for image in drawn.images]
    (root / 'metas.pkl').write_bytes(pickle.dumps(metas))
    names = {image['id']: image['file_name'][:-4] for image in drawn.images}
    boxes, verified = ['header'], ['header']
    for one in drawn.annotations:
        x, y, w, h = (value / 200 for value in one['bbox'])
        label = f'/m/{CLASSES[one["category_id"]]}'
        flags = f'0,0,{one["iscrowd"]},0,0'
        boxes.append(f'{names[one["image_id"]]},x,{label},1,{x},{x + w},{y},{y + h},{flags}')
    verified += [f'{name},x,/m/ant,1' for name in names.values()]
    (root / 'boxes.csv').write_text('\n'.join(boxes))
    (root / 'verified.csv').write_text('\n'.join(verified))
    dataset = dict(
        type='OpenImagesDataset', data_root=f'{root}/', ann_file='boxes.csv', data_prefix=dict(img='JPEGImages/'),
        label_file='labels.csv', hierarchy_file='hierarchy.txt', meta_file='metas.pkl',
        image_level_ann_file='verified.csv', test_mode=True, pipeline=[],
    )  # fmt: skip
    evaluator = dict(type='OpenImagesMetric', iou_thrs=0.5, ioa_thrs=0.5, use_group_of=True, get_supercategory=True)
    metrics, notes, stock = _score(_config(dataset, evaluator), drawn)
    expected = stock()
    assert expected and {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert 'not the numbers of the configured OpenImagesMetric' in notes[0] and 'openimages/mAP' in notes[0]
    assert 0.1 < metrics['AP50'] != pytest.approx(metrics['openimages/mAP'], abs=1e-3)


def _openmmlab(drawn, ignored_label, evaluator):
    infos = [
        dict(
            img_path=f'JPEGImages/{image["file_name"]}', img_id=f'x{image["id"]}', height=200, width=200,
            instances=[
                dict(bbox=[x, y, x + w, y + h], ignore_flag=one['iscrowd'],
                     bbox_label=one['category_id'] if not one['iscrowd'] else ignored_label)
                for one in drawn.annotations if one['image_id'] == image['id'] for x, y, w, h in [one['bbox']]
            ],
        )
        for image in drawn.images
    ]  # fmt: skip
    path = drawn.root / f'openmmlab{ignored_label}.json'
    path.write_text(json.dumps(dict(metainfo=dict(classes=CLASSES), data_list=infos)))
    dataset = dict(type='BaseDetDataset', data_root=f'{drawn.root}/', ann_file=path.name, test_mode=True, pipeline=[])
    return _config(dataset, evaluator)


def test_annotations_of_the_data_set_and_ignored_objects_of_no_class(drawn):
    metrics, notes, stock = _score(_openmmlab(drawn, 1, dict(type='CocoMetric')), drawn)
    _same_as_coco(metrics, stock())
    assert notes == []
    metrics, notes, stock = _score(_openmmlab(drawn, -1, dict(type='CocoMetric')), drawn)
    assert 'it drops the 5 ignored objects of no class; here they are of every class' in notes[0]
    assert metrics['coco/bbox_mAP'] == stock()['coco/bbox_mAP'] < metrics['AP']


@METRICS.register_module()
class CountingMetric(BaseMetric):
    """A user's own: how many boxes, under a name that one of our columns has, and something that is no number."""

    def __init__(self, broken=False):
        super().__init__()
        self.broken = broken

    def process(self, data_batch, data_samples):
        self.results += [len(sample['pred_instances']['scores']) for sample in data_samples]

    def compute_metrics(self, results):
        if self.broken:
            raise ValueError('no such [thing]')
        return dict(AP=sum(results), kind='boxes')


def test_evaluators_are_what_their_classes_are(drawn):
    """Subclasses, wrappers, lists, classes as types and scopes: the annotation file and its areas are read."""
    from mmdet.evaluation import CocoMetric

    class Mine(CocoMetric):
        pass

    METRICS.register_module(module=Mine, force=True)
    plain, _, stock = _score(_coco(drawn), drawn)
    _same_as_coco(plain, stock())
    for change in (
        lambda metric: dict(metric, type='FasterCocoMetric'),
        lambda metric: dict(metric, type='mmdet.CocoMetric'),
        lambda metric: dict(metric, type=CocoMetric),
        lambda metric: dict(metric, type='Mine'),
        lambda metric: [metric],
        lambda metric: dict(type='Evaluator', metrics=[metric]),
        lambda metric: dict(metrics=metric),
        lambda metric: [dict(type='DumpDetResults', out_file_path=str(drawn.root / 'never.pkl')), metric],
    ):
        cfg = _coco(drawn)
        cfg._cfg_dict['test_evaluator'] = change(cfg.test_evaluator.to_dict())
        metrics, notes, _ = _score(cfg, drawn)
        assert metrics == plain and notes == []
    assert not (drawn.root / 'never.pkl').exists()


@pytest.mark.parametrize(
    ('change', 'words', 'column'),
    [
        (dict(iou_thrs=[0.5, 0.6]), 'iou_thrs=[0.5, 0.6]', ''),
        (dict(classwise=True), 'classwise=True', 'coco/ant_precision'),
        (dict(metric=['bbox', 'segm']), 'masks are left out); its numbers, as', ''),
        (dict(metric='segm'), 'it has none for boxes alone', ''),
        (dict(metric='proposal_fast'), "metric=['proposal_fast']", 'coco/AR@100'),
        (dict(format_only=True, outfile_prefix='never/x'), 'format_only=True', ''),
        (dict(proposal_nums=(1, 10, 50)), 'proposal_nums=(1, 10, 50)', ''),
        (dict(type='CountingMetric', _delete_=True), 'CountingMetric/AP', 'CountingMetric/AP'),
        (dict(type='CountingMetric', _delete_=True, broken=True), 'missing: ValueError: no such [thing]', ''),
        (dict(type='CityScapesMetric', _delete_=True, outfile_prefix='x'), 'its numbers are missing', ''),
    ],
)
def test_a_metric_that_is_not_shown_is_said_so(drawn, change, words, column):
    change = dict(change)
    replaced = change.pop('_delete_', False)
    cfg = _coco(drawn, evaluator=lambda metric: change if replaced else dict(metric, **change))
    metrics, notes, stock = _score(cfg, drawn)
    assert len(notes) == 1 and words in notes[0]
    if column:
        name = column.removeprefix('CountingMetric/')
        assert metrics[column] == pytest.approx(stock()[name]) and column in notes[0]
        row = SimpleNamespace(metrics=metrics)
        assert column in columns_of([row], ['AP'])
        assert cell(row, None, column) == f'{metrics[column]:.4f}'


def test_several_data_sets(drawn):
    def keep(first, last):
        def change(content):
            content['images'] = content['images'][first:last]
            ids = {image['id'] for image in content['images']}
            content['annotations'] = [one for one in content['annotations'] if one['image_id'] in ids]

        return change

    parts = [_coco(drawn, change=keep(0, 2)), _coco(drawn, change=keep(2, 5), ids=(7, 8, 6))]
    dataset = dict(type='ConcatDataset', datasets=[part.test_dataloader.dataset for part in parts])
    evaluator = dict(
        type='MultiDatasetsEvaluator', metrics=[part.test_evaluator for part in parts], dataset_prefixes=['one', 'two']
    )
    metrics, notes, stock = _score(_config(dataset, evaluator), drawn)
    whole, _, _ = _score(_coco(drawn), drawn)
    assert metrics['AP'] == pytest.approx(whole['AP']) and metrics['APs'] == pytest.approx(whole['APs'])
    assert metrics['one/coco/bbox_mAP'] == stock()['one/coco/bbox_mAP']
    assert 'MultiDatasetsEvaluator, which scores several data sets one by one' in notes[0]

    for part, source in zip(parts, ('here', 'there'), strict=True):
        part.test_dataloader.dataset.metainfo = dict(classes=CLASSES, source=source)
    dataset = dict(type='ConcatDataset', datasets=[part.test_dataloader.dataset for part in parts])
    metrics, _, _ = _score(_config(dataset, evaluator), drawn)
    assert metrics['AP'] == pytest.approx(whole['AP'])
    parts[1].test_dataloader.dataset.metainfo = dict(classes=CLASSES[::-1], source='there')
    cfg = _config(dict(type='ConcatDataset', datasets=[part.test_dataloader.dataset for part in parts]), evaluator)
    with pytest.raises(ReevaluationError, match='different classes .ant in part 1, cat in part 2.'):
        _score(cfg, drawn)


def test_parts_that_share_an_annotation_file_have_each_object_once(drawn):
    part = _coco(drawn, indices=[0, 1])
    rest = copy.deepcopy(part.test_dataloader.dataset)
    rest.indices = [2, 3, 4]
    evaluator = dict(
        type='MultiDatasetsEvaluator', metrics=[part.test_evaluator, part.test_evaluator], dataset_prefixes=['a', 'b']
    )
    dataset = dict(type='ConcatDataset', datasets=[part.test_dataloader.dataset, rest])
    metrics, notes, stock = _score(_config(dataset, evaluator), drawn)
    whole, _, _ = _score(_coco(drawn), drawn)
    assert metrics['AP'] == pytest.approx(whole['AP']) and len(notes) == 1
    assert metrics['b/coco/bbox_mAP'] == stock()['b/coco/bbox_mAP']
    rest.indices = [2, 3]  # nobody tests the last one
    few, notes, _ = _score(_config(dataset, evaluator), drawn)
    assert 0 < few['AP'] < metrics['AP'] and 'has 1 images that are not in the test set' in notes[0]


def test_images_that_only_the_evaluator_knows_count_as_missed(drawn):
    metrics, notes, stock = _score(_coco(drawn, indices=3), drawn)
    _same_as_coco(metrics, stock())
    assert 'has 2 images that are not in the test set' in notes[0]
