"""Files are written whole or not at all, and hashed whole."""

import hashlib
import json
import os

import pytest

from mmdet_softnms.files import first_line, sha256, write_json, write_whole


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / 'new' / 'folder' / 'file'
    for content in (b'first', b'', b'second, longer'):
        write_whole(path, content)
        assert path.read_bytes() == content and [one.name for one in path.parent.iterdir()] == ['file']


@pytest.mark.parametrize('step', ['fsync', 'replace'])
@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_what_fails_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    path = tmp_path / 'file'
    path.write_bytes(b'earlier')

    def fail(*arguments):
        assert path.read_bytes() == b'earlier'  # not even begun
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_whole(path, b'later')
    assert path.read_bytes() == b'earlier' and list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda number: (steps.append('fsync'), fsync(number)))
    monkeypatch.setattr(os, 'replace', lambda one, other: (steps.append('replace'), replace(one, other)))
    write_whole(tmp_path / 'file', b'content')
    assert steps[:2] == ['fsync', 'replace']


@pytest.mark.parametrize('size', [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_the_hash_is_of_the_whole_file(tmp_path, size):
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / 'file').write_bytes(content)
    assert sha256(tmp_path / 'file') == sha256(str(tmp_path / 'file')) == hashlib.sha256(content).hexdigest()


def test_json_holds_no_number_that_json_has_not(tmp_path):
    write_json(tmp_path / 'file.json', dict(value=1.5, words='ä'))
    assert json.loads((tmp_path / 'file.json').read_text()) == dict(value=1.5, words='ä')
    with pytest.raises(ValueError, match='JSON compliant'):
        write_json(tmp_path / 'file.json', dict(value=float('nan')))
    assert json.loads((tmp_path / 'file.json').read_text())['value'] == 1.5


def test_an_error_without_words_is_named_with_the_code_that_raised_it():
    assert first_line(ValueError('one\ntwo')) == 'one'
    assert first_line(ValueError()) == 'ValueError'
    try:
        raise ValueError
    except ValueError as error:
        said = first_line(error)
    assert said.startswith('ValueError in test_files.py, line ') and said.endswith(': raise ValueError')
