"""Random inputs against the definition: ``python -m tests.fuzz --cases 100000 [--seed 0] [--device cuda]``.

Every case is drawn from its number and the seed alone, so a failing one can be repeated by itself. The oracle below is
the definition of ``soft_nms``, of box voting and of support on numpy arrays; it shares no code with the package.
Results have to be the same bit for bit, except with the gaussian weight in float64, where two libraries may differ in
the last bit of ``exp``: there the operator's sequence is followed, and every step of it has to be right up to rounding.
Votes and support are sums in float64 of such ``exp`` and powers, so they may be whatever a sum with a relative error of
1e-12 rounds to.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmdet_softnms import batched_soft_nms, soft_nms
from mmdet_softnms.ops import quality, ranked_soft_nms, vote

Result = tuple[Tensor, Tensor]
METHODS = ('linear', 'gaussian', 'hard')
MOST_VOTED = 300  # of an image
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CLOSE = 1e-12  # relative, for the gaussian weight in float64, and for sums
ANY = dict(method='hard', iou_threshold=0.5, sigma=1.0, min_score=0.0, max_num=-1, decay='product')  # for overlaps


class Image(NamedTuple):
    boxes: Tensor
    scores: Tensor
    labels: Tensor | None


class Case(NamedTuple):
    images: list[Image]
    parameters: dict[str, Any]
    form: str  # 'single', 'batch', or 'gradient': through the registered operator
    around: str = ''  # 'votes': those for what is selected; 'support': selected in the order by it
    wrapper: Mapping[str, float] = MappingProxyType({})  # parameters of it


# --- the oracle -------------------------------------------------------------------------------------------------------


class Definition:
    """One image by the definition: scores of all boxes, and what one selection does to them."""

    def __init__(self, image: Image, parameters: dict[str, Any], support: np.ndarray | None = None) -> None:
        double = torch.float64 in (image.boxes.dtype, image.scores.dtype)
        self.real: Any = np.float64 if double else np.float32
        self.boxes = image.boxes.double().numpy().astype(self.real)
        self.current = image.scores.double().numpy().astype(self.real)
        self.labels = None if image.labels is None else image.labels.numpy()
        self.method = parameters['method']
        self.threshold, self.sigma, self.min_score, self.offset = (
            self.real(parameters[name]) for name in ('iou_threshold', 'sigma', 'min_score', 'offset')
        )
        self.waiting = np.ones(len(self.current), bool)
        self.first, self.nearest = self.current.copy(), np.zeros_like(self.current)
        self.strongest = parameters['decay'] == 'strongest'
        self.support = np.ones_like(self.current) if support is None else support  # the order is current times this
        self.limit = len(self.current) if parameters['max_num'] < 0 else parameters['max_num']

    def overlaps(self, chosen: int) -> np.ndarray:
        """IoU with one box; 0 where the intersection is empty or the union is not positive."""
        x1, y1, x2, y2 = self.boxes.T
        width = np.minimum(x2, x2[chosen]) - np.maximum(x1, x1[chosen]) + self.offset
        height = np.minimum(y2, y2[chosen]) - np.maximum(y1, y1[chosen]) + self.offset
        area = (x2 - x1 + self.offset) * (y2 - y1 + self.offset)
        inside = width * height
        union = area + area[chosen] - inside
        counts = (width > 0) & (height > 0) & (union > 0)
        iou = np.zeros(len(area), self.real)
        iou[counts] = inside[counts] / union[counts]
        return iou

    def take(self, chosen: int) -> None:
        """Select a box, and decay the remaining ones of its class."""
        self.waiting[chosen] = False
        rest = self.waiting.copy()
        if self.labels is not None:
            rest &= self.labels == self.labels[chosen]
        rest = np.flatnonzero(rest)
        iou = self.overlaps(chosen)[rest]
        if self.strongest:
            iou = self.nearest[rest] = np.maximum(self.nearest[rest], iou)
            self.current[rest] = self.first[rest]
        if self.method == 'hard':
            self.waiting[rest[iou > self.threshold]] = False
        elif self.method == 'linear':
            self.current[rest] *= np.where(iou > self.threshold, self.real(1) - iou, self.real(1))
        else:
            weight = np.exp(-(iou.astype(np.float64) ** 2) / np.float64(self.sigma))
            self.current[rest] *= weight.astype(self.real)

    def select(self) -> tuple[list[int], np.ndarray]:
        keep: list[int] = []
        scores: list[Any] = []
        while len(keep) < self.limit:
            self.waiting &= self.current >= self.min_score
            rest = np.flatnonzero(self.waiting)
            if not len(rest):
                break
            ranked = self.current[rest] * self.support[rest]
            chosen = int(rest[ranked.argmax()])  # the first of the highest
            keep.append(chosen)
            scores.append(ranked.max())
            self.take(chosen)
        return keep, np.array(scores, self.real)

    def follow(self, keep: Sequence[int], scores: Sequence[float], relative: float, absolute: float) -> str:
        """What is wrong with a selection, in words; rounding of the last bits is not."""
        for place, (chosen, score) in enumerate(zip(keep, scores, strict=True)):
            if not self.waiting[chosen]:
                return f'selection {place} takes box {chosen} a second time'
            ranked = self.current * self.support
            may = self.waiting & (self.current >= self.min_score * (1 + CLOSE))  # certainly not dropped
            have, highest = ranked[chosen], ranked[may].max(initial=-np.inf)
            if have < highest * (1 - CLOSE) - 1e-300:
                return f'selection {place} is box {chosen} with {have}, though the highest score is {highest}'
            low = self.current[chosen] < self.min_score * (1 - CLOSE)
            if abs(score - have) > max(relative * have, absolute) or low:
                return f'selection {place}, box {chosen}, has the score {score}, not {have}'
            self.take(chosen)
        left = self.waiting & (self.current > self.min_score * (1 + CLOSE))
        if len(keep) < self.limit and left.any():
            return f'box {int(np.flatnonzero(left)[0])} is missing'
        return '' if len(keep) <= self.limit else f'{len(keep)} boxes are more than max_num'


def complaint(image: Image, parameters: dict[str, Any], result: Result, support: np.ndarray | None = None) -> str:
    """How a result differs from the definition; empty where it does not."""
    keep, scores = result[0].cpu(), result[1].detach().cpu()
    if keep.dtype != torch.int64 or scores.dtype != image.scores.dtype or keep.shape != scores.shape:
        return f'wrong types or shapes: {keep.dtype} {tuple(keep.shape)}, {scores.dtype} {tuple(scores.shape)}'
    definition = Definition(image, parameters, support)
    with np.errstate(all='ignore'):
        if definition.method == 'gaussian' and definition.real is np.float64:
            kind = torch.finfo(scores.dtype)  # to which they were rounded on the way out
            return definition.follow(keep.tolist(), scores.tolist(), max(CLOSE, kind.eps), kind.smallest_normal)
        expected, expected_scores = definition.select()
    wanted = torch.from_numpy(expected_scores.astype(np.float64)).to(image.scores.dtype)
    if keep.tolist() != expected:
        places = zip(keep.tolist(), expected, strict=False)
        first = next((n for n, (one, other) in enumerate(places) if one != other), min(len(keep), len(expected)))
        return (
            f'{len(keep)} boxes instead of {len(expected)}; from place {first} on '
            f'{keep.tolist()[first : first + 5]} instead of {expected[first : first + 5]}'
        )
    if not torch.equal(scores, wanted):
        place = int((scores != wanted).nonzero()[0])
        return f'the score of place {place} is {scores[place].item()!r} instead of {wanted[place].item()!r}'
    return ''


def of_neighbours(image: Image, chosen: int, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """(N,) IoUs with one box, 0 with other classes, and (N,) raw scores that count; both in float64."""
    definition = Definition(image, dict(ANY, offset=offset))
    iou = definition.overlaps(chosen).astype(np.float64)
    if definition.labels is not None:
        iou[definition.labels != definition.labels[chosen]] = 0
    return iou, np.maximum(definition.current.astype(np.float64), 0)


def rounded_range(value: np.ndarray, error: Any, kind: torch.dtype, working: torch.dtype) -> tuple[Tensor, Tensor]:
    """What may come out where a float64 is known up to an error."""
    low, high = (torch.from_numpy(np.asarray(value + sign * error)).to(working).to(kind) for sign in (-1, 1))
    return low, high


def complaint_of_votes(image: Image, keep: Tensor, voted: Tensor, tolerance: float, offset: float) -> str:
    """How the boxes that were voted for differ from the definition."""
    working = torch.promote_types(torch.promote_types(image.boxes.dtype, image.scores.dtype), torch.float32)
    voted = voted.detach().cpu()
    if voted.dtype != image.boxes.dtype or voted.shape != (len(keep), 4):
        return f'wrong type or shape of the votes: {voted.dtype} {tuple(voted.shape)}'
    boxes = image.boxes.double().numpy()
    for place, chosen in enumerate(keep.tolist()):
        iou, scores = of_neighbours(image, chosen, offset)
        exponent = -((1 - iou) ** 2) / tolerance
        weight = np.where((iou > 0) & (exponent > -700), scores * np.exp(np.maximum(exponent, -700)), 0)
        total = weight.sum()
        mean = (weight[:, None] * boxes).sum(0) / total if total > 0 else boxes[chosen]
        error = CLOSE * np.abs(boxes[weight > 0]).max(0, initial=0) if total > 0 else 0
        low, high = rounded_range(mean, error, voted.dtype, working)
        if not ((voted[place] >= low) & (voted[place] <= high)).all():
            return f'the votes for box {chosen} give {voted[place].tolist()} instead of {mean.tolist()}'
    return ''


def complaint_of_support(image: Image, found: Tensor, power: float, prior: float, offset: float) -> str:
    """How the support of all boxes differs from the definition."""
    working = torch.promote_types(torch.promote_types(image.boxes.dtype, image.scores.dtype), torch.float32)
    if found.dtype != working or found.shape != image.scores.shape:
        return f'wrong type or shape of the support: {found.dtype} {tuple(found.shape)}'
    for number in range(len(found)):
        iou, scores = of_neighbours(image, number, offset)
        total = (scores * iou**power).sum()
        wanted = total / (total + prior)
        low, high = rounded_range(wanted, CLOSE * wanted + 1e-300, working, working)
        if not low <= found[number] <= high:
            return f'the support of box {number} is {found[number].item()!r} instead of {wanted!r}'
    return ''


# --- inputs -----------------------------------------------------------------------------------------------------------


def draw(number: int, seed: int) -> Case:
    """Case ``number`` of a seed."""
    random = np.random.default_rng([seed, number])
    parameters = dict(
        method=str(random.choice(METHODS)),
        iou_threshold=float(random.choice([0.3, 0.5, 0.7, 1 / 3, 0.25, 0.0, 1.0, random.random()])),
        sigma=float(random.choice([0.5, 0.1, 2.0, 1e-3, 1e-30, 1e4, random.random() + 1e-3])),
        min_score=float(random.choice([1e-3, 0.0, 0.05, 0.3, 1.0, random.random()])),
        max_num=int(random.choice([-1, -1, -1, 0, 1, 7, 100, 10**9])),
        offset=float(random.choice([0, 0, 1, 0.5])),
        decay=str(random.choice(['product', 'product', 'strongest'])),
    )
    form = str(random.choice(['single', 'batch', 'gradient'], p=[0.8, 0.15, 0.05]))
    images = [_draw_image(random, parameters) for _ in range(int(random.integers(0, 5)) if form == 'batch' else 1)]
    if form == 'batch' and len({image.labels is None for image in images}) == 2:
        images = [image._replace(labels=None) for image in images]
    around = str(random.choice(['', 'votes', 'support'], p=[0.5, 0.3, 0.2]))
    wrapper = {}
    if around == 'votes':
        wrapper = dict(tolerance=float(random.choice([0.025, 0.025, 0.05, 1e-3, 1e-8, 1e4, random.random() + 1e-3])))
    elif around == 'support':
        form = 'single' if form == 'gradient' else form  # it has none
        power = float(random.choice([8, 8, 1, 3, 0.5, 64, 65, random.random() * 10 + 0.1]))
        wrapper = dict(power=power, prior=float(random.choice([1, 1, 0.1, 30, 1e-6])))
    return Case(images, parameters, form, around, wrapper)


def _draw_image(random: np.random.Generator, parameters: dict[str, Any]) -> Image:
    sizes = (0, 5), (1, 40), (1, 400), (512, 900)  # the last: enough for the kernels of large classes
    num = int(random.integers(*sizes[random.choice(4, p=[0.3, 0.67, 0.025, 0.005])]))
    box_type, score_type = (FLOATS[random.choice(4, p=[0.1, 0.1, 0.6, 0.2])] for _ in range(2))
    boxes = _draw_boxes(random, num, parameters)
    if box_type == torch.float16:
        boxes = boxes.clip(-2000, 2000)  # the largest float16 is 65504
    scores = torch.from_numpy(_draw_scores(random, num, parameters['min_score'])).to(score_type)
    return Image(torch.from_numpy(boxes).to(box_type), scores, _draw_labels(random, num))


def _draw_boxes(random: np.random.Generator, num: int, parameters: dict[str, Any]) -> np.ndarray:
    kind = random.choice(['crowd', 'grid', 'duplicates', 'no area', 'huge', 'tiny', 'at the threshold', 'far away'])
    centre = random.uniform(0, 300, (max(1, num // 8), 2))[random.integers(0, max(1, num // 8), num)]
    centre += random.normal(0, 12, (num, 2))
    size = random.uniform(8, 80, (num, 2))
    crowd = np.concatenate([centre - size / 2, centre + size / 2], 1)
    corner = random.integers(0, 8, (num, 2)).astype(float)
    grid = np.concatenate([corner, corner + random.integers(1, 6, (num, 2))], 1)
    if kind == 'grid':  # few different IoUs, many ties
        return grid
    if kind == 'duplicates':
        return crowd[random.integers(0, max(1, num // 4), num)] if num else crowd
    if kind == 'no area':  # among ordinary ones: points, lines, inverted boxes
        for row, turn in zip(grid, random.integers(0, 8, num), strict=True):
            if turn < 4:
                row[:] = row[[[0, 1, 0, 3], [0, 1, 2, 1], [2, 1, 0, 3], [2, 3, 0, 1]][turn]]
        return grid
    if kind == 'huge':  # areas of up to 1.3e38: float32 holds the sum of two, and no more
        return crowd * 1.4e17
    if kind == 'tiny':  # areas that underflow
        return grid * float(random.choice([1e-20, 1e-23, 1e-30, 1e-44]))
    if kind == 'at the threshold':  # a strip of the length a within one of the length b: IoU a / b
        long = int(random.integers(1, 30))
        short = int(random.integers(0, long + 1))
        parameters['iou_threshold'] = short / long
        parameters['offset'] = 0.0
        length = random.choice([short, long, random.integers(1, 30)], num)
        return np.stack([np.zeros(num), np.zeros(num), length, np.ones(num)], 1)
    if kind == 'far away':  # the corners' own rounding is as large as some of the boxes
        return crowd + float(random.choice([1e4, -1e5, 1e6]))
    return crowd


def _draw_scores(random: np.random.Generator, num: int, min_score: float) -> np.ndarray:
    kind = random.choice(['uniform', 'low', 'coarse', 'equal', 'at min_score', 'outside'])
    scores = random.random(num)
    if kind == 'low':
        return scores**8
    if kind == 'coarse':
        return np.floor(scores * 9) / 8
    if kind == 'equal':
        return np.full(num, scores[0]) if num else scores
    if kind == 'at min_score':
        single = np.float32(min_score)
        near = [single, np.nextafter(single, np.float32(0)), np.nextafter(single, np.float32(1)), np.float64(min_score)]
        return np.where(random.random(num) < 0.8, random.choice(np.array(near, np.float64), num), scores)
    if kind == 'outside':  # below 0, above 1, and both zeros
        return random.choice([-1.0, -0.0, 0.0, 1.0, 2.5, 300.0, 0.5], num)
    return scores


def _draw_labels(random: np.random.Generator, num: int) -> Tensor | None:
    classes = int(random.choice([1, 2, 3, 20, 80, 1203]))
    labels = torch.from_numpy(random.integers(0, classes, num))
    kind = random.choice(['none', 'int64', 'int32', 'uint8', 'far apart', 'largest'])
    if kind == 'far apart':
        return labels * 10**12 + 5
    if kind == 'largest':
        return 2**63 - 1 - labels
    if kind == 'uint8':
        return (labels % 256).to(torch.uint8)
    return None if kind == 'none' else labels.to(torch.int32 if kind == 'int32' else torch.int64)


# --- the run ----------------------------------------------------------------------------------------------------------


def check(case: Case, device: str = 'cpu', operator: Callable[..., Result] = soft_nms) -> str:
    """What is wrong with the operator's result for a case; empty where nothing is."""
    there = [Image(*(None if tensor is None else tensor.to(device) for tensor in image)) for image in case.images]
    supports: list[np.ndarray | None] = [None] * len(there)
    if case.around == 'support':
        supports = []
        for number, image in enumerate(there):
            found = quality(*image, offset=case.parameters['offset'], **case.wrapper)
            supports.append(found.cpu().numpy())
            with np.errstate(all='ignore'):
                words = complaint_of_support(
                    case.images[number], found.cpu(), offset=case.parameters['offset'], **case.wrapper
                )
            if words:
                return f'image {number}: {words}'
        results = [
            ranked_soft_nms(*image, torch.from_numpy(one).to(device), **case.parameters)
            for image, one in zip(there, supports, strict=True)
        ]
    elif case.form == 'batch':
        boxes, scores, labels = zip(*there, strict=True) if there else ((), (), ())
        shared = None if any(one is None for one in labels) else list(labels)
        results = batched_soft_nms(list(boxes), list(scores), shared, **case.parameters)
    else:
        for image in there:
            image.scores.requires_grad_(case.form == 'gradient')
        results = [operator(*image, **case.parameters) for image in there]
    if len(results) != len(case.images):
        return f'{len(results)} results for {len(case.images)} images'
    for number, (image, result) in enumerate(zip(case.images, results, strict=True)):
        image = image._replace(scores=image.scores.detach())
        words = complaint(image, case.parameters, result, supports[number])
        if not words and case.around == 'votes':
            keep, offset = result[0][:MOST_VOTED], case.parameters['offset']
            voted = vote(*there[number], keep, offset=offset, **case.wrapper)
            with np.errstate(all='ignore'):
                words = complaint_of_votes(image, keep.cpu(), voted, offset=offset, **case.wrapper)
        if words:
            return f'image {number}: {words}'
    return ''


