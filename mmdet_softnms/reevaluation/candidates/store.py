"""Raw candidates of a test set on disk: Parquet shards written while the network runs, read by every later question.

A store is a folder::

    store.json            what it was made of (the fingerprint) and how it is cut into shards
    00000.parquet         images 0 to shard_size - 1 of the data set, in its order; one row an image
    00000.parquet.sha256  its checksum, as ``sha256sum -c`` reads it
    ...

Columns of a shard: ``img_id`` (int64 or string), ``height`` and ``width`` (int32, pixels of the original image), and
lists with one entry a candidate: ``x1``, ``y1``, ``x2``, ``y2`` (float32, pixels of the original image), or ``cx``,
``cy``, ``w``, ``h``, ``angle`` (float32, pixels and radians) where boxes are rotated, ``score`` (float32) and ``label``
(int32). Where mmdet compares another number than the score with ``score_thr`` (the
class score of a dense head, before a factor is multiplied in), there is ``class_score`` (float32), and ``class_score >
score_thr`` holds for exactly the candidates that a live model with that ``score_thr`` has. Where images have several
views, there is ``view`` (int32), its number. Values are the float32 the network gave, bit for bit; half precision would
move AP. Parquet's byte-stream-split encoding and zstd make 21 raw bytes about 17. Nothing in it can run code when
read.

A shard is finished when it and its checksum are there, both written whole and renamed. The bytes depend on nothing
but the candidates, so a run that was killed and taken up again, or spread over processes, leaves the same files.
"""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mmengine.structures import InstanceData

from mmdet_softnms.files import ReevaluationError, write_whole

FORMAT = 'mmdet_softnms candidates 1'
#: Columns of a box, by how many values it has.
_BOXES = {4: ('x1', 'y1', 'x2', 'y2'), 5: ('cx', 'cy', 'w', 'h', 'angle')}
#: Columns that not every store has, by their names here.
_EXTRAS = {'class_scores': ('class_score', np.float32), 'views': ('view', np.int32)}
_LARGEST_MANIFEST = 1 << 24  # bytes
_LARGEST_SHARD = 1 << 31  # bytes
_MOST_IMAGES = 1 << 31
_IN_MEMORY = 1 << 31  # bytes of candidates; more of them are mapped from a temporary file
_MOST_CANDIDATES = 1 << 22  # of an image: 2,000 RoIs times LVIS' classes


@dataclass
class ImageCandidates:
    """Raw candidates of one test image, boxes in original image scale."""

    img_id: Any
    ori_shape: tuple[int, int]  # height, width in pixels
    #: bboxes (N, 4) float32 xyxy, or (N, 5) rotated, scores (N,) float32, labels (N,) int64, and perhaps class_scores
    #: (N,) float32 and views (N,) int64; on the CPU
    candidates: InstanceData


