"""tools/reproduce.py: what is published, what has to be there, and the verdict."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mmdet
import pytest
import yaml
from mmengine.config import Config

from mmdet_softnms.files import ReevaluationError, sha256
from mmdet_softnms.reevaluation import reproduction
from tests.tiny_dataset import make_project

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'reproduce.py'
INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())
RAW = [model for name in INDEX['Import'] for model in yaml.safe_load((ROOT / name).read_text())['Models']]
MODELS = reproduction.load_models(ROOT / 'model-index.yml', ROOT)
RESULT_NAMES = {'AP': 'box AP', 'VOC07_AP50': 'VOC07 AP50'}


@pytest.fixture(scope='module')
def tool():
    from mmdet_softnms.cli import reproduce

    return reproduce


@pytest.fixture
def run(tool, monkeypatch, capsys, tmp_path):
    """Runs the tool in this process and an empty folder: (exit status, standard output, error lines)."""
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')  # the tool sets it; this takes it back
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = tool.main([str(argument) for argument in arguments])
            errors = ''
        except SystemExit as end:  # what Python prints and returns for it
            status, errors = (1, end.code) if isinstance(end.code, str) else (end.code, '')
        captured = capsys.readouterr()
        return status, captured.out, errors or captured.err

    return run


# -- what is published


def test_names_are_unique_and_every_model_is_read():
    assert len(MODELS) == len(RAW) >= 50


@pytest.mark.parametrize('raw', RAW, ids=lambda raw: raw['Name'])
def test_every_model_says_what_is_published_and_where_it_is_from(raw):
    model = MODELS[raw['Name']]
    assert model.config.is_file()
    cfg = Config.fromfile(model.config) if model.options else None
    for key in model.options:  # (that every config loads and builds is shown in test_configs)
        parent = cfg
        for part in key.split('.')[:-1]:
            parent = parent[part]
    assert raw['Reproduction']['Command'] == f'python tools/reproduce.py {model.name}'
    assert model.weights.fetch and model.split.fetch
    assert bool(model.published) != bool(model.unpublished)
    for one in model.published:
        assert len(one.source) > 10 and len(one.because) > 10 and one.value > 0
        assert one.tolerance is None or 0 < one.tolerance < 1
        # A number compares on its own split only, and test-dev's annotations are not public.
        assert one.tolerance is None or (one.split == model.split.name and model.split.images)

    # The same numbers stand under the key that openmim reads, and in the folder's README.
    results = {
        (result['Dataset'], name, value)
        for result in raw.get('Results', [])
        for name, value in result['Metrics'].items()
    }
    expected = {
        (one.split.replace('COCO val2017', 'COCO'), RESULT_NAMES[one.metric], one.value)
        for one in model.published
        if one.row == 'config' and one.metric in RESULT_NAMES and not one.scales
    }
    assert results == expected
    readme = (model.config.parent / 'README.md').read_text()
    family = model.name.replace('_soft-nms-linear', '').replace('_soft-nms-gaussian', '')
    assert family.removesuffix('-sparse').removesuffix('-voc') in readme
    for one in model.published:
        assert f'{one.value:g}' in readme or f'{one.value:.2f}' in readme, one


def test_the_issue_is_covered():
    def values(name):
        return {
            (one.metric, one.value, one.split, *([len(one.scales)] if one.scales else []))
            for one in MODELS[name].published
        }

    val, dev, voc = 'COCO val2017', 'COCO test-dev', 'VOC2007 test'
    assert values('faster-rcnn_r50_fpn_1x_coco') == {('AP', 37.4, val)}
    assert values('faster-rcnn_r101_fpn_1x_coco') == {('AP', 39.4, val)}
    assert values('faster-rcnn_r101-caffe_fpn_1x_coco') == {('AP', 39.8, val)}
    assert values('faster-rcnn_r50_fpn_1x_voc0712') == {('VOC07_AP50', 80.4, voc)}
    assert values('faster-rcnn_r50-caffe-c4_ms-18k_voc0712') == {('VOC07_AP50', 80.9, voc)}
    for kind, minival, test_dev, vgg in (
        ('', 33.9, 31.1, 24.4),
        ('_soft-nms-linear', 34.8, 32.2, 25.5),
        ('_soft-nms-gaussian', 35.1, 32.4, 25.5),
    ):
        assert values(f'rfcn_r101-caffe{kind}_coco') == {('AP', minival, val), ('AP', test_dev, dev)}
        assert values(f'faster-rcnn_vgg16-caffe{kind}_coco') == {('AP', vgg, dev)}
    for kind, one_scale, six_scales in (('', 37.4, 39.8), ('_soft-nms-gaussian', 38.4, 40.9)):
        name = f'deformable-rfcn_r101-mxnet{kind}_coco'
        assert values(name) == {('AP', one_scale, dev), ('AP', six_scales, dev, 6)}
        assert MODELS[name].scales == [
            (), ('480x800', '576x900', '688x1100', '800x1200', '1200x1600', '1400x2000')
        ]  # fmt: skip
    for name, value in (('rfcn_r101-mxnet-600', 32.1), ('deformable-rfcn_r101-mxnet-600', 35.7),
                        ('faster-rcnn_r101-mxnet', 30.3), ('deformable-faster-rcnn_r101-mxnet', 35.0)):  # fmt: skip
        assert values(f'{name}_coco') == {('AP', value, dev)}
    for name, at_50, at_70 in (('rfcn', 79.6, 63.1), ('deformable-rfcn', 82.3, 67.8)):
        assert values(f'{name}_r101-mxnet_voc0712') == {('VOC07_AP50', at_50, voc), ('VOC07_AP70', at_70, voc)}
    for name, value in (('r101', 40.9), ('r101-dconv-c3-c5', 44.4)):
        assert values(f'faster-rcnn_{name}_fpn_soft-nms-gaussian_1x_coco') == {('AP', value, val, 6)}


def test_mmdets_own_metafile_says_the_same():
    path = Path(mmdet.__file__).parent / '.mim/configs/faster_rcnn/metafile.yml'
    theirs = {model['Name']: model for model in yaml.safe_load(path.read_text())['Models']}
    ours = [raw for raw in RAW if raw['Name'] in theirs]
    assert len(ours) == 3
    for raw in ours:
        assert raw['Weights'] == theirs[raw['Name']]['Weights']
        assert raw['Results'] == theirs[raw['Name']]['Results']


# -- the verdict


def _row(source='table', rule='SoftNMS', ap=0.5, **params):
    return SimpleNamespace(rule=rule, params={'score_thr': 1e-3, **params}, metrics={'AP': ap}, source=source)


ROWS = [
    _row(rule='HardNMS', iou_threshold=0.5),
    _row(method='linear', iou_threshold=0.3, ap=0.6),
    _row(method='gaussian', sigma=0.5, ap=0.7),
    _row('config', method='gaussian', sigma=0.5, ap=0.8),
]


@pytest.mark.parametrize(
    ('row', 'value', 'tolerance', 'caveats', 'verdict'),
    [
        ('config', 80.0, 0.1, [], 'pass'),
        ('config', 80.1, 0.1, [], 'pass'),  # the tolerance itself is within
        ('config', 79.9, 0.1, [], 'pass'),
        ('config', 80.11, 0.1, [], 'fail'),
        ('config', 79.89, 0.1, [], 'fail'),
        ({'rule': 'SoftNMS', 'method': 'gaussian', 'sigma': 0.5}, 70.0, 0.1, [], 'pass'),
        ({'rule': 'SoftNMS', 'method': 'gaussian', 'sigma': 0.5}, 80.0, 0.1, [], 'fail'),  # not the config's row
        ({'rule': 'SoftNMS', 'method': 'linear'}, 60.0, 0.1, [], 'pass'),
        ({'rule': 'SoftNMS', 'method': 'gaussian', 'sigma': 0.6}, 70.0, 0.1, [], 'not comparable'),
        ('config', 80.0, 0.1, ['other data'], 'not comparable'),
        ('config', 80.0, None, [], 'not comparable'),
    ],
)
def test_verdicts(row, value, tolerance, caveats, verdict):
    published = reproduction.Published(row, 'AP', value, 'a source', 'a split', tolerance, 'a reason')
    model = reproduction.Model(
        'name', Path(), reproduction.Weights(None, ''), reproduction.Split('', ''), [published], ''
    )
    comparisons = reproduction.compare(model, ROWS, caveats)
    assert comparisons[0].verdict == verdict == reproduction.overall(model, comparisons)[0]
    assert (comparisons[0].difference is None) == (verdict == 'not comparable')


@pytest.mark.parametrize('metrics', [{}, {'AP': -1.0}, {'AP': float('nan')}])
def test_a_metric_that_was_not_measured_is_not_comparable(metrics):
    published = reproduction.Published('config', 'AP', 0.0, 'a source', 'a split', 0.1, 'a reason')
    model = reproduction.Model(
        'name', Path(), reproduction.Weights(None, ''), reproduction.Split('', ''), [published], ''
    )
    row = SimpleNamespace(rule='nms', params={}, metrics=metrics, source='config')
    (comparison,) = reproduction.compare(model, [row], [])
    assert comparison.verdict == 'not comparable' and comparison.measured is None


def test_one_failure_among_passes_fails_and_what_does_not_compare_is_no_failure():
    one = [reproduction.Published('config', 'AP', value, '', '', 0.1, '') for value in (80.0, 50.0)]
    other = reproduction.Published('config', 'AP', 1.7, '', '', None, 'a gain')
    for published, verdict in (([one[0], other], 'pass'), ([*one, other], 'fail'), ([other], 'not comparable')):
        model = reproduction.Model(
            'name', Path(), reproduction.Weights(None, ''), reproduction.Split('', ''), published, ''
        )
        assert reproduction.overall(model, reproduction.compare(model, ROWS, []))[0] == verdict


# -- a whole run


def test_the_embedded_default_passes_and_fails_when_the_published_number_is_shifted(
    run, tool, monkeypatch, tmp_path, capsys
):
    drawing = [sys.executable, str(ROOT / 'tools/make_demo_dataset.py'), '--out', str(ROOT / 'data/demo')]
    subprocess.run(drawing, check=True, capture_output=True)  # left alone where it is complete
    name = 'faster-rcnn_r18-w16_fpn_demo'
    results, measure = [], tool.measure
    monkeypatch.setattr(tool, 'measure', lambda *arguments: results.append(measure(*arguments)) or results[0])
    data = ('--data-root', ROOT / 'data/demo')
    status, out, errors = run(name, *data)
    assert status == 0, errors
    assert 'pass: 4 of 4 published numbers' in out
    content = json.loads((tmp_path / f'work_dirs/reproduce/{name}/reproduction.json').read_text())
    assert content['verdict'] == 'pass' and content['num_images'] == 240
    assert not list((tmp_path / f'work_dirs/reproduce/{name}').glob('sweep-partial*'))  # the next run measures again
    for one in content['comparisons']:
        assert abs(one['difference']) <= one['tolerance'] == 0.1
        assert one['difference'] == pytest.approx(one['measured'] - one['published'])

    # Nothing is measured again: the same rows against numbers that are 0.09 and 0.2 points higher.
    monkeypatch.setattr(tool, 'measure', lambda *arguments: results[0])
    metafile = yaml.safe_load((ROOT / 'configs/demo/metafile.yml').read_text())
    for shift, expected in ((0.09, 0), (0.2, 1)):
        (model,) = (model for model in metafile['Models'] if model['Name'] == name)
        shifted = json.loads(json.dumps(model))
        shifted.update(Config=str(ROOT / model['Config']), Weights=str(ROOT / model['Weights']))
        shifted['Reproduction']['Published'][0]['Value'] = content['comparisons'][0]['measured'] + shift
        (tmp_path / 'shifted.yml').write_text(yaml.safe_dump({'Models': [shifted]}))
        status, out, errors = run(name, *data, '--metafile', 'shifted.yml')
        assert status == expected, errors
    assert 'fail: config AP: -0.20 is beyond 0.1' in out
    assert json.loads((tmp_path / f'work_dirs/reproduce/{name}/reproduction.json').read_text())['verdict'] == 'fail'


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp('reproduce'))


@pytest.fixture
def metafile(project, tmp_path):
    """Writes a metafile for the tiny detector: changes of the model's ``Reproduction``, of its data, of the model."""

    def write(about=None, data=None, **model):
        text = (project.root / 'VOC2007/ImageSets/Main/test.txt').read_text()
        annotations = json.loads((project.root / 'coco.json').read_text())['annotations']
        objects = sum(not one['iscrowd'] for one in annotations)
        tiny = {'Images': len(text.split()), 'Objects': objects, 'Fetch': 'nowhere to be had', **(data or {})}
        published = {
            'Metric': 'VOC07_AP50', 'Value': 1.0, 'Tolerance': 0.5, 'Because': 'it is tiny', 'Source': 'this test',
        }  # fmt: skip
        content = {
            'Name': 'tiny',
            'Config': str(project.voc_config),
            'Weights': str(project.checkpoint),
            'Reproduction': {'Data': 'tiny', 'Published': [published], **(about or {})},
            **model,
        }
        path = tmp_path / 'metafile.yml'
        path.write_text(yaml.safe_dump({'Datasets': {'tiny': tiny}, 'Models': [content]}))
        return path

    return write


