"""Exact Soft-NMS on NVIDIA GPUs by Triton: the host's side. Importing this module does not need triton.

On the device, in one stream and without waiting for it anywhere: check the values and set up scores (one kernel), sort
the candidates into segments, one for each class of each image (stable sorts of torch), select in all segments in one
launch (``_triton_kernels.select``, which explains the algorithm), and merge.

Why merging is a sort: within a class, a later selection has a lower score, or an equal one and a higher index (had its
index been lower, it would have come first: scores never rise). The merged sequence over classes takes the highest
score, then the lowest index, at every step. So it is the order by (score falling, index rising) of all selections.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmdet_softnms.ops import weights
from mmdet_softnms.ops._arguments import Parameters, check_parameters, check_tensors, raise_bad_values, working_type

CHUNK = 512
"""Candidates a program holds in registers: 4 warps of 32 threads, 4 candidates each. Reasoned, not measured."""
_WARPS = 4
_PREPARE_BLOCK = 1024
_MOST_PROGRAMS = 4096  # further segments are taken by the same programs, one after the other
_CAPABILITY = (8, 0)  # what current Triton releases support
_VERSION = (3, 6)  # 3.5.1 and older flush float32 denormals to zero in the division (div.rn.ftz.f32)


def available(device: torch.device) -> bool:
    """Whether :func:`soft_nms_triton` can be used for tensors on ``device``.

    An NVIDIA GPU of compute capability 8.0 or higher, triton 3.6 or newer (which torch 2.11 and newer bring), and a C
    compiler for it (it builds its launchers); where the last fails, a RuntimeWarning says why, once. Anything else is
    served by the portable path. The first call for a device compiles a small kernel, later ones cost nothing.
    """
    return device.type == 'cuda' and torch.version.hip is None and _works(device.index)


@functools.cache
def _works(index: int | None) -> bool:
    if not torch.cuda.is_available() or _version() < _VERSION:
        return False
    device = torch.device('cuda', torch.cuda.current_device() if index is None else index)
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    try:
        _probe(device)
    except Exception as error:
        warnings.warn(
            'mmdet_softnms runs Soft-NMS on this GPU in plain PyTorch (much slower), because Triton does not work: '
            f'{error or type(error).__name__}',
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return True


def _version() -> tuple[int, ...]:
    """Of triton: (major, minor), or () where it is not installed."""
    try:
        import triton
    except ImportError:
        return ()
    return tuple(int(part) for part in triton.__version__.split('.')[:2])


def _probe(device: torch.device) -> None:
    """Raises what keeps Triton from compiling and launching a kernel."""
    params = Parameters('hard', 0.5, 0.5, 0.0, -1, 0.0)
    _prepare(torch.zeros(1, 4, device=device), torch.zeros(1, device=device), None, None, 1, params)


def select(boxes: Tensor, scores: Tensor, labels: Tensor | None, params: Parameters) -> tuple[Tensor, Tensor]:
    """Select by the definition in :func:`mmdet_softnms.soft_nms`; waits for the device once, for the count.

    Args, Returns, Raises: as :func:`mmdet_softnms.ops._reference.select`.
    """
    keep, kept_scores, count = run(boxes, scores, labels, None, 1, params)
    selected = int(count)
    if selected < 0:
        raise_bad_values(boxes, scores, labels, params.offset)
    return keep[:selected], kept_scores[:selected]


def soft_nms_triton(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    images: Tensor | None = None,
    *,
    num_images: int = 1,
    method: str = 'gaussian',
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    max_num: int = -1,
    offset: float = 0,
    decay: str = 'product',
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mmdet_softnms.soft_nms` for one image or a batch, with an output of fixed size and without waiting.

    Nothing in here reads a value from the device: shapes depend on shapes and on ``max_num`` alone.

    Args:
        boxes (Tensor[N, 4]), scores (Tensor[N]), labels (Tensor[N], optional): as in ``soft_nms``, on a GPU for which
            :func:`available` is true (on any device under Triton's interpreter). N < 2 ** 31.
        images (Tensor[N], optional): which image of the batch each candidate belongs to, any integer type, in
            [0, ``num_images``), in any order. Images never influence each other.
        num_images: B, the number of images, where ``images`` is given.
        method, iou_threshold, sigma, min_score, offset, decay: as in ``soft_nms``.
        max_num: as in ``soft_nms``, for each image.

    Returns:
        ``keep`` (Tensor[B, K], int64): input indices (into all N) in selection order, padded with -1.
        ``scores`` (Tensor[B, K]): decayed scores in the dtype of the input scores, padded with 0.
        ``count`` (Tensor[B], int64): how many of each row count; -1 in every place where a value of the input is bad
        (the rows are all padding then): a value not finite, an area that overflows, a negative label, an image index
        out of range. K is N, or ``min(max_num, N)``. Without ``images`` all three lack the first dimension.
        B x K is memory: give ``max_num`` for a batch.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices or parameters, as in ``soft_nms``. Bad values do not raise.
    """
    check_tensors(boxes, scores, labels)
    if images is not None:
        if images.shape != scores.shape or images.device != scores.device:
            raise ValueError(
                f'images must have shape {tuple(scores.shape)} on {scores.device}, '
                f'got {tuple(images.shape)} on {images.device}'
            )
        if images.dtype == torch.bool or images.is_floating_point() or images.is_complex():
            raise TypeError(f'images must be of an integer type, got {images.dtype}')
        if num_images < 0:
            raise ValueError(f'num_images must be >= 0, got {num_images}')
    dtype = working_type(boxes, scores)
    params = check_parameters(method, iou_threshold, sigma, min_score, max_num, offset, decay, dtype=dtype)
    score_dtype = scores.dtype
    with torch.no_grad():
        keep, kept_scores, count = run(
            boxes.detach().to(dtype),
            scores.detach().to(dtype),
            None if labels is None else labels.to(torch.int64),
            None if images is None else images.to(torch.int64),
            num_images,
            params,
        )
        return keep, kept_scores.to(score_dtype), count


