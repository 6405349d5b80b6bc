"""The RoI extractor of the two-fc Faster R-CNN; tests/test_tools/test_rfcn_mxnet_to_mmdet.py has MXNet itself."""

import pytest
import torch
from mmdet.registry import MODELS

from mmdet_softnms.models.ps_roi_pool import ps_roi_pool
from mmdet_softnms.models.reduced_roi_extractor import ReducedRoIExtractor
from mmdet_softnms.models.roi_max_pool import roi_max_pool

ROIS = torch.tensor([[0.0, 10, 20, 100, 90], [1, 0, 0, 159, 111], [0, 33, 33, 33, 33]])


def extractor(pooling: str) -> ReducedRoIExtractor:
    torch.manual_seed(0)
    made = MODELS.build(
        dict(type='mmdet_softnms.ReducedRoIExtractor', in_channels=8, out_channels=4, output_size=3, pooling=pooling)
    )
    made.init_weights()
    torch.nn.init.normal_(made.reduce.weight)
    return made


def test_reduces_the_last_map_and_pools() -> None:
    made = extractor('max')
    maps = torch.randn(2, 8, 7, 10)
    found = made((torch.randn(2, 3, 7, 10), maps), ROIS)
    torch.testing.assert_close(found, roi_max_pool(made.reduce(maps).relu(), ROIS, 3))
    assert made.num_inputs == 2 and not hasattr(made, 'offset_fc')


def test_offsets_come_from_the_roi_itself_and_learn_from_zero() -> None:
    made = extractor('deformable')
    maps = torch.randn(2, 8, 7, 10, requires_grad=True)
    in_place = made((maps,), ROIS)
    reduced = made.reduce(maps).relu()
    # One map for all bins: position-sensitive pooling of so many copies.
    copies = reduced.repeat_interleave(9, dim=1)
    torch.testing.assert_close(in_place, ps_roi_pool(copies, ROIS, 3, kind='deformable'))
    in_place.square().sum().backward()
    for name, value in made.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.abs().max() > 0, name

    torch.nn.init.normal_(made.offset_fc.weight)
    offsets = made.offset_fc(in_place.flatten(1)).view(3, 2, 3, 3)
    moved = ps_roi_pool(copies, ROIS, 3, kind='deformable', offsets=offsets)
    torch.testing.assert_close(made((maps,), ROIS), moved)
    assert (moved - in_place).abs().max() > 0.01
    assert made((maps,), ROIS[:0]).shape == (0, 4, 3, 3)


def test_errors() -> None:
    with pytest.raises(ValueError, match="pooling 'mean' is not one of max, deformable"):
        extractor('mean')
    with pytest.raises(ValueError, match='roi_scale_factor=1.3'):
        extractor('max')((torch.zeros(2, 8, 7, 10),), ROIS, roi_scale_factor=1.3)
    with pytest.raises(ValueError, match="not with 'caffe'"):
        ps_roi_pool(torch.zeros(2, 4, 7, 10), ROIS, 3, kind='caffe', position_sensitive=False)
