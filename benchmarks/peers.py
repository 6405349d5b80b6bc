"""Who the benchmarks compare with: one function a peer, on the same candidates, and a server for TensorFlow.

A peer is called without arguments and returns the selected indices, or anything with as many entries. Conversion to a
peer's own input (lists, corner order, class offset) is done beforehand and not timed. Peers that are not installed
are left out; TensorFlow, whose numpy may not be ours, runs in an environment of its own (``--tensorflow PYTHON``) and
reports its own times.
"""

import importlib
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdet_softnms import reference

MMCV_SOFT, MMCV_HARD, ENSEMBLE = 'mmcv soft', 'mmcv hard', 'ensemble-boxes soft'
TORCHVISION, BIRDER, PLAIN, TENSORFLOW = 'torchvision hard', 'birder soft', 'plain PyTorch', 'TensorFlow'
PEERS = (MMCV_SOFT, MMCV_HARD, ENSEMBLE, TENSORFLOW, PLAIN, BIRDER, TORCHVISION)
#: What the table says of each peer.
REMARKS = {
    MMCV_SOFT: 'on the CPU, also for candidates on a GPU. It cannot stop early: it works on all candidates also where '
    'the top 100 are wanted (its result is then cut, as in mmdet). It moves classes apart by adding label x (largest '
    'coordinate + 1) to float32 boxes.',
    MMCV_HARD: '`nms` at IoU 0.5, whatever the rule of the row.',
    ENSEMBLE: 'coordinates in [0, 1] and float64, boxes of no area removed, `thresh` (our min_score) applied once at '
    'the end with > instead of >=, result grouped by class and not sorted; no early stop.',
    TORCHVISION: '`batched_nms` at IoU 0.5, whatever the rule of the row; cut afterwards.',
    BIRDER: 'a CUDA kernel on a GPU; on a CPU what it falls back to, a loop over classes in PyTorch.',
    PLAIN: 'the definition, a loop of vectorised PyTorch over selections (mmdet_softnms.reference).',
    TENSORFLOW: '`tf.image.non_max_suppression_with_scores` with soft_nms_sigma = sigma / 2, classes moved apart as in '
    'mmcv; it has no linear rule. It stops early. In a process of its own, timed there.',
}


def peers(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    rule: str,
    parameters: dict[str, Any],
    min_score: float,
    max_num: int,
    size: tuple[int, int],
    tensorflow: 'TensorFlow | None' = None,
) -> dict[str, Callable[[], Any]]:
    """What is timed beside ours.

    Args:
        boxes, scores, labels: (N, 4) ``xyxy``, (N,), (N,) of one image.
        rule: 'gaussian', 'linear' or 'hard'.
        parameters: of the rule, as ``soft_nms`` takes them.
        min_score, max_num: as ``soft_nms`` takes them.
        size: width and height of the image in pixels.
        tensorflow: a running server.
    """
    limit = len(scores) if max_num < 0 else max_num
    offset = (labels.to(boxes) * (boxes.max() + 1))[:, None]

    timed: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: definition(boxes, scores, labels, parameters, min_score, max_num)[0]
    }
    absent = missing(boxes.device)
    if MMCV_HARD not in absent:
        from mmcv.ops import batched_nms

        def mmcv_with(config: dict[str, Any]) -> Callable[[], Tensor]:
            return lambda: batched_nms(boxes, scores, labels, config)[1][:limit]

        timed[MMCV_HARD] = mmcv_with({'type': 'nms', 'iou_threshold': 0.5})
        if rule != 'hard':
            timed[MMCV_SOFT] = mmcv_with({'type': 'soft_nms', 'min_score': min_score, **parameters})
    if rule != 'hard' and ENSEMBLE not in absent:
        timed[ENSEMBLE] = _ensemble_boxes(boxes.cpu(), scores.cpu(), labels.cpu(), rule, parameters, min_score, size)
    if TORCHVISION not in absent:
        from torchvision.ops import batched_nms as torchvision_nms

        timed[TORCHVISION] = lambda: torchvision_nms(boxes, scores, labels, 0.5)[:limit]
    if rule == 'gaussian' and BIRDER not in absent:
        from birder.ops.soft_nms import batched_soft_nms

        timed[BIRDER] = lambda: batched_soft_nms(boxes, scores, labels, parameters['sigma'], min_score)[1][:limit]
    if tensorflow is not None and rule != 'linear':
        timed[TENSORFLOW] = tensorflow.call(
            (boxes + offset).cpu(), scores.cpu(), limit, min_score if rule == 'gaussian' else 0.0, parameters
        )
    return timed


