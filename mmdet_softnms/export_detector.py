"""A whole detector as one ONNX file: from the resized image to detections.

Three parts of a two-stage detector have no direct form in torch's exporter: the RPN's hard NMS, RoIAlign, and the
suppression at the end. Here the first two are custom operators with a translation of their own, into ONNX's
``NonMaxSuppression`` and ``RoiAlign``; the last is the graph of :mod:`mmdet_softnms.export`, joined to the end of the
file. Everything else is the detector's own code, traced by ``torch.onnx.export(dynamo=True)``.

Proposals agree with PyTorch's in all but the last bits. ``caffe`` and ``torchvision`` pooling round the corners of a
proposal to whole pixels, so one that lies within those bits of a half pixel may pool other pixels, and its box differs.

Of a one-stage detector, whose head ends as mmdet's ``BaseDenseHead``, ``score_thr`` and ``nms_pre`` are the only parts
whose result varies in length: here each level gives its ``nms_pre`` best class scores, 0 for those that do not exceed
``score_thr``.

The size of the image is fixed, because anchors are constants then; the number of proposals is the RPN's
``max_per_img``, padded with proposals whose scores are 0.

Glossary: H x W pixels of the resized image, R proposals or candidates, K classes, M detections.
"""

from typing import Any

import onnx
import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor, nn
from torch.nn import functional

from mmdet_softnms import __version__
from mmdet_softnms.export import ExportError, post_process_to_onnx
from mmdet_softnms.models.dense_heads import SoftNMSDenseMixin
from mmdet_softnms.models.ps_roi_pool import _caffe_edges, _corners, _torchvision_edges
from mmdet_softnms.models.rfcn import RFCNRoIHead
from mmdet_softnms.models.takes_rules import plain_of
from mmdet_softnms.rules import Rule

OPSET = 18  # the lowest that torch's exporter writes
_NOTHING = -1.0  # the score of a place without a proposal


@torch.library.custom_op('mmdet_softnms::export_proposals', mutates_args=())
def _proposals(boxes: Tensor, scores: Tensor, levels: Tensor, iou_threshold: float, num: int) -> tuple[Tensor, Tensor]:
    """Hard NMS within each level: the best ``num`` boxes (R, 4) and their scores (R,), padded with `_NOTHING`.

    For the exporter; this body is what PyTorch computes with it. ``boxes`` (N, 4), ``scores`` (N,), ``levels`` (N,).
    """
    from mmdet_softnms import soft_nms

    alive = (scores > _NOTHING).nonzero().flatten()
    keep, kept = soft_nms(
        boxes[alive],
        scores[alive],
        levels[alive],
        method='hard',
        iou_threshold=iou_threshold,
        min_score=0.0,
        max_num=num,
    )
    missing = num - len(keep)
    return (
        functional.pad(boxes[alive[keep]], (0, 0, 0, missing)),
        functional.pad(kept, (0, missing), value=_NOTHING),
    )


@_proposals.register_fake
def _(boxes: Tensor, scores: Tensor, levels: Tensor, iou_threshold: float, num: int) -> tuple[Tensor, Tensor]:
    return boxes.new_empty(num, 4), scores.new_empty(num)


@torch.library.custom_op('mmdet_softnms::export_roi_align', mutates_args=())
def _roi_align(
    feature: Tensor, rois: Tensor, height: int, width: int, scale: float, samples: int, mode: str, aligned: bool
) -> Tensor:
    """``mmcv.ops.roi_align``; ``feature`` (1, C, h, w), ``rois`` (R, 5)."""
    from mmcv.ops import roi_align

    result: Tensor = roi_align(feature, rois, (height, width), scale, samples, mode, aligned)
    return result


@_roi_align.register_fake
def _(
    feature: Tensor, rois: Tensor, height: int, width: int, scale: float, samples: int, mode: str, aligned: bool
) -> Tensor:
    return feature.new_empty(rois.shape[0], feature.shape[1], height, width)


