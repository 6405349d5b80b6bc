"""Rules of other papers, to be held against: plain vectorised PyTorch, each with its source. No AP is claimed for any.

Where none is stated, names and defaults are the paper's or its authors' code's. As everywhere, equal scores are taken
by the lowest index, IoU is 0 where nothing overlaps, and classes do not meet unless ``class_agnostic`` says so.
"""

import importlib
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmdet_softnms.rules import Rule, VotedNMS, in_range, is_flag


class _Paper:
    """The parameters of a rule, checked, and classes.

    Args:
        parameters: as ``params`` shows them, ``class_agnostic`` only where it is True.
    """

    box_dim = 4

    def __init__(self, class_agnostic: bool, **parameters: Any) -> None:
        for name in ('iou_threshold', 'min_score', 'vote_threshold'):
            if name in parameters:
                in_range(name, parameters[name], 0, 1)
        for name in ('sigma', 'beta'):
            if name in parameters:
                in_range(name, parameters[name], 1e-9, 1e9)
        self._class_agnostic = is_flag('class_agnostic', class_agnostic)
        self.params: dict[str, Any] = parameters | (dict(class_agnostic=True) if class_agnostic else {})

    def _classes(self, scores: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """The candidates of each class by falling score."""
        order = torch.sort(scores, descending=True, stable=True).indices
        if self._class_agnostic:
            yield order
            return
        by_class = torch.sort(labels[order], stable=True)
        yield from order[by_class.indices].split(
            torch.unique_consecutive(by_class.values, return_counts=True)[1].tolist()
        )


class _Rescored(_Paper):
    """Rules that give every box of a class a new score at once, and drop those below ``min_score``."""

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        boxes, raw = _wide(boxes), _wide(scores)
        rescored = torch.full_like(raw, -1)
        if len(raw):
            for members in self._classes(raw, labels):
                rescored[members] = self._rescore(boxes[members], raw[members])
        order = torch.sort(rescored, descending=True, stable=True).indices
        order = order[rescored[order] >= max(self.params.get('min_score', 0.0), 0.0)]
        keep = order if max_num < 0 else order[:max_num]
        return keep, rescored[keep].to(scores.dtype)

    def _rescore(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """New scores of a class, by falling score; below 0 where a box is removed."""
        raise NotImplementedError


class FastNMS(_Rescored):
    """YOLACT (Bolya, Zhou, Xiao, Lee, ICCV 2019, section 3.3): also boxes that are themselves removed remove others."""

    def __init__(self, iou_threshold: float = 0.5, class_agnostic: bool = False) -> None:
        super().__init__(class_agnostic, iou_threshold=iou_threshold)

    def _rescore(self, boxes: Tensor, scores: Tensor) -> Tensor:
        most = pairwise_iou(boxes).triu(1).amax(0)
        return torch.where(most <= self.params['iou_threshold'], scores, -1.0)


class MatrixNMS(_Rescored):
    """SOLOv2 (Wang, Zhang, Kong, Li, Shen, NeurIPS 2020, section 3.3), on boxes instead of masks.

    The score of j is multiplied by the least, over boxes i of higher score, of ``f(IoU_ij) / f(m_i)``, where m_i is the
    largest IoU of i with a box of a score above its own.

    Args:
        kernel: ``'gaussian'``, ``f = exp(-sigma * IoU ** 2)``, or ``'linear'``, ``f = 1 - IoU``.
    """

    def __init__(
        self, kernel: str = 'gaussian', sigma: float = 2.0, min_score: float = 1e-3, class_agnostic: bool = False
    ) -> None:
        if kernel not in ('gaussian', 'linear'):
            raise ValueError(f"kernel must be 'gaussian' or 'linear', got {kernel!r}")
        used = dict(sigma=sigma) if kernel == 'gaussian' else {}
        super().__init__(class_agnostic, kernel=kernel, **used, min_score=min_score)

    def _rescore(self, boxes: Tensor, scores: Tensor) -> Tensor:
        iou = pairwise_iou(boxes).triu(1)
        most = iou.amax(0)[:, None]
        if self.params['kernel'] == 'gaussian':
            decay = torch.exp(-self.params['sigma'] * (iou**2 - most**2))
        else:
            decay = (1 - iou) / (1 - most).clamp(min=1e-12)
        earlier = torch.ones_like(iou, dtype=torch.bool).triu(1)
        return scores * torch.where(earlier, decay, 1.0).amin(0).clamp(max=1)


class ClusterNMS(_Rescored):
    """Zheng, Wang, Ren, Liu, Ye, Hu, Zuo, "Enhancing geometric factors", IEEE Transactions on Cybernetics 2021.

    Without a penalty it is greedy NMS, by iterated matrices. With one, nothing is removed, and the score of j is
    multiplied, over the boxes i of higher score that the greedy rule keeps, by ``exp(-IoU ** 2 / sigma)`` (``'spm'``)
    or by ``min(1, exp(-IoU ** 2 / sigma) + D ** beta)`` (``'spm_d'``), with D the squared distance of the centres over
    the squared diagonal of the box round both.

    Args:
        penalty: ``'none'``, ``'spm'`` or ``'spm_d'``.
        weighted: each box becomes the mean of itself and of those of lower score that overlap it by more than 0.8,
            with the weights IoU times score.
    """

    def __init__(
        self,
        penalty: str = 'spm_d',
        iou_threshold: float = 0.5,
        sigma: float = 0.2,
        beta: float = 0.6,
        weighted: bool = False,
        min_score: float = 1e-3,
        class_agnostic: bool = False,
    ) -> None:
        if penalty not in ('none', 'spm', 'spm_d'):
            raise ValueError(f"penalty must be 'none', 'spm' or 'spm_d', got {penalty!r}")
        used = dict(sigma=sigma) if penalty == 'spm' else dict(sigma=sigma, beta=beta) if penalty == 'spm_d' else {}
        moves = dict(weighted=True) if is_flag('weighted', weighted) else {}
        super().__init__(
            class_agnostic, penalty=penalty, iou_threshold=iou_threshold, **used, **moves, min_score=min_score
        )

    def _rescore(self, boxes: Tensor, scores: Tensor) -> Tensor:
        penalty = self.params['penalty']
        iou = self._decisive(boxes)
        if penalty == 'none':
            return torch.where(iou.amax(0) <= self.params['iou_threshold'], scores, -1.0)
        left = torch.exp(-(iou**2) / self.params['sigma'])
        if penalty == 'spm_d':
            left = (left + centre_distance(boxes) ** self.params['beta']).clamp(max=1)
        return scores * torch.where(iou > 0, left, 1.0).prod(0)

    def _decisive(self, boxes: Tensor) -> Tensor:
        """(n, n) IoUs of rows that the greedy rule keeps with columns behind them; 0 elsewhere."""
        iou = pairwise_iou(boxes).triu(1)
        kept = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        while True:
            before, kept = kept, (iou * kept[:, None]).amax(0) <= self.params['iou_threshold']
            if torch.equal(before, kept):
                return iou * kept[:, None]

    def refine(self, boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor, kept_scores: Tensor) -> Tensor:
        """(M, 4) boxes of the detections; they move where ``weighted`` is set."""
        if 'weighted' not in self.params or not len(keep):
            return boxes[keep]
        moved, wide, raw = boxes.clone(), _wide(boxes), _wide(scores)
        for members in self._classes(raw, labels):
            iou = self._decisive(wide[members])
            weights = (torch.where(iou > 0.8, iou, 0.0) + torch.eye(len(members), device=iou.device)) * raw[members]
            moved[members] = (weights @ wide[members] / weights.sum(1, keepdim=True)).to(boxes.dtype)
        return moved[keep]


class DIoUNMS(_Paper):
    """Zheng, Wang, Liu, Li, Ye, Ren, "Distance-IoU loss", AAAI 2020, section "Non-Maximum Suppression using DIoU".

    Boxes are selected as in Soft-NMS, with ``DIoU = IoU - D ** beta`` instead of IoU, D as in :class:`ClusterNMS`.

    Args:
        decay: ``'hard'`` removes where DIoU > ``iou_threshold``; ``'gaussian'`` multiplies by
            ``exp(-max(DIoU, 0) ** 2 / sigma)`` (not in the paper).
    """

    def __init__(
        self,
        decay: str = 'hard',
        iou_threshold: float = 0.5,
        sigma: float = 0.5,
        beta: float = 1.0,
        min_score: float = 1e-3,
        class_agnostic: bool = False,
    ) -> None:
        if decay not in ('hard', 'gaussian'):
            raise ValueError(f"decay must be 'hard' or 'gaussian', got {decay!r}")
        used = dict(iou_threshold=iou_threshold) if decay == 'hard' else dict(sigma=sigma, min_score=min_score)
        super().__init__(class_agnostic, decay=decay, **used, beta=beta)

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        boxes, current = _wide(boxes), _wide(scores).clone()
        floor = max(self.params.get('min_score', 0.0), 0.0)
        keep: list[int] = []
        kept: list[float] = []
        while len(keep) != max_num and len(current):
            top, chosen = float(current.max()), int((current == current.max()).nonzero()[0])
            if top < floor:
                break
            keep.append(chosen)
            kept.append(top)
            diou = pairwise_iou(boxes[chosen, None], boxes)[0]
            diou = diou - centre_distance(boxes[chosen, None], boxes)[0] ** self.params['beta']
            others = torch.ones_like(labels, dtype=torch.bool) if self._class_agnostic else labels == labels[chosen]
            if self.params['decay'] == 'hard':
                current = torch.where(others & (diou > self.params['iou_threshold']), -1.0, current)
            else:
                left = torch.exp(-(diou.clamp(min=0) ** 2) / self.params['sigma'])
                current = torch.where(others, current * left, current)
            current[chosen] = -1
        return labels.new_tensor(keep, dtype=torch.int64), scores.new_tensor(kept)


class GidarisNMS:
    """Box voting of Gidaris and Komodakis (ICCV 2015, section 4) after any rule that does not move boxes itself.

    Each detection becomes the mean, weighted by raw scores, of the candidates of its class whose IoU with it is at
    least ``vote_threshold``, itself included.
    """

    box_dim = 4

    def __init__(self, rule: Rule | None = None, vote_threshold: float = 0.5, class_agnostic: bool = False) -> None:
        voted = VotedNMS(rule, class_agnostic=class_agnostic)  # says what cannot be wrapped
        in_range('vote_threshold', vote_threshold, 0, 1)
        self.rule, self._class_agnostic = voted.rule, class_agnostic
        self.params: dict[str, Any] = dict(rule=voted.params['rule'], vote_threshold=vote_threshold)
        self.params |= dict(class_agnostic=True) if class_agnostic else {}

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        return self.rule(boxes, scores, torch.zeros_like(labels) if self._class_agnostic else labels, max_num)

    def refine(self, boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor, kept_scores: Tensor) -> Tensor:
        """(M, 4) boxes of the detections."""
        wide, raw = _wide(boxes), _wide(scores).clamp(min=0)
        iou = pairwise_iou(wide[keep], wide)
        votes = (iou >= self.params['vote_threshold']) & (iou > 0)
        votes &= (labels[keep, None] == labels) | self._class_agnostic
        weights = votes * raw
        total = weights.sum(1, keepdim=True)
        return torch.where(total > 0, weights @ wide / total.clamp(min=1e-30), wide[keep]).to(boxes.dtype)


class _Fusion(_Paper):
    """Rules of the package ensemble-boxes, which make new boxes of the candidates of one model.

    The index of a new box is that of the candidate of its class that overlaps it most.
    """

    function: str

    def __init__(self, iou_threshold: float, class_agnostic: bool, **parameters: Any) -> None:
        super().__init__(class_agnostic, iou_threshold=iou_threshold, **parameters)
        try:
            importlib.import_module('ensemble_boxes')
        except ImportError as error:
            raise ValueError(f'{type(self).__name__} needs ensemble-boxes: pip install ensemble-boxes') from error

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, max_num: int) -> tuple[Tensor, Tensor]:
        keep, kept, _ = self._fused(boxes, scores, labels)
        return (keep, kept) if max_num < 0 else (keep[:max_num], kept[:max_num])

    def refine(self, boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor, kept_scores: Tensor) -> Tensor:
        """(M, 4) boxes of the detections."""
        return self._fused(boxes, scores, labels)[2][: len(keep)]

    def _fused(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all fused boxes; remembered for the call of ``refine`` with the same tensors."""
        versions = [boxes._version, scores._version, labels._version]
        remembered = _last.get(self)
        if remembered is not None:
            inputs, then, results = remembered
            if all(map(_is, inputs, (boxes, scores, labels))) and then == versions:
                return results  # type: ignore[no-any-return]
        results = self._fuse(boxes, scores, labels)
        _last[self] = (boxes, scores, labels), versions, results
        return results

    def _fuse(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = torch.zeros_like(labels) if self._class_agnostic else labels
        fits = ((boxes[:, 2:] > boxes[:, :2]).all(1) & (scores > 0)).nonzero()[:, 0]
        if not len(fits):
            return fits, scores[fits], boxes[fits]
        wide = boxes[fits].double().cpu()
        low, high = wide[:, :2].amin(0), wide[:, 2:].amax(0)
        unit = (wide.view(-1, 2, 2) - low) / (high - low)  # ensemble-boxes takes coordinates in [0, 1]
        options = {name: value for name, value in self.params.items() if name == 'conf_type'}
        function = getattr(importlib.import_module('ensemble_boxes'), self.function)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of boxes that lose their area by rounding
            fused, kept, of_class = function(
                [unit.view(-1, 4).numpy()],
                [scores[fits].double().cpu().numpy()],
                [groups[fits].cpu().numpy()],
                iou_thr=self.params['iou_threshold'],
                **options,
            )
        made = (torch.from_numpy(fused).double().view(-1, 2, 2) * (high - low) + low).view(-1, 4).to(boxes)
        classes = torch.from_numpy(of_class).to(groups)
        iou = torch.where(classes[:, None] == groups[fits], pairwise_iou(_wide(made), _wide(boxes[fits])), -1.0)
        return fits[iou.argmax(1)], torch.from_numpy(kept).to(scores), made


class WeightedBoxesFusion(_Fusion):
    """Solovyev, Wang, Gabruseva, Image and Vision Computing 2021, of one model; by the authors' ``ensemble-boxes``."""

    function = 'weighted_boxes_fusion'

    def __init__(self, iou_threshold: float = 0.55, conf_type: str = 'avg', class_agnostic: bool = False) -> None:
        if conf_type not in ('avg', 'max'):
            raise ValueError(f"conf_type must be 'avg' or 'max', got {conf_type!r}")
        super().__init__(iou_threshold, class_agnostic, conf_type=conf_type)


class NonMaximumWeighted(_Fusion):
    """Zhou, Zhu, Zhang, Wei, Yao, ICCV 2017 workshops ("CAD"), as ``ensemble-boxes`` has it."""

    function = 'non_maximum_weighted'

    def __init__(self, iou_threshold: float = 0.5, class_agnostic: bool = False) -> None:
        super().__init__(iou_threshold, class_agnostic)


_last: 'WeakKeyDictionary[_Fusion, Any]' = WeakKeyDictionary()


def _is(one: Any, other: Any) -> bool:
    return one is other


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or float64, which rules compute in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def pairwise_iou(boxes: Tensor, others: Tensor | None = None) -> Tensor:
    """(M, N) IoUs of (M, 4) ``xyxy`` boxes with (N, 4) others, or with themselves."""
    others = boxes if others is None else others
    sides = torch.minimum(boxes[:, None, 2:], others[:, 2:]) - torch.maximum(boxes[:, None, :2], others[:, :2])
    inside = sides.clamp(min=0).prod(2)
    areas, other_areas = ((one[:, 2:] - one[:, :2]).prod(1) for one in (boxes, others))
    union = areas[:, None] + other_areas - inside
    overlaps = (sides > 0).all(2) & (union > 0)
    return torch.where(overlaps, inside / torch.where(overlaps, union, 1.0), 0.0)


def centre_distance(boxes: Tensor, others: Tensor | None = None) -> Tensor:
    """(M, N) squared distances of the centres over the squared diagonals of the boxes round both; 0 where that is 0."""
    others = boxes if others is None else others
    centres, other_centres = ((one[:, :2] + one[:, 2:]) / 2 for one in (boxes, others))
    distance = (centres[:, None] - other_centres).square().sum(2)
    around = torch.maximum(boxes[:, None, 2:], others[:, 2:]) - torch.minimum(boxes[:, None, :2], others[:, :2])
    diagonal = around.square().sum(2)
    return torch.where(diagonal > 0, distance / torch.where(diagonal > 0, diagonal, 1.0), 0.0)
