"""The drawn input of the benchmarks: candidates shaped like a detector's.

* A scene of 1333 x 800 px holds 20 objects. 1,000 proposals (more where so many candidates need them): four in five lie
  round an object, with normal errors of a tenth of its size, the others anywhere.
* Every class has its own box for each proposal (class-aware regression, 3 % apart) and a softmax score: random logits,
  with a margin for the background and a larger one for the object's class where there is an object.
* The score threshold is set so that the wanted number of candidates remains. ``min_score`` is 1e-3, or that threshold
  where it is lower: nothing is dropped before it has met another box.
* "1 dense" is one class of that many proposals round the 20 objects; "1 spread" is one class of small boxes all over
  the image, few of which overlap: nearly all survive, which is the most work there is for anyone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WIDTH, HEIGHT = 1333, 800
TENSORS = ('boxes', 'scores', 'labels')


class Candidates(NamedTuple):
    """boxes (N, 4) xyxy in pixels, scores (N,) and labels (N,) of one image; ``kind``: the classes, in words."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    kind: str
    min_score: float


def scene_objects(generator: torch.Generator, num: int, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centres (num, 2) and sizes (num, 2) in pixels and classes (num,) of a scene's objects, drawn first of all."""
    centres = torch.rand(num, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    sizes = 32 * 12 ** torch.rand(num, 1, generator=generator)  # 32 to 384 px
    sizes = sizes * (0.3 * torch.randn(num, 2, generator=generator)).exp()
    return centres, sizes, torch.randint(num_classes, (num,), generator=generator)


def detector_candidates(
    num: int, num_classes: int, num_proposals: int = 1000, kind: str | None = None, seed: int = 0, num_objects: int = 20
) -> Candidates:
    """The ``num`` candidates of highest score of the scene in the module's docstring."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    image = torch.tensor([WIDTH, HEIGHT])
    objects, sizes, classes = scene_objects(generator, num_objects, num_classes)
    nearest = torch.randint(num_objects, (num_proposals,), generator=generator)
    stray = torch.rand(num_proposals, generator=generator) < 0.2
    centres = objects[nearest] + 0.1 * sizes[nearest] * normal(num_proposals, 2)
    centres[stray] = torch.rand(int(stray.sum()), 2, generator=generator) * image
    sides = sizes[nearest] * (0.15 * normal(num_proposals, 2)).exp()

    logits = 1.5 * normal(num_proposals, num_classes + 1) + normal(num_classes + 1)
    logits[torch.arange(num_proposals), classes[nearest]] += torch.where(stray, 0.0, 6.0)
    logits[:, -1] += 4  # background
    scores = logits.softmax(dim=1)[:, :-1].reshape(-1)
    best = scores.topk(min(num, len(scores))).indices.sort().values
    proposal, labels = best // num_classes, best % num_classes

    centres = centres[proposal] + 0.03 * sides[proposal] * normal(len(best), 2)
    half = sides[proposal] * (0.05 * normal(len(best), 2)).exp() / 2
    return _candidates(centres, half, scores[best], labels, kind or f'{num_classes:,}')


def spread_candidates(num: int, seed: int = 0) -> Candidates:
    """One class of small boxes all over the image."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(num, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    half = (5 + 20 * torch.rand(num, 2, generator=generator)) / 2
    scores = 0.01 + 0.99 * torch.rand(num, generator=generator)
    return _candidates(centres, half, scores, torch.zeros(num, dtype=torch.int64), '1 spread')


def _candidates(centres: Tensor, half: Tensor, scores: Tensor, labels: Tensor, kind: str) -> Candidates:
    """Clip to the image, as a detector does; centres are moved inside first, so that no box loses all its area."""
    limit = torch.tensor([WIDTH, HEIGHT], dtype=torch.float32)
    centres = torch.minimum(centres.clamp(min=2), limit - 2)
    boxes = torch.cat([(centres - half).clamp(min=0), torch.minimum(centres + half, limit)], dim=1)
    return Candidates(boxes, scores, labels, kind, min(1e-3, float(scores.min())))
