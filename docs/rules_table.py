"""The tables and the figure of docs/rules.md: every rule on the detectors that are here.

    python docs/rules_table.py measure NAME TITLE CONFIG CHECKPOINT --work-dir DIR    # one detector, into rules.json
    python docs/rules_table.py write                                                  # docs/rules.md and the figure

``measure`` asks what ``reevaluate CONFIG CHECKPOINT --sweep all-rules`` asks, on the same stored candidates, and adds
what a table of differences needs: paired bootstrap intervals, and the CPU time of suppression.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

if TYPE_CHECKING:  # ``write`` does without torch
    from mmengine.config import Config

    from mmdet_softnms.reevaluation.candidates.store import Candidates
    from mmdet_softnms.reevaluation.scoring.matching import Matches
    from mmdet_softnms.reevaluation.scoring.metrics import GroundTruth
    from mmdet_softnms.reevaluation.scoring.settings import Setting

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/rules.md'
STORE = ROOT / 'resources/rules.json'
FIGURE = ROOT / 'resources/rules_ap_ms.svg'
METRICS = ('AP', 'AP50', 'AP75', 'AR100', 'AP_crowded', 'VOC07_AP50')
SCORE_THR = 1e-3
RESAMPLES = 1000

#: What a parameter that was tuned here is chosen from, out of fold, with the gaussian rule among the choices.
FAMILIES: dict[str, tuple[str, ...]] = {
    'voted gaussian 0.5, tolerance 0.0125, 0.025, 0.05, 0.1': (
        'VotedNMS.rule.sigma=0.5',
        'VotedNMS.tolerance=0.0125,0.025,0.05,0.1',
    ),
    'supported voted gaussian 0.5, power 4, 8, 16': ('SupportedNMS.rule=VotedNMS', 'SupportedNMS.power=4,8,16'),
}


def is_reference(setting: Setting) -> bool:
    """Whether this is what differences refer to: gaussian Soft-NMS as the paper has it."""
    from mmdet_softnms.rules import SoftNMS

    return type(setting.rule) is SoftNMS and setting.rule.params == SoftNMS('gaussian', sigma=0.5).params


def settings_of(specs: Sequence[str], cfg: Config) -> list[Setting]:
    """The rows of a sweep, without the config's own."""
    from mmdet_softnms.reevaluation.scoring.settings import sweep_settings

    return [one for one in sweep_settings(specs, cfg, SCORE_THR, 100, 1e-3) if one.source == 'table']


def scored(
    setting: Setting, candidates: Candidates, truth: GroundTruth, weights: np.ndarray | None
) -> tuple[float, Matches, dict[str, float], np.ndarray]:
    """A setting on the whole set: CPU ms an image of suppression, matches; with ``weights`` (B, I) metrics, (B,) AP."""
    import torch

    from mmdet_softnms.reevaluation.choice.resampling import weighted_ap
    from mmdet_softnms.reevaluation.scoring.matching import Objects, match
    from mmdet_softnms.reevaluation.scoring.metrics import Evaluator
    from mmdet_softnms.reevaluation.scoring.sweep import detections

    torch.set_num_threads(1)
    detections(candidates[:1], setting)  # compiled and warm
    before = time.process_time()
    results = detections(candidates, setting)
    milliseconds = 1000 * (time.process_time() - before) / len(candidates)
    objects = Objects.of(truth)
    matches = match(results, objects)
    if weights is None:
        return milliseconds, matches, {}, np.zeros(0)
    metrics = Evaluator(truth)(results).metrics
    values = weighted_ap(matches, objects.counts, weights, np.zeros(weights.shape[1], np.int64), 0)[:, -1]
    if abs(values[0] - metrics['AP']) > 1e-9:
        raise RuntimeError(f'AP is {metrics["AP"]} by faster-coco-eval and {values[0]} by the matching')
    return milliseconds, matches, {name: metrics[name] for name in METRICS if name in metrics}, values


