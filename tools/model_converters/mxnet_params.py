"""Reading MXNet's ``.params``: the list of named arrays that ``mx.nd.save`` writes (``src/ndarray/ndarray.cc``).

Little-endian: uint64 0x112, uint64 reserved, uint64 count and so many arrays, uint64 count and so many names, each a
uint64 length and bytes. An array opens with a magic number and its shape; three versions differ in how:

* 0xF993FACA (with numpy's shapes) and 0xF993FAC9: int32 storage type, int32 number of dimensions, int64 each;
* 0xF993FAC8: uint32 number of dimensions, int64 each;
* files of 2016 and earlier: no magic, uint32 number of dimensions, uint32 each.

Then int32 device type and number, int32 type of the elements, and the elements.
"""

import math
import struct
from collections import Counter
from pathlib import Path

import numpy as np

LIST_MAGIC = 0x112
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
#: Numbers of the element types that weights have; integers and bfloat16 are not among them.
FLOATS = {0: '<f4', 1: '<f8', 2: '<f2'}
MOST_DIMENSIONS = 8


class ParamsError(ValueError):
    """The file holds no named arrays of floats, or ends too soon; the message says where, in one line."""


class _Bytes:
    """A file read from the front; asking for more than there is, is an error before anything is allocated."""

    def __init__(self, content: bytes) -> None:
        self.content = memoryview(content)
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.content) - self.at

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left:
            raise ParamsError(f'{what} needs {size} bytes, and {self.left} are left: truncated, or no .params of MXNet')
        self.at += size
        return self.content[self.at - size : self.at]

    def numbers(self, kinds: str, what: str) -> tuple[int, ...]:
        return struct.unpack(f'<{kinds}', self.take(struct.calcsize(f'<{kinds}'), what))

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        (count,) = self.numbers('Q', what)
        if count > self.left // least:
            raise ParamsError(f'{what} is {count}, and {self.left} bytes are left: truncated, or no .params of MXNet')
        return count


def read_params(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a ``.params`` file by name, in float32. Nothing in the file is executed.

    Raises:
        ParamsError: another format, an end too soon, or arrays without names, of integers or not finite.
        OSError: the file cannot be read.
    """
    data = _Bytes(path.read_bytes())
    try:
        magic, _ = data.numbers('QQ', 'the header')
        if magic != LIST_MAGIC:
            raise ParamsError(f'begins with {magic:#x} instead of {LIST_MAGIC:#x}: no .params of MXNet')
        arrays = [_read_array(data, f'array {index}') for index in range(data.count('the number of arrays', 4))]
        names = [
            bytes(data.take(data.count('the length of a name', 1), 'a name')).decode(errors='backslashreplace')
            for _ in range(data.count('the number of names', 8))
        ]
        if len(names) != len(arrays) or not names:
            raise ParamsError(f'has {len(arrays)} arrays and {len(names)} names: no weights of a network')
        if data.left:
            raise ParamsError(f'goes on for {data.left} bytes behind the last name')
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ParamsError(f'has {twice[0]!r:.80} twice')
        for name, array in zip(names, arrays, strict=True):
            if not np.isfinite(array).all():
                raise ParamsError(f'has numbers that are not finite in {name!r:.80}')
    except ParamsError as error:
        raise ParamsError(f'{path}: {error}') from None
    return dict(zip(names, arrays, strict=True))


def _read_array(data: _Bytes, what: str) -> np.ndarray:
    (magic,) = data.numbers('I', what)
    dimensions, kind = magic, 'I'
    if magic in (V2, V3):
        (storage,) = data.numbers('i', what)
        if storage != 0:
            raise ParamsError(f'{what} has storage type {storage}: only dense arrays, type 0, are read')
    if magic in (V1, V2, V3):
        (dimensions,) = data.numbers('i', what)
        kind = 'q'
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ParamsError(f'{what} has {dimensions} dimensions instead of 1 to {MOST_DIMENSIONS}')
    shape = data.numbers(f'{dimensions}{kind}', what)
    _, _, element = data.numbers('3i', what)
    if min(shape) < 1 or element not in FLOATS:
        raise ParamsError(f'{what} has shape {shape!s:.80} and element type {element}: floats are expected')
    dtype = np.dtype(FLOATS[element])
    elements = data.take(math.prod(shape) * dtype.itemsize, f'{what} of shape {shape!s:.80}')
    with np.errstate(over='ignore'):  # a float64 that is too large becomes infinite, which is refused
        return np.frombuffer(elements, dtype).reshape(shape).astype(np.float32)
