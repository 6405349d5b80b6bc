"""A request is checked once, whoever makes it, before anything slow."""

from dataclasses import FrozenInstanceError, replace

import pytest
from mmengine.config import Config

from mmdet_softnms.files import CheckpointError, ReevaluationError
from mmdet_softnms.reevaluation.request import Listener, Request, check_choice
from mmdet_softnms.rules import SoftNMS
from tests.tiny import tiny_config


@pytest.fixture(scope='module')
def cfg() -> Config:
    return tiny_config('SoftNMSRoIHead')


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / 'some.pth').touch()  # it is located here and read later
    return tmp_path / 'some.pth'


def test_settings_follow_from_the_options(cfg, checkpoint):
    request = Request(cfg, str(checkpoint))
    assert [setting.name for setting in request.settings] == ['HardNMS', 'SoftNMS', 'SoftNMS', 'nms']
    assert request.score_floor == 1e-3 and request.sweep == () and request.checkpoint == checkpoint
    assert request.settings[-1].score_thr == cfg.model.test_cfg.rcnn.score_thr
    swept = Request(cfg, checkpoint, sweep=('SoftNMS.sigma=0.4,0.6', 'score_thr=0.02,0.05'))
    assert len(swept.settings) == 2 * 3 + 1
    assert swept.score_floor == 0.01  # the config's own
    agnostic = Request(cfg, checkpoint, class_agnostic=True)
    assert [setting.class_agnostic for setting in agnostic.settings] == [True, True, True, False]


def test_a_choice_brings_a_grid_to_choose_from(cfg, checkpoint):
    request = Request(cfg, checkpoint, select='AP', min_score=0.01)
    assert len(request.settings) == 22 and request.sweep
    soft = [setting.rule for setting in request.settings if type(setting.rule) is SoftNMS]
    assert {rule.params['min_score'] for rule in soft} == {0.01}


def test_a_request_does_not_change(cfg, checkpoint):
    before = cfg.to_dict()
    request = Request(cfg, checkpoint)
    with pytest.raises(FrozenInstanceError):
        request.score_thr = 0.5
    assert cfg.to_dict() == before
    other = replace(request, score_thr=0.005)
    assert other.score_floor == 0.005 and request.score_floor == 1e-3


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(score_thr=1.0), 'score_thr must be in'),
        (dict(max_per_img=-2), 'max_per_img must be'),
        (dict(min_score=2), 'min_score'),
        (dict(sweep=('SoftNMS.sigma=0',)), 'sigma must be'),
        (dict(select='mAP'), '--select takes AP'),
        (dict(select='AP', resamples=10), '10 resamples'),
        (dict(tune_on='train'), '--tune-on takes auto, val or folds, got train'),
    ],
)
def test_what_cannot_be_asked_is_one_line(cfg, checkpoint, options, words):
    with pytest.raises(ReevaluationError, match=words) as raised:
        Request(cfg, checkpoint, **options)
    assert '\n' not in str(raised.value)


def test_detectors_and_checkpoints_that_are_not_there(cfg, tmp_path):
    with pytest.raises(CheckpointError, match='nowhere.pth does not exist'):
        Request(cfg, tmp_path / 'nowhere.pth')
    with pytest.raises(ReevaluationError):
        Request(Config(dict(model=dict(type='NoDetector'))), tmp_path)


def test_folds_are_checked_once_the_test_set_is_known():
    check_choice('AP', 1000, num_folds=5, num_images=5)
    check_choice('AP', 1000, num_folds=None, num_images=1)  # a tuning split: nothing is divided
    for folds, images, words in [(2, 1, 'a single image'), (1, 9, '1 folds of 9'), (10, 9, '10 folds of 9')]:
        with pytest.raises(ReevaluationError, match=words):
            check_choice('AP', 1000, folds, images)


def test_a_listener_that_nobody_listens_to_and_one_that_hears():
    Listener().bar('drawing')(1, 2)
    Listener().say('a line')
    heard = []
    Listener(progress=lambda *what: heard.append(what)).bar('drawing')(1, 2)
    assert heard == [('drawing', 1, 2)]
