"""Plots of the report: the right numbers, in words too, and ink that follows the page."""

import base64
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from mmdet_softnms.reevaluation.report import figures
from mmdet_softnms.reevaluation.report.figures import (
    class_plot,
    errors_plot,
    precision_recall_plots,
    sensitivity_plots,
    svg_url,
)
from mmdet_softnms.reevaluation.scoring.errors import KINDS
from mmdet_softnms.reevaluation.scoring.metrics import AP_NAMES


def test_curves_of_both_parameters_and_of_the_best_rest(result, selection):
    rows = result.rows
    chosen = next(row for row in rows if row.params.get('sigma') == 0.5 and row.params['score_thr'] == 0.001)
    plots = sensitivity_plots(rows, selection, chosen)
    # Two groups of score_thr: each curve is that of the better one, and says which.
    captions = [plot.caption for plot in plots]
    assert [caption.split(' at ')[0] for caption in captions] == [
        'SoftNMS linear over IoU threshold',
        'SoftNMS gaussian over σ',
    ]
    for plot, method in zip(plots, ('linear', 'gaussian'), strict=True):
        group = [row for row in rows if row.params.get('method') == method]
        best = max(group, key=lambda row: row.metrics['AP'])
        assert plot.caption.endswith(f' at score_thr {best.params["score_thr"]:g}')
        mine = [row for row in group if row.params['score_thr'] == best.params['score_thr']]
        baseline = next(row for row in rows if row.setting.is_baseline and row.setting.group == best.setting.group)
        above, below = plot.figure.axes[:2]
        line = next(line for line in above.get_lines() if line.get_label() == 'AP')
        assert line.get_ydata().tolist() == pytest.approx([100 * row.metrics['AP'] for row in mine])
        # The band is the interval of the difference around the baseline's value.
        band = above.collections[0].get_paths()[0].vertices
        intervals = [selection.settings[rows.index(row)] for row in mine]
        edges = [100 * (baseline.metrics['AP'] + end) for one in intervals for end in (one.low, one.high)]
        assert band[:, 1].min() == pytest.approx(min(edges)) and band[:, 1].max() == pytest.approx(max(edges))
        # The heat map: ten thresholds as rows, in points over hard NMS.
        cells = np.asarray(below.collections[0].get_array()).reshape(len(AP_NAMES), len(mine))
        expected = [[100 * (row.metrics[name] - baseline.metrics[name]) for row in mine] for name in AP_NAMES]
        np.testing.assert_allclose(cells, expected)
        assert f'{expected[0][1]:+.1f}' in [text.get_text() for text in below.texts]
        assert f'{100 * best.metrics["AP"]:.2f}' in plot.words
    marked = [line for line in plots[1].figure.axes[0].get_lines() if line.get_label() == 'chosen']
    shows = plots[1].caption.endswith('0.001')
    assert [line.get_xdata().tolist() for line in marked] == ([[0.5]] if shows else [])
    assert not sensitivity_plots(rows[:3])


def test_curves_before_and_after_can_be_told_apart(result):
    rows = result.rows
    plots = precision_recall_plots(rows[0], rows[1])
    assert [plot.caption for plot in plots] == ['IoU 0.50', 'IoU 0.75', 'IoU 0.90']
    for plot in plots:
        axes, below = plot.figure.axes
        lines = axes.get_lines()
        assert len({line.get_linestyle() for line in lines}) == len({line.get_color() for line in lines}) == 2
        before, after = (line.get_ydata() for line in lines)
        np.testing.assert_allclose(below.get_lines()[0].get_ydata(), 100 * (np.array(after) - before))
    assert f'AP {100 * rows[1].metrics["AP75"]:.2f}' in plots[1].words


def test_classes_gain_and_lose(result):
    rows = result.rows
    plot = class_plot(rows[0], rows[1])
    gains = sorted(100 * (rows[1].per_class[name] - value) for name, value in rows[0].per_class.items())
    assert [bar.get_width() for bar in plot.figure.axes[0].patches] == pytest.approx(gains)
    assert all((bar.get_hatch() == '////') == (bar.get_width() < 0) for bar in plot.figure.axes[0].patches)
    assert f'{gains[-1]:+.2f}' in plot.words

    class Many:
        def __init__(self, shift):
            self.per_class = {f'class {number} {"x" * 60}': 0.3 + shift * number / 1203 for number in range(1203)}

    plot = class_plot(Many(0.0), Many(0.1))
    assert len(plot.figure.axes[0].patches) == 40 and 'the 40 that change most, of 1203' in plot.caption
    assert max(len(label.get_text()) for label in plot.figure.axes[0].get_yticklabels()) <= 28


def test_errors_of_three_rows():
    found = {
        name: dict(dAP={kind: 0.01 * number for number, kind in enumerate(KINDS)}) for name in ('baseline', 'best')
    }
    plot = errors_plot(found)
    assert [bar.get_width() for bar in plot.figure.axes[0].patches] == pytest.approx([0, 1, 2, 3, 4, 5] * 2)
    assert 'hard NMS: classification 0.00, localisation 1.00' in plot.words


def test_ink_follows_the_page(result):
    url = svg_url(class_plot(result.rows[0], result.rows[1]).figure)
    text = base64.b64decode(url.split(',')[1]).decode()
    assert url.startswith('data:image/svg+xml;base64,')
    assert 'currentColor' in text and '#010203' not in text and 'prefers-color-scheme:dark' in text


def test_plots_are_drawn_without_a_display(result, monkeypatch):
    """Without pyplot, which looks for one when it is imported."""
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)  # importing it is an error
    for plot in (*sensitivity_plots(result.rows), class_plot(result.rows[0], result.rows[1])):
        assert svg_url(plot.figure).startswith('data:image/svg+xml')
    for path in Path(figures.__file__).parent.glob('*.py'):
        assert 'pyplot' not in re.sub('#.*', '', path.read_text())
