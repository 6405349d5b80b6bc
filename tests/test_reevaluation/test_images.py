"""Images as a pipeline reads them, through wrappers of data sets and backends other than the disk."""

from pathlib import Path

import mmengine.fileio as fileio
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset, ClassBalancedDataset, Compose, ConcatDataset, RepeatDataset
from mmengine.fileio import BaseStorageBackend

from mmdet_softnms.files import sha256
from mmdet_softnms.reevaluation.candidates.images import ImageReader, image_paths, parts_of, transforms_of


class Listed(BaseDataset):
    """A data set of given image files."""

    def __init__(self, *paths: Path, pipeline=None, **options) -> None:
        self.paths = paths
        super().__init__(pipeline=[LoadImageFromFile(**options)] if pipeline is None else pipeline)

    def load_data_list(self):
        return [dict(img_path=str(path), img_id=number) for number, path in enumerate(self.paths)]

    def get_cat_ids(self, number):
        return [0]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f'{number}.jpg' for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 10)
    return paths


def test_a_data_info_names_one_file_several_or_none():
    assert image_paths(dict(img_path='a.jpg')) == ['a.jpg']
    assert image_paths(dict(img_path=Path('a.jpg'))) == ['a.jpg']
    assert image_paths(dict(img_path=['red.tif', 'green.tif'])) == ['red.tif', 'green.tif']
    assert image_paths(dict(img=np.zeros((2, 2, 3)))) == image_paths(dict(img_path=None)) == []


def test_parts_and_transforms_inside_wrappers(files):
    first, second = Listed(files[0]), Listed(files[1], pipeline=[])
    both = ConcatDataset([first, second])
    assert parts_of(both) == [first, second]
    assert parts_of(RepeatDataset(first, 2)) == parts_of(ClassBalancedDataset(first, 0.5)) == [first]
    assert [type(one) for one in transforms_of(both)] == [Compose, LoadImageFromFile, Compose]
    assert [type(one) for one in transforms_of(RepeatDataset(second, 2))] == [Compose]
    inner = LoadImageFromFile()

    class Either:  # as RandomChoice and TestTimeAug hold them
        def __init__(self) -> None:
            self.transforms = [[inner], Compose([])]

        def __call__(self, results):
            return results

    found = transforms_of(Listed(files[0], pipeline=[Either()]))
    assert [type(one) for one in found] == [Compose, Either, LoadImageFromFile, Compose] and found[2] is inner


def test_bytes_hashes_and_what_is_missing(files):
    reader = ImageReader(Listed(*files))
    assert reader.read(1) == files[1].read_bytes() and reader.paths(1) == [str(files[1])]
    assert reader.contents() == [sha256(path) for path in files]
    assert [reader.missing(number) for number in range(3)] == [[], [], []]
    files[1].unlink()
    assert reader.missing(1) == [str(files[1])]
    assert [content is None for content in reader.contents()] == [False, True, False]
    assert reader.first_unreadable([0, 1]) == str(files[0])  # it is there, but is no image


def test_the_loader_is_that_of_the_part_an_image_comes_from(files):
    parts = Listed(files[0], color_type='grayscale'), Listed(files[1], files[2], pipeline=[])
    assert ImageReader(RepeatDataset(parts[0], 3)).loader(2).color_type == 'grayscale'
    reader = ImageReader(ConcatDataset(parts))
    assert reader.loader(0).color_type == 'grayscale'
    assert reader.loader(1) is None  # a pipeline without mmcv's transform: what is missing cannot be told
    files[2].unlink()
    assert reader.missing(2) == []


class Remote(BaseStorageBackend):
    """A server with one image, which counts what it is asked."""

    asked: list[str] = []  # noqa: RUF012

    def get(self, path):
        self.asked.append(path)
        if path != 'far/0.jpg':
            raise ConnectionError('no such image')
        return memoryview(b'pixels')

    def get_text(self, path, encoding='utf-8'):
        raise NotImplementedError


def test_a_backend_other_than_the_disk(monkeypatch):
    monkeypatch.setitem(fileio.backends.backends, 'test_images', Remote)
    before = dict(fileio.io.backend_instances)
    reader = ImageReader(Listed('far/0.jpg', 'far/1.jpg', backend_args=dict(backend='test_images')))
    contents = reader.contents()
    assert contents[0] is not None and contents[1] is None
    assert fileio.io.backend_instances == before  # closed again, before data loaders are forked
    assert reader.read(0) == b'pixels'
    assert reader.missing(0) == []  # it is not looked for on this machine's disk
    Remote.asked.clear()
    gone = ImageReader(
        Listed(*(f'gone/{number}.jpg' for number in range(50)), backend_args=dict(backend='test_images'))
    )
    assert gone.contents() == [None] * 50
    assert Remote.asked == ['gone/0.jpg']  # a server that does not answer is not asked for every image
    fileio.io.backend_instances.clear()
