"""TIDE's errors: against tidecv, by hand, and in every file that a reader gets."""

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from mmdet_softnms.reevaluation.report.page import markdown
from mmdet_softnms.reevaluation.report.why import compared_rows, errors_of, lines, sentence
from mmdet_softnms.reevaluation.scoring.errors import KINDS, errors
from mmdet_softnms.reevaluation.scoring.matching import Objects
from mmdet_softnms.reevaluation.scoring.metrics import GroundTruth
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import detections
from mmdet_softnms.rules import HardNMS, SoftNMS
from tests.drawn import drawn_test_set

#: Of tidecv 1.0.1, over drawn_test_set(60, 3, seed) without tied scores, in the order of KINDS: AP, dAP and counts.
#: Classes without objects are left out, since it counts them as AP 0.
TIDECV = [
    (0, False, 0.807326229395,
     [0.004101765844, 0.018360596671, 0.038804615453, 0.000023347156, 0.110465665787, 0.000000000000],
     [4, 56, 55, 4, 179, 0]),
    (0, True, 0.748564355030,
     [0.005063614909, 0.017466854279, 0.042800485414, 0.001862208501, 0.145284816738, 0.000000000000],
     [17, 114, 62, 726, 194, 0]),
    (1, False, 0.622991851890,
     [0.000618685531, 0.016532327368, 0.025671132421, 0.000132106428, 0.094805908168, 0.177678251135],
     [1, 14, 16, 1, 69, 56]),
    (1, True, 0.601782123133,
     [0.000858890399, 0.017894325525, 0.028954322843, 0.001565616279, 0.110564609192, 0.165384131524],
     [4, 23, 17, 185, 73, 54]),
    (2, False, 0.690975026127,
     [0.000000000000, 0.020785358143, 0.018322776540, 0.000180462286, 0.102230097752, 0.135282046004],
     [0, 12, 14, 2, 55, 34]),
    (2, True, 0.677894645667,
     [0.002028612716, 0.016834610814, 0.021224825588, 0.002190012105, 0.114184292257, 0.120183254340],
     [4, 20, 15, 161, 61, 32]),
]  # fmt: skip


@pytest.mark.parametrize('case', range(len(TIDECV)))
def test_the_numbers_are_those_of_tidecv(case):
    seed, soft, ap, gains, counts = TIDECV[case]
    results, truth = _drawn(seed, soft)
    found = errors(results, Objects.of(truth))
    assert found['AP50'] == pytest.approx(ap, abs=1e-9)
    assert list(found['dAP']) == list(found['count']) == list(KINDS)
    assert list(found['dAP'].values()) == pytest.approx(gains, abs=1e-9)
    assert list(found['count'].values()) == counts


def _drawn(seed: int, soft: bool):
    """Detections and objects; the class that has no object is left out, and no two scores are equal."""
    candidates, truth = drawn_test_set(60, 4, seed)
    setting = Setting(SoftNMS('gaussian', sigma=0.5) if soft else HardNMS(0.5), 0.7 if seed else 1e-3, 100)
    results = []
    for number, found in enumerate(detections(candidates, setting)):
        found = found[found.labels < 3]
        noise = np.random.default_rng(number).random(len(found)) * 1e-4
        found.scores = found.scores + torch.tensor(noise, dtype=torch.float32)
        results.append(found)
    return results, truth


def _one_image(objects, found, num_classes=2):
    """Errors of one image: objects (label, x1, y1, x2, y2, crowd), detections (label, score, x1, y1, x2, y2)."""
    annotations = [
        dict(id=number, image_id=1, category_id=label + 1, bbox=[x1, y1, x2 - x1, y2 - y1], area=1.0, iscrowd=crowd)
        for number, (label, x1, y1, x2, y2, crowd) in enumerate(objects, 1)
    ]
    categories = [dict(id=label + 1, name=str(label)) for label in range(num_classes)]
    coco = dict(images=[dict(id=1)], annotations=annotations, categories=categories)
    truth = GroundTruth(tuple(map(str, range(num_classes))), coco, [1], list(range(1, num_classes + 1)))
    rows = torch.tensor(found, dtype=torch.float32).reshape(-1, 6)
    result = InstanceData(bboxes=rows[:, 2:], scores=rows[:, 1], labels=rows[:, 0].long())
    return errors([result], Objects.of(truth))


