"""One sweep over a drawn test set, its selection and its report, for all tests of what a reader gets."""

import dataclasses
import multiprocessing.dummy
from pathlib import Path

import pytest

from mmdet_softnms.reevaluation.choice.selection import Selection, select
from mmdet_softnms.reevaluation.report.page import write_report
from mmdet_softnms.reevaluation.report.why import errors_of
from mmdet_softnms.reevaluation.result import Reevaluation, Session
from mmdet_softnms.reevaluation.scoring.matching import Objects
from mmdet_softnms.reevaluation.scoring.settings import sweep_settings
from mmdet_softnms.reevaluation.scoring.sweep import match_all
from tests.drawn import CFG, drawn_reevaluation, drawn_test_set, picture_file

EVIL = r'<script>alert("$\frac$")</script>'  # a class name; matplotlib would read mathematics, and fail


@pytest.fixture
def voc_in_one_process(monkeypatch):
    """mmdet's VOC evaluation forks four processes for each AP, which takes longer than the AP; threads do the same."""
    monkeypatch.setattr('mmdet.evaluation.functional.mean_ap.Pool', multiprocessing.dummy.Pool)


@pytest.fixture(scope='session')
def result(tmp_path_factory) -> Reevaluation:
    """A sweep over a drawn test set, one of whose classes has a dangerous name."""
    candidates, truth = drawn_test_set()
    truth.classes = (EVIL, *truth.classes[1:])
    specs = ['SoftNMS.sigma=0.2,0.5,0.9', 'SoftNMS.iou_threshold=0.2,0.4,0.6', 'score_thr=0.001,0.05']
    settings = sweep_settings(specs, CFG, 1e-3, 100, 1e-3)
    path = picture_file(tmp_path_factory.mktemp('images') / 'one.jpg')
    return drawn_reevaluation(Session(candidates, truth, [path] * len(candidates)), settings)


@pytest.fixture(scope='session')
def selection(result) -> Selection:
    session = result.session
    matches = match_all(session.candidates, result.settings, session.truth)
    return select(result.settings, matches, Objects.of(session.truth))


@pytest.fixture(scope='session')
def page(result, selection, tmp_path_factory) -> Path:
    """The report of the sweep."""
    folder = tmp_path_factory.mktemp('report')
    words = 'chosen: <nothing>\nsecond line'
    whole = dataclasses.replace(result, errors=errors_of(result, selection))
    write_report(folder, whole, title='A & B', command='python x --y "z"', selection=selection, selection_words=words,
                 cfg=CFG, checkpoint='some.pth')  # fmt: skip
    return folder / 'report.html'
