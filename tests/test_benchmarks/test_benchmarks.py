"""The benchmarks on their smallest cells: what they draw, check, write and refuse. No test looks at our times."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import mmdet_softnms
from benchmarks import __main__ as command_line
from benchmarks import drawn, growth, memory, op, peers, pool, serving, stage, timing

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, 'FEWEST_ROUNDS', 1)
    monkeypatch.setattr(serving, 'FEWEST_ROUNDS', 1)


SMALL = ['op', '--sizes', '200', '--classes', '5', '--dense', '300', '--wanted', '100', '-1', '--seconds', '0']


def test_rows_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command_line.main([*SMALL, '--out', str(tmp_path / 'new' / 'folder')])
    assert 'worst against mmcv soft' in capsys.readouterr().out

    folder = tmp_path / 'new' / 'folder'
    assert sorted(path.name for path in folder.iterdir()) == [f'benchmark_op.{kind}' for kind in ('json', 'md', 'svg')]
    report = json.loads((folder / 'benchmark_op.json').read_text())
    rows = report['rows']
    assert all(peer in (folder / 'benchmark_op.svg').read_text() for peer in ('ours', 'mmcv soft'))
    assert len(rows) == 3 * 3 * 2  # scenes, rules, top 100 or all
    for row in rows:
        peers = {'ours', 'mmcv hard', 'plain PyTorch'}
        peers |= {'mmcv soft', 'ensemble-boxes soft'} if row['rule'] != 'hard' else set()
        assert set(row['milliseconds']) == set(row['calls']) == set(row['kept']) >= peers
        assert all(value > 0 for value in row['milliseconds'].values())
        assert row['kept']['ours'] <= (row['max_num'] if row['max_num'] >= 0 else row['candidates'])
        # One class needs no offset, so nothing but ties at the last bit can part us from mmcv.
        assert row['in_common_with_mmcv'] >= (0.99 if row['classes'].startswith('1 ') else 0.9)

    text = (folder / 'benchmark_op.md').read_text()
    assert sum(line.startswith('|') for line in text.splitlines()) == 2 + len(rows)
    for peer in ('mmcv soft', 'mmcv hard', 'ensemble-boxes soft', 'plain PyTorch'):
        assert f'worst against {peer}' in text and f'best against {peer}' in text
    for private in (str(Path.home()), str(tmp_path), str(ROOT), sys.prefix):
        assert private not in text + json.dumps(report), 'a path of this machine is in the report'


def test_candidates_are_the_same_every_time() -> None:
    for make in (lambda: drawn.detector_candidates(500, 80), lambda: drawn.spread_candidates(500)):
        first, second = make(), make()
        assert len(first.scores) == 500
        for a, b in zip(first[:3], second[:3], strict=True):
            assert torch.equal(a, b)
        assert ((first.boxes[:, 2:] - first.boxes[:, :2]) > 1).all()
        assert (first.boxes >= 0).all() and (first.boxes[:, 2] <= 1333).all() and (first.boxes[:, 3] <= 800).all()
        assert first.min_score <= first.scores.min()


def test_wrong_selection_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the guard: an operator that is fast because it is wrong gets no row."""

    def wrong(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, **options: Any) -> Any:
        return peers.definition(
            boxes, scores, torch.zeros_like(labels), {'method': 'hard', 'iou_threshold': 1.0}, 0.0, 100
        )

    monkeypatch.setattr(op, 'soft_nms', wrong)
    with pytest.raises(SystemExit, match='not the reference'):
        op.measure(drawn.detector_candidates(200, 5), 'gaussian', 100, seconds=0)


def test_slow_peer_is_called_once_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, 'SLOW', 0)
    row = op.measure(drawn.detector_candidates(200, 5), 'gaussian', 100, seconds=0)
    assert set(row['calls'].values()) == {1}
    assert sum('once' in cell for cell in op.cells(row, op.PEERS)) == len(row['calls']) - 1 >= 4


def test_the_clock_of_the_process_does_not_count_waiting() -> None:
    waits = {'waits': lambda: time.sleep(0.02)}
    assert min(timing.in_turns(waits, 0.0, timing.CLOCKS['wall'])[0]['waits']) >= 0.02
    assert min(timing.in_turns(waits, 0.0, timing.CLOCKS['cpu'])[0]['waits']) < 0.01
    with pytest.raises(SystemExit, match='leave out --tensorflow'):
        command_line.main([*SMALL, '--clock', 'cpu', '--tensorflow', 'python'])


@pytest.mark.parametrize(
    ('module', 'words'), [('ensemble_boxes', r"pip install '\.\[bench\]'"), ('mmcv.ops', 'Install mmcv')]
)
def test_missing_peer_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match=words) as caught:
        command_line.main([*SMALL, '--out', str(tmp_path / 'out')])
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('arguments', [[], ['op', '--sizes', '0'], ['op', '--sizes', 'many'], ['no-such-command']])
def test_wrong_command_line(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2


def test_output_folder_that_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match=r'--out .*file: File exists'):
        command_line.main([*SMALL, '--out', str(tmp_path / 'file')])


