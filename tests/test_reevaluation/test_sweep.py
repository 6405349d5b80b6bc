"""Sweeps: what a grid means, that every way of running it gives the same rows, and that nothing is done twice."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import distributed
import joblib
import numpy as np
import pytest

from mmdet_softnms.ops import weights
from mmdet_softnms.ops.weights import cos, where
from mmdet_softnms.reevaluation.scoring import sweep
from mmdet_softnms.reevaluation.scoring.sweep import evaluate_all, forget_partial, match_all
from tests.drawn import drawn_test_set
from tests.test_reevaluation.test_settings import settings_of

ROOT = Path(__file__).parents[2]


def _without_times(rows):
    return [row.to_dict() | dict(seconds=0, metric_seconds=0) for row in rows]


@pytest.fixture(scope='module')
def drawn():
    return drawn_test_set()


@pytest.fixture(scope='module')
def rows(drawn):
    return evaluate_all(drawn[0], settings_of('SoftNMS.sigma=0.2,0.5,0.9'), drawn[1])


def test_processes_give_the_same_rows_and_matches(drawn, rows):
    settings = settings_of('SoftNMS.sigma=0.2,0.5,0.9')
    assert len({row.metrics['AP'] for row in rows}) > 3
    assert _without_times(evaluate_all(drawn[0], settings, drawn[1], processes=2)) == _without_times(rows)
    one, two = (match_all(drawn[0], settings[:2], drawn[1], processes=number) for number in (1, 2))
    for left, right in zip(one, two, strict=True):
        for name, values in vars(left).items():
            assert (values == getattr(right, name)).all()


def test_a_cluster_gives_the_same_rows(drawn, rows):
    """Two threads of a Dask worker, a process of its own; rows come as they are finished."""
    finished = []
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config(backend='dask'),
    ):
        found = evaluate_all(
            drawn[0],
            settings_of('SoftNMS.sigma=0.2,0.5,0.9'),
            drawn[1],
            on_row=lambda row, done, total: finished.append((done, total)),
        )
        at_work = client.run(lambda: 'mmdet_softnms.reevaluation.scoring.sweep' in sys.modules)
    assert _without_times(found) == _without_times(rows)
    assert finished == [(done, 5) for done in (1, 2, 3, 4, 5)]
    assert list(at_work.values()) == [True]


def cosine(iou, iou_threshold):
    return where(iou > iou_threshold, (1 + cos(3.141592653589793 * iou)) / 2, 1)


def method_and_images(scorer, setting):
    return weights.get(setting).function, scorer.candidates.img_ids, scorer.truth.classes


def test_a_worker_knows_added_rules_and_only_the_latest_sweep(drawn, monkeypatch):
    monkeypatch.setattr(weights, 'WEIGHTS', dict(weights.WEIGHTS))
    weights.register(cosine)
    for candidates, truth in (drawn, drawn_test_set(3)):
        shared = sweep._share(candidates, truth)
        for number in (4, 5):
            if number == 4:
                del weights.WEIGHTS['cosine']  # as in a process that is started anew
            done = sweep._work(method_and_images, number, 'cosine', None, *shared)
            assert done == (number, (cosine, candidates.img_ids, truth.classes))
    _, _, content, *buffers = shared
    assert all(array.dtype == np.uint8 for array in (content, *buffers)) and len(buffers) == 5
    read_only = [np.frombuffer(array.tobytes(), np.uint8) for array in buffers]  # as Ray hands them on
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # torch's about memory that it may not write to
        _, (image, _) = sweep._work(first_image, 0, 'cosine', None, 'another sweep', [], content, *read_only)
    assert image.candidates.bboxes.equal(drawn_test_set(3)[0][0].candidates.bboxes)


def first_image(scorer, setting):
    return scorer.candidates[0], setting


def test_workers_end_with_an_interrupted_and_with_a_killed_parent():
    """Without a word of theirs, and what they share is cleared away. Nobody tells those of a killed parent."""
    script = f"""
import signal, sys, time
import numpy as np
sys.path[:0] = [{str(ROOT)!r}]
from mmdet_softnms.reevaluation.scoring.sweep import _run

def wait_for_ever(scorer, setting):
    print('at work', flush=True)
    time.sleep(600)

signal.signal(signal.SIGTERM, lambda *_: sys.exit('terminated'))
truth = np.zeros(1 << 18)  # large enough to be mapped into memory
for _ in range(3):  # no if __name__ == '__main__' is needed
    try:
        list(_run(wait_for_ever, [], [None, None], [0, 1], truth, 2))
    except (KeyboardInterrupt, SystemExit) as stopped:
        print(type(stopped).__name__, flush=True)
