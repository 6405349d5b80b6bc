"""The plugin in every way mmdet is used: init_detector, DetInferencer, test and train scripts, real images."""

import pickle
import subprocess
import sys

import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config

from mmdet_softnms import soft_nms
from mmdet_softnms.reevaluation.candidates.forward import collect
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import detections
from mmdet_softnms.rules import HardNMS, MmcvNMS
from tests.commands import TOOLS, run_tool
from tests.tiny import plugged
from tests.tiny_dataset import CLASSES, make_project

GAUSSIAN = dict(type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=1e-3)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp('integration'))
    plugged(Config.fromfile(project.coco_config), 'SoftNMSRoIHead', GAUSSIAN).dump(project.root / 'soft.py')
    return project


def test_the_registry_is_found_without_custom_imports(project):
    """A fresh process that never imports the plugin: mmengine finds it by the scope in the config."""
    code = (
        'import sys; from mmdet.apis import init_detector;'
        'model = init_detector(sys.argv[1], sys.argv[2], device="cpu");'
        'print(type(model.roi_head).__module__, type(model.roi_head._rule).__name__)'
    )
    command = [sys.executable, '-c', code, str(project.root / 'soft.py'), str(project.checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TOOLS.parent)
    assert 'mmdet_softnms.models.roi_heads SoftNMS' in done.stdout, done.stderr


def test_init_detector_and_det_inferencer_agree(project):
    image = str(project.root / 'VOC2007/JPEGImages/000001.jpg')
    model = init_detector(str(project.root / 'soft.py'), str(project.checkpoint), device='cpu')
    model.dataset_meta = dict(classes=CLASSES)
    stock = init_detector(str(project.coco_config), str(project.checkpoint), device='cpu')
    found = inference_detector(model, image).pred_instances
    assert len(found) > 5 and not torch.equal(found.scores, inference_detector(stock, image).pred_instances.scores)

    inferencer = DetInferencer(str(project.root / 'soft.py'), str(project.checkpoint), device='cpu')
    inferencer.show_progress = False
    (result,) = inferencer(image, no_save_vis=True)['predictions']
    torch.testing.assert_close(torch.tensor(result['scores']), found.scores)
    torch.testing.assert_close(torch.tensor(result['bboxes']), found.bboxes)


def test_cfg_options_reach_the_rule(project, tmp_path):
    results = {}
    for sigma in (0.5, 0.1):
        out = tmp_path / f'{sigma}.pkl'
        option = f'model.test_cfg.rcnn.nms.sigma={sigma}'
        arguments = [project.root / 'soft.py', project.checkpoint, '--out', out, '--work-dir', tmp_path]
        done = run_tool('test.py', *arguments, '--cfg-options', option, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        results[sigma] = torch.cat([one['pred_instances']['scores'] for one in pickle.loads(out.read_bytes())])
    assert results[0.1].sum() < results[0.5].sum()  # a smaller sigma decays more


def test_a_training_run_validates_with_the_rule_and_resumes(project, tmp_path):
    config, work_dir = project.root / 'soft.py', tmp_path / 'run'
    done = run_tool('train.py', config, '--work-dir', work_dir, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'coco/bbox_mAP' in done.stdout + done.stderr
    (dumped,) = work_dir.glob('*/vis_data/config.py')
    assert Config.fromfile(dumped).model.test_cfg.rcnn.nms == GAUSSIAN
    # The checkpoint holds HistoryBuffers; mmengine 0.10.7 alone would refuse it, the maintained fork unpickle it.
    arguments = [config, '--work-dir', work_dir, '--resume', '--cfg-options', 'train_cfg.max_epochs=2']
    done = run_tool('train.py', *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (work_dir / 'epoch_2.pth').is_file()
    assert 'resumed epoch: 1' in done.stdout + done.stderr


def test_scripts_of_mmdet_keep_their_flags():
    done = run_tool('test.py', '--help', cwd=TOOLS)
    for flag in ('--work-dir', '--out', '--show-dir', '--wait-time', '--cfg-options', '--launcher', '--tta'):
        assert flag in done.stdout
    done = run_tool('train.py', '--help', cwd=TOOLS)
    for flag in ('--work-dir', '--amp', '--auto-scale-lr', '--resume', '--cfg-options', '--launcher'):
        assert flag in done.stdout


@pytest.fixture(scope='module')
def real_store(shared, tmp_path_factory):
    """Candidates of the trained VOC detector on 30 real images."""
    cfg = Config.fromfile(shared / 'checkpoints/faster-rcnn_mobilenetv2_fpn_voc.py')
    cfg.test_dataloader.dataset.data_root = f'{shared}/data/VOCdevkit/'
    cfg.test_dataloader.dataset.indices = 30
    checkpoint = shared / 'checkpoints/faster-rcnn_mobilenetv2_fpn_voc.pth'
    return collect(cfg, checkpoint, 1e-3, tmp_path_factory.mktemp('real')).store


@pytest.fixture(scope='module')
def real_candidates(real_store):
    return real_store.load()


def test_real_candidates_take_less_than_22_bytes_each(real_store, real_candidates):
    """All 500 images of the VOC hold-out take 16.4 (README)."""
    assert real_candidates.num_candidates > 20_000
    assert 10 < real_store.num_bytes / real_candidates.num_candidates < 22


def test_hard_nms_is_mmdets_on_real_images(real_candidates):
    """Same boxes and labels in the top 100, scores to 1e-6; what differs further down is explained."""
    ours = detections(real_candidates, Setting(HardNMS(0.5), 1e-3, 100))
    theirs = detections(real_candidates, Setting(MmcvNMS('nms', iou_threshold=0.5), 1e-3, 100))
    assert sum(len(one) for one in ours) > 1000
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.bboxes, other.bboxes, rtol=0, atol=0)
        torch.testing.assert_close(one.labels, other.labels)
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-6)


def test_differences_to_mmcv_further_down_come_from_its_class_offset(real_candidates):
    """Without a limit: where mmcv's result is not ours, it is ours on the boxes as mmcv shifts them."""
    different = 0
    for image in real_candidates:
        boxes, scores, labels = (image.candidates[key] for key in ('bboxes', 'scores', 'labels'))
        ours, _ = HardNMS(0.5)(boxes, scores, labels, -1)
        theirs, _ = MmcvNMS('nms', iou_threshold=0.5)(boxes, scores, labels, -1)
        # mmcv.ops.batched_nms: boxes + label * (max coordinate + 1), in float32, all classes in one.
        shifted = boxes + (labels.to(boxes) * (boxes.max() + 1))[:, None]
        explained, _ = soft_nms(shifted, scores, method='hard', iou_threshold=0.5, min_score=0.0)
        different += not torch.equal(ours, theirs)
        # Equal scores may come in another order in mmcv's unstable sort, so the sets are compared.
        assert set(explained.tolist()) == set(theirs.tolist())
    print(f'{different} of {len(real_candidates)} images differ from mmcv below the top 100')
