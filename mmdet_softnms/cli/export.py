"""Export the post-processing of a two-stage detector, suppression and all, as ONNX; or the whole detector.

    python tools/export_onnx.py CONFIG OUT.onnx [--num-rois R] [--opset N] [--cfg-options KEY=VALUE ...]
    python tools/export_onnx.py CONFIG OUT.onnx --checkpoint CHECKPOINT --size HEIGHTxWIDTH

Without a checkpoint, the post-processing alone: the network is not in the file.

In: what the box head gives for one image, mmdet's raw results: ``boxes`` (R, 4K) or (R, 4), decoded and clipped, and
    ``scores`` (R, K + 1) after softmax, background last. Out: ``dets`` (M, 5) and ``labels`` (M,). Rule, thresholds
    and K are those of CONFIG. Where onnxruntime is installed, the file is run on drawn input against the operator
    itself, and the largest difference is printed.

With a checkpoint, the whole detector, for one size of the resized image (Faster R-CNN and R-FCN of one stage).

In: ``image`` (1, 3, HEIGHT, WIDTH), float32, BGR, 0 to 255, resized as in ``test_pipeline``. Out: the same, in pixels
    of that image. Where onnxruntime is installed, the file is run on a drawn image against PyTorch.

The file's metadata names rule, classes, thresholds and the version of this package.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet_softnms.cli.arguments import Parser, add_cfg_options, at_least, config_options, require
from mmdet_softnms.files import CheckpointError, ReevaluationError


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Command line, in mmdet's style."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='mmdet config of a two-stage detector')
    parser.add_argument('out', help='file to write')
    parser.add_argument(
        '--num-rois', type=at_least(1), help='fix R and every other shape; results are padded to max_per_img'
    )
    parser.add_argument('--checkpoint', help='export the whole detector with these weights')
    parser.add_argument('--size', type=size, help='of the resized image, HEIGHTxWIDTH in pixels; with --checkpoint')
    parser.add_argument('--opset', type=int, help='of the standard operators (17; 18 for a whole detector)')
    parser.add_argument(
        '--trust-checkpoint', action='store_true', help='unpickle whatever the checkpoint holds (can run its code)'
    )
    add_cfg_options(parser)
    args = parser.parse_args(arguments)
    if (args.checkpoint is None) != (args.size is None):
        parser.error('--checkpoint and --size belong together: a whole detector is exported for one size of the image')
    if args.checkpoint is not None and args.num_rois is not None:
        parser.error(
            "--num-rois belongs to the post-processing alone; a detector's RoIs are its test_cfg.rpn.max_per_img"
        )
    args.opset = args.opset or (17 if args.checkpoint is None else 18)
    return args


def size(text: str) -> tuple[int, int]:
    """``'800x1333'``: height and width in pixels."""
    height, _, width = text.lower().partition('x')
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f'{text} is not HEIGHTxWIDTH, such as 800x1333')
    return int(height), int(width)


_PERFORMANCE_ONLY = ('split_thr',)  # of mmcv's batched_nms: from how many candidates on it goes class by class


def exported_rule(cfg: Any) -> tuple[Any, list[str]]:
    """The rule of a config as it can be exported, and what is to be said of it.

    Raises:
        ExportError: a stock rule with an argument that no rule here has.
    """
    from mmdet_softnms.export import ExportError
    from mmdet_softnms.reevaluation.candidates.plug import family_of
    from mmdet_softnms.registry import build_rule
    from mmdet_softnms.rules import HardNMS, MmcvNMS, SoftNMS, VotedNMS

    rule = build_rule(family_of(cfg).test_cfg(cfg).nms)
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
    from mmdet_softnms.reevaluation.candidates.plug import DENSE_HEADS, DETECTRON2, box_dim_of, family_of

    cfg = read_config(args.config, args.cfg_options)
    try:
        family = family_of(cfg)
        if family is DETECTRON2:
            raise ExportError("a model of Detectron2's is not exported here: use its own export")
        if box_dim_of(cfg) != 4:
            raise ExportError('rotated boxes are not exported: the graph would take the IoU of axis-aligned ones')
        dense = family is DENSE_HEADS
        head, thresholds = cfg.model[family.part], family.test_cfg(cfg)
        head = head if dense else head.bbox_head
        head = head[-1] if isinstance(head, list) else head  # the last stage of a cascade
        num_classes, class_agnostic = head.num_classes, dense or bool(head.get('reg_class_agnostic', False))
        max_per_img, score_thr = thresholds.get('max_per_img', -1), 0.0 if dense else thresholds.score_thr
        rule, remarks = exported_rule(cfg)
        if dense and args.checkpoint is None:
            remarks.append(
                'the candidates of a dense head, to which it has applied score_thr and nms_pre: a row of boxes each, '
                'and in scores its score in the column of its class, 0 in the others'
            )
    except ExportError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f'{args.config} has no post-processing that can be exported ({type(error).__name__}: {error})'
        ) from error
    max_per_img = max_per_img if max_per_img > 0 else -1  # mmdet: 0 and -1 both mean no limit
    if args.checkpoint is None:
        model = post_process_to_onnx(
            rule,
            num_classes,
            score_thr,
            max_per_img,
            class_agnostic=class_agnostic,
            num_rois=args.num_rois,
            opset=args.opset,
        )
        num_rois = args.num_rois or 300
        arguments = rule, num_classes, score_thr, max_per_img, class_agnostic, num_rois
        names = class_names(cfg)
        check = lambda content: compare(content, *arguments)  # noqa: E731
        what = 'the post-processing alone: the network is not in it'
    else:
        model, names, check = whole_detector(args, cfg, rule, score_thr, max_per_img)
        score_thr = thresholds.get('score_thr', 0.0)  # which a dense head has applied
        what = f'the whole detector for images of {args.size[0]} x {args.size[1]} pixels'
    describe(model, rule, names, score_thr, max_per_img)
    content = model.SerializeToString()
    compared = check(content)
    write_whole(Path(args.out), content)  # only what has been run, where it can be
    for remark in remarks:
        print(f'note: {remark}')
    print(
        f'written: {args.out}, {what}; {len(content):,} bytes, opset {args.opset}: {type(rule).__name__} '
        f'{rule.params}, {num_classes} classes{", class-agnostic boxes" if class_agnostic else ""}, '
        f'score_thr {score_thr:g}, max_per_img {max_per_img}'
    )
    print(compared)


def class_names(cfg: Any) -> list[str]:
    """The classes of the config's test set; none where it does not name them."""
    from mmdet.registry import DATASETS

    dataset = cfg.get('test_dataloader', {}).get('dataset', {})
    while 'dataset' in dataset:  # wrappers
        dataset = dataset['dataset']
    kind = dataset.get('type')
    named = (dataset.get('metainfo') or {}).get('classes')
    found = DATASETS.get(kind) if isinstance(kind, str) else kind
    return list(named or getattr(found, 'METAINFO', {}).get('classes', ()))


