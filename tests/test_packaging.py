"""What is in the wheel and the sdist, and what an import needs."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest
import yaml

import mmdet_softnms
from mmdet_softnms.cli.arguments import EXTRAS

ROOT = Path(__file__).parents[1]


def _sources() -> list[str]:
    """The project's files, as git lists them, or as they lie there in a tree without git."""
    if (ROOT / '.git').exists():
        listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return [name for name in listed.splitlines() if (ROOT / name).is_file()]
    left_out = ('.', 'work_dirs', 'data', 'dist', 'build')
    names = (path.relative_to(ROOT) for path in ROOT.rglob('*') if path.is_file())
    return [str(name) for name in names if not name.parts[0].startswith(left_out) and '__pycache__' not in name.parts]


def _build(source: Path, out: Path, *what: str) -> list[Path]:
    command = [sys.executable, '-m', 'build', '--no-isolation', *what, '--outdir', str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return sorted(out.iterdir())


@pytest.fixture(scope='module')
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel), each built from the tree itself: a copy with some of the litter that a used checkout has."""
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    for name in _sources():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.copy(ROOT / '.gitignore', source / '.gitignore')
    for litter in (
        'work_dirs/run/epoch_1.pth',
        'data/demo/image.jpg',
        'tools/__pycache__/train.pyc',
        'configs/demo/work_dirs/epoch_1.pth',
        'tools/data/image.jpg',
        '.venv/pyvenv.cfg',
    ):
        (source / litter).parent.mkdir(parents=True, exist_ok=True)
        (source / litter).write_text('litter')
    sdist, wheel = sorted(_build(source, out, '--sdist', '--wheel'), key=lambda path: path.suffix)
    assert (sdist.suffix, wheel.suffix) == ('.gz', '.whl')
    return sdist, wheel


def _wheel_names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}


def test_the_wheel_holds_the_package_and_what_mim_looks_for(built):
    names = _wheel_names(built[1])
    expected = {name for name in _sources() if name.startswith('mmdet_softnms/')}
    expected |= {f'mmdet_softnms/.mim/{name}' for name in _sources() if name.startswith(('configs/', 'tools/'))}
    assert names == expected | {'mmdet_softnms/.mim/model-index.yml'}
    assert 'mmdet_softnms/.mim/configs/demo/faster-rcnn_r18-w16_fpn_demo.pth' in names
    assert any('.dist-info/' in name and name.endswith('LICENSE') for name in zipfile.ZipFile(built[1]).namelist())


def test_the_sdist_gives_the_same_wheel(built, tmp_path):
    with tarfile.open(built[0]) as archive:
        names = {str(PurePosixPath(*PurePosixPath(each.name).parts[1:])) for each in archive if each.isfile()}
        archive.extractall(tmp_path / 'sdist', filter='data')
    assert names == {*_sources(), '.gitignore', 'PKG-INFO'}
    (unpacked,) = (tmp_path / 'sdist').iterdir()
    (wheel,) = _build(unpacked, tmp_path / 'again', '--wheel')
    assert _wheel_names(wheel) == _wheel_names(built[1])


def test_metadata_forces_no_stack(built):
    archive = zipfile.ZipFile(built[1])
    (name,) = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata['Version'] == mmdet_softnms.__version__
    assert metadata['Requires-Python'] == '>=3.10'
    required = [line for line in metadata.get_all('Requires-Dist') if 'extra ==' not in line]
    assert {line.split('>')[0] for line in required} == {'torch', 'numpy', 'numba'}
    for extra, names in EXTRAS.items():  # what a command looks for, and what its extra brings
        brought = [line.split('>')[0] for line in metadata.get_all('Requires-Dist') if f"extra == '{extra}'" in line]
        assert {name.replace('-', '_') for name in brought} == set(names)
    stack = re.compile('mmdet|mmcv|mmengine|openmim|onedl', re.IGNORECASE)
    assert not [line for line in metadata.get_all('Requires-Dist') if stack.search(line)]  # nor in an extra


def test_versions_are_in_one_place():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert str(citation['version']) == mmdet_softnms.__version__
    assert citation['authors'] == [{'name': 'mmdet_softnms contributors'}]
    pinned = dict(re.findall(r'^([\w-]+)==([\w.]+)', (ROOT / 'tools/constraints.txt').read_text(), re.MULTILINE))
    files = ['.pre-commit-config.yaml', '.ci/run', '.github/workflows/ci.yml', 'pyproject.toml', 'CONTRIBUTING.md']
    files += [str(path.relative_to(ROOT)) for path in (ROOT / 'tools').glob('*.sh')]
    for name in files:
        for package, version in re.findall(r'\b([\w-]+)==(\d[\w.]*)', (ROOT / name).read_text()):
            assert pinned.get(package, version) == version, f'{name} has {package} {version}'
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    assert [one['repo'] for one in hooks] == ['local']  # no versions of its own
    checks = (ROOT / '.ci/run').read_text()
    assert all(hook['entry'].replace(' --force-exclude', '') in checks for one in hooks for hook in one['hooks'])
    assert '.ci/run' in (ROOT / '.github/workflows/ci.yml').read_text()


def test_forms_and_workflows_can_be_read():
    forms = sorted((ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml'))
    assert [form.stem for form in forms] == ['bug_report', 'rule_request', 'wrong_number']
    for form in forms:
        content = yaml.safe_load(form.read_text())
        assert {'name', 'description', 'body'} <= set(content)
        assert all(field['attributes']['label'] for field in content['body'])
    asked = {field['id'] for field in yaml.safe_load(forms[-1].read_text())['body']}
    assert {'command', 'config', 'result'} <= asked
    assert yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())['jobs']


def _python(code: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    """Runs code where some modules cannot be imported."""
    blocker = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r} or name.split('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocker())
"""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run([sys.executable, '-c', blocker + code], capture_output=True, text=True, env=environment)


