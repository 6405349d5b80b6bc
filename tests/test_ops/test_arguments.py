"""What soft_nms accepts, and that everything else is a TypeError or ValueError naming the argument, never a hang."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from mmdet_softnms import soft_nms, warmup

NUM = 5


def arguments(**changes: Any) -> dict[str, Any]:
    """Valid arguments for five boxes, with some replaced."""
    boxes = torch.tensor([[10.0 * i, 0, 10 * i + 15, 20] for i in range(NUM)])
    return {
        'boxes': boxes,
        'scores': torch.linspace(0.9, 0.5, NUM),
        'labels': torch.tensor([0, 0, 1, 1, 2]),
        **changes,
    }


def call(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    values = arguments(**changes)
    return soft_nms(values.pop('boxes'), values.pop('scores'), values.pop('labels'), **values)


def with_value(name: str, value: float, place: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = arguments()[name].to(dtype)
    tensor[place] = value
    return tensor


nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    ('name', 'value', 'error', 'words'),
    [
        # tensors: kind, shape, length, device, type
        ('boxes', [[0.0, 0, 1, 1]] * NUM, TypeError, 'torch.Tensor'),
        ('boxes', np.zeros((NUM, 4), np.float32), TypeError, 'torch.Tensor'),
        ('boxes', None, TypeError, 'torch.Tensor'),
        ('boxes', torch.zeros(NUM, 4).to_sparse(), TypeError, 'dense'),
        ('boxes', torch.zeros(NUM, 5), ValueError, r'\(N, 4\)'),
        ('boxes', torch.zeros(NUM * 4), ValueError, r'\(N, 4\)'),
        ('boxes', torch.zeros(1, NUM, 4), ValueError, r'\(N, 4\)'),
        ('boxes', torch.tensor(1.0), ValueError, r'\(N, 4\)'),
        ('boxes', torch.zeros(0), ValueError, r'\(N, 4\)'),
        ('boxes', torch.zeros(NUM, 4, dtype=torch.int64), TypeError, 'int64'),
        ('boxes', torch.zeros(NUM, 4, dtype=torch.uint8), TypeError, 'uint8'),
        ('boxes', torch.zeros(NUM, 4, dtype=torch.complex64), TypeError, 'complex64'),
        ('boxes', torch.zeros(NUM, 4, dtype=torch.bool), TypeError, 'bool'),
        ('scores', [0.5] * NUM, TypeError, 'torch.Tensor'),
        ('scores', None, TypeError, 'torch.Tensor'),
        ('scores', torch.ones(NUM, 1), ValueError, r'\(N,\)'),
        ('scores', torch.tensor(0.5), ValueError, r'\(N,\)'),
        ('scores', torch.ones(NUM - 1), ValueError, '4 values for 5 boxes'),
        ('scores', torch.ones(0), ValueError, '0 values for 5 boxes'),
        ('scores', torch.ones(NUM, dtype=torch.int32), TypeError, 'int32'),
        ('scores', torch.ones(NUM, dtype=torch.bool), TypeError, 'bool'),
        ('scores', torch.ones(NUM, device='meta'), ValueError, 'meta'),
        ('labels', [0] * NUM, TypeError, 'torch.Tensor'),
        ('labels', torch.zeros(NUM, 1, dtype=torch.int64), ValueError, r'\(N,\)'),
        ('labels', torch.zeros(NUM + 1, dtype=torch.int64), ValueError, '6 values for 5 boxes'),
        ('labels', torch.zeros(NUM), TypeError, 'float32'),
        ('labels', torch.zeros(NUM, dtype=torch.bool), TypeError, 'bool'),
        ('labels', torch.zeros(NUM, dtype=torch.complex64), TypeError, 'complex64'),
        ('labels', torch.zeros(NUM, dtype=torch.int64, device='meta'), ValueError, 'meta'),
        # values
        ('labels', torch.tensor([0, 1, -1, 0, 0]), ValueError, r'labels\[2\] is -1'),
        ('labels', torch.tensor([0, 1, 0, 0, -7], dtype=torch.int8), ValueError, r'labels\[4\] is -7'),
        ('labels', torch.tensor([0, 2**63, 0, 0, 0], dtype=torch.uint64), ValueError, r'labels\[1\]'),
        ('boxes', with_value('boxes', 1e20, (slice(None), slice(2, 4))), ValueError, r'boxes\[0\].*overflows'),
        # a finite area, but the union of two such boxes would not be
        ('boxes', with_value('boxes', 1e37, (1, 2)), ValueError, r'boxes\[1\].*overflows'),
        ('boxes', with_value('boxes', 3e38, (1, 2)), ValueError, r'boxes\[1\].*overflows'),
        ('boxes', with_value('boxes', -3e38, (1, slice(0, 2))), ValueError, r'boxes\[1\].*overflows'),
        ('boxes', with_value('boxes', 1e300, (1, 2), torch.float64) * 1e5, ValueError, r'boxes\[1\].*overflows'),
        # parameters
        ('method', 'soft', ValueError, 'linear'),
        ('method', 'Gaussian', ValueError, 'gaussian'),
        ('method', None, ValueError, 'hard'),
        ('method', 1, ValueError, 'hard'),
        ('method', ['linear'], ValueError, 'hard'),
        ('iou_threshold', -0.1, ValueError, r'\[0, 1\]'),
        ('iou_threshold', 1.1, ValueError, r'\[0, 1\]'),
        ('iou_threshold', nan, ValueError, r'\[0, 1\]'),
        ('iou_threshold', inf, ValueError, r'\[0, 1\]'),
        ('iou_threshold', '0.5', TypeError, 'number'),
        ('iou_threshold', None, TypeError, 'number'),
        ('iou_threshold', True, TypeError, 'number'),
        ('iou_threshold', 0.5j, TypeError, 'number'),
        ('iou_threshold', [0.5], TypeError, 'number'),
        ('iou_threshold', torch.tensor([0.3, 0.5]), TypeError, 'number'),
        ('min_score', -1e-9, ValueError, r'\[0, 1\]'),
        ('min_score', 1.5, ValueError, r'\[0, 1\]'),
        ('min_score', nan, ValueError, r'\[0, 1\]'),
        ('min_score', None, TypeError, 'number'),
        ('min_score', 10**400, ValueError, 'large'),
        ('sigma', 0, ValueError, '> 0'),
        ('sigma', -0.5, ValueError, '> 0'),
        ('sigma', nan, ValueError, 'finite'),
        ('sigma', inf, ValueError, 'finite'),
        ('sigma', 1e300, ValueError, 'finite'),  # infinite in float32
        ('sigma', 1e-300, ValueError, '> 0'),  # zero in float32
        ('sigma', '0.5', TypeError, 'number'),
        ('sigma', None, TypeError, 'number'),
        ('max_num', 1.5, TypeError, 'int'),
        ('max_num', 100.0, TypeError, 'int'),
        ('max_num', True, TypeError, 'int'),
        ('max_num', None, TypeError, 'int'),
        ('max_num', '100', TypeError, 'int'),
        ('max_num', -2, ValueError, '-1'),
        ('offset', -1, ValueError, '>= 0'),
        ('offset', nan, ValueError, 'finite'),
        ('offset', inf, ValueError, 'finite'),
        ('offset', '1', TypeError, 'number'),
        ('offset', True, TypeError, 'number'),
    ],
)
@pytest.mark.parametrize('gradient', [False, True])
def test_wrong_argument_is_named(name: str, value: Any, error: type[Exception], words: str, gradient: bool) -> None:
    """With gradients the registered operator is called, whose own errors would name its schema."""
    changes = {name: value}
    for other in ('boxes', 'scores'):
        tensor = arguments(**changes)[other]
        if gradient and isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            changes[other] = tensor.clone().requires_grad_()
    with pytest.raises(error, match=words) as caught:
        call(**changes)
    assert name in str(caught.value)


@pytest.mark.parametrize('value', [nan, inf, -inf])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('max_num', [-1, 0, 2])
def test_values_that_are_not_finite_are_named_with_their_place(value: float, dtype: torch.dtype, max_num: int) -> None:
    for column in range(4):
        with pytest.raises(ValueError, match=rf'boxes\[3, {column}\] is {value}'):
            call(boxes=with_value('boxes', value, (3, column), dtype), max_num=max_num)
    with pytest.raises(ValueError, match=rf'scores\[4\] is {value}'):
        call(scores=with_value('scores', value, 4, dtype), max_num=max_num)


@pytest.mark.parametrize('corners', [(inf, inf), (-inf, -inf), (-inf, inf), (inf, -inf)])
def test_infinite_sides_that_could_cancel_are_found(corners: tuple[float, float]) -> None:
    """inf - inf is NaN and inf * 0 is NaN: no such box may pass for one of no area."""
    for height in (0.0, 1.0):
        box = torch.tensor([[corners[0], 0.0, corners[1], height]])
        for boxes in (box, box[:, [1, 0, 3, 2]]):
            with pytest.raises(ValueError, match='boxes must be finite'):
                soft_nms(boxes, torch.tensor([0.5]))


def test_everything_wrong_at_once_on_another_device_is_still_a_clear_error() -> None:
    with pytest.raises(ValueError, match='scores is on meta but boxes is on cpu'):
        soft_nms(torch.zeros(2, 4), torch.ones(3, device='meta'))


def test_positional_parameters_are_refused() -> None:
    """mmcv's third positional argument is iou_threshold, ours is labels: the rest must be spelt out."""
    with pytest.raises(TypeError):
        soft_nms(torch.zeros(1, 4), torch.ones(1), None, 'linear')  # type: ignore[misc]


