"""mmdet's evaluators with the numbers they compute instead of the three decimals they print.

mmdet's ``CocoMetric`` and ``VOCMetric`` round, and name values by position: with ``proposal_nums=(1, 10, 100)`` the
key ``AR@100`` holds AR@1. Both classes here only replace the last step, ``compute_metrics``.
"""

import contextlib
import io
import tempfile
import warnings
from typing import Any

import numpy as np
from mmdet.datasets.api_wrappers import COCO, COCOeval
from mmdet.evaluation import CocoMetric, VOCMetric
from mmdet.evaluation.functional import eval_map
from mmengine.fileio import load

from mmdet_softnms.registry import METRICS

#: pycocotools' ``COCOeval.stats`` at ``maxDets=(1, 10, 100)``, by position.
COCO_STATS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl')


@METRICS.register_module()
class UnroundedCocoMetric(CocoMetric):
    """COCO box metrics at 100 detections an image, in [0, 1] and unrounded; -1 where no object is of that size.

    Args:
        ann_file: a COCO json; None: the ground truth comes with the samples as ``instances``, and crowd, difficult
            and ignored objects are all COCO's ``iscrowd``.
        **kwargs: see mmdet's ``CocoMetric``; ``metric`` and ``proposal_nums`` are fixed.
    """

    _coco_api: COCO | None

    def __init__(self, ann_file: str | None = None, **kwargs: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            super().__init__(ann_file, metric='bbox', proposal_nums=(1, 10, 100), **kwargs)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """The twelve numbers of :data:`COCO_STATS`; all 0 (recall of nothing) where there is no detection at all."""
        ground_truth, predictions = zip(*results, strict=True)
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            if self._coco_api is None:
                self._coco_api = COCO(self.gt_to_coco_json(gt_dicts=ground_truth, outfile_prefix=f'{folder}/gt'))
            self.cat_ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta['classes'])
            self.img_ids = self._coco_api.get_img_ids()
            if not any(len(prediction['labels']) for prediction in predictions):
                return dict.fromkeys(COCO_STATS, 0.0)  # pycocotools cannot load an empty list
            files = self.results2json(predictions, f'{folder}/detections')
            coco_eval = COCOeval(self._coco_api, self._coco_api.loadRes(load(files['bbox'])), 'bbox')
            coco_eval.params.catIds = self.cat_ids
            coco_eval.params.imgIds = self.img_ids
            coco_eval.params.maxDets = list(self.proposal_nums)
            coco_eval.params.iouThrs = np.asarray(self.iou_thrs)
            coco_eval.evaluate()
            coco_eval.accumulate()
            coco_eval.summarize()
        return dict(zip(COCO_STATS, map(float, coco_eval.stats), strict=True))


@METRICS.register_module()
class UnroundedVOCMetric(VOCMetric):
    """PASCAL VOC AP at IoU 0.5 by both definitions, in [0, 1] and unrounded; difficult objects are left out.

    ``VOC07_AP50``: the 11-point metric of VOC2007 (the one the Soft-NMS authors report); ``VOC12_AP50``: the area
    under the precision-recall curve.
    """

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Both numbers from mmdet's ``eval_map`` in VOC's pixel convention (widths are ``x2 - x1 + 1``)."""
        annotations, detections = zip(*results, strict=True)
        values = {}
        for name, mode in (('VOC07_AP50', '11points'), ('VOC12_AP50', 'area')):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', RuntimeWarning)  # 0/0 for classes without any object
                mean_ap, _ = eval_map(
                    list(detections),
                    list(annotations),
                    iou_thr=0.5,
                    dataset=self.dataset_meta['classes'],
                    logger='silent',
                    eval_mode=mode,
                    use_legacy_coordinate=True,
                )
            values[name] = float(mean_ap)
        return values