def test_data_and_weights_are_checked_before_anything_is_run(run, tool, metafile, monkeypatch, tmp_path, project):
    monkeypatch.setattr(tool, 'measure', lambda *arguments: pytest.fail('the network was run'))
    status, out, errors = run('tiny', '--metafile', metafile(), '--dry-run')
    assert (status, errors) == (0, '')
    assert 'are there and fit' in out and 'a run would compare' in out
    assert [path.name for path in tmp_path.iterdir()] == ['metafile.yml']  # nothing written

    for change in ('model.neck.out_channels=8', 'model.roi_head.type=GridRoIHead'):
        status, out, errors = run('tiny', '--metafile', metafile(), '--dry-run', '--cfg-options', change)
        assert status == 1 and ('does not fit the config' in errors or 'cannot be plugged' in errors)
    wrong = metafile(Weights='elsewhere.pth')
    status, out, errors = run('tiny', '--metafile', wrong, '--data-root', tmp_path / 'no')
    lines = errors.splitlines()
    assert status == 1 and len(lines) == 2 and all(line.startswith('error: ') for line in lines)
    assert 'tiny: nowhere to be had' in lines[0] and 'elsewhere.pth does not exist' in lines[1]
    status, _, errors = run('tiny', '--metafile', wrong, '--weights', project.checkpoint, '--dry-run')
    assert status == 0, errors