def soft_nms_of_list(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], labels: Sequence[Tensor] | None, **parameters: Any
) -> list[tuple[Tensor, Tensor]] | None:
    """The images of a batch in one launch; waits for the device once, for the counts.

    Args:
        boxes, scores, labels: for each image, as in ``soft_nms``; each of one type and all on one device, not empty
            lists. parameters: as there.

    Returns:
        ``(keep, scores)`` of each image, or None where a value is bad.
    """
    sizes = [len(one) for one in scores]
    device = scores[0].device
    limit = parameters.get('max_num', -1)
    if isinstance(limit, int) and not isinstance(limit, bool) and limit == -1:
        parameters['max_num'] = max(sizes)  # no limit for any image, but one for the size of the output
    keep, kept_scores, count = soft_nms_triton(
        torch.cat(tuple(boxes)),
        torch.cat(tuple(scores)),
        None if labels is None else torch.cat([one.to(torch.int64) for one in labels]),
        torch.cat([torch.full((size,), number, device=device) for number, size in enumerate(sizes)]),
        num_images=len(sizes),
        **parameters,
    )
    counts = count.tolist()
    if -1 in counts:
        return None
    first = [sum(sizes[:number]) for number in range(len(sizes))]
    return [(keep[i, :n] - first[i], kept_scores[i, :n]) for i, n in enumerate(counts)]


