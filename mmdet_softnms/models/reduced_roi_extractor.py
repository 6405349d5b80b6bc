"""What Faster R-CNN with two fc layers has between its backbone and mmdet's ``Shared2FCBBoxHead``.

Deformable ConvNets (Dai et al., ICCV 2017, section 4.2): a dilated res5, a 1 x 1 reduction to 256 channels on it, and
RoI pooling; in the deformable form bins move by offsets that a fully connected layer computes from the RoI itself.
``faster_rcnn/symbols/resnet_v1_101_rcnn.py`` and ``resnet_v1_101_rcnn_dcn.py`` of msracver/Deformable-ConvNets.
"""

from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet_softnms.models.ps_roi_pool import ps_roi_pool
from mmdet_softnms.models.roi_max_pool import roi_max_pool
from mmdet_softnms.registry import MODELS

POOLINGS = ('max', 'deformable')


@MODELS.register_module()
class ReducedRoIExtractor(BaseModule):
    """Reduces the last feature map by a 1 x 1 convolution and pools RoIs from it; for any RoI head of mmdet.

    Args:
        in_channels: channels of the feature map (res5: 2048).
        out_channels: C, after the reduction.
        output_size: P, the bins on each side.
        stride: pixels of the image for one pixel of the feature map.
        pooling: ``max``, :func:`mmdet_softnms.models.roi_max_pool.roi_max_pool`; or ``deformable``, the mean of 4 x 4
            samples a bin, twice: once in place, for the fully connected layer that gives the offsets of the bins, and
            once moved by them.
        trans_std: how far an offset of 1 moves a bin, in RoI sizes; for ``deformable``.
        num_inputs: so many feature maps are handed over by the RoI head; the last one is taken.
        init_cfg: as for every module of mmengine.

    Raises:
        ValueError: an unknown pooling.
    """

    def __init__(
        self,
        in_channels: int = 2048,
        out_channels: int = 256,
        output_size: int = 7,
        stride: int = 16,
        pooling: str = 'max',
        trans_std: float = 0.1,
        num_inputs: int = 2,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f'pooling {pooling!r} is not one of {", ".join(POOLINGS)}')
        reduction = dict(type='Normal', layer='Conv2d', std=0.01)
        no_offsets = dict(type='Constant', val=0, override=dict(name='offset_fc'))
        super().__init__(init_cfg or ([reduction, no_offsets] if pooling == 'deformable' else reduction))
        self.out_channels = out_channels
        self.output_size = output_size
        self.spatial_scale = 1 / stride
        self.pooling = pooling
        self.trans_std = trans_std
        self.num_inputs = num_inputs
        self.reduce = nn.Conv2d(in_channels, out_channels, 1)
        if pooling == 'deformable':
            bins = output_size**2
            self.offset_fc = nn.Linear(out_channels * bins, 2 * bins)

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Features of RoIs.

        Args:
            feats: maps, of which the last one (N, in_channels, H, W) is reduced.
            rois (Tensor[R, 5]): image index and ``xyxy`` in pixels of the network's input.
            roi_scale_factor: mmdet's argument for enlarged RoIs, which has no meaning here.

        Returns:
            Tensor[R, C, P, P].

        Raises:
            ValueError: RoIs are to be enlarged.
        """
        if roi_scale_factor is not None:
            raise ValueError(f'roi_scale_factor={roi_scale_factor}: ReducedRoIExtractor takes RoIs as they are')
        maps = self.reduce(feats[-1]).relu()
        if self.pooling == 'max':
            return roi_max_pool(maps, rois, self.output_size, self.spatial_scale)
        offsets = self.offset_fc(self._mean(maps, rois).flatten(1))
        return self._mean(maps, rois, offsets.view(-1, 2, self.output_size, self.output_size))

    def _mean(self, maps: Tensor, rois: Tensor, offsets: Tensor | None = None) -> Tensor:
        return ps_roi_pool(
            maps,
            rois,
            self.output_size,
            self.spatial_scale,
            kind='deformable',
            offsets=offsets,
            trans_std=self.trans_std,
            position_sensitive=False,
        )