@dataclass
class Candidates(Sequence[ImageCandidates]):
    """Candidates of a whole test set in flat arrays; image ``i`` has rows ``offsets[i]`` to ``offsets[i + 1]``."""

    img_ids: list[Any]
    shapes: np.ndarray  # (I, 2) int32: height, width
    offsets: np.ndarray  # (I + 1,) int64
    bboxes: np.ndarray  # (N, 4) float32, or (N, 5) rotated
    scores: np.ndarray  # (N,) float32
    labels: np.ndarray  # (N,) int64
    extras: dict[str, np.ndarray] = field(default_factory=dict)  # (N,) each: class_scores float32, views int64

    def __len__(self) -> int:
        return len(self.img_ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f'image {index} of {len(self)}')
        index %= len(self)
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        candidates = InstanceData(
            bboxes=torch.from_numpy(self.bboxes[rows]),
            scores=torch.from_numpy(self.scores[rows]),
            labels=torch.from_numpy(self.labels[rows]),
            **{name: torch.from_numpy(values[rows]) for name, values in self.extras.items()},
        )
        height, width = map(int, self.shapes[index])
        return ImageCandidates(self.img_ids[index], (height, width), candidates)

    @property
    def num_candidates(self) -> int:
        """Candidates of all images together."""
        return len(self.scores)

    def of_views(self, views: Sequence[int]) -> 'Candidates':
        """Candidates of some views only, in the order they are in; of no view in particular: of all.

        Raises:
            ReevaluationError: there are no such views.
        """
        if not views:
            return self
        have = self.extras.get('views', np.zeros(0, np.int64))
        if missing := sorted(set(views) - set(np.unique(have).tolist())):
            known = ', '.join(map(str, np.unique(have).tolist())) or 'none: candidates of one scale have no views'
            raise ReevaluationError(f'no candidate is of view {missing[0]}; stored are {known}')
        chosen = np.isin(have, views)
        counts = np.add.reduceat(np.append(chosen, 0), self.offsets[:-1]) * (np.diff(self.offsets) > 0)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

        def of_them(values: np.ndarray) -> np.ndarray:
            """Image by image: all of them may be more than the memory holds."""
            result = _lay_out((int(offsets[-1]), *values.shape[1:]), values.dtype, int(offsets[-1]))
            for number, (start, stop) in enumerate(itertools.pairwise(self.offsets)):
                result[offsets[number] : offsets[number + 1]] = values[start:stop][chosen[start:stop]]
            return result

        return Candidates(
            self.img_ids,
            self.shapes,
            offsets,
            of_them(self.bboxes),
            of_them(self.scores),
            of_them(self.labels),
            {name: of_them(values) for name, values in self.extras.items()},
        )

    @classmethod
    def of(cls, images: Sequence[ImageCandidates]) -> 'Candidates':
        """Lay the candidates of single images end to end."""
        lengths = [len(image.candidates) for image in images]
        empty = InstanceData(bboxes=torch.empty(0, 4), scores=torch.empty(0), labels=torch.empty(0, dtype=torch.int64))
        parts = [image.candidates for image in images] or [empty]
        extras = [name for name in _EXTRAS if name in parts[0]]
        return cls(
            [image.img_id for image in images],
            np.array([image.ori_shape for image in images], np.int32).reshape(-1, 2),
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            bboxes=torch.cat([part.bboxes for part in parts]).numpy(),
            scores=torch.cat([part.scores for part in parts]).numpy(),
            labels=torch.cat([part.labels for part in parts]).numpy(),
            extras={name: torch.cat([part[name] for part in parts]).numpy() for name in extras},
        )


@dataclass
class Expected:
    """What the candidates of a test set have to look like, wherever they come from."""

    img_ids: list[Any]
    num_classes: int

    @classmethod
    def of(cls, dataset: Any) -> 'Expected':
        """Image ids and classes of a data set that mmdet built."""
        img_ids = [dataset.get_data_info(number)['img_id'] for number in range(len(dataset))]
        return cls(img_ids, len(dataset.metainfo.get('classes', ())))

    def problem(self, candidates: Candidates, images: range, floor: float) -> str | None:
        """What is wrong with a shard's values; None: nothing."""
        wanted = self.img_ids[images.start : images.stop]
        if candidates.img_ids != wanted:
            return 'has other image ids than the test set'
        scores, labels = candidates.scores, candidates.labels
        if not (np.isfinite(candidates.bboxes).all() and np.isfinite(scores).all()):
            return 'holds values that are not finite'
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            strange = labels.min() if labels.min() < 0 else labels.max()
            return f'holds label {strange}, but the test set has {self.num_classes} classes'
        gates = candidates.extras.get('class_scores', scores)
        if len(gates) and not floor < gates.min() <= gates.max() <= 1 + 1e-6:
            strange = gates.max() if gates.max() > 1 + 1e-6 else gates.min()
            return f'holds a score of {strange:g}, outside ({floor:g}, 1]'
        if len(scores) and not 0 <= scores.min() <= scores.max() <= 1 + 1e-6:
            return f'holds scores from {scores.min():g} to {scores.max():g}, outside [0, 1]'
        return None


