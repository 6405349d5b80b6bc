"""RoI pooling by maximum (Fast R-CNN, Girshick, ICCV 2015, section 2.1) in plain PyTorch, with the original's rounding.

Caffe's and MXNet's ``ROIPooling``: RoIs are rounded to whole pixels of the map, the last one included. mmcv's
``RoIPool`` rounds nothing before it cuts the bins, and has no CPU form. The maximum of a rectangle is that of four
overlapping ones whose sides are powers of two (a sparse table), so that no loop goes over RoIs or bins.
"""

import torch
from torch import Tensor

from mmdet_softnms.models.ps_roi_pool import _round


def roi_max_pool(maps: Tensor, rois: Tensor, output_size: int = 7, spatial_scale: float = 1 / 16) -> Tensor:
    """The maximum over each bin of each RoI; ``roi_pooling.cc`` of MXNet 1.9.1.

    Args:
        maps (Tensor[N, C, H, W]): any float dtype.
        rois (Tensor[R, 5]): image index, then ``xyxy`` in pixels of the input image. Edges are computed in float32.
        output_size: P, the bins on each side.
        spatial_scale: pixels of a map for one pixel of the input image.

    Returns:
        Tensor[R, C, P, P]. A bin without any pixel inside the map is 0. Gradients flow to ``maps``, shared by equal
        maxima. Memory: a copy of the maps for each pair of powers of two that a bin's sides reach, 12 for 600 x 1,000
        pixels.

    Raises:
        ValueError: shapes that do not belong together, or an image index out of range.
    """
    if maps.dim() != 4 or rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f'maps must be (N, C, H, W) and rois (R, 5), got {tuple(maps.shape)} and {tuple(rois.shape)}')
    images, _, height, width = maps.shape
    image = rois[:, 0].long()
    if len(rois) and not bool(((image >= 0) & (image < images)).all()):
        raise ValueError(f'rois[:, 0] must be an image index, 0 to {images - 1}')
    boxes = rois[:, 1:].detach().float()
    left, right = _edges(boxes[:, 0], boxes[:, 2], output_size, spatial_scale, width)
    top, bottom = _edges(boxes[:, 1], boxes[:, 3], output_size, spatial_scale, height)
    level_x, level_y = _level(right - left), _level(bottom - top)  # (R, P)
    columns = int(level_x.max()) + 1 if len(rois) else 1
    rows = int(level_y.max()) + 1 if len(rois) else 1
    table = _sparse_table(maps.permute(0, 2, 3, 1), rows, columns)

    # Of each bin (R, P, P): which of the tables, and its four corners there.
    start = (level_y[:, :, None] * columns + level_x[:, None]) * images + image[:, None, None]
    last_y, last_x = bottom - 2**level_y, right - 2**level_x
    pooled = None
    for y in (top, last_y):
        for x in (left, last_x):
            y_inside, x_inside = y.clamp(0, height - 1), x.clamp(0, width - 1)  # of empty bins, which are 0 below
            corner = table[(start * height + y_inside[:, :, None]) * width + x_inside[:, None]]
            pooled = corner if pooled is None else torch.maximum(pooled, corner)
    assert pooled is not None
    empty = (bottom <= top)[:, :, None] | (right <= left)[:, None]
    return pooled.masked_fill(empty[..., None], 0).permute(0, 3, 1, 2)


def _edges(start: Tensor, end: Tensor, bins: int, spatial_scale: float, size: int) -> tuple[Tensor, Tensor]:
    """First pixel of each bin and the one behind its last, (R, P) each, along an axis of ``size`` pixels."""
    first, last = _round(start * spatial_scale), _round(end * spatial_scale)
    step = ((last - first + 1).clamp(min=1) / bins)[:, None]
    index = torch.arange(bins, device=start.device)
    lower = torch.floor(index * step) + first[:, None]
    upper = torch.ceil((index + 1) * step) + first[:, None]
    return lower.clamp(0, size).long(), upper.clamp(0, size).long()


def _level(extent: Tensor) -> Tensor:
    """The largest k with ``2 ** k <= extent``; 0 for what is empty."""
    powers = 2 ** torch.arange(1, 16, device=extent.device)
    return (extent[..., None] >= powers).sum(-1)


def _sparse_table(maps: Tensor, rows: int, columns: int) -> Tensor:
    """``maps`` (N, H, W, C) -> (rows * columns * N * H * W, C): maxima over 2**k rows and 2**l columns from there on.

    The table of (k, l) stands at ``k * columns + l``; what would reach over the border is never asked for.
    """
    tables = []
    for k in range(rows):
        if k:
            maps = _doubled(maps, 1, 2 ** (k - 1))
        wide = maps
        for each in range(columns):
            if each:
                wide = _doubled(wide, 2, 2 ** (each - 1))
            tables.append(wide)
    return torch.stack(tables).flatten(0, 3)


def _doubled(maps: Tensor, axis: int, by: int) -> Tensor:
    """Each with its neighbour ``by`` further on; the last ``by`` as they are."""
    kept = maps.shape[axis] - by
    pairs = torch.maximum(maps.narrow(axis, 0, kept), maps.narrow(axis, by, kept))
    return torch.cat([pairs, maps.narrow(axis, kept, by)], axis)