@pytest.mark.parametrize('command', [SMALL, ['stage']], ids=['op', 'stage'])
def test_gpu_that_is_not_there_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='sees no GPU'):
        command_line.main([*command, '--device', 'cuda', '--out', str(tmp_path)])


@pytest.mark.gpu
def test_rows_on_a_gpu(tmp_path: Path) -> None:
    command_line.main([*SMALL, '--device', 'cuda', '--out', str(tmp_path)])
    assert json.loads((tmp_path / 'benchmark_op.json').read_text())['machine']['device'] != 'CPU'


def test_pooling_equals_its_naive_form_and_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command_line.main(['pool', '--seconds', '0'])
    out = capsys.readouterr().out
    assert all(out.count(kind) >= 2 for kind in pool.KINDS) and 'naive' in out
    monkeypatch.setattr(pool, 'naive_pool', lambda maps, rois, kind: maps.new_zeros(300, 21, 7, 7) + maps.mean())
    with pytest.raises(AssertionError):  # it compares before it reports
        command_line.main(['pool', '--seconds', '0'])


def test_the_stage_gives_mmdets_detections_and_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed = stage.stages(0.01)
    stock, hard = timed[stage.STOCK](), timed['ours, hard']()
    assert len(stock) == 100
    for key in ('bboxes', 'scores', 'labels'):
        torch.testing.assert_close(stock[key], hard[key])
    command_line.main(['stage', '--score-thr', '0.05', '--seconds', '0', '--out', str(tmp_path)])
    assert 'ours, gaussian' in capsys.readouterr().out
    (row,) = json.loads((tmp_path / 'benchmark_stage.json').read_text())['rows']
    assert row['candidates'] > 500 and set(row['milliseconds']) == set(timed)


def test_growth_is_fitted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What is measured is the next test's matter: 41 processes would take a minute.
    monkeypatch.setattr(growth, 'peak_bytes', lambda boxes, scores, labels, max_num: 50 * len(scores))
    assert growth.exponent([10, 100, 1000], [3, 300, 30000]) == pytest.approx(2)
    command_line.main(['growth', '--largest', '8192', '--seconds', '0', '--out', str(tmp_path)])
    rows = json.loads((tmp_path / 'benchmark_growth.json').read_text())['rows']
    assert len(rows) == 6 and all(len(row['sizes']) == len(row['bytes']) for row in rows)
    assert all(row['name'] in (tmp_path / 'benchmark_growth.svg').read_text() for row in rows)
    assert 'exponent' in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != 'linux', reason='no /proc: the peak of a process is read there')
def test_the_peak_memory_is_that_of_one_call() -> None:
    boxes, scores, labels = drawn.detector_candidates(200_000, 80, num_proposals=3125)[:3]
    num = len(scores)
    # At least the boxes and their areas in blocks (20 bytes each), and the order (8).
    assert 28 * num < memory.peak_bytes(boxes, scores, labels, -1) < 100 * num
    assert memory.peak_bytes(boxes, scores, labels, 100) < 16 * num


def test_serving_times_new_processes_and_batches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    warmed: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(mmdet_softnms, 'warmup', lambda: warmed.append('all'))
        exec(serving.WARMUP, {'mmdet_softnms': mmdet_softnms})
    assert warmed == ['all']
    # That would compile the rules' kernels, ten seconds each; the import compiles three small ones, cached alike.
    monkeypatch.setattr(serving, 'WARMUP', 'import mmdet_softnms.ops._cpu')
    command_line.main(['serving', '--images', '1', '3', '--seconds', '0', '--out', str(tmp_path)])
    start, *rows = json.loads((tmp_path / 'benchmark_serving.json').read_text())['rows']
    assert start['seconds']['warmup, compiled'] > start['seconds']['warmup, from the disk cache'] > 0
    assert [row['images'] for row in rows] == [1, 3] * 3
    assert all(row['milliseconds'][name] > 0 for row in rows for name in ('one by one', 'batched'))
    assert 'a new process' in capsys.readouterr().out


def test_the_sweep_is_timed_part_by_part(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command_line.main(['sweep', '--images', '4', '--candidates', '200', '--settings', '3', '--out', str(tmp_path)])
    sweep = json.loads((tmp_path / 'benchmark_sweep.json').read_text())['sweep']
    assert sweep['candidates'] == 800 and sweep['objects'] == 28 and sweep['bytes_per_candidate'] < 60
    assert '3 settings over 4 images' in capsys.readouterr().out


def test_tensorflow_that_is_not_there_is_one_clear_line() -> None:
    for python in ('no-such-python', sys.executable):
        with pytest.raises(SystemExit, match='has no TensorFlow'):
            peers.TensorFlow(python)
