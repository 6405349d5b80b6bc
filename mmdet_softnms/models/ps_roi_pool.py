"""Position-sensitive RoI pooling (R-FCN, Dai et al., NIPS 2016, section 2) in plain PyTorch.

A RoI is cut into P x P bins; bin (i, j) of output channel c looks at score map (c * P + i) * P + j only. Four kinds:

* ``caffe``: the mean of the pixels a bin touches; the original layer (``psroi_pooling_layer.cu`` of R-FCN's Caffe).
* ``torchvision``: the same with the rounding of ``torchvision.ops.ps_roi_pool``, last row and column unused as there.
* ``bilinear``: the mean of 2 x 2 bilinear samples, nothing rounded; the Soft-NMS authors' layer
  (``caffe/src/caffe/layers/psroi_pooling_layer.cu`` of bharatsingh430/soft-nms).
* ``deformable``: the mean of 4 x 4 bilinear samples, each bin moved by a learned offset; ``DeformablePSROIPooling`` of
  Deformable ConvNets (Dai et al., ICCV 2017, section 2.2).

How: a bin is a rectangle, or a grid, of samples, so its weights are an outer product. Means of rectangles are four
corners of an integral image, in float64. Means of samples are ``wy @ map @ wx`` with one row of weights for each RoI,
which is dense arithmetic that every device is good at and that differentiates with respect to the offsets as well.
Rectangles go through one image and one row of bins at a time, samples through one bin at a time, and both compute again
for the gradient what would be large, so that memory does not grow with P.

Glossary: N images, C output channels, P bins a side, H x W pixels of a map, R RoIs, G groups of channels that share
offsets.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

KINDS = ('caffe', 'torchvision', 'bilinear', 'deformable')
_KEPT_BYTES = 2**27  # sums over rows up to this size are kept for the gradient, larger ones computed again


def ps_roi_pool(
    maps: Tensor,
    rois: Tensor,
    output_size: int = 7,
    spatial_scale: float = 1 / 16,
    *,
    kind: str = 'caffe',
    offsets: Tensor | None = None,
    trans_std: float = 0.1,
    position_sensitive: bool = True,
    drop_whole: bool = False,
) -> Tensor:
    """Pool position-sensitive score maps.

    Args:
        maps (Tensor[N, C * P * P, H, W]): score maps, channel ``(c * P + i) * P + j`` for channel c, bin row i and bin
            column j. Any float dtype; half types are pooled in float32 (sums of rectangles always in float64).
        rois (Tensor[R, 5]): image index, then ``xyxy`` in pixels of the input image. Taken in float32; float64 where
            ``maps`` is float64.
        output_size: P, the bins on each side.
        spatial_scale: pixels of a map for one pixel of the input image.
        kind: see the module's docstring.
        offsets (Tensor[R, 2 * G, P, P], optional): for ``deformable`` only. Channel ``2 * g`` moves the bins of the
            output channels ``g * C / G`` and following along x, ``2 * g + 1`` along y, in units of ``trans_std`` times
            the RoI's width and height. None: no bin moves.
        trans_std: see ``offsets``.
        position_sensitive: False: ``maps`` are (N, C, H, W), and every bin of channel c looks at map c, as with a group
            size of 1 in the originals; for the two kinds that sample.
        drop_whole: for ``bilinear``: a sample on a whole row or column counts 0, as in the original, whose weights are
            the distances to ``floor`` and ``ceil``, which are one there.

    Returns:
        Tensor[R, C, P, P] in the dtype of ``maps``. A bin without any pixel or sample inside the map is 0. Gradients
        flow to ``maps`` and ``offsets``, never to ``rois``, as in the originals.

    Raises:
        ValueError: an unknown kind, shapes that do not belong together, an image index out of range, RoIs that are not
            finite, offsets with another kind, or maps that are not position-sensitive with rectangles.

    Note:
        float64 is needed for exact sums: on devices without it (MPS) ``caffe`` and ``torchvision`` run on the CPU.
        GPU builds of the original may fuse multiply and add where a bin's edge falls on a whole number; this does not.
    """
    places = output_size if position_sensitive else 1  # with a map of their own, on each side
    images, channels, height, width = _check(maps, rois, output_size, places, kind, offsets)
    out_channels = channels // places**2
    dtype = maps.dtype if maps.dtype in (torch.float32, torch.float64) else torch.float32
    image = rois[:, 0].long()
    boxes = rois[:, 1:].detach().to(dtype)
    with torch.autocast(maps.device.type, enabled=False):  # edges and sums keep their precision under AMP
        if kind in ('caffe', 'torchvision'):
            edges = _caffe_edges if kind == 'caffe' else _torchvision_edges
            columns = edges(boxes[:, 0], boxes[:, 2], output_size, spatial_scale, width)
            rows = edges(boxes[:, 1], boxes[:, 3], output_size, spatial_scale, height)
            if maps.device.type == 'mps':
                arguments = (each.cpu() for each in (maps, image, rows, columns))
                return _MeanOfRectangles.apply(*arguments).to(maps.device)
            return _MeanOfRectangles.apply(maps, image, rows, columns)

        grouped = maps.to(dtype).reshape(images, out_channels, places, places, height, width)
        if offsets is None:
            offsets = boxes.new_zeros(len(rois), 2, output_size, output_size)
        offsets = offsets.to(dtype) * trans_std
        return _mean_of_samples(grouped, image, boxes, offsets, spatial_scale, kind, drop_whole).to(maps.dtype)


def _check(
    maps: Tensor, rois: Tensor, output_size: int, places: int, kind: str, offsets: Tensor | None
) -> tuple[int, int, int, int]:
    if kind not in KINDS:
        raise ValueError(f'kind {kind!r} is not one of {", ".join(KINDS)}')
    if places != output_size and kind in ('caffe', 'torchvision'):
        raise ValueError(f'position_sensitive=False goes with kinds that sample, not with {kind!r}')
    if maps.dim() != 4 or not maps.is_floating_point() or 0 in maps.shape[2:]:
        raise ValueError(f'maps must be floating point (N, C * P * P, H, W), got {maps.dtype} {tuple(maps.shape)}')
    images, channels, height, width = maps.shape
    if output_size < 1 or channels % places**2 or channels == 0:
        raise ValueError(f'{channels} channels are no multiple of output_size squared, {output_size} * {output_size}')
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f'rois must be (R, 5): image index and xyxy, got {tuple(rois.shape)}')
    if rois.device != maps.device:
        raise ValueError(f'rois are on {rois.device}, maps on {maps.device}')
    if len(rois) and not bool(torch.isfinite(rois).all()):
        raise ValueError('rois must be finite')
    if len(rois) and not bool(((rois[:, 0] >= 0) & (rois[:, 0] < images)).all()):
        raise ValueError(f'rois[:, 0] must be an image index, 0 to {images - 1}')
    if offsets is not None:
        if kind != 'deformable':
            raise ValueError(f"offsets belong to kind 'deformable', not to {kind!r}")
        groups, odd = divmod(offsets.shape[1] if offsets.dim() == 4 else 1, 2)
        if odd or offsets.shape != (len(rois), 2 * groups, output_size, output_size):
            raise ValueError(f'offsets must be (R, 2 * G, P, P), got {tuple(offsets.shape)} for {len(rois)} RoIs')
        if groups == 0 or (channels // places**2) % groups:
            raise ValueError(f'{channels // places**2} output channels do not divide into {groups} groups')
    return images, channels, height, width


def _round(values: Tensor) -> Tensor:
    """C's ``round``: halves away from zero; torch's goes to the even neighbour."""
    whole = values.trunc()
    return whole + ((values - whole).abs() >= 0.5) * values.sign()


def _caffe_edges(start: Tensor, end: Tensor, bins: int, spatial_scale: float, size: int) -> Tensor:
    """First pixel and the one behind the last, (R, P, 2): coordinates rounded in the image, bins at least 0.1 wide."""
    first = _round(start) * spatial_scale
    extent = ((_round(end) + 1) * spatial_scale - first).clamp(min=0.1)
    step = (extent / bins)[:, None]
    index = torch.arange(bins, device=start.device)
    lower = torch.floor(index * step + first[:, None])
    upper = torch.ceil((index + 1) * step + first[:, None])
    return torch.stack([lower, upper], dim=-1).clamp(0, size).long()


def _torchvision_edges(start: Tensor, end: Tensor, bins: int, spatial_scale: float, size: int) -> Tensor:
    """As :func:`_caffe_edges`: coordinates rounded in the map, at least 1 wide, cut at the last pixel (exclusive)."""
    first = _round(start * spatial_scale)
    extent = (_round(end * spatial_scale) - first).clamp(min=1)
    step = (extent / bins)[:, None]
    index = torch.arange(bins, device=start.device)
    lower = torch.floor(index * step) + first[:, None]
    upper = torch.ceil((index + 1) * step) + first[:, None]
    return torch.stack([lower, upper], dim=-1).clamp(0, size - 1).long()


class _MeanOfRectangles(torch.autograd.Function):
    """``(maps, image (R,), rows (R, P, 2), columns (R, P, 2)) -> (R, C, P, P)`` by integral images.

    An integral image of one image and one row of bins at a time, (P, H + 1, W + 1, C) in float64: 18 MB for COCO's
    81 * 7 * 7 maps at 50 x 75. Channels come last, so that a corner is one contiguous row.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        _, channels, height, width = maps.shape
        bins = rows.shape[1]
        pooled = maps.new_zeros(len(image), bins, bins, channels // bins**2)
        for n, mine in _by_image(image, len(maps)):
            grouped = maps[n].reshape(-1, bins, bins, height, width)
            for i in range(bins):
                integral = maps.new_zeros(bins, height + 1, width + 1, grouped.shape[0], dtype=torch.float64)
                integral[:, 1:, 1:] = grouped[:, i].permute(1, 2, 3, 0)
                for axis in (1, 2):
                    _accumulate(integral, axis)
                corners, area = _corners(rows[mine, i], columns[mine], height, width)
                flat = integral.flatten(0, 2)
                total = flat[corners[0]] - flat[corners[1]] - flat[corners[2]] + flat[corners[3]]
                pooled[mine, i] = (total / area[..., None]).to(maps.dtype)
        ctx.save_for_backward(image, rows, columns)
        ctx.maps_shape = maps.shape
        return pooled.permute(0, 3, 1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (grad,) = grads
        image, rows, columns = ctx.saved_tensors
        _, channels, height, width = ctx.maps_shape
        bins = rows.shape[1]
        to_maps = grad.new_zeros(ctx.maps_shape)
        for n, mine in _by_image(image, len(to_maps)):
            grouped = to_maps[n].view(-1, bins, bins, height, width)
            for i in range(bins):
                corners, area = _corners(rows[mine, i], columns[mine], height, width)
                share = grad[mine, :, i].permute(0, 2, 1).double() / area[..., None]
                # A rectangle of equal shares is the sum, over all that lies lower right, of four signed corners.
                integral = share.new_zeros(bins * (height + 1) * (width + 1), channels // bins**2)
                for corner, sign in zip(corners, (1, -1, -1, 1), strict=True):
                    integral.index_add_(0, corner.flatten(), share.flatten(0, 1), alpha=sign)
                integral = integral.view(bins, height + 1, width + 1, -1)
                for axis in (1, 2):
                    _accumulate(integral, axis, reverse=True)
                grouped[:, i] = integral[:, 1:, 1:].permute(3, 0, 1, 2).to(grad.dtype)
        return to_maps, None, None, None


def _by_image(image: Tensor, images: int) -> Iterator[tuple[int, Tensor]]:
    """The images that have RoIs, each with the indices of its own."""
    for n in range(images):
        mine = (image == n).nonzero().flatten()
        if len(mine):
            yield n, mine


def _accumulate(integral: Tensor, axis: int, reverse: bool = False) -> None:
    """Cumulative sum in place, whole rows at a time: torch's cumsum walks a strided axis one number at a time."""
    slices = integral.unbind(axis)
    slices = slices[::-1] if reverse else slices
    for previous, current in itertools.pairwise(slices):
        current += previous


def _corners(rows: Tensor, columns: Tensor, height: int, width: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Where one row of bins looks into the flattened (P, H + 1, W + 1) integral images.

    Args:
        rows (Tensor[R, 2]), columns (Tensor[R, P, 2]): first pixel and the one behind the last.

    Returns:
        Indices (R, P) of the lower right, upper right, lower left and upper left corner, and the area (R, P) in pixels,
        1 where a bin is empty: all its corners coincide, so that its sum is exactly 0.
    """
    top, bottom = rows[:, None].unbind(-1)
    left, right = columns.unbind(-1)
    empty = (bottom <= top) | (right <= left)
    bottom, right = torch.where(empty, top, bottom), torch.where(empty, left, right)
    area = ((bottom - top) * (right - left)).clamp(min=1)
    first = torch.arange(columns.shape[1], device=columns.device) * (height + 1)
    corners = ((bottom, right), (top, right), (bottom, left), (top, left))
    return tuple((first + y) * (width + 1) + x for y, x in corners), area


def _mean_of_samples(
    maps: Tensor, image: Tensor, boxes: Tensor, offsets: Tensor, spatial_scale: float, kind: str, drop_whole: bool
) -> Tensor:
    """``maps`` (N, C, P, P, H, W), ``image`` (R,), ``boxes`` (R, 4), ``offsets`` (R, 2 * G, P, P) in RoI sizes.

    ``maps`` may be (N, C, 1, 1, H, W), one for all bins. Returns (R, C, P, P).
    """
    bins = offsets.shape[-1]
    by_image = list(_by_image(image, len(maps)))

    def one_bin(of_bin: Tensor, along_x: Tensor, along_y: Tensor, i: int, j: int) -> Tensor:
        """``of_bin`` (N, C, H, W), ``along_x`` and ``along_y`` (R, G) -> (R, C)."""
        groups = along_x.shape[1]
        height, width = of_bin.shape[2:]
        wy = _sample_weights(boxes[:, 1], boxes[:, 3], along_y, i, bins, spatial_scale, height, kind, drop_whole)
        wx = _sample_weights(boxes[:, 0], boxes[:, 2], along_x, j, bins, spatial_scale, width, kind, drop_whole)
        # Part of the graph without any RoI, too, as DDP wants it.
        pooled = of_bin.new_zeros(len(boxes), of_bin.shape[1]) + of_bin.flatten()[:0].sum()
        for n, mine in by_image:
            grouped = of_bin[n].reshape(groups, -1, height, width).transpose(1, 2)  # (G, H, C / G, W)
            over_rows = torch.bmm(wy[mine].transpose(0, 1), grouped.flatten(2)).view(groups, len(mine), -1, width)
            mean = (over_rows * wx[mine].transpose(0, 1)[:, :, None]).sum(-1)  # (G, R of this image, C / G)
            pooled = pooled.index_copy(0, mine, mean.permute(1, 0, 2).flatten(1))
        return pooled

    # Unbound at once: the gradient of a slice would fill a tensor of the size of all maps with zeros for each bin.
    planes = maps.flatten(2, 3).unbind(2)
    along_x, along_y = (offsets[:, axis::2].flatten(2).unbind(2) for axis in (0, 1))
    # The gradient of the offsets needs the sums over rows, (R, C, W): 7 MB a bin, 360 in all, for COCO's classes.
    kept = len(boxes) * bins**2 * maps.shape[1] * maps.shape[-1] * maps.element_size()
    recompute = offsets.requires_grad and kept > _KEPT_BYTES
    pooled = []
    for bin_index, (i, j) in enumerate(itertools.product(range(bins), repeat=2)):
        plane = planes[bin_index % len(planes)]  # one for each bin, or one for all
        arguments = (plane, along_x[bin_index], along_y[bin_index], i, j)
        if recompute:
            pooled.append(checkpoint(one_bin, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            pooled.append(one_bin(*arguments))
    return torch.stack(pooled, dim=-1).unflatten(-1, (bins, bins))


def _sample_weights(
    start: Tensor,
    end: Tensor,
    offset: Tensor,
    index: int,
    bins: int,
    spatial_scale: float,
    size: int,
    kind: str,
    drop_whole: bool,
) -> Tensor:
    """Weights along one axis, (R, G, size), of bin ``index``: the mean of those of its samples.

    ``start`` and ``end`` (R,) in pixels of the input image, ``offset`` (R, G) in RoI sizes.
    """
    if kind == 'bilinear':
        first = start * spatial_scale
        step = (end * spatial_scale - first) / bins
        places = torch.stack([first + (index + at) * step for at in (0.25, 0.75)], dim=-1)[:, None]  # (R, 1, S)
        # The original's margins, which keep floor and ceil inside; on maps below 3 pixels they cross.
        places = places.clamp(min=0.001).clamp(0, size - 1.001 if size > 1 else 0)
        inside = torch.ones_like(places, dtype=torch.bool)
    else:
        first = _round(start) * spatial_scale - 0.5
        extent = ((_round(end) + 1) * spatial_scale - 0.5 - first).clamp(min=0.1)
        step = extent / bins
        corner = (index * step + first)[:, None] + offset * extent[:, None]  # (R, G)
        samples = torch.arange(4, device=start.device) * (step / 4)[:, None]
        places = corner[..., None] + samples[:, None]  # (R, G, S)
        inside = (places >= -0.5) & (places <= size - 0.5)
        places = places.clamp(0, size - 1).where(inside, 0)  # an offset may be NaN
    # Two pixels a sample. On a whole pixel they are one, and the gradient of its place is 0, as in the originals.
    lower, upper = places.detach().floor(), places.detach().ceil()
    share = places - lower
    counted = inside & (lower != upper) if drop_whole else inside
    weights = places.new_zeros(*places.shape[:-1], size)
    for pixel, weight in ((lower, 1 - share), (upper, share)):
        weights = weights.scatter_add(-1, pixel.long(), weight * counted)
    return weights / inside.sum(dim=-1, keepdim=True).clamp(min=1)
