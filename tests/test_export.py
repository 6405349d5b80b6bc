"""Exported rules give in onnxruntime what the operator gives, also for the embedded detector."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config

from mmdet_softnms.export import (
    ExportError,
    openvino_arguments,
    post_process_to_onnx,
    rule_to_onnx,
    tensorflow_arguments,
)
from mmdet_softnms.post_process import post_process
from mmdet_softnms.rules import HardNMS, MmcvNMS, NoSuppression, SoftNMS, SupportedNMS, VotedNMS, describe
from tests.commands import run_tool

ROOT = Path(__file__).parents[1]
DEMO = ROOT / 'configs/demo/faster-rcnn_r18-w16_fpn_demo.py'
RULES = [
    SoftNMS('gaussian'),
    SoftNMS('gaussian', sigma=0.1, min_score=0.2),
    SoftNMS('linear'),
    SoftNMS('linear', iou_threshold=0.6, min_score=0.0, offset=1),
    HardNMS(0.5),
    HardNMS(0.0, offset=1),
    SoftNMS('linear', decay='strongest'),
    SoftNMS('gaussian', decay='strongest', min_score=0.0),
    VotedNMS(SoftNMS(class_agnostic=True)),
    VotedNMS(SoftNMS('linear', decay='strongest', offset=1), tolerance=0.1, first_only=True, class_agnostic=True),
]


def _session(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])


def _scene(num, num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num, 2, generator=generator) * 60
    sides = torch.rand(num, 2, generator=generator) * 40 + 5
    scores = torch.rand(num, generator=generator)
    return torch.cat([corners, corners + sides], 1), scores, torch.randint(num_classes, (num,), generator=generator)


@pytest.mark.parametrize('rule', RULES, ids=describe)
@pytest.mark.parametrize('opset', [17, 18, 21])
def test_a_rule_selects_the_same(rule, opset):
    for max_num in (-1, 0, 10):
        session = _session(rule_to_onnx(rule, max_num, opset=opset))
        for num in (0, 1, 2, 60):
            boxes, scores, labels = _scene(num, seed=num)
            found = session.run(None, dict(boxes=boxes.numpy(), scores=scores.numpy(), labels=labels.numpy()))
            keep, kept = rule(boxes, scores, labels, max_num)
            assert found[0].tolist() == keep.tolist()
            np.testing.assert_allclose(found[1], kept.numpy(), rtol=0, atol=1e-5)
            assert len(found) == 2 + isinstance(rule, VotedNMS)
            for voted in found[2:]:
                moved = rule.refine(boxes, scores, labels, keep, kept)
                np.testing.assert_allclose(voted, moved.numpy(), rtol=0, atol=1e-4)
                assert num < 60 or max_num == 0 or not torch.equal(moved, boxes[keep])


def test_ties_degenerate_boxes_and_duplicates():
    boxes = torch.tensor([[0, 0, 9, 9], [0, 0, 9, 9], [5, 5, 5, 5], [5, 5, 5, 5], [9, 9, 0, 0], [9, 9, 0, 0.0]])
    scores, labels = torch.tensor([0.5, 0.5, 0.5, 0.7, 0.5, 0.5]), torch.tensor([1, 1, 1, 1, 0, 0])
    for rule in RULES:
        found = _session(rule_to_onnx(rule)).run(
            None, dict(boxes=boxes.numpy(), scores=scores.numpy(), labels=labels.numpy())
        )
        keep, kept = rule(boxes, scores, labels, -1)
        assert found[0].tolist() == keep.tolist()
        np.testing.assert_allclose(found[1], kept.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize('class_agnostic', [False, True])
@pytest.mark.parametrize('num_rois', [None, 40])
@pytest.mark.parametrize('rule', [SoftNMS('gaussian'), VotedNMS()], ids=describe)
def test_post_processing_of_a_head(class_agnostic, num_rois, rule):
    num_classes = 5
    model = post_process_to_onnx(rule, num_classes, 0.05, 20, class_agnostic=class_agnostic, num_rois=num_rois)
    session = _session(model)
    generator = torch.Generator().manual_seed(0)
    for rois, temperature in ((40, 2.0), (40, 0.0), (0, 1.0), (7, 3.0)):
        if num_rois is not None and rois != num_rois:
            continue
        scores = (temperature * torch.randn(rois, num_classes + 1, generator=generator)).softmax(1)
        scores[rois // 2 :, -1] = 1.0  # nothing but background
        scores[rois // 2 :, :-1] = 0.0
        boxes = _scene(rois * (1 if class_agnostic else num_classes))[0]
        boxes = boxes.reshape(rois, 4 if class_agnostic else 4 * num_classes)
        dets, labels = session.run(None, dict(boxes=boxes.numpy(), scores=scores.numpy()))
        expected = post_process(boxes, scores, rule, 0.05, 20)
        num = len(expected.scores)
        assert len(dets) == len(labels) == (num if num_rois is None else 20)
        assert labels[:num].tolist() == expected.labels.tolist() and (labels[num:] == -1).all()
        np.testing.assert_allclose(dets[:num, :4], expected.bboxes.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(dets[:num, 4], expected.scores.numpy(), rtol=0, atol=1e-5)
        assert (dets[num:] == 0).all()


def test_fixed_shapes_are_fixed():
    model = post_process_to_onnx(SoftNMS('linear'), 5, 0.05, 20, num_rois=40)
    for value in (*model.graph.input, *model.graph.output):
        assert all(one.HasField('dim_value') for one in value.type.tensor_type.shape.dim)


@pytest.mark.parametrize('rule', [NoSuppression(), SupportedNMS(), MmcvNMS('soft_nms', iou_threshold=0.3)])
def test_what_cannot_be_expressed_is_refused(rule):
    with pytest.raises(ExportError, match='cannot be exported; use mmdet_softnms.SoftNMS'):
        rule_to_onnx(rule)
    with pytest.raises(ExportError):
        tensorflow_arguments(rule)


class _Shuffled(SoftNMS):
    def __call__(self, boxes, scores, labels, max_num):
        return super().__call__(boxes, scores.flip(0), labels, max_num)


class _Renamed(SoftNMS):
    """The same rule by another name."""


def test_a_subclass_with_its_own_call_is_not_exported_as_its_parent():
    with pytest.raises(ExportError, match='_Shuffled cannot be exported'):
        rule_to_onnx(_Shuffled())
    assert rule_to_onnx(_Renamed()).SerializeToString() == rule_to_onnx(SoftNMS()).SerializeToString()


def test_class_agnostic_rules_and_no_limit():
    rule = SoftNMS('linear', class_agnostic=True)
    boxes, scores, labels = _scene(60)
    found = _session(rule_to_onnx(rule)).run(
        None, dict(boxes=boxes.numpy(), scores=scores.numpy(), labels=labels.numpy())
    )
    assert found[0].tolist() == rule(boxes, scores, labels, -1)[0].tolist()
    assert found[0].tolist() != SoftNMS('linear')(boxes, scores, labels, -1)[0].tolist()
    with pytest.raises(ExportError, match='class_agnostic'):
        tensorflow_arguments(SoftNMS(class_agnostic=True))
    without = [post_process_to_onnx(SoftNMS(), 5, 0.05, limit).SerializeToString() for limit in (0, -1)]
    assert without[0] == without[1]


def test_bad_arguments():
    for opset in (11, 99):
        with pytest.raises(ExportError, match=f'opset must be 17 to .* got {opset}'):
            rule_to_onnx(SoftNMS(), opset=opset)
    for name, value in dict(num_classes=0, score_thr=float('nan'), max_per_img=-5, num_rois=0).items():
        with pytest.raises(ExportError, match=f'{name} must be .*got {value}'):
            post_process_to_onnx(SoftNMS(), **(dict(num_classes=5, score_thr=0.05, max_per_img=9) | {name: value}))
    with pytest.raises(ExportError, match='fixed shapes need a limit'):
        post_process_to_onnx(SoftNMS(), 5, 0.05, -1, num_rois=40)


def test_tensorflows_sigma_is_half_of_the_papers():
    gaussian = tensorflow_arguments(SoftNMS('gaussian', sigma=0.5, min_score=0.01))
    assert gaussian == dict(iou_threshold=1.0, score_threshold=0.01, soft_nms_sigma=0.25)
    assert tensorflow_arguments(HardNMS(0.4)) == dict(iou_threshold=0.4, score_threshold=0.0, soft_nms_sigma=0.0)
    assert openvino_arguments(SoftNMS('gaussian', sigma=0.3))['soft_nms_sigma'] == 0.15
    for rule in (SoftNMS('linear'), SoftNMS('gaussian', offset=1)):
        with pytest.raises(ExportError, match='TensorFlow'):
            tensorflow_arguments(rule)
        with pytest.raises(ExportError, match='OpenVINO'):
            openvino_arguments(rule)


def _export(*arguments):
    return run_tool('export_onnx.py', *arguments, cwd=ROOT)


def test_the_embedded_detector_end_to_end(tmp_path):
    """The tool's file, fed with what the live network gives to its head, gives the live detections."""
    config = DEMO.with_name('faster-rcnn_r18-w16_fpn_soft-nms-gaussian_demo.py')
    done = _export(config, tmp_path / 'demo.onnx')
    assert done.returncode == 0, done.stderr
    assert 'the same 100 detections, largest difference' in done.stdout
    session = onnxruntime.InferenceSession(tmp_path / 'demo.onnx', providers=['CPUExecutionProvider'])
    model = init_detector(Config.fromfile(config), str(DEMO.with_suffix('.pth')), device='cpu')
    raw = []
    original = model.roi_head.bbox_head.predict_by_feat

    def listen(*arguments, **options):
        results = original(*arguments, **options)
        raw.extend(results)
        return results

    model.roi_head.bbox_head.predict_by_feat = listen
    random = np.random.default_rng(0)
    number = 0
    for _ in range(3):
        image = random.integers(0, 255, (160, 192, 3), dtype=np.uint8)
        image[40:100, 30:90] = (30, 60, 200)
        live = inference_detector(model, image).pred_instances
        dets, labels = session.run(None, dict(boxes=raw[-1].bboxes.numpy(), scores=raw[-1].scores.numpy()))
        assert labels.tolist() == live.labels.tolist()
        np.testing.assert_allclose(dets[:, :4], live.bboxes.numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(dets[:, 4], live.scores.numpy(), rtol=0, atol=1e-5)
        number += len(labels)
    assert number > 30


def test_stock_rules_are_exported_with_a_note(tmp_path):
    done = _export(DEMO, tmp_path / 'stock.onnx', '--num-rois', 50)
    assert done.returncode == 0, done.stderr
    assert "note: mmdet's nms keeps classes apart by shifting coordinates" in done.stdout


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('missing.py', 'out.onnx'), 'config missing.py does not exist'),
        (('mmdet::detr/detr_r50_8xb2-150e_coco.py', 'out.onnx'), 'no post-processing that can be exported'),
        ((DEMO, 'out.onnx', '--opset', 99), 'opset must be 17 to'),
        ((DEMO, 'out.onnx', '--num-rois', 0), '--num-rois: must be at least 1'),
        (
            (DEMO, 'out.onnx', '--cfg-options', 'model.test_cfg.rcnn.nms.class_agnostic=True'),
            "has {'class_agnostic': True}, which the exported graph cannot express",
        ),
        (
            (DEMO, 'out.onnx', '--cfg-options', 'model.test_cfg.rcnn.nms.type=mmdet_softnms.Missing'),
            'no post-processing that can be exported',
        ),
        ((DEMO, f'{__file__}/out.onnx'), 'test_export.py'),  # a folder that is a file
    ],
    ids=['config', 'no suppression', 'opset', 'rois', 'argument', 'rule', 'place'],
)
def test_bad_input_is_one_clear_line(tmp_path, arguments, words):
    done = _export(*(tmp_path / one if one == 'out.onnx' else one for one in arguments))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith('error: ') and words in done.stderr
    assert 'Traceback' not in done.stderr and not (tmp_path / 'out.onnx').exists()