@pytest.mark.parametrize(
    ('data', 'options', 'words'),
    [
        ({'Images': 7}, [], 'the test set has 6 images, tiny has 7'),
        ({'Objects': 1000}, [], 'objects, tiny has 1000'),
        ({}, ['test_dataloader.dataset.indices=2'], 'has 2 images'),
        ({}, ['model.test_cfg.rcnn.score_thr=0.3'], 'changes model.test_cfg.rcnn.score_thr'),
        ({}, ['test_dataloader.num_workers=0'], 'a run would compare'),
    ],
)
def test_another_split_or_setting_is_not_comparable(run, metafile, data, options, words):
    arguments = ['--cfg-options', *options] if options else []
    status, out, errors = run('tiny', '--metafile', metafile(data=data), '--dry-run', *arguments)
    assert errors == '' and words in out
    assert status == (0 if 'would compare' in words else 2)


def test_a_run_that_is_not_comparable_still_measures(run, metafile, tmp_path):
    """Another test set, a split that is not public, and a union of scales, which is a run of its own."""
    one = {'Metric': 'VOC07_AP50', 'Value': 1.0, 'Source': 'this test'}
    rows = [
        {**one, 'Tolerance': 0.5, 'Because': 'it is tiny'},
        {**one, 'Metric': 'VOC07_AP70', 'Split': 'hidden', 'Not Comparable': 'hidden is not public'},
        {**one, 'Metric': 'AP', 'Scales': ['32x48', '64x96'], 'Not Comparable': 'hidden is not public'},
    ]
    about = {'Options': {'model.test_cfg.rcnn.max_per_img': 7}, 'Published': rows}
    status, out, _ = run('tiny', '--metafile', metafile(about, {'Images': 7}), '--work-dir', tmp_path / 'out')
    assert status == 2 and 'not comparable: the test set has 6 images' in out and 'hidden is not public' in out
    assert 'the union of 2 scales of each image: 32x48 64x96' in out
    content = json.loads((tmp_path / 'out/reproduction.json').read_text())
    own = {tuple(row['scales']): row for row in content['rows'] if row['source'] == 'config'}
    assert list(own) == [(), ('32x48', '64x96')]
    for comparison in content['comparisons']:
        assert comparison['verdict'] == content['verdict'] == 'not comparable'
        row = own[tuple(comparison['scales'])]
        assert comparison['measured'] == 100 * row['metrics'][comparison['metric']] and comparison['difference'] is None
        assert row['params']['max_per_img'] == 7  # the setting of the published number
    assert content['comparisons'][0]['measured'] > 0 and len(content['comparisons']) == 3
    assert own[()]['metrics']['AP'] != own['32x48', '64x96']['metrics']['AP']
    assert content['versions']['mmdet'] == mmdet.__version__
    assert len(content['checkpoint_sha256']) == 64
    assert (tmp_path / 'out/scales_32x48_64x96/candidates').is_dir()