class CandidateStore:
    """One folder of shards.

    Args:
        folder: where it is.
        manifest: what ``store.json`` holds: ``fingerprint`` (of what the candidates were made), ``num_images``,
            ``shard_size``.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint: dict[str, Any] = manifest['fingerprint']
        self.num_images: int = manifest['num_images']
        self.shard_size: int = manifest['shard_size']
        if not isinstance(self.fingerprint, dict):
            raise TypeError(f'fingerprint is {type(self.fingerprint).__name__}, not a dict')
        for name, most in (('num_images', _MOST_IMAGES), ('shard_size', _MOST_IMAGES)):
            value = manifest[name]
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f'{name} is {str(value)[:50]}')
        self.num_shards = -(-self.num_images // self.shard_size)

    @classmethod
    def create(cls, folder: Path, fingerprint: dict[str, Any], num_images: int, shard_size: int) -> 'CandidateStore':
        """Make an empty store; one of the same content that is there already is taken up."""
        manifest = dict(format=FORMAT, num_images=num_images, shard_size=shard_size, fingerprint=fingerprint)
        if folder.is_file():
            folder.unlink()  # it has the name of a store, and is none
        _make_way(folder / 'store.json')
        write_whole(folder / 'store.json', (json.dumps(manifest, indent=1, sort_keys=True) + '\n').encode())
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: Path) -> 'CandidateStore':
        """Open a store that is there.

        Raises:
            ReevaluationError: ``store.json`` is missing, damaged, or of another format.
        """
        path = folder / 'store.json'
        try:
            if path.exists() and not path.is_file():
                raise ValueError('store.json is not a file')
            if path.stat().st_size > _LARGEST_MANIFEST:
                raise ValueError(f'store.json has {path.stat().st_size:,} bytes')
            manifest = json.loads(path.read_bytes())
            if manifest['format'] != FORMAT:
                raise ReevaluationError(
                    f'{path} is of format {str(manifest["format"])[:50]!r}, not {FORMAT!r}; delete {folder}'
                )
            return cls(folder, manifest)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ReevaluationError(
                f'{folder} is not a store of candidates ({type(error).__name__}: {error}); give a folder that '
                'tools/reevaluate.py made (DIR/candidates/...), or delete it'
            ) from error

    def images_of(self, shard: int) -> range:
        """Data set indices of a shard's images."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def path_of(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f'{shard:05d}.parquet'

    def write(self, shard: int, images: Sequence[ImageCandidates]) -> None:
        """Write one shard whole.

        Raises:
            OSError: no space, no permission; finished shards and this shard's earlier state are intact.
            ReevaluationError: it is larger than what would be read again.
        """
        if len(images) != len(self.images_of(shard)):
            raise ValueError(f'shard {shard} takes {len(self.images_of(shard))} images, got {len(images)}')
        content = _encode(images, shard, self._mark)
        if len(content) > _LARGEST_SHARD:
            raise ReevaluationError(
                f'{len(images)} images have {len(content):,} bytes of candidates, and a store takes {_LARGEST_SHARD:,} '
                'at once: raise score_thr, or take fewer views'
            )
        path = self.path_of(shard)
        checksum = f'{hashlib.sha256(content).hexdigest()}  {path.name}\n'
        for place in (path, path.with_name(path.name + '.sha256')):
            _make_way(place)
        # The checksum first: a shard without one would have to be computed again.
        write_whole(path.with_name(path.name + '.sha256'), checksum.encode())
        write_whole(path, content)

    def check(self, expected: Expected | None = None) -> dict[int, str]:
        """Unfinished shards and why: ``{number: 'missing' | what is wrong with it}``; reads every byte.

        Args:
            expected: what the values have to be like; None: only that they can be read.
        """
        return {shard: problem for shard in range(self.num_shards) if (problem := self._problem(shard, expected))}

    def _problem(self, shard: int, expected: Expected | None) -> str | None:
        path = self.path_of(shard)
        if not path.exists():
            return 'missing'
        checksum = path.with_name(path.name + '.sha256')
        try:
            if not path.is_file():
                return 'is not a file'
            if path.stat().st_size > _LARGEST_SHARD:
                return f'has {path.stat().st_size:,} bytes'
            content = path.read_bytes()
            if not checksum.is_file():
                return 'has no checksum'
            with open(checksum, 'rb') as file:
                recorded = file.read(100).split()[:1]
            if recorded != [hashlib.sha256(content).hexdigest().encode()]:
                return 'is damaged: its SHA-256 is not the recorded one'
            metadata = pq.read_metadata(pa.BufferReader(content)).metadata or {}
            if metadata.get(b'store') != self._mark or metadata.get(b'shard') != str(shard).encode():
                return 'is foreign: it belongs to another store or place'
            candidates = _decode(content, len(self.images_of(shard)))
        except (OSError, ValueError, pa.ArrowException) as error:
            return f'cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}'
        if expected is None:
            return None
        return expected.problem(candidates, self.images_of(shard), self.fingerprint['score_floor'])

    @property
    def _mark(self) -> bytes:
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest().encode()

    def __iter__(self) -> Iterator[Candidates]:
        """Candidates shard by shard, in data set order."""
        for shard in range(self.num_shards):
            path = self.path_of(shard)
            try:
                yield _decode(path.read_bytes(), len(self.images_of(shard)))
            except (OSError, ValueError, pa.ArrowException) as error:
                raise ReevaluationError(
                    f'{path} cannot be read: {error}; run again, and it is computed anew'
                ) from error

    def load(self) -> Candidates:
        """Read everything into flat arrays."""
        lengths, img_ids, shapes, extras, box_dim = [], [], [], set(_EXTRAS), 4
        for part in self:  # once to know how many there are: arrays are laid out once, and filled shard by shard
            lengths.append(np.diff(part.offsets))
            img_ids += part.img_ids
            shapes.append(part.shapes)
            extras &= set(part.extras)
            box_dim = part.bboxes.shape[1]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        kinds: dict[str, Any] = dict(bboxes=np.float32, scores=np.float32, labels=np.int64)
        kinds |= {name: np.float32 if name == 'class_scores' else np.int64 for name in _EXTRAS if name in extras}
        flat = {
            name: _lay_out((int(offsets[-1]), *[box_dim] * (name == 'bboxes')), kind, int(offsets[-1]))
            for name, kind in kinds.items()
        }
        start = 0
        for part in self:
            for name, values in flat.items():
                values[start : start + part.num_candidates] = part.extras.get(name, getattr(part, name, None))
            start += part.num_candidates
        return Candidates(
            img_ids,
            np.concatenate(shapes),
            offsets,
            bboxes=flat.pop('bboxes'),
            scores=flat.pop('scores'),
            labels=flat.pop('labels'),
            extras=flat,
        )

    @property
    def num_bytes(self) -> int:
        """Size of all shards on disk."""
        return sum(self.path_of(shard).stat().st_size for shard in range(self.num_shards))