def run(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    images: Tensor | None,
    num_images: int,
    params: Parameters,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`soft_nms_triton`, after its checks.

    Args:
        boxes, scores: of one dtype, float32 or float64. labels, images: int64 or None.
        chunk: a power of 2; the tests make it small, so that small inputs have many chunks.
    """
    num_boxes = len(scores)
    size = num_boxes if params.max_num < 0 else min(params.max_num, num_boxes)
    if num_boxes >= 2**31 - 1:
        raise ValueError(f'boxes has {num_boxes} rows; this path numbers them in 31 bits')
    if num_boxes == 0 or (images is not None and num_images == 0):
        rows = () if images is None else (num_images,)
        keep = torch.full((*rows, size), -1, dtype=torch.int64, device=scores.device)
        # Candidates of no image are out of range.
        count = torch.full(rows, 0 if num_boxes == 0 else -1, dtype=torch.int64, device=scores.device)
        return keep, scores.new_zeros(*rows, size), count

    boxes = boxes.contiguous()
    live, group, bad = _prepare(boxes, scores, labels, images, num_images, params)
    final = torch.full_like(live, -1)
    if size > 0:
        # Where one chunk holds everything, the order inside a segment is of no use.
        order, starts, segments = _segments(live if num_boxes > chunk else None, group, images, num_boxes, live.device)
        _select(boxes, live[order], order, starts, segments, bad, final, params, size, chunk)
    return _merge(final, images, num_images, bad, size)


def _prepare(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, images: Tensor | None, num_images: int, params: Parameters
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(N,) scores to start from (-1: out), (N,) int64 sort key of the classes or None, (1,) int32 "a value is bad"."""
    from mmdet_softnms.ops import _triton_kernels as kernels

    num_boxes = len(scores)
    live = torch.empty_like(scores, memory_format=torch.contiguous_format)
    group = None if labels is None else torch.empty_like(labels, memory_format=torch.contiguous_format)
    bad = torch.zeros(1, dtype=torch.int32, device=scores.device)
    with _on(scores.device):
        kernels.prepare[(-(-num_boxes // _PREPARE_BLOCK),)](
            boxes.contiguous(),
            scores.contiguous(),
            live if labels is None else labels.contiguous(),
            live if images is None else images.contiguous(),
            live,
            live if group is None else group,
            bad,
            num_boxes,
            num_images,
            torch.finfo(scores.dtype).max / 2,
            params.min_score,
            params.offset,
            HAS_LABELS=labels is not None,
            HAS_IMAGES=images is not None,
            BLOCK=_PREPARE_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return live, group, bad


def _segments(
    live: Tensor | None, group: Tensor | None, images: Tensor | None, num_boxes: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the candidates into segments: by (image, class, score falling, index rising), each only where it is given.

    Returns:
        order (N,) int64 input indices; starts (N + 1,) int64, N behind the last segment; segments (1,) int64: how many.
    """
    # From the least significant key to the most significant one; stable sorts keep what the earlier ones did.
    order = torch.arange(num_boxes, device=device)
    if live is not None:
        order = torch.sort(live, descending=True, stable=True).indices
    keys = [key for key in (group, images) if key is not None]
    if not keys:
        starts = torch.full((num_boxes + 1,), num_boxes, device=device)
        starts[:1].zero_()
        return order, starts, torch.ones(1, dtype=torch.int64, device=device)
    for key in keys:
        order = order[torch.sort(key[order], stable=True).indices]

    begins = torch.ones(num_boxes, dtype=torch.bool, device=device)
    begins[1:] = False
    for key in keys:
        in_order = key[order]
        begins[1:] |= in_order[1:] != in_order[:-1]
    number = begins.cumsum(0)
    # Compaction without knowing the length: what does not begin a segment is written to one place behind the end.
    starts = torch.full((num_boxes + 2,), num_boxes, device=device)
    target = torch.where(begins, number - 1, num_boxes + 1)
    starts.scatter_(0, target, torch.arange(num_boxes, device=device))
    return order, starts[:-1], number[-1:].clone()  # aligned as every tensor of its own: no variant of the kernel


def _select(
    boxes: Tensor,
    live: Tensor,
    order: Tensor,
    starts: Tensor,
    segments: Tensor,
    bad: Tensor,
    final: Tensor,
    params: Parameters,
    size: int,
    chunk: int,
) -> None:
    """Launch the selection: ``final[i]`` becomes the score of candidate i where it is selected in its segment."""
    from mmdet_softnms.ops import _triton_kernels as kernels

    num_boxes = len(order)
    table = 1
    while table * chunk < num_boxes:
        table *= 2
    with _on(boxes.device):
        kernels.select[(min(num_boxes, _MOST_PROGRAMS),)](
            boxes,
            live,
            live.clone() if params.decay == 'strongest' else live,
            order,
            starts,
            segments,
            bad,
            torch.empty(num_boxes, dtype=torch.int32, device=boxes.device),
            final,
            size,
            params.iou_threshold,
            params.sigma,
            params.min_score,
            params.offset,
            **kernels.rule(weights.get(params.method)),
            STRONGEST=params.decay == 'strongest',
            CHUNK=chunk,
            TABLE=table,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )


def _merge(
    final: Tensor, images: Tensor | None, num_images: int, bad: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``size`` selections of each image, padded; see :func:`soft_nms_triton`, Returns."""
    best, order = torch.sort(final, descending=True, stable=True)
    fine = bad[0] == 0
    if images is None:
        best, order = best[:size], order[:size]
        counts = (best >= 0) & fine
        count = torch.where(fine, counts.sum(), -1)
    else:
        row = torch.where(best >= 0, images[order], num_images)  # what was not selected goes behind the last image
        row, by_image = torch.sort(row, stable=True)
        bounds = torch.searchsorted(row, torch.arange(num_images + 1, device=row.device))
        place = bounds[:-1, None] + torch.arange(size, device=row.device)
        counts = (place < bounds[1:, None]) & fine
        at = by_image[place.clamp(max=len(row) - 1)]
        best, order = best[at], order[at]
        count = torch.where(fine, counts.sum(1), -1)
    return torch.where(counts, order, -1), torch.where(counts, best, 0), count


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, whatever the tensors are on."""
    return torch.cuda.device(device) if device.type == 'cuda' else torch.no_grad()
