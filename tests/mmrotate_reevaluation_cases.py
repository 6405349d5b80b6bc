"""Re-evaluation of mmrotate's detectors beside live runs: narrow zoo configs, random weights, drawn images."""

import copy
import dataclasses
import json
import pickle
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests import mmrotate_for_tests

if WHY_NOT := mmrotate_for_tests.find():
    pytest.skip(WHY_NOT, allow_module_level=True)

from mmengine.config import Config
from mmengine.runner import Runner
from mmrotate.datasets import DOTADataset
from mmrotate.evaluation import RotatedCocoMetric
from mmrotate.evaluation.functional import mean_ap
from mmrotate.structures.bbox import rbox2qbox

from mmdet_softnms.cli.reevaluate import main
from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.candidates.plug import plug
from mmdet_softnms.reevaluation.candidates.store import CandidateStore
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.reevaluation.request import Request
from mmdet_softnms.reevaluation.result import Reevaluation
from mmdet_softnms.reevaluation.run import reevaluate
from mmdet_softnms.reevaluation.scoring.evaluators import data_samples
from mmdet_softnms.reevaluation.scoring.metrics import Evaluator, read_ground_truth
from mmdet_softnms.reevaluation.scoring.settings import paste_block, sweep_settings
from mmdet_softnms.reevaluation.scoring.sweep import detections
from tests.mmrotate_cases import build, small_config

SIZES = [(128, 160), (150, 110), (128, 128), (160, 120)]  # height, width in pixels
CLASSES = DOTADataset.METAINFO['classes']
#: A RoI head, and a dense head whose scores have a factor.
BOTH = pytest.mark.parametrize('project', ['Faster R-CNN', 'FCOS'], indirect=True)
THRESHOLDS = dict(score_thr=0.02, max_per_img=40)


class Project(NamedTuple):
    """A detector with its test set, what its own NMS detects by image id, and its re-evaluation."""

    root: Path
    cfg: Config
    checkpoint: Path
    stock: dict[str, Any]
    result: Reevaluation


@pytest.fixture(scope='module')
def project(request, tmp_path_factory) -> Project:
    """Objects are near the detector's own detections, so that its AP is neither 0 nor 1; some are ignored."""
    root = tmp_path_factory.mktemp('rotated')
    cfg = small_config(request.param)
    loader = cfg.test_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    loader.dataset.update(data_root=f'{root}/', ann_file='annfiles/', data_prefix=dict(img_path='images/'), diff_thr=1)
    next(one for one in loader.dataset.pipeline if one.type == 'mmdet.Resize').scale = (256, 256)
    for folder in ('images', 'annfiles'):
        (root / folder).mkdir()
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        blocks = random.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        picture = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(root / f'images/P{number:04d}.png'), picture)
        (root / f'annfiles/P{number:04d}.txt').write_text('')
    torch.save({'meta': {}, 'state_dict': build(cfg).state_dict()}, root / 'tiny.pth')
    stock = live(cfg, root / 'tiny.pth', root / 'stock', evaluated=False)[0]
    for img_id, found in stock.items():
        lines = []
        for number, row in enumerate(random.permutation(min(len(found['scores']), 30))[:8]):  # of the best ones
            box = found['bboxes'][row] + torch.tensor(random.normal(0, [2, 2, 2, 2, 0.1])).float()
            corners = ' '.join(f'{value:.1f}' for value in rbox2qbox(box[None])[0].tolist())
            lines.append(f'{corners} {CLASSES[int(found["labels"][row])]} {2 * (number == 7)}\n')
        (root / f'annfiles/{img_id}.txt').write_text(''.join(lines))
    result = reevaluate(Request(cfg, root / 'tiny.pth', work_dir=root / 'work', **THRESHOLDS))
    return Project(root, cfg, root / 'tiny.pth', stock, result)