def test_nothing_published_is_not_comparable(run, metafile):
    about = {'Published': [], 'Unpublished': 'nobody measured it'}
    status, out, _ = run('tiny', '--metafile', metafile(about), '--dry-run')
    assert status == 2 and 'a run would not be comparable: nobody measured it' in out
    status, out, _ = run('tiny', '--metafile', metafile(about))
    assert status == 2 and 'measured: AP ' in out and 'no published number: nobody measured it' in out


# -- missing and wrong files


def test_what_to_fetch_is_said_with_place_and_checksum(run):
    status, _, errors = run('faster-rcnn_r50_fpn_1x_coco', '--dry-run')
    data, weights = errors.splitlines()
    assert status == 1
    for words in (
        'http://images.cocodataset.org/zips/val2017.zip (MD5 442b8da7639aecaf257c1dceb8ba8c80)',
        'annotations_trainval2017.zip (MD5 f4bbac642086de4f52a3fdda2de5fa2c)',
        'data/coco/val2017/*.jpg and data/coco/annotations/instances_val2017.json',
    ):
        assert words in data
    assert 'checkpoints/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth does not exist' in weights
    assert 'https://download.openmmlab.com/' in weights and 'its SHA-256 begins with 047c8118' in weights

    _, _, errors = run('rfcn_r101-caffe_voc0712', '--dry-run')
    data, weights = errors.splitlines()
    assert 'VOCtest_06-Nov-2007.tar (MD5 b6e924de25625d8de591ea690078ad9f)' in data
    assert 'resnet101_rfcn_final.caffemodel' in weights and 'no checksum is published' in weights
    assert 'rfcn_caffe_to_mmdet.py' in weights and 'checkpoints/rfcn_r101_voc0712.pth' in weights


