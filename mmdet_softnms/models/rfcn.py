"""R-FCN (Dai et al., NIPS 2016) and its deformable form (Dai et al., ICCV 2017): what mmdet lacks for them.

Everything with weights runs once an image: a backbone up to res4, on which the RPN works, and a dilated res5 behind it
(mmdet's ``ResNet`` with ``strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), out_indices=(2, 3)``), a 1 x 1 reduction, and
position-sensitive score maps. A RoI costs pooling and a mean over its bins.

``RFCN(coordinates='caffe')`` takes every coordinate as the authors' Caffe code does, for their weights and numbers.
docs/rfcn.md lists what still differs.

Glossary: N images, K classes, P bins a side, H x W pixels of a map, R RoIs of the whole batch.
"""

from typing import Any

import mmdet.registry
import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.detectors import FasterRCNN
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.structures.bbox import scale_boxes
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_softnms.models.caffe import CaffeAnchorGenerator, CaffeDeltaXYWHBBoxCoder
from mmdet_softnms.models.ps_roi_pool import KINDS, ps_roi_pool
from mmdet_softnms.models.roi_heads import SoftNMSMixin
from mmdet_softnms.registry import MODELS

COORDINATES = ('mmdet', 'caffe')


@MODELS.register_module()
class RFCN(FasterRCNN):
    """mmdet's ``FasterRCNN`` with R-FCN's heads, and one switch for how they take coordinates.

    Args:
        coordinates: ``mmdet``, or ``caffe``: as ``lib/rpn/proposal_layer.py`` and ``lib/fast_rcnn/test.py`` of
            bharatsingh430/soft-nms (py-R-FCN's are the same). Then proposals are removed as small before the best are
            taken, where a side with its last pixel is less than ``min_bbox_size`` pixels of the original image;
            RoIs are divided by the scale of the image first, decoded and clipped afterwards; deltas are not cut; and
            ``bilinear`` pooling takes a sample on a whole row or column as 0. Weights are the same.
        **kwargs: the arguments of mmdet's ``FasterRCNN``.

    Raises:
        ValueError: unknown coordinates; for ``caffe``, other heads, anchors or coders than those of this package.
    """

    def __init__(self, *args: Any, coordinates: str = 'mmdet', **kwargs: Any) -> None:
        if coordinates not in COORDINATES:
            raise ValueError(f'coordinates {coordinates!r} is not one of {", ".join(COORDINATES)}')
        super().__init__(*args, **kwargs)
        self.coordinates = coordinates
        if coordinates == 'caffe':
            self._follow_caffe()

    def _follow_caffe(self) -> None:
        rpn_head, bbox_head = self.rpn_head, self.roi_head.bbox_head
        for place, part, wanted in (
            ('rpn_head', rpn_head, RFCNRPNHead),
            ('rpn_head.anchor_generator', rpn_head.prior_generator, CaffeAnchorGenerator),
            ('rpn_head.bbox_coder', rpn_head.bbox_coder, CaffeDeltaXYWHBBoxCoder),
            ('roi_head.bbox_head', bbox_head, RFCNBBoxHead),
            ('roi_head.bbox_head.bbox_coder', bbox_head.bbox_coder, CaffeDeltaXYWHBBoxCoder),
        ):
            # A coder that derives from Caffe's decodes otherwise (MXNet's); a head that derives from ours need not.
            if not isinstance(part, wanted) or (isinstance(part, CaffeDeltaXYWHBBoxCoder) and type(part) is not wanted):
                raise ValueError(
                    f"coordinates='caffe' needs model.{place}=dict(type='mmdet_softnms.{wanted.__name__}'), "
                    f'not {type(part).__name__}'
                )
        for head in (rpn_head, bbox_head):
            head.coordinates = 'caffe'
            head.bbox_coder.cut_deltas = False


