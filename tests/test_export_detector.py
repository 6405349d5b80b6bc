"""Whole detectors as ONNX: the embedded ones from image to detections, onnxruntime beside a live run."""

import json
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.structures import DetDataSample
from mmengine.config import Config

from mmdet_softnms.cli.export import main
from mmdet_softnms.export import ExportError
from mmdet_softnms.export_detector import raw_detector
from tests.tiny_dense import build, with_head, zoo_config

ROOT = Path(__file__).resolve().parents[1]
IMAGES = sorted((ROOT / 'data/demo/VOC2007/JPEGImages').glob('0012*.jpg'))[1:21]  # of the crowded split, 192 x 192 px


SOFT_ATSS = """
model = dict(
    bbox_head=dict(type='mmdet_softnms.SoftNMSDenseHead', head='ATSSHead'),
    test_cfg=dict(nms=dict(_delete_=True, type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=0.01)))
"""


@pytest.mark.parametrize(
    'name', ['faster-rcnn_r18-w16_fpn_soft-nms-gaussian_demo', 'rfcn_r18-w16_demo', 'atss_r18-w16_fpn_demo']
)
def test_from_image_to_detections(name, tmp_path, capsys):
    config, checkpoint = ROOT / f'configs/demo/{name}.py', ROOT / f'configs/demo/{name}.pth'
    if 'faster' in name:
        checkpoint = ROOT / 'configs/demo/faster-rcnn_r18-w16_fpn_demo.pth'
    if 'atss' in name:
        (tmp_path / 'soft.py').write_text(f'_base_ = {str(config)!r}\n{SOFT_ATSS}')
        config = tmp_path / 'soft.py'
    out = tmp_path / 'detector.onnx'
    main([str(config), str(out), '--checkpoint', str(checkpoint), '--size', '192x192'])
    assert 'the whole detector for images of 192 x 192 pixels' in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    model = init_detector(Config.fromfile(config), str(checkpoint), device='cpu')
    assert len(IMAGES) == 20
    total = other = 0
    for path in IMAGES:
        image = cv2.imread(str(path)).transpose(2, 0, 1)[None].astype(np.float32)
        dets, labels = (torch.from_numpy(each) for each in session.run(None, {'image': image}))
        live = inference_detector(model, str(path)).pred_instances
        near = (dets[None, :, :4] - live.bboxes[:, None]).abs().amax(-1) < 1e-3
        near &= (dets[None, :, 4] - live.scores[:, None]).abs() < 1e-5
        near &= labels[None] == live.labels[:, None]
        total, other = total + len(live), other + int((~near.any(1)).sum()) + int((~near.any(0)).sum())
    # R-FCN rounds the corners of proposals: the last bit decides where one lies on a half pixel.
    assert total > 150 and other <= (total // 20 if 'rfcn' in name else 0), f'{other} of {total} differ'
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described['classes'])[:2] == ['person', 'car']
    assert json.loads(described['rule'])['type'] == ('HardNMS' if 'rfcn' in name else 'SoftNMS')
    test_cfg = model.cfg.model.test_cfg
    assert float(described['score_thr']) == test_cfg.get('rcnn', test_cfg).score_thr
    assert described['max_per_img'] == '100' and described['mmdet_softnms']


def test_what_cannot_be_exported_is_named():
    cfg = Config.fromfile(ROOT / 'configs/demo/deformable-rfcn_r50-w8_demo.py')
    model = init_detector(cfg, None, device='cpu')
    with pytest.raises(ExportError, match="pooling 'deformable' cannot be exported; caffe and torchvision can"):
        raw_detector(model, (192, 192))
    model.roi_head.bbox_head.pooling, model.rpn_head.whole_cells = 'caffe', True
    with pytest.raises(ExportError, match='whole cells cannot be exported; with model.rpn_head.whole_cells=False'):
        raw_detector(model, (192, 192))
    model.rpn_head.whole_cells, model.coordinates = False, 'caffe'
    with pytest.raises(ExportError, match="coordinates='caffe' cannot be exported.*with model.coordinates='mmdet'"):
        raw_detector(model, (192, 192))


