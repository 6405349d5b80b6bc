"""Every config of the repository is built, dumped and reloaded, and listed in a metafile."""

from pathlib import Path

import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in ROOT.glob('configs/*/*.py') if path.parent.name != '_base_')
#: Their bases are mmrotate's: tests/mmrotate_cases.py builds them, in a process that can import it.
ROTATED = sorted(ROOT.glob('configs/rotated/*.py'))


@pytest.fixture(scope='module')
def _parts_once():
    """A backbone or head with the options of one that another config had is that one: there are a few of each.

    Nor is it filled with random weights, which take longer than everything else: 100 million of them in a VGG-16.
    """
    parts, build = {}, MODELS.build

    def once(*options, **named):
        key = repr((options, named))
        if key not in parts:
            parts[key] = build(*options, **named)
        return parts[key]

    with pytest.MonkeyPatch.context() as patch:
        for layer in (torch.nn.modules.conv._ConvNd, torch.nn.Linear):
            patch.setattr(layer, 'reset_parameters', lambda self: None)
        patch.setattr(MODELS, 'build', once)
        yield


def test_there_are_configs():
    assert len(CONFIGS) >= 30


@pytest.mark.usefixtures('_parts_once')
@pytest.mark.parametrize('path', sorted({*CONFIGS} - {*ROTATED}), ids=lambda path: path.stem)
def test_config_is_built_dumped_and_reloaded(path, tmp_path):
    register_all_modules()
    cfg = Config.fromfile(path)
    cfg.dump(tmp_path / 'dumped.py')
    again = Config.fromfile(tmp_path / 'dumped.py')
    assert again.to_dict() == cfg.to_dict()
    model = MODELS.build(again.model)
    if 'soft-nms' in path.stem:
        dense = not hasattr(model, 'roi_head')
        rule = (model.bbox_head if dense else model.roi_head)._rule
        assert rule.params['method'] == ('linear' if 'linear' in path.stem else 'gaussian')
        assert (
            rule.params['min_score'] == 1e-3 >= (again.model.test_cfg if dense else again.model.test_cfg.rcnn).score_thr
        )


def test_a_config_is_a_swap_over_mmdets_own():
    """The model of a Soft-NMS config differs from its base in the head's type and the test settings only."""
    ours = Config.fromfile(ROOT / 'configs/soft_nms/faster-rcnn_r50_fpn_soft-nms-gaussian_1x_coco.py').model.to_dict()
    from mmengine.hub import get_config

    base = get_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py').model.to_dict()
    assert ours['roi_head'].pop('type') == 'mmdet_softnms.SoftNMSRoIHead'
    base['roi_head'].pop('type')
    ours.pop('_scope_', None)  # mmengine's note of where the base came from
    assert ours['test_cfg'].pop('rcnn') != base['test_cfg'].pop('rcnn')
    assert ours == base


def test_metafiles_list_every_config_and_name_existing_files():
    listed = set()
    for imported in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        metafile = yaml.safe_load((ROOT / imported).read_text())
        collections = {collection['Name'] for collection in metafile['Collections']}
        assert all((ROOT / collection['README']).is_file() for collection in metafile['Collections'])
        for model in metafile['Models']:
            assert model['In Collection'] in collections
            assert model['Name'] == Path(model['Config']).stem
            for key in ('Config', 'Weights'):
                assert key not in model or '://' in model[key] or (ROOT / model[key]).is_file(), model[key]
            listed.add(ROOT / model['Config'])
    assert listed == set(CONFIGS)