@MODELS.register_module()
class RFCNRPNHead(RPNHead):
    """mmdet's ``RPNHead`` on the first of the feature maps (res4); the others are the RoI head's.

    Args:
        whole_cells: propose only from cells that lie in the image as a whole, as Deformable-ConvNets' ``Proposal``:
            not from the last row of a map where the image's height is no multiple of the stride, columns alike.
        **kwargs: the arguments of mmdet's ``RPNHead``.
    """

    def __init__(self, *args: Any, whole_cells: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.whole_cells = whole_cells
        self.coordinates = 'mmdet'  # RFCN sets it

    def _predict_by_feat_single(
        self,
        cls_score_list: list[Tensor],
        bbox_pred_list: list[Tensor],
        score_factor_list: list[Tensor],
        mlvl_priors: list[Tensor],
        img_meta: dict[str, Any],
        cfg: ConfigDict | None = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> InstanceData:
        if self.whole_cells:
            (scores,), (deltas,), (priors,) = cls_score_list, bbox_pred_list, mlvl_priors
            stride_x, stride_y = self.prior_generator.strides[0]
            rows, columns = int(img_meta['img_shape'][0] / stride_y), int(img_meta['img_shape'][1] / stride_x)
            cls_score_list, bbox_pred_list = [scores[:, :rows, :columns]], [deltas[:, :rows, :columns]]
            priors = priors.view(*scores.shape[1:], -1, 4)  # cell by cell, all anchors of one
            mlvl_priors = [priors[:rows, :columns].reshape(-1, 4)]
        if self.coordinates == 'caffe':
            cfg = self.test_cfg if cfg is None else cfg
            candidates = self._large_enough(cls_score_list[0], bbox_pred_list[0], mlvl_priors[0], img_meta, cfg)
            cfg = ConfigDict(cfg, min_bbox_size=-1)
            return self._bbox_post_process(candidates, cfg, rescale, with_nms, img_meta)
        return super()._predict_by_feat_single(
            cls_score_list, bbox_pred_list, score_factor_list, mlvl_priors, img_meta, cfg, rescale, with_nms
        )

    def _large_enough(
        self, logits: Tensor, deltas: Tensor, priors: Tensor, img_meta: dict[str, Any], cfg: ConfigDict
    ) -> InstanceData:
        """The best ``nms_pre`` of the boxes that are not small; ``logits`` (A, H, W), ``deltas`` (4A, H, W)."""
        logits = logits.permute(1, 2, 0).reshape(-1, self.cls_out_channels)
        scores = (logits.sigmoid() if self.use_sigmoid_cls else logits.softmax(-1))[:, 0]
        deltas = deltas.permute(1, 2, 0).reshape(-1, 4)
        boxes = self.bbox_coder.decode(priors, deltas, max_shape=img_meta['img_shape'])
        sides = boxes[:, 2:] - boxes[:, :2] + 1
        smallest = cfg.get('min_bbox_size', -1) * boxes.new_tensor(_of_image(img_meta, 'scale_factor')[:2])
        large = (sides >= smallest).all(dim=1)
        scores, order = scores[large].sort(descending=True, stable=True)
        best = slice(cfg.nms_pre if cfg.get('nms_pre', -1) > 0 else None)
        levels = order[best] * 0
        return InstanceData(bboxes=boxes[large][order[best]], scores=scores[best], level_ids=levels)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """``x``: feature maps (N, C, H, W). Returns objectness logits and deltas, each a list of one map."""
        return super().forward(x[:1])


@MODELS.register_module()
class RFCNBBoxHead(BBoxHead):
    """Score maps, pooling and losses of R-FCN; decoding is mmdet's ``BBoxHead``, boxes are class-agnostic.

    Args:
        in_channels: channels of the feature map (res5: 2048).
        num_classes: K, without background. Unlike in the authors' files, background is the last class, as in mmdet.
        reduced_channels: channels after the 1 x 1 reduction.
        output_size: P; there are ``(K + 1) * P * P`` score maps and ``4 * P * P`` box maps.
        stride: pixels of the image for one pixel of the feature map.
        pooling: a kind of :func:`mmdet_softnms.models.ps_roi_pool.ps_roi_pool`. ``caffe``, the default, is what the
            authors' weights were trained with and the cheapest; ``bilinear`` is the Soft-NMS authors', who found
            it about 1 % better on COCO; ``deformable`` adds offset maps, as Deformable R-FCN does.
        trans_std: how far an offset of 1 moves a bin, in RoI sizes; for ``deformable``.
        ohem: train on so many RoIs an image, those of largest total loss, with no quota for either kind (section 2 of
            the R-FCN paper). The sampler should then hand over every RoI. None: on all that the sampler chose.
        **kwargs: the arguments of mmdet's ``BBoxHead``: coder, losses, ``init_cfg``.

    Raises:
        ValueError: an unknown pooling, boxes for each class, or OHEM of a loss on decoded boxes.
    """

    def __init__(
        self,
        in_channels: int = 2048,
        num_classes: int = 80,
        reduced_channels: int = 1024,
        output_size: int = 7,
        stride: int = 16,
        pooling: str = 'caffe',
        trans_std: float = 0.1,
        ohem: int | None = None,
        reg_class_agnostic: bool = True,
        reg_decoded_bbox: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if pooling not in KINDS:
            raise ValueError(f'pooling {pooling!r} is not one of {", ".join(KINDS)}')
        if not reg_class_agnostic:
            raise ValueError('reg_class_agnostic=False: R-FCN regresses one box for all classes')
        if ohem is not None and (ohem < 1 or reg_decoded_bbox):
            raise ValueError(f'ohem={ohem} must be positive, and needs reg_decoded_bbox=False, got {reg_decoded_bbox}')
        init_cfg = init_cfg or dict(
            type='Normal',
            layer='Conv2d',
            std=0.01,
            override=[dict(type='Constant', name=name, val=0) for name in ('cls_offset_maps', 'reg_offset_maps')]
            if pooling == 'deformable'
            else [],
        )
        super().__init__(
            with_cls=False,  # no fully connected layers
            roi_feat_size=output_size,
            in_channels=in_channels,
            num_classes=num_classes,
            reg_class_agnostic=True,
            reg_decoded_bbox=reg_decoded_bbox,
            init_cfg=init_cfg,
            **kwargs,
        )
        del self.fc_reg
        self.with_cls = True
        self.output_size = output_size
        self.spatial_scale = 1 / stride
        self.pooling = pooling
        self.coordinates = 'mmdet'  # RFCN sets it
        self.trans_std = trans_std
        self.ohem = ohem
        bins = output_size**2
        self.reduce = nn.Conv2d(in_channels, reduced_channels, 1)
        self.cls_maps = nn.Conv2d(reduced_channels, (num_classes + 1) * bins, 1)
        self.reg_maps = nn.Conv2d(reduced_channels, self.bbox_coder.encode_size * bins, 1)
        if pooling == 'deformable':
            self.cls_offset_maps = nn.Conv2d(reduced_channels, 2 * (num_classes + 1) * bins, 1)
            self.reg_offset_maps = nn.Conv2d(reduced_channels, 2 * bins, 1)

    def forward(self, feature: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and box deltas of RoIs.

        Args:
            feature (Tensor[N, C, H, W]): the map to reduce.
            rois (Tensor[R, 5]): image index and ``xyxy`` in pixels of the network's input.

        Returns:
            Class logits (R, K + 1), background last, and deltas (R, 4).
        """
        reduced = self.reduce(feature).relu()
        votes = []
        for branch in ('cls', 'reg'):
            offsets = None
            if self.pooling == 'deformable':
                offsets = self._pool(getattr(self, f'{branch}_offset_maps')(reduced), rois)
            votes.append(self._pool(getattr(self, f'{branch}_maps')(reduced), rois, offsets).mean(dim=(2, 3)))
        return votes[0], votes[1]

    def _pool(self, maps: Tensor, rois: Tensor, offsets: Tensor | None = None) -> Tensor:
        return ps_roi_pool(
            maps,
            rois,
            self.output_size,
            self.spatial_scale,
            kind=self.pooling,
            offsets=offsets,
            trans_std=self.trans_std,
            drop_whole=self.pooling == 'bilinear' and self.coordinates == 'caffe',
        )

    def _predict_by_feat_single(
        self,
        roi: Tensor,
        cls_score: Tensor,
        bbox_pred: Tensor,
        img_meta: dict[str, Any],
        rescale: bool = False,
        rcnn_test_cfg: ConfigDict | None = None,
    ) -> InstanceData:
        if self.coordinates == 'mmdet':
            return super()._predict_by_feat_single(roi, cls_score, bbox_pred, img_meta, rescale, rcnn_test_cfg)
        scale = _of_image(img_meta, 'scale_factor')[:2]
        roi = torch.cat([roi[:, :1], scale_boxes(roi[:, 1:], [1 / s for s in scale])], dim=1)
        original = dict(img_meta, img_shape=_of_image(img_meta, 'ori_shape'))
        results = super()._predict_by_feat_single(roi, cls_score, bbox_pred, original, False, rcnn_test_cfg)
        if not rescale:
            results.bboxes = scale_boxes(results.bboxes, scale)
        return results

    def loss_and_target(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        sampling_results: list[SamplingResult],
        rcnn_train_cfg: ConfigDict,
        concat: bool = True,
        reduction_override: str | None = None,
    ) -> dict[str, Any]:
        """As in mmdet's ``BBoxHead``, on the hardest RoIs only where ``ohem`` is set.

        Losses are means over the chosen RoIs, as the authors' (their fixed 128 is that number). The pooled results are
        at hand, so choosing costs no second pass over the score maps.
        """
        targets = self.get_targets(sampling_results, rcnn_train_cfg)
        losses_of = (cls_score, bbox_pred, rois, *targets)
        if self.ohem is not None:
            hardest = self.hardest(*losses_of)
            losses_of = tuple(each[hardest] for each in losses_of)
        return {'loss_bbox': self.loss(*losses_of, reduction_override=reduction_override), 'bbox_targets': targets}

    @torch.no_grad()
    def hardest(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
    ) -> Tensor:
        """Indices of the ``ohem`` RoIs of largest total loss in each image; arguments as for mmdet's ``loss``."""
        total = self.loss_cls(cls_score, labels, label_weights, reduction_override='none')
        if bool(bbox_weights.any()):  # mmdet's losses of nothing are scalars
            total = total + self.loss_bbox(bbox_pred, bbox_targets, bbox_weights, reduction_override='none').sum(dim=1)
        hardest = []
        for image in rois[:, 0].unique():
            mine = (rois[:, 0] == image).nonzero().flatten()
            hardest.append(mine[total[mine].topk(min(self.ohem or 0, len(mine))).indices])
        return torch.cat(hardest) if hardest else labels.new_zeros(0)


@MODELS.register_module()
class RFCNRoIHead(SoftNMSMixin, StandardRoIHead):
    """mmdet's ``StandardRoIHead`` for a bbox head that pools score maps itself, with suppression by rule.

    Args:
        in_index: which of the feature maps the bbox head takes; -1, the last, is res5.
        **kwargs: the arguments of mmdet's ``StandardRoIHead``, without RoI extractors and mask head.

    Raises:
        ValueError: a RoI extractor or a mask head, which R-FCN has none of.
    """

    raw_bbox_heads = (BBoxHead, RFCNBBoxHead)

    def __init__(self, *args: Any, in_index: int = -1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_index = in_index

    def init_bbox_head(self, bbox_roi_extractor: dict[str, Any] | None, bbox_head: dict[str, Any]) -> None:
        """Build the bbox head."""
        if bbox_roi_extractor is not None:
            raise ValueError('RFCNRoIHead takes no bbox_roi_extractor: set it to None, the bbox head pools score maps')
        self.bbox_head = mmdet.registry.MODELS.build(bbox_head)  # unscoped names are mmdet's
        if not isinstance(self.bbox_head, RFCNBBoxHead):
            raise ValueError(f'RFCNRoIHead needs an RFCNBBoxHead, not {type(self.bbox_head).__name__}')

    def init_mask_head(self, mask_roi_extractor: Any, mask_head: Any) -> None:
        """R-FCN has no mask head."""
        raise ValueError('RFCNRoIHead has no masks: leave mask_head out')

    def _bbox_forward(self, x: tuple[Tensor, ...], rois: Tensor) -> dict[str, Tensor | None]:
        cls_score, bbox_pred = self.bbox_head(x[self.in_index], rois)
        return {'cls_score': cls_score, 'bbox_pred': bbox_pred, 'bbox_feats': None}


def _of_image(img_meta: dict[str, Any], key: str) -> Any:
    """``img_meta[key]``, with a remedy where it is missing."""
    if img_meta.get(key) is None:
        raise ValueError(f"coordinates='caffe' needs {key} of every image: name it in meta_keys of PackDetInputs")
    return img_meta[key]
