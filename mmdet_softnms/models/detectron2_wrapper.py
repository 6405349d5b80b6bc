"""Detectron2's detectors inside mmdet: mmdet's own ``Detectron2Wrapper``, with suppression by rule.

Its ``detector`` is a yacs config of Detectron2 (its ``MODEL``, names in any case). Detectron2 is imported when a model
is built or a config is read, not before: this module can be imported without it.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from mmdet.models import Detectron2Wrapper
from mmdet.models.detectors.d2_wrapper import _to_cfgnode_list
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_softnms.registry import MODELS, TASK_UTILS, build_rule, resolve
from mmdet_softnms.rules import HardNMS, MmcvNMS, Rule, SoftNMS, name_of

#: RoI heads of Detectron2, and those of :mod:`mmdet_softnms.detectron2` that take rules.
HEADS = {
    'StandardROIHeads': 'SoftNMSROIHeads',
    'CascadeROIHeads': 'SoftNMSCascadeROIHeads',
    'Res5ROIHeads': 'SoftNMSRes5ROIHeads',
}
_RETINANET = {'RetinaNet': 'SoftNMSRetinaNet'}
#: Of ``detector``: where weights and the model are, and what follows the suppression. Each name as Detectron2 has it.
_BESIDE_CANDIDATES = ('WEIGHTS', 'DEVICE', 'MASK_ON', 'KEYPOINT_ON')


def read_detector(detector: Mapping[str, Any]) -> Any:
    """The yacs config of a ``detector``, with the keys of :func:`mmdet_softnms.detectron2.add_soft_nms_config`.

    Raises:
        ImportError: Detectron2 is not installed.
        KeyError, ValueError, AssertionError: a key does not exist there, or its value is of another type.
        ValueError: it is a model whose suppression cannot be exchanged.
    """
    try:
        from detectron2.config import get_cfg

        from mmdet_softnms.detectron2 import add_soft_nms_config
    except ImportError as error:
        raise ImportError(f'Detectron2Wrapper needs Detectron2, which cannot be imported here ({error})') from error
    cfg = get_cfg()
    add_soft_nms_config(cfg)
    # The list is given, since mmdet's own default is one list for all calls, with the keys of earlier models.
    cfg.merge_from_list(_to_cfgnode_list(detector, [])[0])
    model = cfg.MODEL
    if model.META_ARCHITECTURE in (*_RETINANET, *_RETINANET.values()):
        return cfg
    if model.META_ARCHITECTURE != 'GeneralizedRCNN':
        raise ValueError(f'META_ARCHITECTURE {model.META_ARCHITECTURE} is not one of GeneralizedRCNN and RetinaNet')
    if model.ROI_HEADS.NAME not in (*HEADS, *HEADS.values()):
        raise ValueError(f'ROI_HEADS.NAME {model.ROI_HEADS.NAME} is not one of {", ".join(HEADS)}')
    if model.PROPOSAL_GENERATOR.NAME != 'RPN':
        raise ValueError(f'PROPOSAL_GENERATOR.NAME {model.PROPOSAL_GENERATOR.NAME} is not RPN')
    return cfg


def is_retinanet(cfg: Any) -> bool:
    """Whether a yacs config is that of a RetinaNet, with rules or without."""
    return cfg.MODEL.META_ARCHITECTURE in (*_RETINANET, *_RETINANET.values())


def head_with_rules(cfg: Any) -> str:
    """The name of the part of a yacs config's model that takes rules, in :mod:`mmdet_softnms.detectron2`."""
    model = cfg.MODEL
    names, name = (_RETINANET, model.META_ARCHITECTURE) if is_retinanet(cfg) else (HEADS, model.ROI_HEADS.NAME)
    return names.get(name, name)