def _lay_out(shape: tuple[int, ...], kind: Any, num_candidates: int) -> np.ndarray:
    """An array to fill; of too many candidates for the memory, in a temporary file without a name."""
    if num_candidates * 36 <= _IN_MEMORY:
        return np.empty(shape, kind)
    with tempfile.TemporaryFile() as file:
        return np.asarray(np.memmap(file, kind, 'w+', shape=shape))


def find_stores(folder: Path) -> list[CandidateStore]:
    """The stores below a folder that can be opened; anything else there is left alone."""
    stores = []
    for path in sorted(folder.glob('*/store.json')):
        try:
            stores.append(CandidateStore.open(path.parent))
        except ReevaluationError:
            continue  # of another version, or half a folder that somebody deletes
    return stores


def _encode(images: Sequence[ImageCandidates], shard: int, mark: bytes) -> memoryview:
    flat = Candidates.of(images)
    offsets = pa.array(flat.offsets.astype(np.int32))

    def lists(values: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values)))

    columns: dict[str, Any] = dict(
        img_id=pa.array(flat.img_ids), height=pa.array(flat.shapes[:, 0]), width=pa.array(flat.shapes[:, 1])
    )
    floats = (*_BOXES[flat.bboxes.shape[1]], 'score', 'class_score')
    for position, name in enumerate(_BOXES[flat.bboxes.shape[1]]):
        columns[name] = lists(flat.bboxes[:, position])
    columns['score'] = lists(flat.scores)
    columns['label'] = lists(flat.labels.astype(np.int32))
    for key, values in flat.extras.items():
        name, kind = _EXTRAS[key]
        columns[name] = lists(values.astype(kind))
    table = pa.table(columns).replace_schema_metadata({'store': mark, 'shard': str(shard)})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=len(images),
        compression='zstd',
        compression_level=3,
        use_dictionary=[f'{name}.list.element' for name in ('label', 'view') if name in columns],
        use_byte_stream_split=[f'{name}.list.element' for name in floats if name in columns],
        write_statistics=False,
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue())