def _translations() -> dict[Any, Any]:
    """The custom operators in ONNX, for torch's exporter."""
    try:
        from onnxscript import opset18 as op
    except ImportError as error:
        raise ExportError(
            "a whole detector needs onnxscript; in the clone of mmdet_softnms: pip install '.[export]'"
        ) from error

    def proposals(boxes: Any, scores: Any, levels: Any, iou_threshold: float, num: int) -> Any:
        number = op.ReduceMax(levels, keepdims=0) + op.Constant(value_int=1)
        rows = op.Range(op.Constant(value_int=0), number, op.Constant(value_int=1))
        of_level = op.Equal(
            op.Unsqueeze(rows, op.Constant(value_ints=[1])), op.Unsqueeze(levels, op.Constant(value_ints=[0]))
        )
        per_level = op.Where(
            of_level, op.Unsqueeze(scores, op.Constant(value_ints=[0])), op.Constant(value_float=_NOTHING)
        )
        selected = op.NonMaxSuppression(
            op.Unsqueeze(boxes, op.Constant(value_ints=[0])),
            op.Unsqueeze(per_level, op.Constant(value_ints=[0])),
            op.Constant(value_int=num),
            op.Constant(value_float=iou_threshold),
            op.Constant(value_float=_NOTHING / 2),
        )
        index = op.Gather(selected, op.Constant(value_int=2), axis=1)
        padded = op.Concat(index, op.ConstantOfShape(op.Constant(value_ints=[num]), value=_zeros()), axis=0)
        lowest = op.Expand(op.Constant(value_float=_NOTHING), op.Constant(value_ints=[num]))
        best, place = op.TopK(op.Concat(op.Gather(scores, index), lowest, axis=0), op.Constant(value_ints=[num]))
        return op.Gather(boxes, op.Gather(padded, place)), best

    def roi_align(
        feature: Any, rois: Any, height: int, width: int, scale: float, samples: int, mode: str, aligned: bool
    ) -> Any:
        corners = op.Slice(rois, op.Constant(value_ints=[1]), op.Constant(value_ints=[5]), op.Constant(value_ints=[1]))
        image = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=onnx.TensorProto.INT64)
        return op.RoiAlign(
            feature,
            corners,
            image,
            mode=mode,
            output_height=height,
            output_width=width,
            sampling_ratio=samples,
            spatial_scale=scale,
            coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
        )

    operators = torch.ops.mmdet_softnms
    return {operators.export_proposals.default: proposals, operators.export_roi_align.default: roi_align}


def _zeros() -> onnx.TensorProto:
    return onnx.helper.make_tensor('zeros', onnx.TensorProto.INT64, [1], [0])