def test_the_traced_part_gives_the_raw_results_of_a_live_run():
    """Before any ONNX: padding to the divisor, channel order and proposals are the detector's own."""
    cfg = Config.fromfile(ROOT / 'configs/demo/faster-rcnn_r18-w16_fpn_demo.py')
    model = init_detector(cfg, str(ROOT / 'configs/demo/faster-rcnn_r18-w16_fpn_demo.pth'), device='cpu')
    image = torch.from_numpy(cv2.imread(str(IMAGES[0]))[:170, :180].copy()).permute(2, 0, 1)  # not a multiple of 32
    with torch.no_grad():
        boxes, scores = raw_detector(model, (170, 180))(image[None].float())
        meta = dict(img_shape=(170, 180), scale_factor=(1.0, 1.0), batch_input_shape=(192, 192), ori_shape=(170, 180))
        data = model.data_preprocessor({'inputs': [image], 'data_samples': [DetDataSample(metainfo=meta)]})
        features = model.extract_feat(data['inputs'])
        proposals = model.rpn_head.predict(features, data['data_samples'], rescale=False)
        raw = model.roi_head.predict_bbox(
            features, [data['data_samples'][0].metainfo], proposals, rcnn_test_cfg=None, rescale=False
        )[0]
    found = len(raw.bboxes)
    torch.testing.assert_close(boxes[:found], raw.bboxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(scores[:found], raw.scores, rtol=0, atol=1e-5)
    assert not scores[found:].any()  # places without a proposal


@pytest.mark.parametrize(
    ('head', 'nms_pre', 'score_thr'),
    [('ATSSHead', 50, 0.4), ('FCOSHead', 50, 0.4), ('RetinaHead', 50, 0.4), ('RTMDetSepBNHead', 300, 0.5)],
)
def test_the_traced_part_gives_the_candidates_of_a_dense_head(head, nms_pre, score_thr):
    thresholds = dict(nms_pre=nms_pre, score_thr=score_thr, max_per_img=-1, min_bbox_size=3)
    model = build(with_head(zoo_config(head), dict(type='mmdet_softnms.NoSuppression'), **thresholds))
    model.data_preprocessor.pad_size_divisor = 32
    image = torch.from_numpy(cv2.imread(str(IMAGES[0]))[:170, :180].copy()).permute(2, 0, 1)  # not a multiple of 32
    meta = dict(img_id=0, img_shape=(170, 180), scale_factor=(1.0, 1.0), ori_shape=(170, 180))
    with torch.no_grad():
        boxes, scores = raw_detector(model, (170, 180))(image[None].float())
        data = dict(inputs=[image], data_samples=[DetDataSample(metainfo=meta)])
        live = model.test_step(data)[0].pred_instances
    score, label = scores.max(1)
    there = score > 0
    assert not scores[:, -1].any() and 20 < len(live) == int(there.sum()) < len(boxes)
    best, order = live.scores.sort(descending=True)
    found, ours = score[there].sort(descending=True)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)
    near = (boxes[there][ours][None] - live.bboxes[order][:, None]).abs().amax(-1) < 1e-3
    near &= label[there][ours][None] == live.labels[order][:, None]
    assert near.any(0).all() and near.any(1).all()


def test_heads_that_end_in_their_own_way_are_named():
    model = build(zoo_config('YOLOXHead'))
    with pytest.raises(ExportError, match='YOLOXHead has its own predict_by_feat, and a whole one-stage detector is'):
        raw_detector(model, (192, 192))
    model = build(zoo_config('ATSSHead'))
    model.bbox_head.test_cfg.nms_pre = -1
    with pytest.raises(ExportError, match='nms_pre of at least 1'):
        raw_detector(model, (192, 192))


def test_size_and_checkpoint_belong_together(tmp_path, capsys):
    for arguments in (['--size', '192x192'], ['--checkpoint', 'x.pth'], ['--size', '192', '--checkpoint', 'x.pth']):
        with pytest.raises(SystemExit):
            main(['config.py', str(tmp_path / 'out.onnx'), *arguments])
        error = capsys.readouterr().err
        assert 'is not HEIGHTxWIDTH' in error or 'belong together' in error


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path):
    config = ROOT / 'configs/demo/rfcn_r18-w16_demo.py'
    with pytest.raises(SystemExit, match='^error: checkpoint .*gone.pth'):
        main([str(config), str(tmp_path / 'out.onnx'), '--checkpoint', str(tmp_path / 'gone.pth'), '--size', '192x192'])
