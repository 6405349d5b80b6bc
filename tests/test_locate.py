"""Configs of mmdet's zoo and checkpoints by URL: what mmdet's own scripts take is found, anything else is one line."""

import functools
import http.server
import shutil
import socketserver
import threading
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

from mmdet_softnms.checkpoint import load_checkpoint
from mmdet_softnms.files import CheckpointError, ReevaluationError, sha256
from mmdet_softnms.locate import local_checkpoint, local_config, read_config

DEMO = Path(__file__).parents[1] / 'configs/demo/faster-rcnn_r18-w16_fpn_demo.pth'


class _Handler(http.server.SimpleHTTPRequestHandler):
    """A folder, with the content's hash as its ETag."""

    def do_GET(self):
        self.server.asked.append(self.path)
        path = Path(self.directory) / self.path.lstrip('/').partition('?')[0]
        if self.path.startswith('/error'):
            self.send_error(503)
        elif self.path.startswith('/short'):
            self.send_response(200)
            self.send_header('Content-Length', '1000')
            self.end_headers()
            self.wfile.write(b'PK')
        elif path.is_file() and self.headers.get('If-None-Match') == sha256(path):
            self.send_response(304)
            self.end_headers()
            self.server.unchanged += 1
        else:
            super().do_GET()

    def end_headers(self):
        path = Path(self.directory) / self.path.lstrip('/').partition('?')[0]
        if path.is_file():
            self.send_header('ETag', sha256(path))
        super().end_headers()

    def log_message(self, *_):
        """Silent."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of ``tmp_path / 'www'``, and a cache of its own."""
    (tmp_path / 'www').mkdir()
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    for name in ('http_proxy', 'HTTP_PROXY', 'https_proxy', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    handler = functools.partial(_Handler, directory=str(tmp_path / 'www'))
    with socketserver.ThreadingTCPServer(('127.0.0.1', 0), handler) as server:
        server.asked, server.unchanged, server.folder = [], 0, tmp_path / 'www'
        server.url = f'http://127.0.0.1:{server.server_address[1]}'
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_checkpoint_by_url_is_fetched_once_and_again_when_it_changed(server):
    (server.folder / 'a').mkdir()
    shutil.copy(DEMO, server.folder / 'a' / 'epoch_1.pth')
    url = f'{server.url}/a/epoch_1.pth'
    said = []
    path = local_checkpoint(url, say=said.append)
    assert sha256(path) == sha256(DEMO) and path.suffix == '.pth' and url in said[0]
    assert load_checkpoint(url)['state_dict'].keys() == load_checkpoint(DEMO)['state_dict'].keys()
    assert server.unchanged == 1  # asked, and not sent again
    # The same name on another server or below another folder is another file, as is other content at the same place.
    torch.save({'state_dict': {'a': torch.ones(1)}}, server.folder / 'epoch_1.pth')
    assert 'a' in load_checkpoint(f'{server.url}/epoch_1.pth')['state_dict']
    shutil.copy(server.folder / 'epoch_1.pth', server.folder / 'a' / 'epoch_1.pth')
    assert 'a' in load_checkpoint(url)['state_dict']
    assert 'a' in load_checkpoint(f'{url}?token=x%2Fy')['state_dict']
    # Without a network: what there is.
    server.shutdown()
    server.server_close()
    assert local_checkpoint(url, say=said.append) == path and 'cannot be reached' in said[-1]
    with pytest.raises(CheckpointError, match='cannot be fetched .*refused.*check the network'):
        local_checkpoint(f'{server.url}/other.pth')


def test_what_a_server_answers_instead(server):
    (server.folder / 'page.pth').write_text('<!DOCTYPE html><p>Sign in')
    for name, words in (
        ('missing.pth', 'cannot be fetched: the server answers 404'),
        ('error.pth', 'cannot be fetched: the server answers 503'),
        ('short.pth', 'ended after 2 of 1000 bytes'),
        ('page.pth', 'gave no checkpoint: .*damaged .it is a web page.: fetch it again'),
    ):
        with pytest.raises(CheckpointError, match=words) as raised:
            load_checkpoint(f'{server.url}/{name}')
        assert '\n' not in str(raised.value) and 'trust' not in str(raised.value)
    shutil.copy(DEMO, server.folder / 'page.pth')  # the page is not kept
    assert load_checkpoint(f'{server.url}/page.pth')['state_dict']
    assert not list(Path(torch.hub.get_dir()).rglob('*.partial'))


def test_other_addresses(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.setenv('HOME', str(tmp_path))
    shutil.copy(DEMO, tmp_path / 'my demo.pth')
    assert sha256(local_checkpoint((tmp_path / 'my demo.pth').as_uri())) == sha256(DEMO)
    assert local_checkpoint('~/my demo.pth') == tmp_path / 'my demo.pth'
    # Whatever scheme a plugin registers with mmengine, its own loader reads.
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    CheckpointLoader.register_scheme('bucket://', lambda name, map_location: torch.load(tmp_path / name[9:]))
    fetched = load_checkpoint('bucket://my demo.pth')['state_dict']
    for key, value in load_checkpoint(DEMO)['state_dict'].items():
        assert torch.equal(fetched[key], value)
    for name, words in (
        ('bucket://nowhere', 'cannot be fetched by mmengine .FileNotFoundError'),
        ('s3://bucket/name.pth', 'cannot be fetched by mmengine'),
        ('petrel:s3://bucket/name.pth', 'cannot be fetched by mmengine'),
        ('open-mmlab://no_such_model', 'cannot be fetched by mmengine .KeyError'),
        ('file:///nowhere.pth', 'cannot be fetched .*No such file'),
        ('http://', 'cannot be fetched'),
        ('nothing://name', 'does not exist'),
        ('name.pth', 'does not exist'),
    ):
        with pytest.raises(CheckpointError, match=words) as raised:
            load_checkpoint(name)
        assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    'name',
    [
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco',
        'faster-rcnn_r50_fpn_1x_coco',
        'Faster-RCNN_r50_fpn_1x_COCO',
    ],
)
def test_configs_of_mmdets_zoo(name):
    path = local_config(name)
    assert path.endswith('configs/faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py') and Path(path).is_file()


def test_configs(tmp_path, monkeypatch):
    assert local_config('mmdet::_base_/models/faster-rcnn_r50_fpn.py').endswith('_base_/models/faster-rcnn_r50_fpn.py')
    assert local_config('rtmdet-t').endswith('rtmdet_tiny_8xb32-300e_coco.py')  # an alias
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a.py').write_text('a = 1')
    assert read_config('~/a.py', {'b.c': 2}).to_dict() == dict(a=1, b=dict(c=2))
    (tmp_path / 'broken.py').write_text('a = dict(')
    (tmp_path / 'raises.py').write_text("raise RuntimeError('one\\ntwo')")
    for name, words in (
        ('nowhere.py', 'config nowhere.py does not exist'),
        ('folder/nowhere', 'does not exist'),
        ('no-such-model_r50', 'does not exist, nor does mmdet have a model of that name'),
        ('no_such_package::a/b.py', 'package no_such_package is not installed'),
        ('mmdet::nowhere/nothing.py', 'mmdet::nowhere/nothing.py cannot be read'),
        ('mmdet::faster-rcnn', 'write mmdet::FOLDER/NAME.py'),
        ('torch::a/b.py', 'cannot be read'),
        ('::', 'does not exist'),
        (tmp_path, 'does not exist'),
        (tmp_path / 'broken.py', 'cannot be read: SyntaxError'),
        (tmp_path / 'raises.py', 'cannot be read: .*one'),
    ):
        with pytest.raises(ReevaluationError, match=words) as raised:
            read_config(name)
        assert '\n' not in str(raised.value)


def test_a_yaml_config_is_data(tmp_path):
    """What mmengine dumps is read, tuples included; no object that a file or its base names is made."""
    Config(dict(a=(1, [2]), b=None)).dump(tmp_path / 'dumped.yml')
    (tmp_path / 'child.yaml').write_text("_base_: dumped.yml\nb: '{{ fileBasenameNoExtension }}'")
    assert read_config(tmp_path / 'child.yaml').to_dict() == dict(a=(1, [2]), b='child')
    (tmp_path / 'bad.yml').write_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path / 'RAN'}']")
    (tmp_path / 'child.yml').write_text('_base_: bad.yml')
    for name in ('bad.yml', 'child.yml'):
        with pytest.raises(ReevaluationError, match=f'{name} cannot be read: YamlError: could not determine') as raised:
            read_config(tmp_path / name)
        assert '\n' not in str(raised.value)
    assert not (tmp_path / 'RAN').exists()
