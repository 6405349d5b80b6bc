"""``pool``: position-sensitive RoI pooling, forward and backward at VOC size, against naive form and torchvision."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timing import OURS, in_turns, machine
from mmdet_softnms.models.ps_roi_pool import KINDS, _caffe_edges, _torchvision_edges, ps_roi_pool


class NaivePool(torch.autograd.Function):
    """The definition as a loop: a slice for each RoI and bin, all channels at once, and its gradient the same way."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, rois: Tensor, kind: str) -> Tensor:
        edges = _caffe_edges if kind == 'caffe' else _torchvision_edges
        columns = edges(rois[:, 1], rois[:, 3], 7, 1 / 16, maps.shape[3]).tolist()
        rows = edges(rois[:, 2], rois[:, 4], 7, 1 / 16, maps.shape[2]).tolist()
        ctx.bins = [
            (r, image, i, j, top, bottom, left, right)
            for r, image in enumerate(rois[:, 0].int().tolist())
            for i, (top, bottom) in enumerate(rows[r])
            for j, (left, right) in enumerate(columns[r])
            if bottom > top and right > left
        ]
        ctx.shape = maps.shape
        grouped = maps.unflatten(1, (-1, 7, 7))
        pooled = maps.new_zeros(len(rois), grouped.shape[1], 7, 7)
        for r, image, i, j, top, bottom, left, right in ctx.bins:
            pooled[r, :, i, j] = grouped[image, :, i, j, top:bottom, left:right].mean((1, 2))
        return pooled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        to_maps = grads[0].new_zeros(ctx.shape)
        grouped = to_maps.unflatten(1, (-1, 7, 7))
        for r, image, i, j, top, bottom, left, right in ctx.bins:
            share = grads[0][r, :, i, j] / ((bottom - top) * (right - left))
            grouped[image, :, i, j, top:bottom, left:right] += share[:, None, None]
        return to_maps, None, None


def naive_pool(maps: Tensor, rois: Tensor, kind: str) -> Tensor:
    return NaivePool.apply(maps, rois, kind)


def forward_and_backward(pool: Callable[[], Tensor], maps: Tensor) -> Tensor:
    maps.grad = None
    pooled = pool()
    pooled.sum().backward()
    return pooled.detach()


def run(arguments: argparse.Namespace) -> None:
    try:
        from torchvision.ops import ps_roi_pool as torchvision_pool
    except ImportError:
        torchvision_pool = None
    torch.manual_seed(0)
    maps = torch.randn(1, 21 * 49, 38, 63, requires_grad=True)
    centres, sizes = torch.rand(300, 2) * torch.tensor([1000.0, 600.0]), torch.rand(300, 2) * 300 + 16
    rois = torch.cat([torch.zeros(300, 1), centres - sizes / 2, centres + sizes / 2], dim=1)
    table = Table('kind', 'pass', 'ours, ms', 'naive, ms', 'ratio', 'torchvision, ms', 'ratio')
    for kind in KINDS:
        pools: dict[str, Callable[[], Tensor]] = {OURS: partial(ps_roi_pool, maps, rois, kind=kind)}
        if kind in ('caffe', 'torchvision'):
            pools['naive'] = partial(naive_pool, maps, rois, kind)
        if kind == 'torchvision' and torchvision_pool is not None:
            pools['torchvision'] = partial(torchvision_pool, maps, rois, 7, 1 / 16)
        both: dict[str, Callable[[], Tensor]] = {
            key: partial(forward_and_backward, each, maps) for key, each in pools.items()
        }
        for name, timed in (('forward', pools), ('forward and backward', both)):
            times, results = in_turns(timed, arguments.seconds)
            for other in results.values():
                torch.testing.assert_close(other, results[OURS], rtol=1e-4, atol=1e-5)
            medians = {key: 1e3 * statistics.median(values) for key, values in times.items()}
            peers = [
                text
                for peer in ('naive', 'torchvision')
                for text in (
                    (f'{medians[peer]:.1f}', f'{medians[peer] / medians[OURS]:.2g}x') if peer in medians else ('', '')
                )
            ]
            table.add_row(kind, name, f'{medians[OURS]:.1f}', *peers)
    about = machine()
    table.caption = 'VOC: 21 x 7 x 7 maps of 38 x 63, 300 RoIs, one image; ' + ', '.join(
        f'{key} {about[key]}' for key in ('cpu', 'torch_threads', 'load_at_start', 'torch')
    )
    if torchvision_pool is None:
        table.caption += '; torchvision is not installed'
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
