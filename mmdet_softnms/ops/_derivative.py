"""A weight and its derivative by the IoU, from the same function: arithmetic on pairs of both (forward mode).

Not torch's autograd, which would be shorter: inside a registered operator it is switched off, and ``torch.func.grad``
there fails under dispatch modes (``FlopCounterMode``) and hooks on saved tensors (``save_on_cpu``); it is no quicker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmdet_softnms.ops import weights


def with_derivative(weight: weights.Weight, iou: Tensor, values: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Weights of float64 IoUs of any shape, and their derivatives; ``values`` in the order of ``weight.parameters``."""
    result = _pair(weights.rewritten(weight.function, _WORDS)(_Dual(iou, torch.ones_like(iou)), *values), iou)
    return result.value, result.slope


class _Dual:
    def __init__(self, value: Tensor, slope: Tensor) -> None:
        self.value, self.slope = value, slope

    def __neg__(self) -> _Dual:
        return _Dual(-self.value, -self.slope)

    def __add__(self, other: Any) -> _Dual:
        a, b = self, _pair(other, self.value)
        return _Dual(a.value + b.value, a.slope + b.slope)

    def __sub__(self, other: Any) -> _Dual:
        return self + -_pair(other, self.value)

    def __rsub__(self, other: Any) -> _Dual:
        return -self + other

    def __mul__(self, other: Any) -> _Dual:
        a, b = self, _pair(other, self.value)
        return _Dual(a.value * b.value, a.slope * b.value + a.value * b.slope)

    def __truediv__(self, other: Any) -> _Dual:
        a, b = self, _pair(other, self.value)
        quotient = a.value / b.value
        return _Dual(quotient, (a.slope - quotient * b.slope) / b.value)

    def __rtruediv__(self, other: Any) -> _Dual:
        return _pair(other, self.value) / self

    def __pow__(self, power: float) -> _Dual:
        return _Dual(self.value**power, power * self.value ** (power - 1) * self.slope)

    __radd__, __rmul__ = __add__, __mul__

    def __gt__(self, other: Any) -> Tensor:
        return self.value > _pair(other, self.value).value

    def __lt__(self, other: Any) -> Tensor:
        return self.value < _pair(other, self.value).value

    def __ge__(self, other: Any) -> Tensor:
        return self.value >= _pair(other, self.value).value

    def __le__(self, other: Any) -> Tensor:
        return self.value <= _pair(other, self.value).value


def _pair(number: Any, like: Tensor) -> _Dual:
    return number if isinstance(number, _Dual) else _Dual(torch.full_like(like, number), torch.zeros_like(like))


def _where(condition: Tensor, a: Any, b: Any) -> _Dual:
    like = torch.empty(condition.shape, dtype=torch.float64, device=condition.device)
    a, b = _pair(a, like), _pair(b, like)
    return _Dual(torch.where(condition, a.value, b.value), torch.where(condition, a.slope, b.slope))


def _exp(x: _Dual) -> _Dual:
    value = torch.exp(x.value)
    return _Dual(value, value * x.slope)


def _sqrt(x: _Dual) -> _Dual:
    value = torch.sqrt(x.value)
    return _Dual(value, x.slope / (2 * value))


def _cos(x: _Dual) -> _Dual:
    return _Dual(torch.cos(x.value), -torch.sin(x.value) * x.slope)


_WORDS = dict(where=_where, exp=_exp, cos=_cos, sqrt=_sqrt)