@pytest.mark.parametrize(
    'changes',
    [
        {'iou_threshold': np.float32(0.5), 'method': 'linear'},
        {'iou_threshold': torch.tensor(0.5), 'method': 'linear'},
        {'iou_threshold': 1, 'method': 'hard'},
        {'max_num': np.int64(3)},
        {'max_num': torch.tensor(3)},
        {'max_num': 2**100},
        {'sigma': np.float64(0.25)},
        {'offset': 1},
    ],
)
def test_numbers_of_other_libraries_are_numbers(changes: dict[str, Any]) -> None:
    plain = {
        key: value if isinstance(value, str) else int(value) if key in ('max_num', 'offset') else float(value)
        for key, value in changes.items()
    }
    for actual, expected in zip(call(**changes), call(**plain), strict=True):
        assert torch.equal(actual, expected)


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize('dtype', INTEGERS)
def test_every_integer_type_names_classes(dtype: torch.dtype) -> None:
    expected = call()
    for actual, wanted in zip(call(labels=arguments()['labels'].to(dtype)), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize('num', [1, 2, 3, 2000])
def test_labels_of_any_value_are_as_good_as_small_ones(num: int) -> None:
    """As many classes as boxes, in runs, at equal distances and anywhere: names only."""
    generator = torch.Generator().manual_seed(num)
    corners = torch.rand(num, 2, generator=generator) * 100
    boxes = torch.cat([corners, corners + 30], 1)
    scores = torch.rand(num, generator=generator)
    for small in (torch.arange(num), torch.randint(7, (num,), generator=generator)):
        names = torch.randint(2**63 - 1, (max(num, 7),), generator=generator)
        for labels in (small + 10**7, small * 2**40, small * 6367, names[small]):
            for actual, wanted in zip(soft_nms(boxes, scores, labels), soft_nms(boxes, scores, small), strict=True):
                assert torch.equal(actual, wanted)


def test_a_default_device_is_not_ours() -> None:
    """torch.set_default_device('cuda') in a script must not move what is computed on the CPU."""
    boxes = arguments()['boxes']
    with torch.device('meta'):
        warmup()
        keep, _ = soft_nms(boxes, torch.rand(NUM, device='cpu'))
        assert keep.device.type == 'cpu'


def test_largest_label() -> None:
    labels = torch.tensor([0, 0, 2**63 - 1, 2**63 - 1, 5])
    for actual, wanted in zip(call(labels=labels), call(), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize('boxes_dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('scores_dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_come_back_in_their_own_type(boxes_dtype: torch.dtype, scores_dtype: torch.dtype) -> None:
    keep, scores = call(boxes=arguments()['boxes'].to(boxes_dtype), scores=arguments()['scores'].to(scores_dtype))
    assert keep.dtype == torch.int64
    assert scores.dtype == scores_dtype


def test_parameters_are_rounded_to_the_working_type_first() -> None:
    """IoU 3/10 in float32 is float32(0.3), which is above the double 0.3: unrounded, the threshold would be crossed."""
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert float(np.float32(0.3)) > 0.3
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        keep, _ = soft_nms(boxes.to(dtype), scores.to(dtype), method='hard', iou_threshold=0.3)
        assert keep.tolist() == [0, 1]
    # The same for a score at min_score.
    keep, _ = soft_nms(boxes[:1], torch.tensor([0.001]), min_score=0.001)
    assert keep.tolist() == [0]


def test_half_precision_is_computed_in_single_precision() -> None:
    """A coordinate difference of 0.25 px at 4000 px is lost in float16 input, but no area overflows at 65504."""
    boxes = torch.tensor([[0.0, 0, 4000, 4000], [0, 0, 2000, 4000]], dtype=torch.float16)
    keep, scores = soft_nms(boxes, torch.tensor([0.5, 0.25], dtype=torch.float16), method='linear')
    assert keep.tolist() == [0, 1]
    assert scores.tolist() == [0.5, 0.125]