def measure(candidates: Candidates, truth: GroundTruth, cfg: Config) -> dict[str, Any]:
    """All rows of one detector, with what the page says of it; metrics and differences in [-1, 1].

    Args:
        candidates: of the whole test set.
        truth: the ground truth of the same images.
        cfg: the detector's config.
    """
    from mmdet_softnms import __version__
    from mmdet_softnms.reevaluation.choice.resampling import bootstrap_weights
    from mmdet_softnms.reevaluation.choice.selection import select
    from mmdet_softnms.reevaluation.scoring.matching import Objects
    from mmdet_softnms.reevaluation.scoring.metrics import are_crowded

    rows = settings_of(('all-rules',), cfg)
    families = {name: settings_of(specs, cfg) for name, specs in FAMILIES.items()}
    settings = {
        str(one.params) + one.name: one for one in [*rows, *(one for each in families.values() for one in each)]
    }
    numbers = {key: number for number, key in enumerate(settings)}
    weights = bootstrap_weights(len(candidates), RESAMPLES, seed=1)
    results = [
        scored(setting, candidates, truth, weights if number < len(rows) else None)
        for number, setting in enumerate(settings.values())
    ]
    (reference,) = (number for number, setting in enumerate(rows) if is_reference(setting))
    table = []
    for number, setting in enumerate(rows):
        differences = results[number][3] - results[reference][3]
        low, high = np.percentile(differences[1:], [2.5, 97.5]).tolist()
        table.append(
            dict(
                rule=setting.name,
                params=setting.rule.params,
                metrics=_rounded(results[number][2]),
                ms=float(f'{results[number][0]:.3g}'),
                gain=_rounded(dict(value=float(differences[0]), low=low, high=high, sd=float(differences[1:].std()))),
            )
        )
    tuned = []
    for name, members in families.items():
        # What select() compares with is the setting in the place of hard NMS: here the gaussian rule's detections.
        baseline = next(setting for setting in rows if setting.is_baseline)
        mine = [one for one in members if not one.is_baseline and not is_reference(one)]
        matches = [results[reference][1], *(results[numbers[str(one.params) + one.name]][1] for one in mine)]
        found = select([baseline, *mine], matches, Objects.of(truth), resamples=RESAMPLES).procedure
        tuned.append(dict(family=name, **_rounded(dict(AP=found.value, value=found.value - found.baseline,
                                                       low=found.low, high=found.high))))  # fmt: skip
    crowd = np.array([bool(one['iscrowd']) for one in truth.coco['annotations']])
    return dict(
        images=len(candidates),
        candidates=candidates.num_candidates,
        objects=int((~crowd).sum()),
        crowded=int((are_crowded(truth) & ~crowd).sum()),
        version=__version__,
        rows=table,
        tuned=tuned,
    )


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in values.items()}


def label(rule: str, params: dict[str, Any]) -> str:
    """What the page calls a rule."""
    inner = params.get('rule', {})
    inside = label(inner['type'], {key: value for key, value in inner.items() if key != 'type'}) if inner else ''
    if rule == 'SoftNMS':
        number = params['iou_threshold'] if params['method'] == 'linear' else params['sigma']
        strongest = ' strongest' if params.get('decay') == 'strongest' else ''
        return f'{params["method"]} {number:g}{strongest}'
    if rule == 'ClusterNMS':
        penalty = {'none': '', 'spm': ' SPM', 'spm_d': ' SPM-D'}[params['penalty']]
        return f'Cluster-NMS{penalty}{" weighted" if params.get("weighted") else ""}'
    return {
        'HardNMS': f'hard {params.get("iou_threshold", 0):g}',
        'VotedNMS': f'voted {inside}',
        'SupportedNMS': f'supported {inside}',
        'MatrixNMS': f'Matrix NMS {params.get("kernel")}',
        'FastNMS': 'Fast NMS',
        'DIoUNMS': f'DIoU-NMS{" gaussian" if params.get("decay") == "gaussian" else ""}',
        'GidarisNMS': f'Gidaris’ voting of {inside}',
        'WeightedBoxesFusion': 'weighted boxes fusion',
        'NonMaximumWeighted': 'non-maximum weighted',
    }[rule]


def p_value(gain: dict[str, float]) -> float:
    """Two-sided, of no difference: the bootstrap's standard deviation in a normal distribution; 1 where it is 0."""
    return math.erfc(abs(gain['value']) / gain['sd'] / math.sqrt(2)) if gain['sd'] > 0 else 1.0


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which differences survive Holm's step-down correction (Scandinavian Journal of Statistics, 1979)."""
    survive = [False] * len(p_values)
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda one: p_values[one])):
        if p_values[number] > level / (len(p_values) - rank):
            break
        survive[number] = True
    return survive