def _decode(content: bytes, num_images: int) -> Candidates:
    """The candidates of a shard; sizes and types are looked at before anything is laid out.

    Raises:
        ValueError, pa.ArrowException: it is not what :func:`_encode` makes of so many images.
    """
    file = pq.ParquetFile(pa.BufferReader(content))
    metadata = file.metadata
    if metadata.num_rows != num_images:
        raise ValueError(f'it has {metadata.num_rows} rows for {num_images} images')
    schema, ids = file.schema_arrow, (pa.int64(), pa.string())
    box = _BOXES[5 if 'angle' in schema.names else 4]
    kinds = dict.fromkeys((*box, 'score'), pa.float32()) | dict(label=pa.int32())
    extras = {key: name for key, (name, _) in _EXTRAS.items() if name in schema.names}
    kinds |= {name: pa.float32() if key == 'class_scores' else pa.int32() for key, name in extras.items()}
    if schema.names != ['img_id', 'height', 'width', *kinds] or schema.field('img_id').type not in ids:
        raise ValueError(f'its columns are {", ".join(schema.names)[:200]}')
    if any(schema.field(name).type != pa.int32() for name in ('height', 'width')) or any(
        not pa.types.is_list(schema.field(name).type) or schema.field(name).type.value_type != kind
        for name, kind in kinds.items()
    ):
        raise ValueError('its columns are of other types')
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
        if max(column.num_values for column in columns) > num_images * _MOST_CANDIDATES:
            raise ValueError('it has more candidates than there can be')
        if max(column.total_uncompressed_size for column in columns) > max(_LARGEST_SHARD, 64 * len(content)):
            raise ValueError('it is larger than it can be')
    table = file.read(use_threads=False).combine_chunks()
    if any(table[name].null_count for name in table.column_names):
        raise ValueError('values are missing')
    lists = {name: table[name].chunk(0) for name in kinds}
    if any(one.flatten().null_count for one in lists.values()):
        raise ValueError('values are missing')
    offsets = lists['score'].offsets.to_numpy().astype(np.int64)
    if any(not np.array_equal(np.diff(one.offsets.to_numpy()), np.diff(offsets)) for one in lists.values()):
        raise ValueError('the lists of an image are not of one length')
    return Candidates(
        table['img_id'].to_pylist(),
        np.stack([table['height'].to_numpy(), table['width'].to_numpy()], 1),
        offsets - offsets[0],
        np.stack([lists[name].flatten().to_numpy() for name in box], 1),
        lists['score'].flatten().to_numpy(),
        lists['label'].flatten().to_numpy().astype(np.int64),
        {
            key: lists[name].flatten().to_numpy().astype(np.float32 if key == 'class_scores' else np.int64)
            for key, name in extras.items()
        },
    )


def _make_way(path: Path) -> None:
    """Remove a folder that stands in the place of a file of the store."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