@MODELS.register_module()
class SoftNMSDetectron2Wrapper(Detectron2Wrapper):
    """mmdet's ``Detectron2Wrapper`` with suppression by rule; with none, its detections are those of the stock one.

    Args:
        detector, bgr_to_rgb, rgb_to_bgr: as there. Of the detectors, those with RoI heads of :data:`HEADS`, and
            RetinaNet. ``device`` is ignored: mmengine puts the model where it runs.
        rule: a rule of a config, as ``nms`` of a test_cfg; None: what the Soft-NMS keys of ``detector`` say
            (:func:`mmdet_softnms.detectron2.add_soft_nms_config`), or Detectron2's own NMS.
        max_per_img: at most so many detections, 0 or less: no limit; None: Detectron2's ``DETECTIONS_PER_IMAGE``.

    Raises:
        ImportError, KeyError, TypeError, ValueError: see :func:`read_detector`; or the rule is wrong.
    """

    def __init__(
        self,
        detector: Mapping[str, Any],
        bgr_to_rgb: bool = False,
        rgb_to_bgr: bool = False,
        rule: Mapping[str, Any] | None = None,
        max_per_img: int | None = None,
    ) -> None:
        if bgr_to_rgb and rgb_to_bgr:
            raise ValueError('bgr_to_rgb and rgb_to_bgr cannot both be true')
        # Not that of Detectron2Wrapper, which knows no keys of Soft-NMS and builds on a GPU.
        super(Detectron2Wrapper, self).__init__()
        self._channel_conversion = bgr_to_rgb or rgb_to_bgr
        self.cfg = read_detector(detector)
        from detectron2.modeling import build_model
        from detectron2.utils.events import EventStorage

        from mmdet_softnms import detectron2

        head = head_with_rules(self.cfg)
        if is_retinanet(self.cfg):
            self.cfg.MODEL.META_ARCHITECTURE = head
        else:
            self.cfg.MODEL.ROI_HEADS.NAME = head
        self.cfg.MODEL.DEVICE = 'cpu'
        self.d2_model: Any = build_model(self.cfg)
        #: For whoever compares models: all that Detectron2 was told, its defaults included.
        self.config_sha256 = hashlib.sha256(self.cfg.dump().encode()).hexdigest()
        self.storage = EventStorage()
        if rule is not None:
            place = self.d2_model if is_retinanet(self.cfg) else self.d2_model.roi_heads
            place = place if hasattr(place, 'rule') else place.box_predictor
            place.rule = detectron2.build_rule(build_rule(rule))
        if max_per_img is not None:
            limit = max_per_img if max_per_img > 0 else -1
            for part in self.d2_model.modules():
                for name in ('test_topk_per_image', 'max_detections_per_image'):
                    if hasattr(part, name):
                        setattr(part, name, limit)

    @property
    def num_classes(self) -> int:
        """How many classes the model predicts."""
        return int(self.d2_model.num_classes if is_retinanet(self.cfg) else self.d2_model.roi_heads.num_classes)

    def predict(self, batch_inputs: Tensor, batch_data_samples: Any) -> Any:
        """Detections in image scale; mmdet's method also reads the objects of an image, which it does not need."""
        for sample in batch_data_samples:
            if 'gt_instances' not in sample or 'bboxes' not in sample.gt_instances:
                sample.gt_instances = InstanceData(bboxes=torch.empty(0, 4), labels=torch.empty(0, dtype=torch.int64))
        return super().predict(batch_inputs, batch_data_samples)

    def layers_before_suppression(self) -> list[nn.Module]:
        """The modules whose outputs candidates are made of: RPN head and box predictors, or the head of RetinaNet."""
        if is_retinanet(self.cfg):
            return [self.d2_model.head]
        predictor = self.d2_model.roi_heads.box_predictor
        stages = list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]
        return [self.d2_model.proposal_generator.rpn_head, *stages]


def not_persistent(model: nn.Module) -> tuple[str, ...]:
    """Full names of the buffers that a model does not save; older files of Detectron2 hold them, to no effect."""
    return tuple(
        f'{path}.{name}' if path else name
        for path, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
    )


def own_test_cfg(model: Mapping[str, Any]) -> dict[str, Any]:
    """``score_thr``, ``max_per_img`` and ``nms`` of a wrapper's config with RoI heads, as those of a test_cfg.

    Detectron2's own NMS is written as ``HardNMS``, which selects the same boxes.

    Raises:
        ImportError, KeyError, ValueError: see :func:`read_detector`.
    """
    from mmdet_softnms.detectron2 import rule_of

    cfg = read_detector(model['detector'])
    keys = cfg.MODEL.ROI_HEADS
    nms, most = model.get('rule'), model.get('max_per_img')
    if nms is None:
        rule = rule_of(keys) or HardNMS(keys.NMS_THRESH_TEST)
        nms = dict(type=resolve(type(rule), TASK_UTILS).type, **rule.params)
    return dict(
        score_thr=float(keys.SCORE_THRESH_TEST),
        max_per_img=int(cfg.TEST.DETECTIONS_PER_IMAGE if most is None else max(most, -1)),
        nms=nms,
    )