def live(
    cfg: Config, checkpoint: Path, folder: Path, block: str = '', *, evaluated: bool = True
) -> tuple[dict[str, Any], dict[str, float]]:
    """Detections by image id, and the evaluators' numbers, of mmengine's test loop; ``block``: lines of a config."""
    cfg = copy.deepcopy(cfg)
    if block:
        lines: dict[str, Any] = {}
        exec(block, lines)
        cfg.merge_from_dict(dict(model=lines['model']))
    cfg.load_from, cfg.work_dir, cfg.log_level = str(checkpoint), str(folder), 'ERROR'
    cfg.visualizer = dict(type='mmengine.Visualizer', name=str(folder))
    dump = dict(type='mmdet.DumpDetResults', out_file_path=str(folder / 'out.pkl'))
    cfg.test_evaluator = [*([cfg.test_evaluator] if evaluated else []), dump]
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:  # four processes that import torch anew, for each number
        patch.setattr(mean_ap, 'get_context', lambda method: SimpleNamespace(Pool=ThreadPool))
        numbers = Runner.from_cfg(cfg).test()
    found = pickle.loads((folder / 'out.pkl').read_bytes())
    return {one['img_id']: one['pred_instances'] for one in found}, numbers


@BOTH
def test_detections_and_numbers_are_those_of_the_live_run(project):
    candidates, rows = project.result.session.candidates, project.result.rows
    assert [row.setting.is_baseline for row in rows] == [True, False, False, False]
    gaussian = rows[2]
    found, numbers = live(
        project.cfg, project.checkpoint, project.root / 'live', paste_block(gaussian.setting, project.cfg)
    )
    for img_id, ours in zip(candidates.img_ids, detections(candidates, gaussian.setting), strict=True):
        assert ours.bboxes.shape[1] == 5 and len(ours) > 20
        for key in ('bboxes', 'scores', 'labels'):
            assert torch.equal(ours[key], found[img_id][key]), key
    for name in ('dota/mAP', 'dota/AP50'):
        assert gaussian.metrics[name] == numbers[name]
    assert 0 < numbers['dota/mAP'] < 1
    # The config's own row is what mmrotate itself gives.
    for img_id, ours in zip(candidates.img_ids, detections(candidates, rows[-1].setting), strict=True):
        theirs = project.stock[img_id]
        order, other = ours.scores.argsort(stable=True), theirs['scores'].argsort(stable=True)
        assert torch.equal(ours.scores[order], theirs['scores'][other]) and len(ours) > 20


@BOTH
def test_ap_is_that_of_mmrotates_coco_metric(project):
    """Of the objects that are not difficult: that metric drops the others, here they are COCO's crowds.

    On a DOTADataset the metric itself ends in a TypeError: faster-coco-eval takes no strings as ids.
    """
    session, row = project.result.session, project.result.rows[1]
    easy = [one for one in session.truth.coco['annotations'] if not one['iscrowd']]
    assert 0 < len(easy) < len(session.truth.coco['annotations'])
    evaluator = Evaluator(dataclasses.replace(session.truth, coco=session.truth.coco | dict(annotations=easy)))
    found = detections(session.candidates, row.setting)
    metrics = evaluator(found).metrics
    infos = [build_test_set(project.cfg).get_data_info(number) for number in range(len(SIZES))]
    samples = data_samples(
        [dict(info, img_id=number) for number, info in enumerate(infos)], session.candidates.shapes, 5
    )
    for sample, each in zip(samples, found, strict=True):
        sample['pred_instances'] = dict(each.items())
    metric = RotatedCocoMetric(metric='bbox')
    metric.dataset_meta = dict(classes=CLASSES)
    metric.process({}, samples)
    numbers = metric.evaluate(len(samples))
    for ours, theirs in dict(AP='mAP', AP50='mAP_50', AP75='mAP_75', APs='mAP_s').items():
        assert metrics[ours] == pytest.approx(numbers[f'r_coco/bbox_{theirs}'], abs=5.01e-4), ours
    assert 0 < metrics['AP'] < metrics['AP50'] < 1