def compared(content: dict[str, Any]) -> dict[tuple[str, int], bool]:
    """Of every difference of the page, by detector and row: whether it survives Holm's correction over all of them."""
    places = [
        (name, number)
        for name, one in content.items()
        for number, row in enumerate(one['rows'])
        if label(row['rule'], row['params']) != 'gaussian 0.5'
    ]
    survive = holm([p_value(content[name]['rows'][number]['gain']) for name, number in places])
    return dict(zip(places, survive, strict=True))


def _points(value: float, digits: int = 2) -> str:
    return f'{100 * value:+.{digits}f}'.replace('-', '−')


def _interval(gain: dict[str, float]) -> str:
    return f'{_points(gain["value"])} [{_points(gain["low"])}, {_points(gain["high"])}]'


def _lines(cells: Sequence[Sequence[str]]) -> list[str]:
    heading, *rows = cells
    return [f'| {" | ".join(row)} |' for row in (heading, ['---', *['--:'] * (len(heading) - 1)], *rows)]


def summary(content: dict[str, Any]) -> list[str]:
    """Difference in AP to the gaussian rule, rules by detectors, and what many comparisons leave of it."""
    survives = compared(content)
    first = next(iter(content.values()))
    cells = [['ΔAP to gaussian 0.5', *(one['title'] for one in content.values())]]
    for number, row in enumerate(first['rows']):
        line = [label(row['rule'], row['params'])]
        for name, one in content.items():
            gain = one['rows'][number]['gain']
            if (name, number) not in survives:
                line.append(f'AP {100 * one["rows"][number]["metrics"]["AP"]:.2f}')
                continue
            star = '*' if gain['low'] > 0 or gain['high'] < 0 else ''
            line.append(f'**{_points(gain["value"])}**' if survives[name, number] else _points(gain['value']) + star)
        cells.append(line)
    apart = sum(
        gain['low'] > 0 or gain['high'] < 0
        for gain in (content[name]['rows'][number]['gain'] for name, number in survives)
    )
    bonferroni = sum(
        p_value(content[name]['rows'][number]['gain']) <= 0.05 / len(survives) for name, number in survives
    )
    by_chance = round(0.05 * len(survives))
    words = (
        f'{len(survives)} differences are in this table: {len(first["rows"]) - 1} rules on {len(content)} detectors. '
        f'If all were truly zero, about {by_chance} of their 95 % intervals would leave zero out; here {apart} do. '
        f'**Bold**: the {sum(survives.values())} that survive Holm’s correction over all {len(survives)} at 5 % '
        f'(Bonferroni’s: {bonferroni}). A star: only its own interval leaves zero out.'
    )
    return [*_lines(cells), '', words]


def details(content: dict[str, Any]) -> list[str]:
    """One table for each detector, with all metrics, and what choosing the parameter out of fold gives."""
    lines = []
    for one in content.values():
        metrics = [name for name in METRICS if all(name in row['metrics'] for row in one['rows'])]
        heading = ['rule', *(name.replace('_', ' ') for name in metrics), 'ms', 'ΔAP to gaussian, 95 %']
        cells = [heading]
        best = {name: max(row['metrics'][name] for row in one['rows']) for name in metrics}
        for row in one['rows']:
            values = [(row['metrics'][name], best[name]) for name in metrics]
            shown = [f'{100 * value:.2f}' if value >= 0 else '–' for value, _ in values]
            shown = [
                f'**{text}**' if value == top >= 0 else text for text, (value, top) in zip(shown, values, strict=True)
            ]
            name = label(row['rule'], row['params'])
            cells.append([name, *shown, f'{row["ms"]:g}', '' if name == 'gaussian 0.5' else _interval(row['gain'])])
        lines += [
            f'<details><summary>{one["title"]}: {one["images"]} images, {one["objects"]} objects, {one["crowded"]} of '
            f'them crowded, {one["candidates"]} candidates</summary>',
            '',
            *_lines(cells),
            '',
            'Chosen out of fold (5 folds, gaussian 0.5 among the choices; interval of the whole procedure):',
            '',
            *_lines(
                [
                    ['chosen from', 'AP', 'ΔAP to gaussian, 95 %'],
                    *([each['family'], f'{100 * each["AP"]:.2f}', _interval(each)] for each in one['tuned']),
                ]
            ),
            '',
            '</details>',
            '',
        ]
    return lines[:-1]