class RawDetector(nn.Module):
    """A detector up to its raw results, with shapes that do not depend on what is in the image.

    Args:
        model: a detector, built and with its weights.
        size: H and W of the image, resized and not padded.
    """

    model: Any  # mmdet's detectors have no types
    size: tuple[int, int]
    num_classes: int
    class_agnostic: bool  # whether a candidate has one box for all classes

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.size = size
        divisor = model.data_preprocessor.pad_size_divisor
        self.padded = tuple(-(-side // divisor) * divisor for side in size)

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        """``image`` (1, 3, H, W), BGR, 0 to 255, to what the heads take."""
        preprocessor = self.model.data_preprocessor
        image = image.flip(1) if preprocessor._channel_conversion else image
        if preprocessor._enable_normalize:
            image = (image - preprocessor.mean) / preprocessor.std
        bottom, right = (padded - side for padded, side in zip(self.padded, self.size, strict=True))
        image = functional.pad(image, (0, right, 0, bottom), value=float(preprocessor.pad_value))
        features: tuple[Tensor, ...] = self.model.extract_feat(image)
        return features


class RawOneStageDetector(RawDetector):
    """A one-stage detector whose head ends as mmdet's ``BaseDenseHead`` does.

    Raises:
        ExportError: its head does not.
    """

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        super().__init__(model, size)
        self.num_classes, self.class_agnostic = int(model.bbox_head.num_classes), True
        head = type(model.bbox_head)
        for name in ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process'):
            defined = next(
                vars(one)[name] for one in head.__mro__ if name in vars(one) and one is not SoftNMSDenseMixin
            )
            if defined is not getattr(BaseDenseHead, name):
                raise ExportError(
                    f'{plain_of(head).__name__} has its own {name}, and a whole one-stage detector is exported with '
                    "that of mmdet's BaseDenseHead only, as ATSS, FCOS, RetinaNet and RTMDet have it"
                )
        if model.bbox_head.test_cfg.get('nms_pre', -1) < 1:
            raise ExportError('a whole one-stage detector must have nms_pre of at least 1 in test_cfg')
        if getattr(model.bbox_head.loss_cls, 'custom_cls_channels', False):
            raise ExportError(f'the class scores of {type(model.bbox_head.loss_cls).__name__} cannot be exported')

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """``image`` (1, 3, H, W), BGR, 0 to 255. Gives boxes (R, 4) and scores (R, K + 1), one above 0 in a row."""
        head = self.model.bbox_head
        test_cfg = head.test_cfg
        logits, deltas, *factors = head(self.features(image))
        priors = head.prior_generator.grid_priors(
            [each.shape[-2:] for each in logits], dtype=logits[0].dtype, device=logits[0].device
        )
        boxes, scores = [], []
        for level, (logit, delta, prior) in enumerate(zip(logits, deltas, priors, strict=True)):
            score = logit[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
            score = score.sigmoid() if head.use_sigmoid_cls else score.softmax(-1)[:, :-1]
            score = torch.where(score > test_cfg.get('score_thr', 0), score, torch.zeros_like(score)).flatten()
            best, chosen = score.topk(min(test_cfg.nms_pre, len(score)))
            place, label = chosen // self.num_classes, chosen % self.num_classes
            delta = delta[0].permute(1, 2, 0).reshape(-1, head.bbox_coder.encode_size)[place]
            if factors:
                best = best * factors[0][level][0].permute(1, 2, 0).reshape(-1).sigmoid()[place]
            boxes.append(head.bbox_coder.decode(prior[place], delta, max_shape=self.size))
            scores.append(best[:, None] * functional.one_hot(label, self.num_classes + 1))
        every, score = torch.cat(boxes), torch.cat(scores)
        if test_cfg.get('min_bbox_size', -1) >= 0:
            sides = every[:, 2:] - every[:, :2]
            score = score * (sides > test_cfg.min_bbox_size).all(1)[:, None]
        return every, score


class RawTwoStageDetector(RawDetector):
    """A two-stage detector with a standard RoI head, or an R-FCN.

    Raises:
        ExportError: a detector with a part that is not known here.
    """

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        super().__init__(model, size)
        head = model.roi_head
        if isinstance(head.bbox_head, nn.ModuleList):
            raise ExportError(
                f'{type(head).__name__} has several stages, and a whole detector is exported with one only'
            )
        if isinstance(head, RFCNRoIHead):
            if head.bbox_head.pooling not in ('caffe', 'torchvision'):
                raise ExportError(f'pooling {head.bbox_head.pooling!r} cannot be exported; caffe and torchvision can')
        elif head.bbox_roi_extractor is None or type(head.bbox_roi_extractor).__name__ != 'SingleRoIExtractor':
            raise ExportError(f'{type(head.bbox_roi_extractor).__name__} cannot be exported; SingleRoIExtractor can')
        if getattr(head, 'with_shared_head', False):
            raise ExportError('a shared head (C4) cannot be exported')
        if getattr(model.rpn_head, 'whole_cells', False):
            raise ExportError(
                'proposals of whole cells cannot be exported; with model.rpn_head.whole_cells=False, all can'
            )
        if getattr(model, 'coordinates', 'mmdet') == 'caffe':
            raise ExportError(
                "coordinates='caffe' cannot be exported, since it decodes boxes in the original image, whose scale the "
                "file does not know; with model.coordinates='mmdet', all can"
            )
        rpn = model.rpn_head.test_cfg
        if rpn.nms.get('type', 'nms') != 'nms' or rpn.get('nms_pre', -1) < 1 or rpn.get('max_per_img', -1) < 1:
            raise ExportError(
                f'the RPN must have hard NMS, nms_pre and max_per_img in test_cfg.rpn; here it is {dict(rpn)}'
            )
        self.num_classes = int(head.bbox_head.num_classes)
        self.class_agnostic = bool(head.bbox_head.reg_class_agnostic)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """``image`` (1, 3, H, W), BGR, 0 to 255. Gives raw boxes (R, 4K) or (R, 4) and scores (R, K + 1)."""
        features = self.features(image)
        boxes, valid = self.proposals(features)
        rois = torch.cat([boxes.new_zeros(boxes.shape[0], 1), boxes], 1)
        head = self.model.roi_head.bbox_head
        logits, deltas = self.pool_and_classify(features, rois)
        raw = head._predict_by_feat_single(rois, logits, deltas, self.meta, rescale=False, rcnn_test_cfg=None)
        return raw.bboxes, raw.scores * valid[:, None]

    @property
    def meta(self) -> dict[str, Any]:
        """What mmdet's heads want to know of the image."""
        return dict(img_shape=self.size, scale_factor=(1.0, 1.0))

    def proposals(self, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Boxes (R, 4), and 1.0 or 0.0 (R,): whether there is a proposal at all."""
        head = self.model.rpn_head
        rpn = head.test_cfg
        logits, deltas = head(features)
        priors = head.prior_generator.grid_priors([each.shape[-2:] for each in logits], device=logits[0].device)
        scores, chosen, levels = [], [], []
        for level, (logit, delta, prior) in enumerate(zip(logits, deltas, priors, strict=True)):
            score = logit[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
            score = score.sigmoid()[:, 0] if head.use_sigmoid_cls else score.softmax(-1)[:, 0]
            delta = delta[0].permute(1, 2, 0).reshape(-1, 4)
            if score.shape[0] > rpn.nms_pre:
                score, best = score.topk(rpn.nms_pre)
                delta, prior = delta[best], prior[best]
            scores.append(score)
            chosen.append(head.bbox_coder.decode(prior, delta, max_shape=self.size))
            levels.append(torch.full(score.shape, level, dtype=torch.long))
        boxes, score = torch.cat(chosen), torch.cat(scores)
        sides = boxes[:, 2:] - boxes[:, :2]
        if rpn.get('min_bbox_size', -1) >= 0:
            score = torch.where((sides > rpn.min_bbox_size).all(1), score, torch.full_like(score, _NOTHING))
        boxes, score = torch.ops.mmdet_softnms.export_proposals(
            boxes, score, torch.cat(levels), rpn.nms.iou_threshold, rpn.max_per_img
        )
        valid = (score > _NOTHING / 2).to(boxes.dtype)
        return boxes * valid[:, None], valid

    def pool_and_classify(self, features: tuple[Tensor, ...], rois: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (R, K + 1) and box deltas (R, 4K) or (R, 4)."""
        head = self.model.roi_head
        if isinstance(head, RFCNRoIHead):
            box_head: Any = head.bbox_head
            reduced = box_head.reduce(features[head.in_index]).relu()
            maps = (box_head.cls_maps(reduced), box_head.reg_maps(reduced))
            logits, deltas = (self.pool_score_maps(each, rois).mean(dim=(2, 3)) for each in maps)
            return logits, deltas
        extractor = head.bbox_roi_extractor
        used = features[: extractor.num_inputs]
        of_level = extractor.map_roi_levels(rois, len(used))
        pooled = torch.zeros(())
        for level, (feature, layer) in enumerate(zip(used, extractor.roi_layers, strict=True)):
            height, width = layer.output_size
            here = torch.ops.mmdet_softnms.export_roi_align(
                feature, rois, height, width, layer.spatial_scale, layer.sampling_ratio, layer.pool_mode, layer.aligned
            )
            pooled = torch.where((of_level == level)[:, None, None, None], here, pooled)
        logits, deltas = head.bbox_head(pooled)
        return logits, deltas

    def pool_score_maps(self, maps: Tensor, rois: Tensor) -> Tensor:
        """Position-sensitive pooling by one integral image of all maps: (1, C * P * P, h, w) -> (R, C, P, P)."""
        head = self.model.roi_head.bbox_head
        bins, (height, width) = head.output_size, maps.shape[2:]
        edges = _caffe_edges if head.pooling == 'caffe' else _torchvision_edges
        columns = edges(rois[:, 1], rois[:, 3], bins, head.spatial_scale, width)
        rows = edges(rois[:, 2], rois[:, 4], bins, head.spatial_scale, height)
        grouped = maps[0].view(-1, bins, bins, height, width).double()
        integral = functional.pad(grouped.cumsum(-1).cumsum(-2), (1, 0, 1, 0)).permute(1, 2, 3, 4, 0)
        pooled = []
        for row in range(bins):
            corners, area = _corners(rows[:, row], columns, height, width)
            flat = integral[row].flatten(0, 2)
            total = flat[corners[0]] - flat[corners[1]] - flat[corners[2]] + flat[corners[3]]
            pooled.append((total / area[..., None]).to(maps.dtype))
        return torch.stack(pooled, 1).permute(0, 3, 1, 2)


def raw_detector(model: Any, size: tuple[int, int]) -> RawDetector:
    """A detector of mmdet up to its raw results, in eval mode; arguments and errors as of :class:`RawDetector`."""
    kind = RawTwoStageDetector if hasattr(model, 'roi_head') else RawOneStageDetector
    return kind(model, size).eval()


def detector_to_onnx(
    model: Any, rule: Rule, score_thr: float, max_per_img: int, size: tuple[int, int], *, opset: int = OPSET
) -> onnx.ModelProto:
    """A detector and its post-processing as one model.

    Args:
        model: a detector, built and with its weights.
        rule: what suppresses; see :func:`mmdet_softnms.export.post_process_to_onnx`.
        score_thr, max_per_img: of the post-processing. A one-stage detector has applied its own ``score_thr``, to other
            scores: 0.0 for it.
        size: height and width of the image in pixels, resized as in training and not padded.
        opset: of the standard operators, at least 18.

    Returns:
        A checked model: ``image`` (1, 3, H, W) float32, BGR, 0 to 255, in; ``dets`` (M, 5), boxes ``xyxy`` in pixels
        of that image and scores, and ``labels`` (M,) int64 out.

    Raises:
        ExportError: a part of the detector that cannot be expressed; the message names it.
    """
    if opset < OPSET:
        raise ExportError(f'a whole detector needs opset {OPSET} or newer, got {opset}')
    raw = raw_detector(model, size)
    with torch.no_grad():
        program = torch.onnx.export(
            torch.export.export(raw, (torch.zeros(1, 3, *size),), strict=False),
            dynamo=True,
            input_names=['image'],
            output_names=['boxes', 'scores'],
            opset_version=opset,
            custom_translation_table=_translations(),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    network = program.model_proto
    last = post_process_to_onnx(
        rule,
        raw.num_classes,
        score_thr,
        max_per_img,
        class_agnostic=raw.class_agnostic,
        opset=opset,
    )
    network.ir_version = last.ir_version = max(network.ir_version, last.ir_version)
    last = onnx.compose.add_prefix(last, 'post_process/', rename_inputs=False, rename_outputs=False)
    whole = onnx.compose.merge_models(network, last, io_map=[('boxes', 'boxes'), ('scores', 'scores')])
    whole.producer_name, whole.producer_version = 'mmdet_softnms', __version__
    onnx.checker.check_model(whole, full_check=True)
    return whole
