"""R-FCN: what it computes once, its OHEM, its raw results, and that it learns."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

from mmdet_softnms.models import rfcn as rfcn_module
from mmdet_softnms.roi_heads import RFCNBBoxHead
from tests.tiny import tiny_rfcn_model

ROOT = Path(__file__).parents[2]
POOLINGS = ['caffe', 'torchvision', 'bilinear', 'deformable']
SIZE = (96, 128)  # height, width


def tiny_rfcn(pooling='caffe', ohem=24, nms=None, spread=True):
    register_all_modules()
    model = tiny_rfcn_model(pooling=pooling, ohem=ohem)
    if nms is not None:
        model.test_cfg.rcnn.nms = nms
    torch.manual_seed(0)
    detector = MODELS.build(copy.deepcopy(model))
    detector.init_weights()
    for name, parameter in detector.named_parameters():  # scores that differ, offsets that move
        if spread and name.endswith(('cls_maps.weight', 'offset_maps.weight')):
            torch.nn.init.normal_(parameter, std=0.3)
    return detector


def batch(images=2, objects=3):
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(3, *SIZE, generator=generator) for _ in range(images)]
    samples = []
    for _ in range(images):
        corners = torch.rand(objects, 2, generator=generator) * 50
        boxes = torch.cat([corners, corners + 25 + torch.rand(objects, 2, generator=generator) * 20], dim=1)
        sample = DetDataSample(metainfo=dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.randint(0, 5, (objects,), generator=generator))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    return torch.stack(inputs), samples


def total_loss(model, inputs, samples):
    losses = model.loss(inputs, copy.deepcopy(samples))
    values = [value for key, value in losses.items() if 'loss' in key]
    return sum(sum(value) if isinstance(value, list) else value for value in values), losses


@pytest.mark.parametrize('pooling', POOLINGS)
def test_every_weight_gets_a_gradient(pooling):
    model = tiny_rfcn(pooling)
    model.train()
    loss, losses = total_loss(model, *batch())
    assert set(losses) == {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'acc', 'loss_bbox'}
    assert losses['loss_cls'] > 0 and losses['loss_bbox'] > 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        assert bool(parameter.grad.any()), name


def test_gradient_of_the_head_is_that_of_finite_differences():
    """Through the reduction, the deformable pooling and both votes."""
    register_all_modules()
    torch.manual_seed(0)
    head = RFCNBBoxHead(
        in_channels=3, num_classes=2, reduced_channels=2, output_size=2, stride=8, pooling='deformable'
    ).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rois = torch.tensor([[0.0, 3, 5, 40, 30], [0, 10, 10, 25, 45]], dtype=torch.float64)
    feature = torch.randn(1, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda each: head(each, rois), feature)


@pytest.mark.parametrize('pooling', POOLINGS)
def test_score_maps_are_computed_once_for_all_rois(pooling, monkeypatch):
    model = tiny_rfcn(pooling)
    calls = {'maps': 0, 'pool': 0}
    head = model.roi_head.bbox_head
    head.cls_maps.register_forward_hook(lambda *_: calls.update(maps=calls['maps'] + 1))
    pool = rfcn_module.ps_roi_pool
    monkeypatch.setattr(
        rfcn_module,
        'ps_roi_pool',
        lambda *args, **kwargs: calls.update(pool=calls['pool'] + 1) or pool(*args, **kwargs),
    )
    pools = 4 if pooling == 'deformable' else 2  # classes and boxes, and the offsets of each
    model.train()
    total_loss(model, *batch())
    assert calls == {'maps': 1, 'pool': pools}  # OHEM included: no second pass
    model.eval()
    with torch.no_grad():
        assert len(model.predict(*batch())[0].pred_instances)
    assert calls == {'maps': 2, 'pool': 2 * pools}


def test_ohem_takes_the_largest_total_losses_of_each_image_whatever_their_class():
    head = RFCNBBoxHead(in_channels=4, num_classes=3, reduced_channels=4, ohem=3)
    rois = torch.tensor([[0.0, 0, 0, 9, 9]] * 6 + [[1.0, 0, 0, 9, 9]] * 2)
    labels = torch.tensor([3, 0, 3, 1, 3, 2, 3, 3])  # 3: background
    cls_score = torch.zeros(8, 4)
    cls_score[0, 3] = cls_score[3, 1] = 9.0  # easy: class right
    cls_score[2, 0] = 5.0  # a hard background
    bbox_pred = torch.zeros(8, 4)
    bbox_targets = torch.zeros(8, 4)
    bbox_targets[3] = 7.0  # class right, box far off: hardest of all in total
    bbox_targets[4] = 7.0  # no positive: its box does not count
    bbox_weights = (labels < 3).float()[:, None].expand(8, 4)
    arguments = (cls_score, bbox_pred, rois, labels, torch.ones(8), bbox_targets, bbox_weights)
    chosen = head.hardest(*arguments)
    assert chosen[:2].tolist() == [3, 2] and chosen[2] in (1, 4, 5)  # equal ones: any
    assert sorted(chosen[3:].tolist()) == [6, 7]  # an image with fewer RoIs gives all
    head.ohem = 1
    assert head.hardest(*arguments)[0] == 3


def test_ohem_loss_is_the_mean_over_the_hardest_and_the_others_get_no_gradient(monkeypatch):
    head = RFCNBBoxHead(in_channels=4, num_classes=3, reduced_channels=4, ohem=2)
    torch.manual_seed(0)
    cls_score = torch.randn(5, 4, requires_grad=True)
    bbox_pred = torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 3])
    bbox_targets, bbox_weights = torch.randn(5, 4), (labels < 3).float()[:, None].expand(5, 4)
    targets = (labels, torch.ones(5), bbox_targets, bbox_weights)
    monkeypatch.setattr(head, 'get_targets', lambda *_: targets)
    losses = head.loss_and_target(cls_score, bbox_pred, torch.zeros(5, 5), [], {})['loss_bbox']
    each_cls = torch.nn.functional.cross_entropy(cls_score, labels, reduction='none')
    each_box = torch.nn.functional.smooth_l1_loss(bbox_pred, bbox_targets, reduction='none').sum(1) * bbox_weights[:, 0]
    hardest = (each_cls + each_box).topk(2).indices
    torch.testing.assert_close(losses['loss_cls'], each_cls[hardest].mean())
    torch.testing.assert_close(losses['loss_bbox'], each_box[hardest].sum() / 2)
    (losses['loss_cls'] + losses['loss_bbox']).backward()
    assert sorted(cls_score.grad.any(dim=1).nonzero().flatten().tolist()) == sorted(hardest.tolist())


@pytest.mark.parametrize('pooling', POOLINGS)
def test_raw_results_follow_mmdets_contract_and_rules_work_on_them(pooling):
    model = tiny_rfcn(pooling, nms=dict(type='mmdet_softnms.HardNMS', iou_threshold=0.5))
    stock = tiny_rfcn(pooling, nms=dict(type='nms', iou_threshold=0.5))
    stock.load_state_dict(model.state_dict())
    for each in (model, stock):
        each.eval()
    inputs, samples = batch()
    with torch.no_grad():
        features = model.extract_feat(inputs)
        proposals = model.rpn_head.predict(features, samples, rescale=False)
        metas = [sample.metainfo for sample in samples]
        raw = model.roi_head.predict_bbox(features, metas, proposals, None)
        assert [tuple(each.bboxes.shape) for each in raw] == [(len(each), 4) for each in proposals]
        assert [tuple(each.scores.shape) for each in raw] == [(len(each), 6) for each in proposals]
        ours, theirs = model.predict(inputs, samples), stock.predict(*batch())
    for a, b in zip(ours, theirs, strict=True):
        assert len(a.pred_instances) > 5
        torch.testing.assert_close(a.pred_instances.bboxes, b.pred_instances.bboxes)
        torch.testing.assert_close(a.pred_instances.scores, b.pred_instances.scores)
        assert a.pred_instances.labels.equal(b.pred_instances.labels)


@pytest.mark.parametrize('pooling', ['caffe', 'deformable'])
def test_images_without_objects_and_without_proposals(pooling):
    model = tiny_rfcn(pooling)
    model.train()
    loss, _ = total_loss(model, *batch(objects=0))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    inputs, samples = batch()
    nothing = [InstanceData(bboxes=torch.zeros(0, 4)) for _ in samples]
    with torch.no_grad():
        results = model.roi_head.predict(model.extract_feat(inputs), nothing, samples)
    assert [len(each) for each in results] == [0, 0]


@pytest.mark.parametrize('pooling', POOLINGS)
def test_mixed_precision(pooling):
    """Everything but the RPN, whose nms mmcv does not offer for bfloat16 on a CPU."""
    model = tiny_rfcn(pooling, ohem=None)
    model.train()
    inputs, samples = batch()

    def losses(enabled):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            features = model.extract_feat(inputs)
            proposals = [InstanceData(bboxes=each.gt_instances.bboxes + 4) for each in samples]
            return model.roi_head.loss(features, proposals, samples)

    full, half = losses(False), losses(True)
    for key in ('loss_cls', 'loss_bbox'):
        torch.testing.assert_close(half[key], full[key], rtol=0.1, atol=0.02)
    (half['loss_cls'] + half['loss_bbox']).backward()
    for name, parameter in model.roi_head.named_parameters():
        assert bool(torch.isfinite(parameter.grad).all()) and bool(parameter.grad.any()), name


@pytest.mark.parametrize('schedule', ['fpn', 'fpn96'])
def test_the_deformable_holdout_config_is_the_other_with_deformable_pooling_and_trains(schedule):
    register_all_modules()
    plain, deformable = (
        Config.fromfile(ROOT / 'configs/rfcn' / f'{name}_mobilenetv2_{schedule}_voc07-holdout.py')
        for name in ('rfcn', 'deformable-rfcn')
    )
    model = copy.deepcopy(deformable.model)
    for cfg in (plain, deformable):
        cfg.model.roi_head.bbox_head.pop('pooling')
        cfg.model.roi_head.bbox_head.get('init_cfg', {}).pop('override', None)
    assert deformable.to_dict() == plain.to_dict()

    model.backbone.init_cfg = None  # its file is not here
    model.backbone.widen_factor = 0.25
    model.neck.in_channels = [24, 1280]
    model.train_cfg.rpn_proposal.max_per_img = 16
    detector = MODELS.build(model)
    detector.init_weights()
    head = detector.roi_head.bbox_head
    assert not head.cls_offset_maps.weight.any() and not head.reg_offset_maps.weight.any()
    detector.train()
    loss, _ = total_loss(detector, *batch())
    loss.backward()
    for maps in (head.cls_maps, head.cls_offset_maps, head.reg_offset_maps):
        assert bool(torch.isfinite(maps.weight.grad).all()) and bool(maps.weight.grad.any())


def _one_step(rank, port, folder):
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = tiny_rfcn('deformable')
    model.train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)  # no find_unused_parameters
    inputs, samples = batch(objects=3 if rank == 0 else 0)  # a rank without any object
    for _ in range(2):
        losses = parallel(inputs + rank, copy.deepcopy(samples), mode='loss')
        model.zero_grad()
        model.parse_losses(losses)[0].backward()
    torch.save([parameter.grad for parameter in model.parameters()], f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_ranks_agree_on_every_gradient(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    mp.spawn(_one_step, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert len(first) > 50 and all(bool(a.any()) and a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize('pooling', ['caffe', 'deformable'])
def test_learns_a_handful_of_images_by_heart(pooling):
    gaussian = dict(type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=1e-3)
    model = tiny_rfcn(pooling, nms=gaussian, spread=False)
    inputs, samples = batch()
    scenes = ([[6.0, 8, 46, 50], [70, 10, 120, 44], [40, 56, 90, 90]], [[10.0, 40, 50, 84], [64, 20, 110, 60]])
    for sample, boxes, labels in zip(samples, scenes, ([0, 3, 4], [1, 3]), strict=True):
        sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes), labels=torch.tensor(labels))
    for image, sample in zip(inputs, samples, strict=True):  # objects of one colour a class
        image *= 0.1
        for (x1, y1, x2, y2), label in zip(
            sample.gt_instances.bboxes.int().tolist(), sample.gt_instances.labels.tolist(), strict=True
        ):
            image[:, y1:y2, x1:x2] += torch.tensor([label - 2.0, label % 2, 1.0])[:, None, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(1, 151):  # at most: as few as it takes
        model.train()
        optimizer.zero_grad()
        loss, _ = total_loss(model, inputs, samples)
        loss.backward()
        optimizer.step()
        if step % 15 == 0 and _knows(model.eval(), inputs, samples):
            break
    assert _knows(model.eval(), inputs, samples)


@torch.no_grad()
def _knows(model, inputs, samples):
    """Whether every object is found."""
    from mmdet.structures.bbox import bbox_overlaps

    for result, sample in zip(model.predict(inputs, copy.deepcopy(samples)), samples, strict=True):
        found = result.pred_instances[result.pred_instances.scores > 0.3]
        overlaps = bbox_overlaps(sample.gt_instances.bboxes, found.bboxes)
        right = (overlaps > 0.5) & (sample.gt_instances.labels[:, None] == found.labels)
        if not right.any(dim=1).all():
            return False
    return True


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        (dict(pooling='max'), "pooling 'max'"),
        (dict(reg_class_agnostic=False), 'one box for all classes'),
        (dict(ohem=0), 'must be positive'),
        (dict(ohem=8, reg_decoded_bbox=True), 'reg_decoded_bbox=False'),
    ],
)
def test_bbox_head_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        RFCNBBoxHead(**changed)


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        (dict(bbox_roi_extractor=dict(type='SingleRoIExtractor')), 'no bbox_roi_extractor'),
        (dict(bbox_head=dict(type='mmdet.Shared2FCBBoxHead')), 'needs an RFCNBBoxHead'),
        (dict(mask_head=dict(type='FCNMaskHead')), 'no masks'),
        (dict(num_stages=3), 'takes no num_stages'),
    ],
)
def test_roi_head_errors(changed, message):
    register_all_modules()
    config = dict(type='mmdet_softnms.RFCNRoIHead', bbox_head=dict(type='mmdet_softnms.RFCNBBoxHead'))
    with pytest.raises((ValueError, TypeError), match=message):
        MODELS.build({**config, **changed})


@torch.no_grad()
def test_proposals_of_whole_cells():
    """``Proposal`` of Deformable-ConvNets: an image of 20 x 30 px has two rows of three whole cells of 8 px."""
    detector = tiny_rfcn()
    head = detector.rpn_head
    anchors = head.num_base_priors
    scores, deltas = torch.randn(1, anchors, 3, 4), torch.randn(1, 4 * anchors, 3, 4)
    meta = dict(img_shape=(20, 30), scale_factor=(1.0, 1.0))

    def proposals(scores, deltas):
        return head.predict_by_feat([scores], [deltas], batch_img_metas=[meta], cfg=head.test_cfg)[0].bboxes

    every = proposals(scores, deltas)
    cropped = proposals(scores[..., :2, :3], deltas[..., :2, :3])
    head.whole_cells = True
    assert proposals(scores, deltas).equal(cropped) and not every.equal(cropped)