def plugged(model: Mapping[str, Any], score_floor: float) -> ConfigDict:
    """A wrapper's config with RoI heads that returns every candidate with ``score > score_floor``, and boxes only."""
    detector = _in_capitals(model['detector'])
    for name in _BESIDE_CANDIDATES:
        detector.pop(name, None)
    keys = detector.setdefault('ROI_HEADS', {})
    for name in [one for one in keys if one.startswith('SOFT_NMS') or one == 'NMS_THRESH_TEST']:
        del keys[name]
    keys['SCORE_THRESH_TEST'] = score_floor
    return ConfigDict(
        type=resolve(SoftNMSDetectron2Wrapper, MODELS).type,
        detector=detector,
        bgr_to_rgb=model.get('bgr_to_rgb', False),
        rgb_to_bgr=model.get('rgb_to_bgr', False),
        rule=dict(type='mmdet_softnms.NoSuppression'),
        max_per_img=-1,
    )


def _in_capitals(content: Any) -> Any:
    """A config with the names that Detectron2 has; what is written in two cases becomes one, as in the wrapper."""
    if not isinstance(content, Mapping):
        return content
    made: dict[str, Any] = {}
    for key, value in content.items():
        name, value = str(key).upper(), _in_capitals(value)
        made[name] = made[name] | value if isinstance(value, dict) and isinstance(made.get(name), dict) else value
    return made


def lines_to_paste(head: str, rule: Rule, score_thr: float, max_per_img: int) -> str:
    """The lines that a yacs config and a LazyConfig of Detectron2 need for a setting.

    Args:
        head: the RoI heads of :mod:`mmdet_softnms.detectron2`, see :func:`head_with_rules`.
        rule, score_thr, max_per_img: the setting.
    """
    if isinstance(rule, MmcvNMS):
        return f"# {name_of(rule)} is mmcv's, and not to be had in Detectron2: take SoftNMS or HardNMS"
    limit, written = (max_per_img if max_per_img > 0 else -1), dict(type=type(rule).__name__, **rule.params)
    cascade = head == HEADS['CascadeROIHeads']
    place, target = ('', head) if cascade else ('.box_predictor', 'SoftNMSOutputLayers')
    keys = dict(NAME=head, SCORE_THRESH_TEST=score_thr) | (_as_keys(rule) or {})
    lines = [
        '# yacs: from mmdet_softnms.detectron2 import add_soft_nms_config; after get_cfg(), add_soft_nms_config(cfg)',
        *(f'cfg.MODEL.ROI_HEADS.{name} = {value!r}' for name, value in keys.items()),
        f'cfg.TEST.DETECTIONS_PER_IMAGE = {limit}',
    ]
    if _as_keys(rule) is None:
        lines += [
            '# and, since no keys say this rule, once the model is built:',
            f'model.roi_heads{place}.rule = mmdet_softnms.detectron2.build_rule({written})',
        ]
    lines += [
        '# LazyConfig',
        f"model.roi_heads{place}._target_ = 'mmdet_softnms.detectron2.{target}'",
        f'model.roi_heads{place}.rule = {written}',
        'for predictor in model.roi_heads.box_predictors:' if cascade else 'predictor = model.roi_heads.box_predictor',
        f'{"    " * cascade}predictor.test_score_thresh, predictor.test_topk_per_image = {score_thr!r}, {limit}',
    ]
    return '\n'.join(lines)


def _as_keys(rule: Rule) -> dict[str, Any] | None:
    """A rule as the keys of a yacs config; None where they cannot say it."""
    given = dict(rule.params)
    if given.pop('offset', 0) or type(rule) not in (HardNMS, SoftNMS):
        return None
    values = dict(SOFT_NMS_ENABLED=type(rule) is SoftNMS)
    known = dict(method='SOFT_NMS_METHOD', sigma='SOFT_NMS_SIGMA', min_score='SOFT_NMS_PRUNE')
    known['iou_threshold'] = 'NMS_THRESH_TEST'
    return None if set(given) - set(known) else values | {known[name]: value for name, value in given.items()}
