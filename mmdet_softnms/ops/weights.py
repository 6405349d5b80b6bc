"""The rules: what a selected box leaves of another one's score. One function for each, and nothing else anywhere.

A weight is a function of the IoU of two boxes and of parameters of the operator. It is written once, in a subset of
Python: arithmetic, comparisons, numbers, and the functions of this module (``where``, ``exp``, ``cos``, ``sqrt``).
As it stands it takes PyTorch tensors: the reference and the gradients call it so. The other backends call a copy of it
whose ``where``, ``exp``, … are theirs (:func:`rewritten`): numba's, Triton's, ONNX's. Every backend computes it in
float64 from the rounded IoU, and rounds once to the type of the scores (ONNX: in float32 throughout).

A new rule is one function here, or anywhere else with ``@register``::

    from mmdet_softnms.ops.weights import cos, register, where

    @register
    def cosine(iou, iou_threshold):
        return where(iou > iou_threshold, (1 + cos(3.141592653589793 * iou)) / 2, 1)

    soft_nms(boxes, scores, method='cosine')
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch

from mmdet_softnms.files import did_you_mean

where, exp, cos, sqrt = torch.where, torch.exp, torch.cos, torch.sqrt
WORDS = {'where': where, 'exp': exp, 'cos': cos, 'sqrt': sqrt}


class Parameter(NamedTuple):
    """A parameter that weights may take."""

    default: float
    fits: Callable[[float], bool]
    range: str  # in words: "must be ..."


#: By the name of the argument, of a weight and of :func:`mmdet_softnms.soft_nms`. A weight that takes ``iou_threshold``
#: is 1 at and below it.
PARAMETERS = {
    'iou_threshold': Parameter(0.3, lambda value: 0 <= value <= 1, 'in [0, 1]'),
    'sigma': Parameter(0.5, lambda value: math.isfinite(value) and value > 0, 'finite and > 0'),
}


@dataclass(frozen=True, eq=False)  # the same only as itself: a quick key
class Weight:
    """A rule as the backends take it from the table."""

    name: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]  # those of PARAMETERS that it takes, in the order of its arguments
    removes: bool  # a weight of 0 removes the box, whatever min_score is; all others are 1
    falls: bool = True  # never rises with the IoU, which decay='strongest' needs


#: By the name that ``method=`` takes.
WEIGHTS: dict[str, Weight] = {}


def register(function: Any = None, *, removes: bool = False) -> Any:
    """Make a weight a rule of its name, for every backend; a decorator.

    Args:
        function: of ``iou`` in [0, 1], and of any of :data:`PARAMETERS` by name. Weights lie in [0, 1]; they are 1 at
            an IoU of 0, and at and below ``iou_threshold`` where it is taken.
        removes: the weights are 0, which removes a box whatever ``min_score`` is, or 1.

    Returns:
        The function.

    Raises:
        ValueError: the name is taken; the function takes or uses what no weight can; a weight is out of range.
    """
    if function is None:
        return lambda function: register(function, removes=removes)
    name, taken = function.__name__, tuple(inspect.signature(function).parameters)
    if name in WEIGHTS:
        raise ValueError(f'there is a rule named {name!r} already; give the function another name')
    if taken[:1] != ('iou',) or not set(taken[1:]) <= set(PARAMETERS):
        raise ValueError(f'{name} takes {", ".join(taken)}; a weight takes iou, then any of {", ".join(PARAMETERS)}')
    rewritten(function, WORDS)  # says what it may not use
    weight = Weight(name, function, taken[1:], removes)
    WEIGHTS[name] = replace(weight, falls=_check_range(weight))
    return function


def get(method: str) -> Weight:
    """The rule of a name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    weight = WEIGHTS.get(method) if isinstance(method, str) else None
    if weight is None:
        known = ', '.join(map(repr, WEIGHTS))
        raise ValueError(f'method must be one of {known}, got {method!r}{did_you_mean(method, WEIGHTS)}')
    return weight


def rewritten(
    function: Callable[..., Any], words: Mapping[str, Any], number: Callable[[float], Any] = lambda value: value
) -> Callable[..., Any]:
    """A copy of a weight that calls a backend's functions instead of PyTorch's.

    Args:
        function: as :func:`register` takes it.
        words: the backend's function for each of :data:`WORDS`.
        number: what the backend makes of a number that stands in the function's module.

    Raises:
        ValueError: the function uses something else.
    """
    assert isinstance(function, FunctionType)
    meanings = {id(value): words[name] for name, value in WORDS.items()}
    used: dict[str, Any] = {}
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if id(value) in meanings:
            used[name] = meanings[id(value)]
        elif isinstance(value, (int, float)):
            used[name] = number(value)
        else:
            raise ValueError(
                f'{function.__name__} uses {name}; a weight may use arithmetic, comparisons, numbers, and '
                f'{", ".join(WORDS)} of mmdet_softnms.ops.weights'
            )
    if function.__closure__:
        raise ValueError(f'{function.__name__} uses {", ".join(function.__code__.co_freevars)} of another function')
    scope = {'__name__': function.__module__, '__builtins__': {}, **used}
    copy = FunctionType(function.__code__, scope, function.__name__)
    copy.__qualname__ = function.__qualname__
    return copy


def _check_range(weight: Weight) -> bool:
    """What makes lazy selection exact, at some IoUs and thresholds; returns whether the weight never rises."""
    falls = True
    function = rewritten(weight.function, dict(where=np.where, exp=np.exp, cos=np.cos, sqrt=np.sqrt))
    iou = np.linspace(0, 1, 201)
    for threshold in (0.0, 0.3, 0.5, 1.0):
        values = {
            name: threshold if name == 'iou_threshold' else PARAMETERS[name].default for name in weight.parameters
        }
        with np.errstate(all='ignore'):  # of branches that where does not choose
            weights = np.broadcast_to(np.asarray(function(iou, **values), np.float64), iou.shape)
        untouched = iou <= values.get('iou_threshold', 0)
        wrong = ~((weights >= 0) & (weights <= 1)) | (untouched & (weights != 1))
        if weight.removes:
            wrong |= (weights != 0) & (weights != 1)
        if wrong.any():
            place = int(wrong.argmax())
            raise ValueError(
                f'{weight.name} gives {weights[place]} at an IoU of {iou[place]:g} with {values}; weights lie in '
                '[0, 1], are 1 at an IoU of 0 and up to iou_threshold, and 0 or 1 where they remove'
            )
        falls &= bool((np.diff(weights) <= 0).all())
    return falls


@register
def linear(iou: Any, iou_threshold: Any) -> Any:
    """Bodla, Singh, Chellappa, Davis, ICCV 2017, equation (2) of section 3."""
    return where(iou > iou_threshold, 1 - iou, 1)


@register
def gaussian(iou: Any, sigma: Any) -> Any:
    """The same, equation (3)."""
    return exp(-(iou * iou) / sigma)


@register(removes=True)
def hard(iou: Any, iou_threshold: Any) -> Any:
    """Greedy NMS."""
    return where(iou > iou_threshold, 0, 1)
