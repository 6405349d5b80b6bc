"""What every head with rules does: find the rule in its test_cfg, warn of what is dropped, be copied and pickled."""

import copy
import functools
import warnings
from collections.abc import Sequence
from typing import Any

from mmengine.config import ConfigDict

from mmdet_softnms.registry import build_rule, is_stock
from mmdet_softnms.rules import Rule, check_box_dim


class TakesRules:
    """A head whose ``test_cfg.nms`` may name a rule; goes before a head of mmdet's in the bases."""

    test_cfg: ConfigDict | None
    box_dim: int | None = None  # how many values a box of this head has, where that is known before the first image

    def look_for_rule(self, needed: tuple[str, ...], place: str) -> None:
        """What is wrong with test_cfg is said when the head is built, not at the first image.

        Raises:
            TypeError: one of the ``needed`` keys is missing; ``place``: of test_cfg in the config.
            KeyError, TypeError, ValueError: ``test_cfg.nms`` names no registered rule or does not fit it, or the rule
                does not take rotated boxes, which this head predicts, or takes nothing else.
        """
        self._nms_cfg: ConfigDict | None = None
        self._rule: Rule | None = None
        self._warned = False
        if self.test_cfg is None:
            return
        if missing := [name for name in needed if name not in self.test_cfg]:
            *others, last = needed
            wanted = f'{", ".join(others)} and {last}' if others else last
            raise TypeError(
                f'{type(self).__name__} finds no {", ".join(missing)} in its test_cfg: {place} has to hold '
                f"{wanted}=dict(type='mmdet_softnms.SoftNMS')"
            )
        self.rule_of(self.test_cfg)

    def rule_of(self, test_cfg: ConfigDict | None) -> Rule | None:
        """The rule of ``test_cfg.nms``; None where the suppression is mmdet's own business.

        Built anew when the config has changed: in a notebook it is edited in place.
        """
        nms_cfg = None if test_cfg is None else test_cfg.get('nms')
        if nms_cfg is None or is_stock(nms_cfg):
            return None
        if self._nms_cfg != nms_cfg:
            rule = build_rule(nms_cfg)
            if self.box_dim is not None:
                check_box_dim(rule, self.box_dim)
            self._rule = rule
            self._nms_cfg = copy.deepcopy(nms_cfg)
        return self._rule

    def warn_of_dropped(self, batch_img_metas: Sequence[dict[str, Any] | None], dropped: Sequence[int]) -> None:
        """Say once that candidates are not finite, and in which image."""
        if self._warned:
            return
        self._warned = True
        meta = next(meta for meta, count in zip(batch_img_metas, dropped, strict=True) if count) or {}
        warnings.warn(
            f'{type(self).__name__} dropped {sum(dropped)} candidates whose box or score is not finite, or whose area '
            f'overflows, first on image {meta.get("img_path") or meta.get("img_id")}: the network diverged in '
            'training, or ran out of the range of its floating type. More of them are dropped without a word.',
            RuntimeWarning,
            stacklevel=2,
        )


@functools.cache
def combined(mixin: Any, head: type) -> type:
    """A head's class with a mixin before it, the same one each time; one with the mixin already as it is."""
    if issubclass(head, mixin):
        return head
    # Pickled and copied by way of the head's class: this one cannot be imported by name.
    members: dict[str, Any] = dict(
        __module__=mixin.__module__, __doc__=f'{head.__name__} with suppression by rule.', __reduce_ex__=_reduce
    )
    return type(f'SoftNMS{head.__name__}', (mixin, head), members)


def plain_of(head: type) -> type:
    """What :func:`combined` made a class of; any other class as it is."""
    return head.__bases__[1] if vars(head).get('__reduce_ex__') is _reduce else head


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    return _blank, type(self).__bases__, self.__dict__


def _blank(mixin: Any, head: type) -> Any:
    made: Any = combined(mixin, head)
    return made.__new__(made)