def test_checksums(tmp_path):
    place = Path('checkpoints/some-01234567.pth')
    published = reproduction.Weights(place, 'fetch it', '01234567')
    path = tmp_path / 'mine.pth'
    path.write_bytes(b'weights')
    digits = sha256(path)
    assert digits == hashlib.sha256(b'weights').hexdigest()
    assert 'begins with' in reproduction.check_checksum(path, published)
    assert reproduction.check_checksum(path, reproduction.Weights(place, '', digits[:8])) == ''
    assert reproduction.check_checksum(path, reproduction.Weights(place, '')) == ''
    path.rename(tmp_path / place.name)
    with pytest.raises(ReevaluationError, match='the file is damaged; fetch it'):
        reproduction.check_checksum(tmp_path / place.name, published)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['faster-rcnn_r50_fpn_1x_voc071'], 'did you mean faster-rcnn_r50_fpn_1x_voc0712'),
        (['name', '--metafile', 'missing.yml'], 'metafile missing.yml cannot be read'),
        (['name', '--metafile', 'broken.yml'], 'metafile broken.yml cannot be read'),
        (['name', '--metafile', 'incomplete.yml'], "model it of incomplete.yml cannot be used: KeyError 'Source'"),
        (['name', '--metafile', 'twice.yml'], 'model it appears twice'),
        ([], 'give the NAME of a model, or --list'),
        (['name', '--no-such-option'], 'unrecognized arguments'),
    ],
)
def test_bad_input_is_one_clear_line(run, tmp_path, arguments, words):
    model = {'Name': 'it', 'Config': 'it.py', 'Weights': 'it.pth'}
    about = {'Data': 'COCO val2017', 'Published': [{'Metric': 'AP', 'Value': 1, 'Tolerance': 1, 'Because': 'x'}]}
    complete = {**model, 'Reproduction': {'Data': 'COCO val2017', 'Unpublished': 'x'}}
    (tmp_path / 'broken.yml').write_text('a: [')
    (tmp_path / 'incomplete.yml').write_text(yaml.safe_dump({'Models': [{**model, 'Reproduction': about}]}))
    (tmp_path / 'twice.yml').write_text(yaml.safe_dump({'Models': [complete, complete]}))
    status, _, errors = run(*arguments)
    assert status == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith('error: ') and words in last and 'Traceback' not in errors


