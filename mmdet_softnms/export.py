"""Suppression rules as ONNX, and as the built-in operators of other runtimes where those are exact.

Why a ``Loop``: each selection changes the scores the next one looks at, so the work is sequential by nature. A
``Loop`` of a dozen vector operations runs once for each detection that is wanted, about 100 times, whatever the
number of candidates; it needs nothing but standard operators, any opset from 17 on. Unrolled, the same graph would be
100 times as long and could not stop early; a top-k beforehand would change results. The graph is assembled by
``onnx.helper``: onnxscript adds a dependency and writes the same nodes.

Results are those of :func:`mmdet_softnms.soft_nms` up to rounding: weights are computed in float32, since few
runtimes have the float64 exponential that makes ours the same bits everywhere. Scores agree to 1e-5; two boxes whose
scores are that close may change places.
"""

import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmdet_softnms import __version__
from mmdet_softnms.ops import weights
from mmdet_softnms.rules import HardNMS, Rule, SoftNMS, VotedNMS

OPSET = 17
_GONE = -1.0  # the score of a candidate that is selected, removed, or dropped


class ExportError(ValueError):
    """A rule that cannot be expressed; the message says what can."""


class _Graph:
    """Nodes in the making: ``graph('Add', a, b)`` adds one and returns the name of its output."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._number = prefix, 0
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, kind: str, *inputs: str, outputs: int = 1, name: str = '', **attributes: Any) -> Any:
        self._number += 1
        names = [name or f'{self._prefix}{self._number}_{kind}'] if outputs == 1 else [
            f'{self._prefix}{self._number}_{kind}_{number}' for number in range(outputs)
        ]  # fmt: skip
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def value(self, name: str) -> '_Value':
        """What a weight of :mod:`mmdet_softnms.ops.weights` computes with."""
        return _Value(self, name)

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A constant of a type."""
        name: str = self('Constant', value=numpy_helper.from_array(np.array(value, dtype)))
        return name


class _Value:
    """A tensor of a graph, with the arithmetic of weights: each operation adds a node."""

    def __init__(self, graph: _Graph, name: str) -> None:
        self.graph, self.name = graph, name

    def _do(self, kind: str, *inputs: Any) -> '_Value':
        names = [one.name if isinstance(one, _Value) else self.graph.constant(float(one)) for one in inputs]
        return _Value(self.graph, self.graph(kind, *names))

    def __neg__(self) -> '_Value':
        return self._do('Neg', self)

    def __and__(self, other: '_Value') -> '_Value':
        return self._do('And', self, other)

    def __or__(self, other: '_Value') -> '_Value':
        return self._do('Or', self, other)


def _operation(kind: str, reverse: bool) -> Any:
    return lambda self, other: self._do(kind, *((other, self) if reverse else (self, other)))


for _name, _kind in dict(add='Add', sub='Sub', mul='Mul', truediv='Div', pow='Pow').items():
    setattr(_Value, f'__{_name}__', _operation(_kind, False))
    setattr(_Value, f'__r{_name}__', _operation(_kind, True))
for _name, _kind in dict(gt='Greater', lt='Less', ge='GreaterOrEqual', le='LessOrEqual').items():
    setattr(_Value, f'__{_name}__', _operation(_kind, False))
_WORDS = dict(
    where=lambda condition, a, b: condition._do('Where', condition, a, b),
    exp=lambda x: x._do('Exp', x),
    cos=lambda x: x._do('Cos', x),
    sqrt=lambda x: x._do('Sqrt', x),
)


