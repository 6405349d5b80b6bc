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


def test_names_and_flags(run):
    checkpoint = DEMO.with_suffix('.pth')
    options = ['--cfg-options', 'model.a=b.pth', 'c=missing.py', '--work-dir', 'w']
    assert run('test.py', DEMO, checkpoint, *options) == [str(DEMO), str(checkpoint), *options]
    assert run('test.py', '--work-dir', 'w', DEMO, checkpoint.as_uri())[2:] == [str(DEMO), checkpoint.as_uri()]
    (path,) = run('train.py', 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    assert Path(path).is_file() and run('train.py', 'faster-rcnn_r50_fpn_1x_coco', '--resume') == [path, '--resume']
    assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '1'
    assert run('test.py', DEMO, checkpoint, '--trust-checkpoint') == [str(DEMO), str(checkpoint)]
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
    for arguments, options, words in (
        (('test.py', 'no.py', checkpoint), {}, 'config no.py does not exist'),
        (('test.py', 'broken.py', checkpoint), {}, 'config broken.py cannot be read: SyntaxError'),
        (('test.py', 'code.yml', checkpoint), {}, 'config code.yml cannot be read: YamlError'),
        (('train.py', 'code.yml'), {}, 'config code.yml cannot be read: YamlError'),
        (('test.py', DEMO, 'no.pth'), {}, 'checkpoint no.pth does not exist'),
        (('test.py', DEMO, 'page'), {}, 'checkpoint page is damaged (it is a web page): fetch it again'),
        (('train.py', DEMO, '--resume', 'page'), {}, 'checkpoint page is damaged'),
        (('test.py', DEMO, 'http://127.0.0.1:1/a.pth'), {}, 'checkpoint http://127.0.0.1:1/a.pth cannot be fetched'),
        (('train.py', DEMO), dict(main=main), 'what the Runner reads is damaged'),
        (('test.py', 'lists.json', checkpoint), dict(main=resize), 'lists.json has lists where mmcv needs tuples'),
    ):
        said = run(*arguments, **options)
        assert said.startswith('error: ') and words in said and '\n' not in said
    assert not (tmp_path / 'RAN').exists()