#: Families of the figure: which labels, colour (Okabe and Ito's palette, safe for colour-blind readers), marker.
KINDS = (
    ('hard', r'hard|Fast|DIoU-NMS$|Cluster-NMS$', '#555555', 's'),
    ('Soft-NMS', r'(linear|gaussian) [\d.]+$', '#0072B2', 'o'),
    ('strongest decay', r'(linear|gaussian).* strongest', '#56B4E9', 'D'),
    ('voted', r'voted', '#D55E00', '^'),
    ('supported', r'supported', '#CC79A7', 'v'),
    ('other soft rules', r'Matrix|Cluster-NMS SPM(-D)?$|DIoU-NMS gaussian', '#009E73', 'P'),
    ('other averages of boxes', r'Gidaris|.*weighted', '#E69F00', 'X'),
)
#: Points with their name beside them: offset in points.
NAMED = {
    'hard 0.5': (6, -10),
    'gaussian 0.5': (-18, -14),
    'linear 0.3 strongest': (-4, 8),
    'voted gaussian 0.5': (6, 4),
    'supported voted gaussian 0.5': (6, 4),
    'Matrix NMS linear': (-50, 8),
    'Cluster-NMS SPM-D weighted': (-90, 8),
    'DIoU-NMS': (6, -4),
    'weighted boxes fusion': (-95, 4),
}


def draw(one: dict[str, Any], path: Path) -> None:
    """AP against CPU milliseconds of one detector."""
    with plt.rc_context({'svg.hashsalt': 'rules', 'svg.fonttype': 'none', 'font.size': 9}):
        figure, axes = plt.subplots(figsize=(7, 4.6), layout='constrained')
        for kind, _, colour, marker in KINDS:
            rows = [row for row in one['rows'] if kind_of(row) == kind]
            places = [row['ms'] for row in rows], [100 * row['metrics']['AP'] for row in rows]
            axes.scatter(*places, c=colour, marker=marker, s=42, label=kind, edgecolors='white', linewidths=0.6)
        for row in one['rows']:
            name = label(row['rule'], row['params'])
            if name in NAMED:
                place = row['ms'], 100 * row['metrics']['AP']
                axes.annotate(name, place, NAMED[name], textcoords='offset points', fontsize=8, color='#333333')
        axes.set_xscale('log')
        axes.set(xlabel='CPU time of suppression, ms an image', ylabel='AP, %', title=one['title'])
        axes.grid(alpha=0.25)
        figure.legend(fontsize=8, frameon=False, loc='outside lower center', ncols=4)
        figure.savefig(path, facecolor='white', metadata={'Date': None})
        plt.close(figure)


def kind_of(row: dict[str, Any]) -> str:
    """The family of the figure that a row belongs to."""
    return next(kind for kind, pattern, _, _ in KINDS if re.match(pattern, label(row['rule'], row['params'])))


def page(text: str, content: dict[str, Any]) -> str:
    """The page with new tables between its markers."""
    for name, lines in (('summary', summary(content)), ('details', details(content))):
        begin, end = f'<!-- {name}: docs/rules_table.py -->\n', f'<!-- end of {name} -->'
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f'{PAGE} has no markers of the {name}: {begin.strip()} … {end.strip()}')
        text = ''.join([before, begin, '\n', '\n'.join(lines), '\n\n', end, after])
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    measuring = commands.add_parser('measure')
    for name in ('name', 'title', 'config', 'checkpoint'):
        measuring.add_argument(name)
    measuring.add_argument('--work-dir', required=True, help='where candidates are stored')
    commands.add_parser('write')
    args = parser.parse_args(arguments)
    content = json.loads(STORE.read_text()) if STORE.is_file() else {}
    if args.command == 'measure':
        from mmengine.config import Config

        from mmdet_softnms.files import write_json
        from mmdet_softnms.reevaluation.candidates.forward import collect
        from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
        from mmdet_softnms.reevaluation.scoring.metrics import read_ground_truth

        cfg = Config.fromfile(args.config)
        dataset = build_test_set(cfg)
        truth = read_ground_truth(cfg, dataset)
        collected = collect(
            cfg, args.checkpoint, SCORE_THR, Path(args.work_dir) / 'candidates', dataset=dataset, say=print
        )
        measured = measure(collected.store.load(), truth, cfg)
        content[args.name] = dict(title=args.title, **measured)
        write_json(STORE, content)
    else:
        PAGE.write_text(page(PAGE.read_text(), content))
        draw(next(iter(content.values())), FIGURE)


if __name__ == '__main__':
    main()