def rule_to_onnx(rule: Rule, max_num: int = -1, *, opset: int = OPSET) -> onnx.ModelProto:
    """A model that suppresses candidates.

    Args:
        rule: :class:`mmdet_softnms.rules.SoftNMS` or ``HardNMS``, or a ``VotedNMS`` of these.
        max_num: as :func:`mmdet_softnms.soft_nms` takes it.
        opset: of the standard operators, at least 17.

    Returns:
        A checked model: ``boxes`` (N, 4) float32 ``xyxy``, ``scores`` (N,) float32 and ``labels`` (N,) int64 in, with
        N left open; ``keep`` (M,) int64 and ``kept_scores`` (M,) float32 out, in selection order, and of a ``VotedNMS``
        ``voted`` (M, 4) float32, its boxes. N may be 0.

    Raises:
        ExportError: another rule, or an opset below 17.
    """
    graph = _Graph('')
    keep, kept, voted = _selection(graph, rule, max_num, 'boxes', 'scores', 'labels')
    graph('Identity', keep, name='keep')
    graph('Identity', kept, name='kept_scores')
    inputs = [
        helper.make_tensor_value_info('boxes', TensorProto.FLOAT, ['N', 4]),
        helper.make_tensor_value_info('scores', TensorProto.FLOAT, ['N']),
        helper.make_tensor_value_info('labels', TensorProto.INT64, ['N']),
    ]
    outputs = [
        helper.make_tensor_value_info('keep', TensorProto.INT64, ['M']),
        helper.make_tensor_value_info('kept_scores', TensorProto.FLOAT, ['M']),
    ]
    if voted is not None:
        graph('Identity', voted, name='voted')
        outputs.append(helper.make_tensor_value_info('voted', TensorProto.FLOAT, ['M', 4]))
    return _model(graph, 'soft_nms', inputs, outputs, opset)


