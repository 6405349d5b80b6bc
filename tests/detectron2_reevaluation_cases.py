"""Re-evaluation of Detectron2's models by way of mmdet's ``Detectron2Wrapper``: small models with drawn weights."""

import copy
import json

import pytest
import torch

from tests import detectron2_for_tests

if WHY_NOT := detectron2_for_tests.find():
    pytest.skip(WHY_NOT, allow_module_level=True)

from detectron2.config import get_cfg
from detectron2.model_zoo import get_config
from detectron2.utils.registry import locate
from mmdet.models import Detectron2Wrapper
from mmdet.models.detectors import d2_wrapper
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

import mmdet_softnms.detectron2
from mmdet_softnms.checkpoint import check_weights
from mmdet_softnms.cli.export import main as export
from mmdet_softnms.cli.reevaluate import main
from mmdet_softnms.detectron2 import add_soft_nms_config, build_rule, rule_of
from mmdet_softnms.files import CheckpointError, ReevaluationError
from mmdet_softnms.models.detectron2_wrapper import SoftNMSDetectron2Wrapper, lines_to_paste
from mmdet_softnms.post_process import suppress
from mmdet_softnms.reevaluation.candidates.fingerprint import build_model, differences, fingerprint
from mmdet_softnms.reevaluation.candidates.forward import collect
from mmdet_softnms.reevaluation.candidates.plug import DETECTRON2, family_of, has_mask_head, most_candidates, plug
from mmdet_softnms.reevaluation.candidates.store import CandidateStore
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.reevaluation.scoring.settings import Setting, own_setting
from mmdet_softnms.rules import HardNMS, MmcvNMS, SoftNMS, VotedNMS, describe
from tests.detectron2_cases import spread_out
from tests.tiny_dataset import CLASSES, make_project

SMALL = dict(
    weights='detectron2://ImageNetPretrained/MSRA/R-50.pkl',
    resnets=dict(stem_out_channels=8, res2_out_channels=16, width_per_group=8),
    fpn=dict(out_channels=16),
    rpn=dict(pre_nms_topk_test=1000, post_nms_topk_test=60),
    roi_heads=dict(num_classes=len(CLASSES), nms_thresh_test=0.4),
    retinanet=dict(num_classes=len(CLASSES), nms_thresh_test=0.4, topk_candidates_test=80, num_convs=1),
    roi_box_head=dict(num_fc=1, fc_dim=16),
    roi_mask_head=dict(num_conv=1, conv_dim=8),
)
ZOO = {
    'mask': 'COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml',
    'cascade': 'Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml',
    'C4': 'COCO-Detection/faster_rcnn_R_50_C4_1x.yaml',
    'retinanet': 'COCO-Detection/retinanet_R_50_FPN_1x.yaml',
}


def detector_of(kind):
    """A zoo config as mmdet's configs write it: the entries that differ from Detectron2's defaults, made small."""
    stock, zoo = get_cfg(), get_config(ZOO[kind])

    def changed(node, default):
        pairs = ((key.lower(), value, default[key]) for key, value in node.items())
        return {
            key: changed(v, d) if isinstance(v, dict) else v for key, v, d in pairs if isinstance(v, dict) or v != d
        }

    def merged(some, others):
        both = {key: merged(some[key], others[key]) for key in some.keys() & others if isinstance(others[key], dict)}
        return some | others | both

    return merged(changed(zoo.MODEL, stock.MODEL), SMALL)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp('detectron2'))


def made(project, kind, folder):
    """Config and checkpoint of a detector with drawn weights; with what older files of Detectron2 held, too."""
    cfg = Config.fromfile(project.coco_config)
    cfg.model = dict(type='Detectron2Wrapper', detector=detector_of(kind))
    torch.manual_seed(0)
    model = SoftNMSDetectron2Wrapper(cfg.model.detector).eval()
    with torch.no_grad():
        image = torch.rand(3, 144, 192) * 255
        spread_out(model.d2_model, [dict(image=image, height=144, width=192)], bbox_pred=2)
    generator = 'anchor_generator' if kind == 'retinanet' else 'proposal_generator.anchor_generator'
    old = {'d2_model.pixel_mean': torch.zeros(3, 1, 1), f'd2_model.{generator}.cell_anchors.0': torch.zeros(3, 4)}
    torch.save({'state_dict': model.state_dict() | old}, folder / 'model.pth')
    return cfg, folder / 'model.pth'