def test_the_list_and_the_exit_status_of_a_process():
    environment = dict(os.environ, COLUMNS='220')
    command = [sys.executable, str(TOOL), '--list']
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in MODELS:
        assert name in done.stdout
    assert '37.4' in done.stdout and 'no published number' in done.stdout


# -- real data


def test_real_photographs_and_a_real_detector(run, shared, tmp_path):
    """The hold-out is no published split: everything runs, and nothing is compared."""
    checkpoint = shared / 'checkpoints/faster-rcnn_mobilenetv2_fpn_voc.pth'
    published = {'Metric': 'VOC07_AP50', 'Value': 80.4, 'Tolerance': 0.2, 'Because': 'x', 'Source': 'another detector'}
    model = {
        'Name': 'real',
        'Config': str(checkpoint.with_suffix('.py')),
        'Weights': str(checkpoint),
        'Reproduction': {'Data': 'VOC2007 test', 'Published': [published]},
    }
    (tmp_path / 'metafile.yml').write_text(yaml.safe_dump({'Models': [model]}))
    arguments = ['real', '--metafile', 'metafile.yml', '--data-root', shared / 'data/VOCdevkit']
    options = ['--cfg-options', 'test_dataloader.dataset.indices=8', 'test_dataloader.num_workers=0']
    options += ['test_dataloader.persistent_workers=False']
    status, out, errors = run(*arguments, '--dry-run')
    assert status == 2 and 'the test set has 500 images, VOC2007 test has 4952' in out, errors
    status, out, errors = run(*arguments, *options)
    assert status == 2, errors
    content = json.loads((tmp_path / 'work_dirs/reproduce/real/reproduction.json').read_text())
    assert content['verdict'] == 'not comparable' and content['num_images'] == 8
    assert 'has 8 images' in content['reason'] and 'test_dataloader.dataset.indices' in content['reason']
    assert content['comparisons'][0]['measured'] > 20  # the detector detects
    for row in content['rows']:
        assert {'AP', 'AP50', 'AP75', 'AR100', 'VOC07_AP50'} <= set(row['metrics'])


def test_real_coco_images_without_the_weights(run, shared):
    annotations = 'annotations/instances_val2017_206.json'
    root = shared / 'data/coco'
    for name, digits in (('faster-rcnn_r50_fpn_1x_coco', '047c8118'), ('faster-rcnn_r101_fpn_1x_coco', 'f513f705')):
        status, _, errors = run(
            name, '--dry-run', '--data-root', root, '--cfg-options',
            f'test_dataloader.dataset.ann_file={annotations}', f'test_evaluator.ann_file={root / annotations}',
        )  # fmt: skip
        assert status == 1 and len(errors.splitlines()) == 1  # the data are there
        (weights,) = errors.splitlines()
        public = MODELS[name].weights.place.name
        assert f'checkpoints/{public} does not exist' in weights and f'begins with {digits}' in weights