@BOTH
def test_the_store_has_columns_of_its_own(project):
    store = CandidateStore.open(Path(project.result.store))
    box = ['cx', 'cy', 'w', 'h', 'angle']
    more = ['class_score'] if 'FCOS' in project.cfg.model.type else []
    names = pq.read_schema(store.path_of(0)).names
    assert names == ['img_id', 'height', 'width', *box, 'score', 'label', *more]
    assert 'mmrotate' in store.fingerprint['code'] and 'mmrotate' in store.fingerprint['versions']
    assert not store.fingerprint['unknown'] and store.load().bboxes.shape[1] == 5


@pytest.mark.parametrize('project', ['Faster R-CNN'], indirect=True)
def test_a_choice_and_a_report_from_the_command_line(project, capsys):
    project.cfg.dump(project.root / 'config.py')
    arguments = [project.root / 'config.py', project.checkpoint, '--work-dir', project.root / 'work', '--select']
    arguments += ['--folds', 2, '--tune-on', 'folds', '--score-thr', THRESHOLDS['score_thr'], '--max-per-img', 40]
    main(
        [
            str(one)
            for one in [*arguments, '--sweep', 'RotatedSoftNMS.sigma=0.3,0.5', 'RotatedSoftNMS.iou_threshold=0.3']
        ]
    )
    printed = capsys.readouterr().out
    content = json.loads((project.root / 'work/reevaluation.json').read_text())
    assert content['forward_images'] == 0 and 'hard NMS at IoU 0.1' in printed and 'dota/mAP' in printed
    assert [row['params'].get('method') for row in content['rows']] == ['hard', 'linear', 'gaussian', 'gaussian', None]
    for difference, row in zip(content['selection']['settings'], content['rows'], strict=True):
        assert abs(difference['value'] - row['metrics']['AP']) < 1e-9  # the bootstrap's matching is the evaluator's
    assert content['errors']['baseline']['AP50'] == pytest.approx(content['rows'][0]['metrics']['AP50'])
    assert ' transform="rotate(' in (project.root / 'work/report.html').read_text()


@pytest.mark.parametrize('project', ['Faster R-CNN'], indirect=True)
def test_what_rotated_boxes_cannot_have_is_refused_in_one_sentence(project, monkeypatch):
    cfg = project.cfg
    for sweep, words in (
        ('SoftNMS.sigma=0.5', "SoftNMS takes axis-aligned .* write type='mmdet_softnms.RotatedSoftNMS'"),
        ('VotedNMS.tolerance=0.05', 'VotedNMS takes axis-aligned'),
    ):
        with pytest.raises(ReevaluationError, match=words):
            sweep_settings([sweep], cfg, 1e-3, 100, 1e-3)
    with pytest.raises(ReevaluationError, match='several views .* of axis-aligned boxes only'):
        Request(cfg, project.checkpoint, scales=('128x160',))
    dataset = build_test_set(cfg)
    for box, words in (([0, 0, 9, 9], 'annotated with 4 values'), ([], 'no annotated object')):
        info = dict(img_id=0, instances=[dict(bbox=box, bbox_label=0)])
        monkeypatch.setattr(dataset, 'get_data_info', lambda number, info=info: info)
        with pytest.raises(ReevaluationError, match=words):
            read_ground_truth(cfg, dataset)


def test_detectors_that_refine_and_boxes_of_eight_values():
    with pytest.raises(ReevaluationError, match=r'a detector that refines \(bbox_head_refine\) cannot be re-evaluated'):
        plug(small_config('S2A-Net'), 0.05)
    cfg = copy.deepcopy(small_config('Faster R-CNN'))
    cfg.model.roi_head.bbox_head.predict_box_type = 'qbox'
    with pytest.raises(ReevaluationError, match='predicts boxes of 8 values'):
        plug(cfg, 0.05)