def stock_wrapper(model):
    """mmdet's own, as the first of its process: it keeps the keys of each detector for the next one (ours does not)."""
    d2_wrapper._to_cfgnode_list.__defaults__[0].clear()
    model = copy.deepcopy(model)
    model.detector.device = 'cpu'  # Detectron2's default is a GPU
    return MODELS.build(model)


@torch.no_grad()
def detections(model, checkpoint, dataset):
    model.load_state_dict(torch.load(checkpoint)['state_dict'], strict=False)
    return [model.eval().test_step(pseudo_collate([dataset[number]]))[0].pred_instances for number in range(2)]


def compare(stored, live, setting):
    for candidates, expected in zip(stored, live, strict=True):
        found = suppress(candidates, setting.rule, setting.score_thr, setting.max_per_img)
        assert len(found.scores) == len(expected) > 5
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=5e-6)  # boxes of 2 px
        torch.testing.assert_close(found.bboxes, expected.bboxes, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize('kind', ['mask', 'cascade', 'C4'])
def test_detections_are_those_of_a_live_model(project, kind, tmp_path):
    cfg, checkpoint = made(project, kind, tmp_path)
    dataset = build_test_set(cfg)
    model = build_model(plug(cfg, 1e-3))
    check_weights(model, checkpoint, ignore=DETECTRON2.not_needed(model))
    assert DETECTRON2.num_classes(model) == len(CLASSES)
    assert has_mask_head(cfg) == (kind in ('mask', 'cascade'))
    assert most_candidates(cfg) is None
    candidates = detections(model, checkpoint, dataset)
    assert min(map(len, candidates)) > 50

    own = own_setting(cfg)
    assert (describe(own.rule), own.score_thr, own.max_per_img) == ('HardNMS iou_threshold=0.4', 0.05, 100)
    compare(candidates, detections(stock_wrapper(cfg.model), checkpoint, dataset), own)

    keys = cfg.model.detector.roi_heads
    keys.update(soft_nms_enabled=True, soft_nms_method='linear', nms_thresh_test=0.3, score_thresh_test=0.01)
    own = own_setting(cfg)
    assert describe(own.rule) == 'SoftNMS linear iou_threshold=0.3 min_score=0.001' and own.score_thr == 0.01
    live = detections(SoftNMSDetectron2Wrapper(cfg.model.detector), checkpoint, dataset)
    compare(candidates, live, own)

    voted = dict(type='mmdet_softnms.VotedNMS', rule=dict(type='mmdet_softnms.SoftNMS', sigma=0.4))
    cfg.model = dict(cfg.model, type='mmdet_softnms.SoftNMSDetectron2Wrapper', rule=voted, max_per_img=7)
    own = own_setting(cfg)
    assert describe(own.rule) == describe(VotedNMS(SoftNMS(sigma=0.4))) and own.max_per_img == 7
    compare(candidates, detections(MODELS.build(cfg.model), checkpoint, dataset), own)


def test_the_command_chooses_and_stores(project, tmp_path, monkeypatch, capsys):
    cfg, checkpoint = made(project, 'mask', tmp_path)
    cfg.model.detector.roi_heads.name = 'SoftNMSROIHeads'
    # Objects near detections, so that there is something to choose by.
    truth = json.loads((project.root / 'coco.json').read_text())
    dataset = build_test_set(cfg)
    collected = collect(cfg, checkpoint, 1e-3, tmp_path / 'work/candidates', dataset=dataset)
    truth['annotations'] = []
    for image in collected.store.load():
        best = suppress(image.candidates, HardNMS(0.3), 0.05, 9)
        for (x1, y1, x2, y2), label in zip(best.bboxes[::3].round().tolist(), best.labels[::3].tolist(), strict=True):
            box = dict(bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1), category_id=label + 1, iscrowd=0)
            truth['annotations'].append(dict(box, id=len(truth['annotations']) + 1, image_id=image.img_id))
    (project.root / 'detections.json').write_text(json.dumps(truth))
    cfg.test_dataloader.dataset.ann_file = 'detections.json'
    cfg.test_evaluator.ann_file = str(project.root / 'detections.json')
    cfg.dump(tmp_path / 'config.py')
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    main(['config.py', 'model.pth', '--work-dir', 'work', '--select', '--folds', '2', '--resamples', '1000',
          '--tune-on', 'folds', '--sweep', 'SoftNMS.sigma=0.3,0.5', '--paste-anyway'])  # fmt: skip
    printed, said = capsys.readouterr()
    assert 'no forward pass is needed' in printed + said and 'To paste into the config' in printed
    assert "cfg.MODEL.ROI_HEADS.NAME = 'SoftNMSROIHeads'" in printed
    result = json.loads((tmp_path / 'work/reevaluation.json').read_text())
    assert result['masks_left_out'] and [row['source'] for row in result['rows']] == ['table'] * 3 + ['config']
    assert 0.2 < result['rows'][0]['metrics']['AP'] < 1
    assert 'model.roi_heads.box_predictor' in (tmp_path / 'work/report.html').read_text()

    # What candidates depend on, and what not.
    have = CandidateStore.open(collected.store.folder).fingerprint
    assert {'detectron2', 'mmdet_softnms'} < set(have['code']) and {'detectron2', 'torchvision'} < set(have['versions'])
    assert not have['unknown']
    changes = [(('roi_heads', 'nms_thresh_test'), 0.7, ''), (('roi_heads', 'soft_nms_enabled'), True, '')]
    changes += [
        (('mask_on',), False, ''),
        (('weights',), 'elsewhere.pkl', ''),
        (('ROI_HEADS', 'score_thresh_test'), 0.3, ''),
    ]
    changes += [(('rpn', 'nms_thresh'), 0.6, 'config'), (('pixel_std',), [57.0, 57.0, 57.0], 'config')]
    for names, value, differs in changes:
        other = copy.deepcopy(cfg)
        node = other.model.detector
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = value
        plugged = plug(other, 0.0).model, plug(cfg, 0.0).model
        assert (plugged[0] != plugged[1]) == bool(differs), names
    wanted = fingerprint(other, checkpoint, dataset, 1e-3)
    assert differences(have, wanted) == 'config' and have['live'] != wanted['live']
    monkeypatch.setattr('detectron2.__version__', '0.7')
    assert differences(have, fingerprint(cfg, checkpoint, dataset, 1e-3)) == 'version of detectron2'


