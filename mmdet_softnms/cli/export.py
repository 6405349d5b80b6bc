"""Export the post-processing of a two-stage detector, suppression and all, as ONNX.

    python tools/export_onnx.py CONFIG OUT.onnx [--num-rois R] [--opset N] [--cfg-options KEY=VALUE ...]

In: what the box head gives for one image, mmdet's raw results: ``boxes`` (R, 4K) or (R, 4), decoded and clipped, and
    ``scores`` (R, K + 1) after softmax, background last. Out: ``dets`` (M, 5) and ``labels`` (M,). Rule, thresholds
    and K are those of CONFIG. Where onnxruntime is installed, the file is run on drawn input against the operator
    itself, and the largest difference is printed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet_softnms.cli.arguments import Parser, add_cfg_options, at_least, config_options, require
from mmdet_softnms.files import ReevaluationError


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Command line, in mmdet's style."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='mmdet config of a two-stage detector')
    parser.add_argument('out', help='file to write')
    parser.add_argument(
        '--num-rois', type=at_least(1), help='fix R and every other shape; results are padded to max_per_img'
    )
    parser.add_argument('--opset', type=int, default=17, help='of the standard operators (%(default)s)')
    add_cfg_options(parser)
    return parser.parse_args(arguments)


_PERFORMANCE_ONLY = ('split_thr',)  # of mmcv's batched_nms: from how many candidates on it goes class by class


def exported_rule(cfg: Any) -> tuple[Any, list[str]]:
    """The rule of a config as it can be exported, and what is to be said of it.

    Raises:
        ExportError: a stock rule with an argument that no rule here has.
    """
    from mmdet_softnms.export import ExportError
    from mmdet_softnms.registry import build_rule
    from mmdet_softnms.rules import HardNMS, MmcvNMS, SoftNMS, VotedNMS

    rule = build_rule(cfg.model.test_cfg.rcnn.nms)
    if not isinstance(rule, MmcvNMS):
        selects = rule.rule if type(rule) is VotedNMS else rule
        if type(selects).__call__ is not SoftNMS.__call__:
            raise ExportError(
                f'{type(rule).__module__}.{type(rule).__name__} selects in its own way, which the exported graph '
                'cannot express; use mmdet_softnms.SoftNMS or mmdet_softnms.HardNMS in test_cfg.rcnn.nms, alone or in '
                'mmdet_softnms.VotedNMS'
            )
        return rule, []
    if rule.nms_type not in ('nms', 'soft_nms'):
        raise ExportError(
            f'test_cfg.rcnn.nms is {rule.nms_type}, which the exported graph cannot express; use mmdet_softnms.SoftNMS '
            'or mmdet_softnms.HardNMS'
        )
    arguments = {name: value for name, value in rule.params.items() if name not in _PERFORMANCE_ONLY}
    known = ['iou_threshold', 'offset', *(['method', 'sigma', 'min_score'] if rule.nms_type == 'soft_nms' else [])]
    if unknown := {name: value for name, value in arguments.items() if name not in known and value}:
        raise ExportError(
            f'test_cfg.rcnn.nms has {unknown}, which the exported graph cannot express; use mmdet_softnms.SoftNMS or '
            'mmdet_softnms.HardNMS'
        )
    options = {name: value for name, value in arguments.items() if name in known}
    if rule.nms_type == 'nms':
        remark = (
            "mmdet's nms keeps classes apart by shifting coordinates, which moves IoUs in the last bits: here it is not"
        )
        return HardNMS(**options), [remark]
    remark = (
        "mmcv's soft_nms decays at IoU >= threshold, never drops the first pick, and shifts coordinates between "
        'classes; exported is mmdet_softnms.SoftNMS, which does not'
    )
    return SoftNMS(**({'method': 'linear'} | options)), [remark]


def run(args: argparse.Namespace) -> None:
    """Export, check, write, compare."""
    from mmdet_softnms.export import ExportError, post_process_to_onnx
    from mmdet_softnms.files import write_whole
    from mmdet_softnms.locate import read_config

    cfg = read_config(args.config, args.cfg_options)
    try:
        head, rcnn = cfg.model.roi_head.bbox_head, cfg.model.test_cfg.rcnn
        head = head[-1] if isinstance(head, list) else head  # the last stage of a cascade
        num_classes, class_agnostic = head.num_classes, bool(head.get('reg_class_agnostic', False))
        rule, remarks = exported_rule(cfg)
    except ExportError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f'{args.config} has no two-stage post-processing that can be exported ({type(error).__name__}: {error})'
        ) from error
    max_per_img = rcnn.max_per_img if rcnn.max_per_img > 0 else -1  # mmdet: 0 and -1 both mean no limit
    model = post_process_to_onnx(
        rule,
        num_classes,
        rcnn.score_thr,
        max_per_img,
        class_agnostic=class_agnostic,
        num_rois=args.num_rois,
        opset=args.opset,
    )
    content = model.SerializeToString()
    num_rois = args.num_rois or 300
    compared = compare(content, rule, num_classes, rcnn.score_thr, max_per_img, class_agnostic, num_rois)
    write_whole(Path(args.out), content)  # only what has been run, where it can be
    for remark in remarks:
        print(f'note: {remark}')
    print(
        f'written: {args.out}, {len(content):,} bytes, opset {args.opset}: {type(rule).__name__} {rule.params}, '
        f'{num_classes} classes{", class-agnostic boxes" if class_agnostic else ""}, score_thr {rcnn.score_thr:g}, '
        f'max_per_img {max_per_img}'
    )
    print(compared)


def compare(
    content: bytes, rule: Any, num_classes: int, score_thr: float, max_per_img: int, class_agnostic: bool, num_rois: int
) -> str:
    """Run the model on drawn input; what to say of it."""
    try:
        import onnxruntime
    except ImportError:
        return 'not run: onnxruntime is not installed (pip install onnxruntime)'
    import torch

    from mmdet_softnms.post_process import post_process

    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(num_rois, 1, 2, generator=generator) * 400
    sides = torch.rand(num_rois, 1, 2, generator=generator) * 300 + 20
    shift = torch.randn(num_rois, 1 if class_agnostic else num_classes, 4, generator=generator) * 5
    boxes = (torch.cat([corners, corners + sides], 2) + shift).flatten(1)
    scores = (3 * torch.randn(num_rois, num_classes + 1, generator=generator)).softmax(1)
    session = onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])
    dets, labels = map(torch.from_numpy, session.run(None, dict(boxes=boxes.numpy(), scores=scores.numpy())))
    expected = post_process(boxes, scores, rule, score_thr, max_per_img)
    dets, labels = dets[labels >= 0], labels[labels >= 0]
    if not torch.equal(labels, expected.labels):
        raise SystemExit('error: onnxruntime selects other boxes than mmdet_softnms.soft_nms; please report this')
    difference = (dets - torch.cat([expected.bboxes, expected.scores[:, None]], 1)).abs()
    largest = float(difference.max()) if len(difference) else 0.0
    return f'onnxruntime {onnxruntime.__version__}: the same {len(labels)} detections, largest difference {largest:.1e}'


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run; one clear line and a non-zero exit status for bad input."""
    args = parse_args(arguments, prog)
    require('export')
    try:
        from mmdet_softnms.export import ExportError
    except ImportError as error:
        sys.exit(f'error: {error}')
    args.cfg_options = config_options(args.cfg_options)
    try:
        run(args)
    except (ExportError, ReevaluationError, OSError) as error:
        sys.exit(f'error: {error}')