def test_the_operator_needs_torch_numba_and_numpy_alone():
    result = _python(
        """
import torch
from mmdet_softnms import soft_nms
import mmdet_softnms.ops
boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
keep, scores = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), method='linear')
assert keep.tolist() == [0, 2, 1], keep
assert abs(float(scores[2]) - 0.08) < 1e-6
""",
        'mmdet', 'mmcv', 'mmengine', 'pycocotools', 'cv2', 'yaml', 'ensemble_boxes',
        *EXTRAS['reevaluate'], *EXTRAS['export'],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_operator_does_not_import_the_stack_where_there_is_one():
    code = """
import sys
import mmdet_softnms.ops
from mmdet_softnms import soft_nms
print({name.split('.')[0] for name in sys.modules} & {'mmdet', 'mmcv', 'mmengine', 'pycocotools', 'cv2', 'matplotlib'})
"""
    result = _python(code)
    assert result.stdout == 'set()\n', result.stdout + result.stderr[-2000:]


def test_position_sensitive_pooling_needs_torch_alone():
    code = """
import torch
from mmdet_softnms.models.ps_roi_pool import ps_roi_pool
assert ps_roi_pool(torch.ones(1, 49, 4, 4), torch.tensor([[0.0, 0, 0, 63, 63]])).sum() == 49
"""
    result = _python(code, 'mmdet', 'mmcv', 'mmengine', 'torchvision', 'cv2')
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    ('blocked', 'words'),
    [
        ('mmdet', 'install either onedl-mmdetection or mmdet'),
        ('mmcv', 'install either onedl-mmdetection or mmdet'),
        ('mmengine', 'install either onedl-mmdetection or mmdet'),
        ('mmcv._ext', 'build it after torch with "pip install --no-build-isolation"'),
    ],
)
def test_a_missing_stack_is_one_clear_sentence(blocked, words):
    result = _python('from mmdet_softnms.registry import require_mmdet; require_mmdet()', blocked)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith('ImportError: '), last
    assert words in last and f'No module named {blocked!r}' in last, last
