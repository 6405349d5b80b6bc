"""tools/test.py and tools/train.py: mmdet's scripts get what they would get, and more names are understood."""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

from mmdet_softnms.files import CheckpointError

ROOT = Path(__file__).parents[2]
DEMO = ROOT / 'configs/demo/faster-rcnn_r18-w16_fpn_demo.py'
DATA = ['test_dataloader.dataset.ann_file=']  # a test runs in a folder of its own, without data
TRAINING = [f'{part}_dataloader.dataset.ann_file=' for part in ('train', 'val')]
spec = importlib.util.spec_from_file_location('_mmdet_script', ROOT / 'tools/_mmdet_script.py')
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script up to where mmdet's begins; its arguments, or the one line of an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    for name in ('TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'):
        monkeypatch.setenv(name, '0')
    real = runpy.run_path

    def run(name, *arguments, main=lambda: None):
        begun = []

        def stand_in(path, run_name):
            if run_name != '__main__':
                return real(path, run_name=run_name)
            begun.extend(sys.argv[1:])
            return main()

        monkeypatch.setattr(runpy, 'run_path', stand_in)
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        try:
            script.run(name)
        except SystemExit as error:
            return error.code
        return begun

    return run


def test_names_and_flags(run, monkeypatch):
    checkpoint = DEMO.with_suffix('.pth')
    options = ['--cfg-options', 'a=b.pth', 'c=missing.py', *DATA, '--work-dir', 'w']
    assert run('test.py', DEMO, checkpoint, *options) == [str(DEMO), str(checkpoint), *options]
    uri = checkpoint.as_uri()
    assert run('test.py', '--work-dir', 'w', DEMO, uri, '--cfg-options', *DATA)[2:4] == [str(DEMO), uri]
    options = ['--resume', '--cfg-options', *TRAINING]
    path, *rest = run('train.py', 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', *options)
    assert Path(path).is_file() and rest == options
    assert run('train.py', 'faster-rcnn_r50_fpn_1x_coco', *options) == [path, *options]
    assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '1'
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    given = ['--cfg-options', *DATA]
    assert run('test.py', DEMO, checkpoint, '--trust-checkpoint', *given) == [str(DEMO), str(checkpoint), *given]
    assert os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] == '1'


def test_errors_are_one_line(run, tmp_path):
    (tmp_path / 'page').write_text('<html>')
    (tmp_path / 'code.yml').write_text('a: !!python/object/apply:os.mkdir [RAN]')
    (tmp_path / 'broken.py').write_text('a = dict(')
    Config.fromfile(DEMO).dump(tmp_path / 'lists.json')

    def main():
        raise CheckpointError('what the Runner reads is damaged')

    def resize():
        raise TypeError("Scale must be a number or tuple of int, but got <class 'list'>")

    checkpoint = DEMO.with_suffix('.pth')
    test, nms = ('test.py', DEMO, checkpoint, '--cfg-options', *DATA), 'model.test_cfg.rcnn.nms'
    for arguments, options, words in (
        (('test.py', 'no.py', checkpoint), {}, 'config no.py does not exist'),
        (('test.py', 'broken.py', checkpoint), {}, 'config broken.py cannot be read: SyntaxError'),
        (('test.py', 'code.yml', checkpoint), {}, 'config code.yml cannot be read: YamlError'),
        (('train.py', 'code.yml'), {}, 'config code.yml cannot be read: YamlError'),
        (('test.py', DEMO, 'no.pth'), {}, 'checkpoint no.pth does not exist'),
        (('test.py', DEMO, 'page'), {}, 'checkpoint page is damaged (it is a web page): fetch it again'),
        (('train.py', DEMO, '--resume', 'page'), {}, 'checkpoint page is damaged'),
        (('test.py', DEMO, 'http://127.0.0.1:1/a.pth'), {}, 'checkpoint http://127.0.0.1:1/a.pth cannot be fetched'),
        (
            ('test.py', 'lists.json', checkpoint, '--cfg-options', *DATA),
            dict(main=resize),
            'lists.json has lists where mmcv needs tuples',
        ),
        (('train.py', DEMO, '--cfg-options', *TRAINING), dict(main=main), 'what the Runner reads is damaged'),
        # What mmengine would say below 500 lines of config, or not at all.
        (('test.py', DEMO, checkpoint), {}, 'crowded.json of test_dataloader.dataset does not exist; put the data'),
        ((*test, 'test_dataloader.dataset.type=CocoDatset'), {}, 'test_dataloader.dataset cannot be built'),
        ((*test, f'{nms}.type=SoftNMS'), {}, "lacks its scope: write type='mmdet_softnms.SoftNMS'"),
        ((*test, f'{nms}.sigma=0.5'), {}, "for Soft-NMS write type='mmdet_softnms.SoftNMS'"),
        ((*test, f'{nms}.iou_thresh=0.5'), {}, "did you mean 'iou_threshold'?"),
        ((*test, 'model.neck.type=FNP'), {}, 'the model of the config cannot be built'),
        ((*test, 'model.neck.out_channels=8'), {}, f'{checkpoint} does not fit the config: neck.lateral_convs.0.conv'),
        (
            ('test.py', ROOT / 'configs/demo/rfcn_r18-w16_demo.py', checkpoint, '--cfg-options', *DATA),
            {},
            f'checkpoint {checkpoint} does not fit the config: rpn_head.',
        ),
    ):
        said = run(*arguments, **options)
        assert said.startswith('error: ') and words in said and '\n' not in said
    assert not (tmp_path / 'RAN').exists()