def describe(model: Any, rule: Any, classes: list[str], score_thr: float, max_per_img: int) -> None:
    """Write into the file what made it: rule, classes, thresholds and version, as metadata that runtimes hand out."""
    import onnx

    from mmdet_softnms import __version__

    properties = dict(
        rule=json.dumps({'type': type(rule).__name__, **rule.params}),
        classes=json.dumps(classes),
        score_thr=repr(float(score_thr)),
        max_per_img=str(max_per_img),
        mmdet_softnms=__version__,
    )
    onnx.helper.set_model_props(model, properties)


def whole_detector(
    args: argparse.Namespace, cfg: Any, rule: Any, score_thr: float, max_per_img: int
) -> tuple[Any, list[str], Any]:
    """The model with its weights as ONNX, its classes, and how to compare it."""
    import torch
    from mmdet.apis import init_detector

    from mmdet_softnms.checkpoint import allow_unsafe_loading, check_weights, forbid_unsafe_loading, load_checkpoint
    from mmdet_softnms.export_detector import detector_to_onnx
    from mmdet_softnms.locate import local_checkpoint

    checkpoint = local_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
    allow_unsafe_loading() if args.trust_checkpoint else forbid_unsafe_loading()
    load_checkpoint(checkpoint, trust=args.trust_checkpoint)
    detector = init_detector(cfg, str(checkpoint), device='cpu')
    check_weights(detector, checkpoint, trust=args.trust_checkpoint)
    model = detector_to_onnx(detector, rule, score_thr, max_per_img, args.size, opset=args.opset)
    names = list(detector.dataset_meta.get('classes', ())) or class_names(cfg)

    def compared(content: bytes) -> str:
        try:
            import onnxruntime
        except ImportError:
            return 'not run: onnxruntime is not installed (pip install onnxruntime)'
        from mmdet_softnms.export_detector import raw_detector
        from mmdet_softnms.post_process import post_process

        image = torch.rand(1, 3, *args.size, generator=torch.Generator().manual_seed(0)) * 255
        session = onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])
        dets, labels = map(torch.from_numpy, session.run(None, {'image': image.numpy()}))
        with torch.no_grad():
            boxes, scores = raw_detector(detector, args.size)(image)
        expected = post_process(boxes, scores, rule, score_thr, max_per_img)
        return same_detections(dets, labels, expected, onnxruntime.__version__)

    return model, names, compared


def same_detections(dets: Any, labels: Any, expected: Any, version: str) -> str:
    """How far a file's detections are from PyTorch's; an error where they are other ones."""
    import torch

    if not torch.equal(labels, expected.labels):
        raise SystemExit('error: onnxruntime selects other boxes than mmdet_softnms.soft_nms; please report this')
    difference = (dets - torch.cat([expected.bboxes, expected.scores[:, None]], 1)).abs()
    largest = float(difference.max()) if len(difference) else 0.0
    return f'onnxruntime {version}: the same {len(labels)} detections, largest difference {largest:.1e}'


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
    return same_detections(dets, labels, expected, onnxruntime.__version__)


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
    except (ExportError, CheckpointError, ReevaluationError, OSError) as error:
        sys.exit(f'error: {error}')
