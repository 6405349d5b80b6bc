"""The fuzz itself: some cases of it in every run of the tests, and that it notices what is wrong."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdet_softnms import soft_nms
from tests import fuzz

CASES = 600  # about 3 s; the command runs as many as there is time for
Result = tuple[Tensor, Tensor]


@pytest.mark.parametrize(
    'device',
    ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)],
)
def test_random_cases_agree_with_the_definition(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = fuzz.main(['--cases', str(CASES), '--device', device])
    assert status == 0, capsys.readouterr().out


def test_the_cases_are_of_every_sort() -> None:
    """What a generator never draws is never tested."""
    cases = [fuzz.draw(number, 0) for number in range(CASES)]
    images = [image for case in cases for image in case.images]
    forms = {(case.form, case.around) for case in cases}
    assert forms == {*itertools.product(('single', 'batch', 'gradient'), ('', 'votes', 'support'))} - {
        ('gradient', 'support')
    }
    methods_and_types = {(case.parameters['method'], image.boxes.dtype) for case in cases for image in case.images}
    assert methods_and_types == set(itertools.product(fuzz.METHODS, fuzz.FLOATS))
    labels = [image.labels for image in images if image.labels is not None and len(image.labels)]
    assert len(labels) < len(images) and {one.dtype for one in labels} == {torch.int64, torch.int32, torch.uint8}
    assert any(int(one.max()) > 2**62 for one in labels) and any(int(one.max()) == 0 for one in labels)
    assert {case.parameters['max_num'] for case in cases} >= {-1, 0, 1}
    assert {len(image.scores) for image in images} >= {0, 1, 2} and max(len(image.scores) for image in images) > 512
    boxes = torch.cat([image.boxes.double() for image in images])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides == 0).any() and (sides < 0).any() and (sides > 1e18).any()
    at_threshold = 0
    for case in cases:
        for image in case.images:
            if len(image.scores) and image.boxes.dtype == torch.float64:
                definition = fuzz.Definition(image, case.parameters)
                at_threshold += bool((definition.overlaps(0)[1:] == definition.threshold).any())
    assert at_threshold > 10


def _doubled_sigma(*image: Any, sigma: float, **parameters: Any) -> Result:
    return soft_nms(*image, sigma=2 * sigma, **parameters)


def _one_box_less(*image: Any, **parameters: Any) -> Result:
    keep, scores = soft_nms(*image, **parameters)
    return keep[:-1], scores[:-1]


def _last_bit(boxes: Tensor, scores: Tensor, labels: Tensor | None, **parameters: Any) -> Result:
    keep, kept = soft_nms(boxes, scores, labels, **parameters)
    return keep, kept.nextafter(kept + 1) if kept.dtype == torch.float32 else kept


def _ties_from_behind(boxes: Tensor, scores: Tensor, labels: Tensor | None, **parameters: Any) -> Result:
    keep, kept = soft_nms(boxes.flip(0), scores.flip(0), None if labels is None else labels.flip(0), **parameters)
    return len(scores) - 1 - keep, kept


def _decays_at_the_threshold(*image: Any, iou_threshold: float, **parameters: Any) -> Result:
    below = torch.tensor(iou_threshold).nextafter(torch.tensor(0.0)).item()
    return soft_nms(*image, iou_threshold=below, **parameters)


def _without_classes(boxes: Tensor, scores: Tensor, labels: Tensor | None, **parameters: Any) -> Result:
    return soft_nms(boxes, scores, **parameters)


def _raises(*image: Any, **parameters: Any) -> Result:
    raise ValueError('boxes must be nice')


@pytest.mark.parametrize(
    'wrong',
    [
        _doubled_sigma, _one_box_less, _last_bit, _ties_from_behind, _decays_at_the_threshold, _without_classes, _raises
    ],
)  # fmt: skip
def test_an_operator_that_is_wrong_is_noticed(wrong: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.fuzz(150, operator=wrong) > 0
    said = capsys.readouterr().out
    first = next(line for line in said.splitlines() if 'again: ' in line)
    options = first.split('python -m tests.fuzz ')[1].split()
    number = int(options[options.index('--first') + 1])
    # The line that repeats it names the case that fails, and nothing of this is in the operator itself.
    assert fuzz.check(fuzz.draw(number, 0)) == ''
    if wrong is not _raises:
        assert fuzz.check(fuzz.draw(number, 0), operator=wrong) != ''


@pytest.mark.parametrize('name', ['vote', 'quality', 'ranked_soft_nms'])
def test_wrong_votes_and_support_are_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Against raw scores a thousandth higher, which moves a weighted mean by less than any tolerance would forgive."""
    right = getattr(fuzz, name)

    def wrong(boxes: Tensor, scores: Tensor, *others: Any, **parameters: Any) -> Any:
        uneven = torch.linspace(1, 1.01, len(scores), dtype=scores.dtype, device=scores.device)
        return right(boxes, scores * uneven, *others, **parameters)

    monkeypatch.setattr(fuzz, name, wrong)
    assert fuzz.fuzz(150) > 0
    words = {'vote': 'votes for', 'quality': 'support of', 'ranked_soft_nms': 'score of'}
    assert words[name] in capsys.readouterr().out


def test_a_failure_is_exit_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, 'check', lambda *arguments: 'image 0: wrong')
    assert fuzz.main(['--cases', '2']) == 1


def test_no_gpu_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as caught:
        fuzz.main(['--device', 'cuda'])
    assert caught.value.code == 2 and 'sees no GPU' in capsys.readouterr().err