@torch.no_grad()
def test_a_live_retinanet_takes_rules(project, tmp_path):
    cfg, checkpoint = made(project, 'retinanet', tmp_path)
    dataset = build_test_set(cfg)
    expected = detections(stock_wrapper(cfg.model), checkpoint, dataset)
    cfg.model.type = 'mmdet_softnms.SoftNMSDetectron2Wrapper'
    live = detections(MODELS.build(cfg.model), checkpoint, dataset)
    hard = dict(cfg.model, rule=dict(type='mmdet_softnms.HardNMS', iou_threshold=0.4))
    for one, other, rule in zip(expected, live, detections(MODELS.build(hard), checkpoint, dataset), strict=True):
        assert torch.equal(one.bboxes, other.bboxes) and torch.equal(one.scores, other.scores) and len(one) > 5
        assert torch.equal(one.bboxes, rule.bboxes) and torch.equal(one.scores, rule.scores)
    keys = cfg.model.detector.retinanet
    keys.update(soft_nms_enabled=True, soft_nms_sigma=0.4)
    model = MODELS.build(cfg.model)
    assert describe(model.d2_model.rule) == describe(SoftNMS(sigma=0.4)) and model.num_classes == len(CLASSES)
    assert not torch.equal(detections(model, checkpoint, dataset)[0].scores, expected[0].scores)