def definition(
    boxes: Tensor, scores: Tensor, labels: Tensor, parameters: dict[str, Any], min_score: float, max_num: int
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch: what every selection is checked with."""
    return reference(boxes, scores, labels, min_score=min_score, max_num=max_num, **parameters)


def missing(device: torch.device) -> dict[str, str]:
    """Peers that are not installed, or not built for the device, and why."""
    boxes, scores = torch.tensor([[0.0, 0, 1, 1]], device=device), torch.tensor([0.5], device=device)
    found = {}
    for peer, module in ((MMCV_HARD, 'mmcv.ops'), (TORCHVISION, 'torchvision.ops')):
        try:
            importlib.import_module(module).nms(boxes, scores, 0.5)
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
            found[peer] = f'{type(error).__name__}: {error}'.split(chr(10))[0]
    for peer, module in ((ENSEMBLE, 'ensemble_boxes'), (BIRDER, 'birder')):
        try:
            importlib.import_module(module)
        except ImportError as error:
            found[peer] = f'{type(error).__name__}: {error}'
    return found


def _ensemble_boxes(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    rule: str,
    parameters: dict[str, Any],
    min_score: float,
    size: tuple[int, int],
) -> Callable[[], Any]:
    import ensemble_boxes

    lists = [(boxes.double() / torch.tensor([*size, *size])).numpy()], [scores.double().numpy()], [labels.numpy()]
    options = {
        'method': {'linear': 1, 'gaussian': 2}[rule],
        'iou_thr': parameters.get('iou_threshold', 0.5),
        'sigma': parameters.get('sigma', 0.5),
        'thresh': min_score,
    }
    return lambda: ensemble_boxes.soft_nms(*lists, **options)[0]


class TensorFlowCall:
    """A call in the other process; ``seconds`` is what it took there, without the way to and fro."""

    def __init__(self, server: 'TensorFlow', path: Path, arguments: dict[str, Any]) -> None:
        self._server, self._path, self._arguments = server, path, arguments
        self.seconds = 0.0

    def __call__(self) -> np.ndarray:
        answer = self._server.ask(self._path, self._arguments)
        self.seconds = answer['seconds']
        return np.asarray(answer['keep'])


class TensorFlow:
    """A process of another Python that suppresses by TensorFlow, one thread.

    Args:
        python: an interpreter with TensorFlow and numpy.

    Raises:
        SystemExit: it does not start or has no TensorFlow.
    """

    _PROGRAM = """
import json, os, sys, time
os.environ.update(TF_CPP_MIN_LOG_LEVEL='3', CUDA_VISIBLE_DEVICES='-1', TF_ENABLE_ONEDNN_OPTS='0')
import numpy as np
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
print(json.dumps(dict(version=tf.__version__)), flush=True)
loaded = {}
for line in sys.stdin:
    request = json.loads(line)
    if request['path'] not in loaded:
        loaded.clear()
        data = np.load(request['path'])
        loaded[request['path']] = tf.constant(data['boxes']), tf.constant(data['scores'])
    boxes, scores = loaded[request['path']]
    start = time.perf_counter()
    keep, kept = tf.image.non_max_suppression_with_scores(boxes, scores, **request['arguments'])
    keep = keep.numpy()
    print(json.dumps(dict(seconds=time.perf_counter() - start, keep=keep.tolist())), flush=True)
"""

    def __init__(self, python: str) -> None:
        try:
            self._process = subprocess.Popen(
                [python, '-c', self._PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self.version = json.loads(self._read())['version']
        except (OSError, ValueError) as error:
            raise SystemExit(f'--tensorflow {python} does not start or has no TensorFlow ({error})') from None
        self._folder = tempfile.TemporaryDirectory()
        self._numbers = 0

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def ask(self, path: Path, arguments: dict[str, Any]) -> dict[str, Any]:
        """One call."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dict(path=str(path), arguments=arguments)) + '\n')
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read())
        return answer

    def call(
        self, boxes: Tensor, scores: Tensor, limit: int, min_score: float, parameters: dict[str, Any]
    ) -> TensorFlowCall:
        """Prepare a call on some candidates; TensorFlow's corners are y1, x1, y2, x2."""
        self._numbers += 1
        path = Path(self._folder.name) / f'{self._numbers}.npz'
        np.savez(path, boxes=boxes[:, [1, 0, 3, 2]].numpy(), scores=scores.numpy())
        arguments = dict(
            max_output_size=limit,
            iou_threshold=parameters.get('iou_threshold', 1.0),
            score_threshold=min_score,
            soft_nms_sigma=parameters.get('sigma', 0.0) / 2,
        )
        return TensorFlowCall(self, path, arguments)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()
