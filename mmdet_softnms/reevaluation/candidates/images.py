"""Images as the test pipeline reads them: from disk, LMDB, petrel, HTTP, whatever ``backend_args`` names."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256 as hash_bytes
from typing import Any

import mmengine.fileio as fileio
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.dataset import BaseDataset, Compose
from mmengine.fileio.backends import LocalBackend

from mmdet_softnms.files import sha256


def image_paths(info: dict[str, Any]) -> list[str]:
    """The image files of a data info: one, several (a file a channel), or none (the info holds the pixels)."""
    paths = info.get('img_path') or []
    return [str(path) for path in paths] if isinstance(paths, (list, tuple)) else [str(paths)]


def parts_of(dataset: Any) -> list[Any]:
    """The data sets inside wrappers that hold a pipeline."""
    if hasattr(dataset, 'datasets'):
        return [part for one in dataset.datasets for part in parts_of(one)]
    return [dataset] if hasattr(dataset, 'pipeline') or not hasattr(dataset, 'dataset') else parts_of(dataset.dataset)


def transforms_of(dataset: Any) -> list[Any]:
    """Every transform of a data set's pipeline, those inside other transforms too."""
    found: list[Any] = []

    def visit(thing: Any) -> None:
        if isinstance(thing, (list, tuple)):
            for each in thing:
                visit(each)
        elif isinstance(thing, (BaseTransform, Compose)) or (callable(thing) and hasattr(thing, '__dict__')):
            found.append(thing)
            visit([value for value in vars(thing).values() if isinstance(value, (list, tuple, BaseTransform, Compose))])

    for part in parts_of(dataset):
        visit(getattr(part, 'pipeline', None) or [])
    return found


class ImageReader:
    """The bytes of a data set's images, read by the backend of the pipeline's ``LoadImageFromFile``.

    Args:
        dataset: as mmdet built it.
    """

    def __init__(self, dataset: BaseDataset) -> None:
        self._dataset = dataset
        self._loaders: dict[int, LoadImageFromFile | None] = {}

    def paths(self, number: int) -> list[str]:
        """The files of one image."""
        return image_paths(self._dataset.get_data_info(number))

    def read(self, number: int) -> bytes:
        """The bytes of one image, its files one after the other.

        Raises:
            Exception: whatever the backend raises where there is no such image.
        """
        return b''.join(self._read(number, path) for path in self.paths(number))

    def missing(self, number: int) -> list[str]:
        """Files of one image that are looked for on this machine's disk and are not there."""
        if self.loader(number) is None:  # the pipeline reads it in another way; the forward pass will tell
            return []
        return [path for path in self.paths(number) if self._is_local(number, path) and not os.path.isfile(path)]

    def contents(self) -> list[str | None]:
        """The SHA-256 of every image; None for what cannot be read here. On all cores."""

        def content(number: int) -> str | None:
            try:
                paths = self.paths(number)
                if len(paths) == 1 and self._is_local(number, paths[0]):
                    return sha256(paths[0])
                return hash_bytes(self.read(number)).hexdigest()
            except Exception:  # backends raise what they like
                return None

        with _backends_closed_again():
            first = content(0)  # alone: only one thread may open a database
            if first is None and not all(self._is_local(0, path) for path in self.paths(0)):
                return [None] * len(self._dataset)  # a server that does not answer is not asked for every image
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [first, *pool.map(content, range(1, len(self._dataset)))]

    def first_unreadable(self, numbers: Sequence[int]) -> str | None:
        """The first image that is not there or cannot be decoded; looked for after a failure only."""
        import mmcv

        for number in numbers:
            for path in self.paths(number):
                try:
                    if mmcv.imfrombytes(self._read(number, path)) is None:
                        return path
                except Exception:  # OpenCV and backends raise errors of their own
                    return path
        return None

    def loader(self, number: int) -> LoadImageFromFile | None:
        """The transform that reads an image; None where the pipeline does not use mmcv's."""
        part: Any = self._dataset
        while not hasattr(part, 'pipeline'):
            if hasattr(part, 'datasets'):
                which, number = part._get_ori_dataset_idx(number)
                part = part.datasets[which]
            elif hasattr(part, 'dataset'):
                part, number = part.dataset, 0
            else:
                return None
        if id(part) not in self._loaders:
            loaders = (one for one in transforms_of(part) if isinstance(one, LoadImageFromFile))
            self._loaders[id(part)] = next(loaders, None)
        return self._loaders[id(part)]

    def _backend(self, number: int, path: str) -> Any:
        loader = self.loader(number)
        arguments = getattr(loader, 'file_client_args', None)  # as mmcv's loader distinguishes them
        if arguments is not None:
            return fileio.FileClient.infer_client(arguments, path)
        arguments = getattr(loader, 'backend_args', None)
        return fileio.get_file_backend(path, backend_args=arguments, enable_singleton=True)

    def _is_local(self, number: int, path: str) -> bool:
        backend = self._backend(number, path)
        return isinstance(getattr(backend, 'client', backend), LocalBackend)

    def _read(self, number: int, path: str) -> bytes:
        content = self._backend(number, path).get(path)
        if content is None:  # LMDB's answer
            raise FileNotFoundError(path)
        return bytes(content)


@contextmanager
def _backends_closed_again() -> Iterator[None]:
    """Backends opened inside are forgotten afterwards: an LMDB that is open must not go into a forked data loader."""
    instances: dict[str, Any] = fileio.io.backend_instances
    before = set(instances)
    try:
        yield
    finally:
        for key in set(instances) - before:
            del instances[key]