@pytest.mark.parametrize('kind', ['mask', 'cascade'])
def test_the_lines_to_paste_are_detectron2s(kind):
    """They are run on a config of each kind, and give the rule."""
    written = DETECTRON2.written(Config(dict(model=dict(type='Detectron2Wrapper', detector=detector_of(kind)))))
    lazy_model = get_config(f'common/models/{dict(mask="mask_rcnn_fpn", cascade="cascade_rcnn")[kind]}.py').model
    for rule in (HardNMS(0.5), SoftNMS('linear', 0.3), SoftNMS(sigma=0.4), SoftNMS(decay='strongest'), VotedNMS()):
        cfg, model = get_cfg(), Namespace()
        add_soft_nms_config(cfg)
        yacs, lazy = lines_to_paste(written['head'], rule, 0.01, 0).split('# LazyConfig\n')
        exec(yacs, dict(cfg=cfg, model=model, mmdet_softnms=mmdet_softnms))
        keys = cfg.MODEL.ROI_HEADS
        place = model.roi_heads if kind == 'cascade' else model.roi_heads.box_predictor
        said = place.rule if 'rule' in vars(place) else rule_of(keys) or HardNMS(keys.NMS_THRESH_TEST)
        assert describe(said) == describe(rule)
        assert keys.SCORE_THRESH_TEST == 0.01 and cfg.TEST.DETECTIONS_PER_IMAGE == -1
        assert {'mask': 'SoftNMSROIHeads', 'cascade': 'SoftNMSCascadeROIHeads'}[kind] == keys.NAME

        exec(lazy, dict(model=lazy_model))
        heads = lazy_model.roi_heads
        place, predictors = (heads, heads.box_predictors) if kind == 'cascade' else (heads.box_predictor,) * 2
        assert describe(build_rule(place.rule)) == describe(rule)
        assert locate(place._target_).__module__ == 'mmdet_softnms.detectron2'
        predictors = predictors if kind == 'cascade' else [predictors]
        assert {(one.test_score_thresh, one.test_topk_per_image) for one in predictors} == {(0.01, -1)}


class Namespace:
    """Takes any attribute, one inside another."""

    def __getattr__(self, name):
        if name.startswith('__') or name == 'rule':
            raise AttributeError(name)
        setattr(self, name, Namespace())
        return getattr(self, name)


class OwnWrapper(Detectron2Wrapper):
    """Somebody's own."""


def test_what_is_refused(project, tmp_path):
    cfg, checkpoint = made(project, 'mask', tmp_path)
    for change, words in [
        (dict(roi_heads=dict(SMALL['roi_heads'], name='RROIHeads')), 'RROIHeads is not one of StandardROIHeads'),
        (dict(meta_architecture='SemanticSegmentor'), 'SemanticSegmentor is not one of GeneralizedRCNN'),
        (dict(roi_heads=dict(nms_tresh_test=0.5)), 'NMS_TRESH_TEST'),
        (dict(proposal_generator=dict(name='RRPN')), 'RRPN is not RPN'),
        (detector_of('retinanet'), 'suppresses boxes before they are clipped'),
    ]:
        with pytest.raises(ReevaluationError, match=words) as caught:
            plug(Config(dict(model=dict(cfg.model, detector=dict(cfg.model.detector, **change)))), 0.0)
        assert '\n' not in str(caught.value)
    with pytest.raises(ReevaluationError, match="use mmdet's Detectron2Wrapper"):
        plug(Config(dict(model=dict(type=OwnWrapper, detector={}))), 0.0)
    with pytest.raises(ReevaluationError, match='several views'):
        plug(Config(dict(model=cfg.model, softnms_views=True)), 0.0)
    assert family_of(cfg) is DETECTRON2
    assert 'not to be had in Detectron2' in Setting(MmcvNMS('nms', iou_threshold=0.5), 0.05, 100).snippet(
        DETECTRON2.written(cfg)
    )

    cfg.dump(tmp_path / 'config.py')
    with pytest.raises(SystemExit, match='use its own export'):
        export([str(tmp_path / 'config.py'), str(tmp_path / 'out.onnx')])

    def run(cfg, checkpoint=checkpoint):
        collect(cfg, checkpoint, 1e-3, tmp_path / 'candidates')

    other = copy.deepcopy(cfg)
    other.model.detector.roi_heads.num_classes = 7
    with pytest.raises(ReevaluationError, match='predicts 7 classes but the test set .* has 5'):
        run(other)
    state = torch.load(checkpoint)['state_dict']
    name = 'd2_model.roi_heads.box_predictor.bbox_pred.weight'
    torch.save({'state_dict': {key: value for key, value in state.items() if key != name}}, tmp_path / 'lacks.pth')
    with pytest.raises(CheckpointError, match=f'lacks 1 entries, first {name}'):
        run(cfg, tmp_path / 'lacks.pth')
    torch.save({'state_dict': state | {name: state[name] * float('nan')}}, tmp_path / 'nan.pth')
    with pytest.raises(ReevaluationError, match='values that are not finite, first on image 1;'):
        run(cfg, tmp_path / 'nan.pth')