OBJECT = (0, 0, 0, 100, 100, 0)
RIGHT = (0, 0.5, 0, 0, 100, 100)


@pytest.mark.parametrize(
    ('kind', 'wrong'),
    [
        ('classification', (1, 0.9, 200, 0, 300, 100)),
        ('localisation', (0, 0.9, 200, 60, 300, 160)),
        ('both', (1, 0.9, 200, 60, 300, 160)),
        ('duplicate', (0, 0.4, 0, 0, 100, 98)),
        ('background', (0, 0.9, 400, 400, 450, 450)),
    ],
)
def test_each_kind_by_hand(kind, wrong):
    """Two objects of class 0, one found; a single wrong detection is of one kind, and nothing else costs anything."""
    found = _one_image([OBJECT, (0, 200, 0, 300, 100, 0)], [RIGHT, wrong])
    assert {name: count for name, count in found['count'].items() if count} == (
        {kind: 1} if kind in ('classification', 'localisation') else {kind: 1, 'missed': 1}
    )
    # AP of one object of two: recall 0, 0.01, ... 0.5 at precision 1, or at 1/2 behind a false one of the class.
    first = wrong[0] == 0 and wrong[1] > 0.5
    assert found['AP50'] == pytest.approx(51 / 101 / (1 + first))
    if kind in ('classification', 'localisation'):  # it becomes the second object's, and all is right
        assert found['dAP'][kind] == pytest.approx(1 - found['AP50'])
        assert found['dAP']['missed'] == 0
    else:
        assert found['dAP'][kind] == pytest.approx(51 / 101 - found['AP50'])
        assert found['dAP']['missed'] == pytest.approx((1 - 51 / 101) / (1 + first))


def test_crowds_and_empty_images():
    in_crowd = _one_image([OBJECT, (0, 200, 0, 400, 200, 1)], [RIGHT, (0, 0.9, 210, 10, 260, 60)])
    assert in_crowd['AP50'] == 1.0 and set(in_crowd['dAP'].values()) == {0.0}
    nothing = _one_image([OBJECT], [])
    assert nothing['AP50'] == 0.0 and nothing['count']['missed'] == 1


def test_the_ap_is_that_of_the_table(result, selection):
    found = errors_of(result, selection)
    compared = compared_rows(result.rows, selection)
    assert list(found) == list(compared) and next(iter(found)) == 'baseline' and list(found)[-1] == 'config'
    for name, row in compared.items():
        assert found[name]['AP50'] == pytest.approx(row.metrics['AP50'], abs=1e-12)
        assert found[name]['params'] == row.params
    text = lines(found)
    assert len(text) == 2 + len(KINDS) and max(map(len, text)) <= 80
    value, base = (100 * found[name]['dAP']['duplicate'] for name in (list(found)[1], 'baseline'))
    (line,) = (line for line in text if line.startswith('duplicate'))
    assert f'{base:.2f}' in line and f'{value:.2f} ({value - base:+.2f})' in line
    result_with = result.__class__(**{**vars(result), 'errors': found})
    assert f'| duplicate | {base:.2f} | {value:.2f} ({value - base:+.2f}) |' in markdown(
        result_with, title='', command=''
    )
    assert result_with.to_dict()['errors'] == found


def test_the_sentence_names_the_largest_changes():
    def row(**gains):
        return dict(dAP=dict.fromkeys(KINDS, 0.0) | gains)

    found = dict(baseline=row(missed=0.05, both=0.01), best=row(missed=0.02, duplicate=0.004))
    words = sentence(found)
    assert '3.00 points less are lost to missed objects and 0.40 points more are lost to duplicates' in words
    assert 'No kind' in sentence(dict(baseline=row(), chosen=row())) and sentence(dict(baseline=row())) == ''


def test_many_classes_and_images_take_seconds():
    """1,203 classes, as LVIS has; the time of 5,000 images is 25 times this."""
    candidates, truth = drawn_test_set(200, 1203)
    found = errors(detections(candidates, Setting(HardNMS(0.5), 1e-3, 100)), Objects.of(truth))
    assert 0 < found['AP50'] < 1 and sum(found['count'].values()) > 100