"""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'main.py').write_text(script)
        parent = subprocess.Popen(
            [sys.executable, f'{folder}/main.py'],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, JOBLIB_TEMP_FOLDER=folder),
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a CI's background job ignores it
        )
        for stop in (
            lambda: os.killpg(parent.pid, signal.SIGINT),  # as a terminal does it
            lambda: parent.send_signal(signal.SIGTERM),
            parent.kill,
        ):
            assert parent.stdout.readline() == parent.stdout.readline() == 'at work\n'
            assert list(Path(folder).glob('joblib_*/*'))
            stop()
            if stop != parent.kill:
                assert parent.stdout.readline() in ('KeyboardInterrupt\n', 'SystemExit\n')
                assert not list(Path(folder).glob('joblib_*'))
        out, errors = parent.communicate(timeout=60)  # the pipes end with the last process that holds them
        # loky's tracker says, after a kill that nobody could tell it of, that it clears away what was left.
        lines = errors.splitlines()
        assert out == '' and all('resource_tracker' in line or line.startswith('  ') for line in lines), errors
        assert not list(Path(folder).glob('joblib_*'))


class _StopError(Exception):
    pass


def test_an_interrupted_sweep_goes_on_where_it_stopped(drawn, rows, tmp_path):
    settings = settings_of('SoftNMS.sigma=0.2,0.5,0.9')

    def stop(row, done, total):
        if done == 2:
            raise _StopError

    with pytest.raises(_StopError):
        evaluate_all(drawn[0], settings, drawn[1], work_dir=tmp_path, identity='a', on_row=stop)
    partial = tmp_path / 'sweep-partial-0.jsonl'
    # A kill in the middle of writing leaves half a line.
    partial.write_text(partial.read_text() + '{"identity": "a", "setting": "tab')
    fresh = []
    again = evaluate_all(
        drawn[0],
        settings,
        drawn[1],
        work_dir=tmp_path,
        identity='a',
        on_row=lambda row, done, total: fresh.append(done),
    )
    assert _without_times(again) == _without_times(rows)
    # Two kept, three new: kept ones keep the seconds they took.
    assert [one.seconds for one in again[:2]] == [
        one.seconds for one in evaluate_all(drawn[0], settings, drawn[1], work_dir=tmp_path, identity='a')[:2]
    ]
    assert fresh == [1, 2, 3, 4, 5]
    forget_partial(tmp_path)
    assert not partial.exists()


def test_kept_rows_of_any_content_are_ignored_with_a_line(drawn, rows, tmp_path):
    """Kept rows are read from a folder that anybody may have written to: none is taken that is not a row."""
    settings = settings_of('SoftNMS.sigma=0.2,0.5,0.9')
    evaluate_all(drawn[0], settings, drawn[1], work_dir=tmp_path, identity='a')
    partial = tmp_path / 'sweep-partial-0.jsonl'
    kept = [json.loads(line) for line in partial.read_text().split('\n') if line]
    one = {**kept[0], 'row': {**kept[0]['row'], 'metrics': {**kept[0]['row']['metrics'], 'AP': 0.123}}}
    strange = [
        one | dict(row=[]),
        one | dict(row={**one['row'], 'surplus': 1}),
        one | dict(row={**one['row'], 'rule': 'Other'}),
        one | dict(row={**one['row'], 'seconds': 'long'}),
        one | dict(row={**one['row'], 'metrics': {'AP': 0.123}}),
        one | dict(row={**one['row'], 'metrics': {**one['row']['metrics'], 'AP': float('nan')}}),
        one | dict(row={**one['row'], 'metrics': {**one['row']['metrics'], 'AP': 7}}),
        [],
        dict(identity='a'),
    ]
    partial.write_bytes(b'\xff\x00\n' + '\n'.join(map(json.dumps, strange)).encode())
    (tmp_path / 'sweep-partial-1.jsonl').mkdir()
    said = []
    again = evaluate_all(drawn[0], settings, drawn[1], work_dir=tmp_path, identity='a', say=said.append)
    assert _without_times(again) == _without_times(rows)
    assert len(said) == 2 and f'{len(strange) + 1} lines are not finished rows' in said[0]
    forget_partial(tmp_path)


def test_kept_rows_of_other_candidates_are_not_taken(drawn, rows, tmp_path):
    settings = settings_of('SoftNMS.sigma=0.2,0.5,0.9')
    evaluate_all(drawn[0], settings, drawn[1], work_dir=tmp_path, identity='a')
    other = drawn_test_set(seed=1)
    found = evaluate_all(other[0], settings, other[1], work_dir=tmp_path, identity='b')
    assert found[0].metrics['AP'] != rows[0].metrics['AP']