def post_process_to_onnx(
    rule: Rule,
    num_classes: int,
    score_thr: float,
    max_per_img: int,
    *,
    class_agnostic: bool = False,
    num_rois: int | None = None,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A model of :func:`mmdet_softnms.post_process.post_process`: what a two-stage head gives, to detections.

    Args:
        rule: :class:`mmdet_softnms.rules.SoftNMS` or ``HardNMS``, or a ``VotedNMS`` of these.
        num_classes: K, without background.
        score_thr: candidates with ``score > score_thr`` take part.
        max_per_img: at most so many detections; 0 and -1: no limit, as in mmdet.
        class_agnostic: one box a RoI instead of one a class.
        num_rois: a fixed R, then every shape in the graph is fixed: all R * K candidates take part in each step
            instead of those above the threshold, and the results are padded to ``max_per_img`` with boxes and scores
            of 0 and labels of -1.
            None: R is open.
        opset: of the standard operators, at least 17.

    Returns:
        A checked model: ``boxes`` (R, 4K) or (R, 4) float32 ``xyxy`` and ``scores`` (R, K + 1) float32, background
        last (mmdet's ``rcnn_test_cfg=None`` contract), in; ``dets`` (M, 5), boxes and scores, and ``labels`` (M,)
        int64 out, in selection order.

    Raises:
        ExportError: another rule, an opset below 17 or unknown to onnx, a number out of range, or ``num_rois``
            without a limit.
    """
    _check_numbers(num_classes, score_thr, max_per_img, num_rois)
    max_per_img = max_per_img or -1
    graph = _Graph('')
    first, last, axis = (graph.constant([value], np.int64) for value in (0, num_classes, 1))
    foreground = graph('Slice', 'scores', first, last, axis)
    # R by name rather than -1, which means nothing where there is no RoI at all.
    rois = graph('Slice', graph('Shape', 'boxes'), graph.constant([0], np.int64), graph.constant([1], np.int64))
    shape = graph('Concat', rois, graph.constant([1 if class_agnostic else num_classes, 4], np.int64), axis=0)
    per_class = graph('Reshape', 'boxes', shape, allowzero=1)
    threshold = graph.constant(score_thr)
    if num_rois is None:
        place = graph('Transpose', graph('NonZero', graph('Greater', foreground, threshold)), perm=[1, 0])
        halves: dict[str, Any] = dict(num_outputs=2) if opset >= 18 else {}
        roi, label = graph('Split', place, axis=1, outputs=2, **halves)
        candidates = graph('GatherND', foreground, place)
        nothing = graph('Mul', label, graph.constant(0, np.int64))
        own = graph('Concat', roi, nothing if class_agnostic else label, axis=1)
        candidate_boxes = graph('GatherND', per_class, own)
        labels = graph('Reshape', label, graph.constant([-1], np.int64))
    else:
        above = graph('Greater', foreground, threshold)
        flat = graph.constant([num_rois * num_classes], np.int64)
        candidates = graph('Reshape', graph('Where', above, foreground, graph.constant(_GONE)), flat)
        everywhere = graph('Expand', per_class, graph.constant([num_rois, num_classes, 4], np.int64))
        candidate_boxes = graph('Reshape', everywhere, graph.constant([num_rois * num_classes, 4], np.int64))
        labels = graph.constant(np.tile(np.arange(num_classes), num_rois), np.int64)
    keep, kept, voted = _selection(graph, rule, max_per_img, candidate_boxes, candidates, labels)
    columns = graph.constant([1], np.int64)
    found = graph('Gather', candidate_boxes, keep) if voted is None else voted
    detections = graph('Concat', found, graph('Unsqueeze', kept, columns), axis=1)
    of_class = graph('Gather', labels, keep)
    if num_rois is not None:
        missing = graph('Sub', graph.constant([max_per_img], np.int64), graph('Shape', keep))
        zero = graph.constant([0], np.int64)
        padded = graph('Pad', detections, graph('Concat', zero, zero, missing, zero, axis=0), graph.constant(0))
        detections = graph('Reshape', padded, graph.constant([max_per_img, 5], np.int64))
        padded = graph('Pad', of_class, graph('Concat', zero, missing, axis=0), graph.constant(-1, np.int64))
        of_class = graph('Reshape', padded, graph.constant([max_per_img], np.int64))
    graph('Identity', detections, name='dets')
    graph('Identity', of_class, name='labels')
    rows, results = num_rois or 'R', 'M' if num_rois is None else max_per_img
    inputs = [
        helper.make_tensor_value_info('boxes', TensorProto.FLOAT, [rows, 4 if class_agnostic else 4 * num_classes]),
        helper.make_tensor_value_info('scores', TensorProto.FLOAT, [rows, num_classes + 1]),
    ]
    outputs = [
        helper.make_tensor_value_info('dets', TensorProto.FLOAT, [results, 5]),
        helper.make_tensor_value_info('labels', TensorProto.INT64, [results]),
    ]
    return _model(graph, 'post_process', inputs, outputs, opset)


def _check_numbers(num_classes: int, score_thr: float, max_per_img: int, num_rois: int | None) -> None:
    if num_classes < 1:
        raise ExportError(f'num_classes must be at least 1, got {num_classes}')
    if not math.isfinite(score_thr):
        raise ExportError(f'score_thr must be finite, got {score_thr}')
    if max_per_img < -1:
        raise ExportError(f'max_per_img must be at least 1, or 0 or -1 for no limit, got {max_per_img}')
    if num_rois is None:
        return
    if num_rois < 1:
        raise ExportError(f'num_rois must be at least 1, or None for any number, got {num_rois}')
    if max_per_img < 1:
        raise ExportError(f'fixed shapes need a limit of detections, got max_per_img {max_per_img}; give 1 or more')


def tensorflow_arguments(rule: Rule) -> dict[str, float]:
    """Arguments of ``tf.image.non_max_suppression_with_scores`` that mean the same for one class.

    TensorFlow's weight is ``exp(-IoU ** 2 / (2 * soft_nms_sigma))``: the paper's sigma of 0.5 is its 0.25. Its boxes
    are ``(y1, x1, y2, x2)`` and know no classes: call it class by class.

    Raises:
        ExportError: TensorFlow has no such rule (linear, an offset).
    """
    method, arguments = _arguments(rule)
    if arguments.get('class_agnostic'):
        raise ExportError('class_agnostic is not an argument of TensorFlow; export the rule as ONNX')
    if arguments.get('decay') == 'strongest':
        raise ExportError('TensorFlow multiplies all decays, and knows no strongest one; export the rule as ONNX')
    if arguments['offset']:
        raise ExportError(f'TensorFlow knows no offset, got {arguments["offset"]:g}; use 0')
    if method == 'hard':
        return dict(iou_threshold=arguments['iou_threshold'], score_threshold=0.0, soft_nms_sigma=0.0)
    if method == 'gaussian':
        return dict(iou_threshold=1.0, score_threshold=arguments['min_score'], soft_nms_sigma=arguments['sigma'] / 2)
    raise ExportError(f'TensorFlow has the gaussian rule and hard NMS only, not {method}; export it as ONNX')


def openvino_arguments(rule: Rule) -> dict[str, Any]:
    """Inputs and attributes of OpenVINO's ``NonMaxSuppression`` (opset 5 to 9) that mean the same.

    Its sigma is TensorFlow's. It keeps classes apart by itself, and zeroes what overlaps more than ``iou_threshold``,
    which is 1 here for the gaussian rule. ``max_output_boxes_per_class`` is per class: cut its sorted result at
    ``max_per_img``.

    Raises:
        ExportError: OpenVINO has no such rule (linear, an offset).
    """
    try:
        arguments: dict[str, Any] = dict(tensorflow_arguments(rule))
    except ExportError as error:
        raise ExportError(str(error).replace('TensorFlow', 'OpenVINO')) from None
    return arguments | dict(box_encoding='corner', sort_result_descending=True)


def _arguments(rule: Rule) -> tuple[str, dict[str, Any]]:
    # A subclass with a call of its own selects in its own way.
    if not isinstance(rule, SoftNMS) or type(rule).__call__ is not SoftNMS.__call__:
        raise ExportError(
            f'{type(rule).__name__} cannot be exported; use mmdet_softnms.SoftNMS or mmdet_softnms.HardNMS in '
            'test_cfg.rcnn.nms, alone or (as ONNX) in mmdet_softnms.VotedNMS'
        )
    if isinstance(rule, HardNMS):
        return 'hard', {**rule.params, 'min_score': 0.0}
    return str(rule.params['method']), rule.params


def _selection(
    graph: _Graph, rule: Rule, max_num: int, boxes: str, scores: str, labels: str
) -> tuple[str, str, str | None]:
    """Add the nodes that select; names of ``keep`` (M,), the decayed scores (M,), and (M, 4) boxes where they move."""
    voting = rule if type(rule) is VotedNMS else None
    if voting is not None:
        rule = voting.rule
    method, arguments = _arguments(rule)
    if voting is not None and voting.params.get('class_agnostic'):
        labels = graph('Mul', labels, graph.constant(0, np.int64))
    groups = labels
    if arguments.get('class_agnostic'):
        labels = graph('Mul', labels, graph.constant(0, np.int64))
    # One candidate more that is never selected: no reduction ever meets an empty tensor.
    boxes = graph('Concat', boxes, graph.constant(np.zeros((1, 4))), axis=0)
    scores = graph('Concat', scores, graph.constant([_GONE]), axis=0)
    labels, groups = (graph('Concat', one, graph.constant([-1], np.int64), axis=0) for one in (labels, groups))
    least, gone = graph.constant(max(arguments['min_score'], 0.0)), graph.constant(_GONE)
    current = graph('Where', graph('Less', scores, least), gone, scores)
    count = graph('Shape', scores)
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
    index = graph('Range', zero, graph('Squeeze', count), one)
    sides = graph(
        'Add',
        graph('Sub', _columns(graph, boxes, 2, 4), _columns(graph, boxes, 0, 2)),
        graph.constant(arguments['offset']),
    )
    second = graph.constant([1], np.int64)
    width, height = (graph('Squeeze', _columns(graph, sides, number, number + 1), second) for number in (0, 1))
    areas = graph('Mul', width, height)
    limit = graph('Squeeze', count) if max_num < 0 else graph.constant(max_num, np.int64)
    strongest = arguments.get('decay') == 'strongest'
    body = _body(method, arguments, boxes, labels, areas, index, current if strongest else None)
    _, keep, kept = graph('Loop', limit, _any_left(graph, current), current, outputs=3, body=body)
    if voting is None:
        return keep, kept, None
    return keep, kept, _voted(graph, voting, arguments['offset'], keep, kept, boxes, scores, groups, areas)


def _voted(
    graph: _Graph,
    rule: VotedNMS,
    offset: float,
    keep: str,
    kept: str,
    boxes: str,
    scores: str,
    labels: str,
    areas: str,
) -> str:
    """(M, 4) boxes after the votes of all candidates, to about 1e-6 of a coordinate; IoUs are (M, N) tables."""
    zero, one = graph.constant(0.0), graph.constant(1.0)
    columns, rows = graph.constant([1], np.int64), graph.constant([0], np.int64)
    chosen = graph('Gather', boxes, keep)
    mine, others = graph('Unsqueeze', chosen, columns), graph('Unsqueeze', boxes, rows)

    def corner(name: str, begin: int) -> str:
        first, last, axis = (graph.constant([value], np.int64) for value in (begin, begin + 2, 2))
        sliced: str = graph('Slice', name, first, last, axis)
        return sliced

    low, high = (graph(kind, corner(mine, at), corner(others, at)) for kind, at in (('Max', 0), ('Min', 2)))
    sides = graph('Add', graph('Sub', high, low), graph.constant(offset))
    width, height = (graph('Gather', sides, graph.constant(number, np.int64), axis=2) for number in (0, 1))
    inside = graph('Mul', width, height)
    total = graph('Add', graph('Unsqueeze', graph('Gather', areas, keep), columns), graph('Unsqueeze', areas, rows))
    union = graph('Sub', total, inside)
    overlaps = graph('And', graph('Greater', width, zero), graph('Greater', height, zero))
    same = graph('Equal', graph('Unsqueeze', graph('Gather', labels, keep), columns), graph('Unsqueeze', labels, rows))
    counts = graph('And', graph('And', overlaps, graph('Greater', union, zero)), same)
    # A candidate that is not one (a score of -1) has no vote.
    counts = graph('And', counts, graph('Unsqueeze', graph('Greater', scores, zero), rows))
    apart = graph('Sub', one, graph('Div', inside, graph('Where', counts, union, one)))
    near = graph(
        'Exp', graph('Neg', graph('Div', graph('Mul', apart, apart), graph.constant(rule.params['tolerance'])))
    )
    weights_ = graph('Where', counts, graph('Mul', near, graph('Unsqueeze', scores, rows)), zero)
    sums = graph('ReduceSum', weights_, columns, keepdims=1)
    some = graph('Greater', sums, zero)
    if rule.params.get('first_only'):
        raw = graph('Mul', graph('Gather', scores, keep), graph.constant(0.9))
        some = graph('And', some, graph('Unsqueeze', graph('GreaterOrEqual', kept, raw), columns))
    moved = graph('Div', graph('MatMul', weights_, boxes), graph('Where', some, sums, one))
    voted: str = graph('Where', some, moved, chosen)
    return voted


def _columns(graph: _Graph, boxes: str, begin: int, end: int) -> str:
    begin_, end_, axis = (graph.constant([value], np.int64) for value in (begin, end, 1))
    name: str = graph('Slice', boxes, begin_, end_, axis)
    return name


def _any_left(graph: _Graph, current: str) -> str:
    name: str = graph('GreaterOrEqual', graph('ReduceMax', current, keepdims=0), graph.constant(0.0))
    return name


def _body(
    method: str, arguments: dict[str, Any], boxes: str, labels: str, areas: str, index: str, first: str | None
) -> onnx.GraphProto:
    """One selection: the best box (ties: the lowest index), and the decay of its class by it.

    ``first``: where the strongest decay counts alone, the scores to start from.
    """
    graph = _Graph('body_')
    gone = graph.constant(_GONE)
    best = graph('ArgMax', 'current', axis=0, keepdims=0, select_last_index=0)
    best_score = graph('Gather', 'current', best)
    box = graph('Gather', boxes, best)

    def corner(begin: int) -> tuple[str, str]:
        first, last = (graph.constant([value], np.int64) for value in (begin, begin + 2))
        return _columns(graph, boxes, begin, begin + 2), graph('Slice', box, first, last)

    low, high = graph('Max', *corner(0)), graph('Min', *corner(2))
    sides = graph('Add', graph('Sub', high, low), graph.constant(arguments['offset']))
    width, height = (
        graph('Squeeze', _columns(graph, sides, number, number + 1), graph.constant([1], np.int64)) for number in (0, 1)
    )
    inside = graph('Mul', width, height)
    union = graph('Sub', graph('Add', areas, graph('Gather', areas, best)), inside)
    zero, one = graph.constant(0.0), graph.constant(1.0)
    overlaps = graph(
        'And',
        graph('And', graph('Greater', width, zero), graph('Greater', height, zero)),
        graph('Greater', union, zero),
    )
    iou = graph('Where', overlaps, graph('Div', inside, graph('Where', overlaps, union, one)), zero)
    decays = graph('Equal', labels, graph('Gather', labels, best))
    rule = weights.get(method)
    values = [float(np.float32(arguments[name])) for name in rule.parameters]
    weight = weights.rewritten(rule.function, _WORDS)(graph.value(iou), *values).name
    if rule.removes:
        decayed = graph('Where', graph('And', decays, graph('Equal', weight, zero)), gone, 'current')
    elif first is not None:  # weights never rise with the IoU
        decayed = graph('Min', 'current', graph('Mul', first, graph('Where', decays, weight, one)))
    else:
        decayed = graph('Mul', 'current', graph('Where', decays, weight, one))
    dropped = graph('Less', decayed, graph.constant(max(arguments['min_score'], 0.0)))
    # Gone before is looked up before the decay: a weight of 0 would make -0.0 of its score, which is not below 0.
    before = graph('Less', 'current', zero)
    out = graph('Or', graph('Or', dropped, before), graph('Equal', index, best))
    left = graph('Where', out, gone, decayed, name='body_current')
    condition = graph('Identity', _any_left(graph, left), name='body_condition')
    inputs = [
        helper.make_tensor_value_info('iteration', TensorProto.INT64, []),
        helper.make_tensor_value_info('condition', TensorProto.BOOL, []),
        helper.make_tensor_value_info('current', TensorProto.FLOAT, None),
    ]
    outputs = [
        helper.make_tensor_value_info(condition, TensorProto.BOOL, []),
        helper.make_tensor_value_info(left, TensorProto.FLOAT, None),
        helper.make_tensor_value_info(best, TensorProto.INT64, []),
        helper.make_tensor_value_info(best_score, TensorProto.FLOAT, []),
    ]
    return helper.make_graph(graph.nodes, 'selection', inputs, outputs)


def _model(graph: _Graph, name: str, inputs: list[Any], outputs: list[Any], opset: int) -> onnx.ModelProto:
    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise ExportError(f'opset must be {OPSET} to {newest} (what onnx {onnx.__version__} knows), got {opset}')
    model = helper.make_model(
        helper.make_graph(graph.nodes, name, inputs, outputs),
        producer_name='mmdet_softnms',
        producer_version=__version__,
        opset_imports=[helper.make_opsetid('', opset)],
        ir_version=8 if opset < 19 else 9,
    )
    onnx.checker.check_model(model, full_check=True)
    return model
