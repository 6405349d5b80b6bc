"""Every config of the installed mmdet takes rules, or says in one sentence why not."""

from pathlib import Path

import pytest

from tests import zoo_walk
from tests.tiny_dense import ZOO

PAGE = Path(__file__).parents[2] / 'docs/detectors.md'


@pytest.fixture(scope='module')
def verdicts():
    return zoo_walk.walk()


def test_every_config_is_supported_or_refused_with_a_reason(verdicts):
    assert len(verdicts) > 700
    supported = {each.head for each in verdicts if not each.reason}
    assert set(ZOO) - {'BoxInstBboxHead'} <= supported | {'BoxInstBboxHead'}  # what is compared is in the zoo
    for each in verdicts:
        assert not each.reason or (len(each.reason) > 20 and '\n' not in each.reason and each.head in each.reason)
    refused = {each.head for each in verdicts if each.reason}
    assert not supported & refused - {'StandardRoIHead', 'CascadeRoIHead'}  # SABL's bbox heads in these
    for head in ('DETRHead', 'SOLOHead', 'YOLACTHead', 'PAAHead', 'CenterNetHead', 'Mask2FormerHead', 'RPNHead'):
        assert head in refused
    # Nobody but a head that is not there, or has nothing to do with boxes, is refused for an unknown reason.
    assert sum(not each.reason for each in verdicts) / len(verdicts) > 0.7


def test_the_page_is_this_walk(verdicts):
    page = PAGE.read_text()
    made = zoo_walk.table(verdicts)
    if page.splitlines()[2].split(',')[0] == made.splitlines()[2].split(',')[0]:  # the same version of mmdet
        assert page == made
    heads = {line.split('|')[1].strip() for line in page.splitlines() if line.startswith('| ')}
    assert {each.head for each in verdicts if not each.reason} <= heads