def fuzz(
    cases: int, seed: int = 0, first: int = 0, device: str = 'cpu', operator: Callable[..., Result] = soft_nms
) -> int:
    """Check so many cases; print progress and every failure with the command that repeats it. Returns the failures."""
    start = told = time.monotonic()
    failures = 0
    for number in range(first, first + cases):
        try:
            case = draw(number, seed)
            words = check(case, device, operator)
        except Exception as error:  # an operator that raises has failed as well; the next case may say more
            words = f'{type(error).__name__}: {error}'
        if words:
            failures += 1
            again = f'python -m tests.fuzz --seed {seed} --first {number} --cases 1 --device {device}'
            sizes = [len(image.scores) for image in case.images]
            about = f'{case.form} {case.around}, boxes {sizes}, {case.parameters} {case.wrapper}'
            print(f'case {number} fails: {words}\n  {about}\n  again: {again}')
        if time.monotonic() - told > 10:
            told = time.monotonic()
            done = number + 1 - first
            print(f'{done:,} of {cases:,} cases, {failures} failures, {told - start:.0f} s', flush=True)
    print(f'{cases:,} cases, {failures} failures, {time.monotonic() - start:.1f} s, seed {seed}, {device}')
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.fuzz', description=__doc__.split('\n')[0])
    parser.add_argument('--cases', type=int, default=1000, help='how many (default %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='other seeds give other cases (default %(default)s)')
    parser.add_argument('--first', type=int, default=0, help='number of the first case, to repeat one')
    parser.add_argument('--device', default='cpu', help='cpu (default) or cuda')
    options = parser.parse_args(arguments)
    if options.cases < 1 or options.first < 0 or options.seed < 0:
        parser.error('--cases must be at least 1, --first and --seed at least 0')
    if options.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--device {options.device}: torch {torch.__version__} sees no GPU')
    torch.set_num_threads(1)
    return 1 if fuzz(options.cases, options.seed, options.first, options.device) else 0


if __name__ == '__main__':
    sys.exit(main())
