"""A table's rows in a snapshot, whatever the format: blobs of raw values, read by row range.

Every format comes down to this: a blob is a rectangle of the table that lies, little-endian and row-major, at some
offset of some file. Nothing is mapped and nothing is loaded whole, so memory does not grow with the table.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from upath import UPath

from export.errors import SnapshotError
from export.storage import Location, fingerprints, map_files, read_range, read_whole, size
from runtime_py.digests import Digest
from runtime_py.tensor_file import tensor_bytes

__all__ = ["Blob", "SnapshotIndex", "StoredTensor", "TableRows", "identify", "read_commit_mark", "rectangle"]

_FETCHES = 4  # at a time, for each thread that takes chunks, and no more than
_FETCHED_BYTES = 4 << 20  # at a time, where that is more than one: a driver has two or three copies of a range


@dataclass(frozen=True)
class Blob:
    """`rows` x `columns` values of a table, from (`row`, `column`) on, at `offset_bytes` of a file."""

    path: Location
    offset_bytes: int
    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class StoredTensor:
    """What a snapshot says of one of its tensors, before any of its values is looked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inferred: bool = False  # nothing in the snapshot says the shape: it is as large as the parts reach


class SnapshotIndex(Protocol):
    """What a format has to provide."""

    format: str
    digest: Digest  # of the index, which identifies the snapshot without reading its rows
    tensors: dict[str, StoredTensor]

    def locate(self, name: str) -> list[Blob]:
        """The blobs of one tensor, as a table (see `rectangle`).

        Raises:
            SnapshotError: the files are not what the index says.
        """


def rectangle(offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> tuple[int, int, int, int] | None:
    """A part of a tensor of any shape as row, column, rows and columns of `table_shape(shape)`; None where it is none.

    Of more than two dimensions, a part is one where only the first is cut.
    """
    if len(offsets) != len(shape) or len(sizes) != len(shape):
        return None
    if len(shape) == 2:
        return offsets[0], offsets[1], sizes[0], sizes[1]
    if len(shape) < 2:
        return 0, offsets[0] if offsets else 0, 1, sizes[0] if sizes else 1
    if list(sizes[1:]) != list(shape[1:]):
        return None
    return offsets[0], 0, sizes[0], math.prod(sizes[1:])


def read_commit_mark(file: Location) -> bytes:
    """The bytes of the file that a format writes last, and that says what the others hold.

    Raises:
        SnapshotError: it is missing, so the snapshot was never completed, or cannot be read.
    """
    try:
        return read_whole(file)
    except FileNotFoundError as error:
        raise SnapshotError(f"{file}: is missing: the snapshot was never completed") from error
    except OSError as error:
        raise SnapshotError(f"{file}: cannot be read: {error.strerror}") from error


def identify(locations: Iterable[Location]) -> list[tuple[str, tuple[object, ...]]]:
    """What tells these files from others, now: it differs once one of them was written again.

    Raises:
        SnapshotError: a file is gone, or cannot be asked for.
    """
    paths = sorted(set(locations), key=str)
    try:
        return list(zip(map(str, paths), fingerprints(paths), strict=True))
    except OSError as error:
        raise SnapshotError(f"{error.filename}: holds rows, and cannot be read: {error.strerror}") from error


class TableRows:
    """The rows of one table: E = `num_embeddings`, D = `embedding_dim`, of type `dtype`."""

    def __init__(self, tensor: StoredTensor, blobs: Sequence[Blob]) -> None:
        """Checks that the blobs tile the table and lie within their files.

        Raises:
            SnapshotError: a hole, an overlap, a blob outside the table, a missing or short file, a byte of two blobs.
        """
        self.name = tensor.name
        self.num_embeddings, self.embedding_dim = tensor.shape
        self.dtype = tensor.dtype
        for blob in blobs:
            numbers = (blob.offset_bytes, blob.row, blob.column, blob.rows, blob.columns)
            if not all(type(number) is int for number in numbers) or "\0" in str(blob.path):
                raise SnapshotError(f"{str(blob.path)!r}: '{self.name}': the place of a shard is damaged: {numbers}")
        self._blobs = sorted(blobs, key=lambda blob: (blob.row, blob.column))
        self._check_tiling()
        self._check_files()

    @property
    def bytes(self) -> int:
        """All rows, as trained."""
        return self.num_embeddings * self.embedding_dim * self.dtype.itemsize

    def _check_tiling(self) -> None:
        area = 0
        active: list[Blob] = []
        for blob in self._blobs:
            where = (
                f"rows {blob.row}-{blob.row + blob.rows - 1}, columns {blob.column}-{blob.column + blob.columns - 1}"
            )
            inside = blob.row + blob.rows <= self.num_embeddings and blob.column + blob.columns <= self.embedding_dim
            if min(blob.rows, blob.columns) < 1 or min(blob.row, blob.column) < 0 or not inside:
                shape = [self.num_embeddings, self.embedding_dim]
                raise SnapshotError(f"{blob.path}: '{self.name}': shard of {where} is outside the table {shape}")
            active = [other for other in active if other.row + other.rows > blob.row]
            for other in active:
                if other.column < blob.column + blob.columns and blob.column < other.column + other.columns:
                    raise SnapshotError(f"{blob.path}: '{self.name}': shard of {where} overlaps another one")
            active.append(blob)
            area += blob.rows * blob.columns
        missing = self.num_embeddings * self.embedding_dim - area
        if missing:
            raise SnapshotError(
                f"'{self.name}': the shards leave {missing} values of the table out; a shard is missing"
            )

    def _check_files(self) -> None:
        places = sorted(
            (str(blob.path), blob.offset_bytes, blob.offset_bytes + blob.rows * blob.columns * self.dtype.itemsize)
            for blob in self._blobs
        )
        for (file, _, end), (other, start, _) in pairwise(places):
            if file == other and start < end:
                raise SnapshotError(f"{file}: two shards of '{self.name}' have byte {start}; the index is damaged")
        ends: dict[Location, int] = {}
        for blob in self._blobs:
            end = blob.offset_bytes + blob.rows * blob.columns * self.dtype.itemsize
            ends[blob.path] = max(end, ends.get(blob.path, 0))
        for (path, end), size_bytes in zip(ends.items(), map_files(self._size, list(ends), list(ends)), strict=True):
            if size_bytes < end:
                raise SnapshotError(
                    f"{path}: '{self.name}' ends at byte {end}, the file has {size_bytes}; it was truncated"
                )

    def _size(self, path: Location) -> int:
        try:
            return size(path)
        except OSError as error:
            raise SnapshotError(f"{path}: holds rows of '{self.name}', cannot be read: {error.strerror}") from error

    @property
    def locations(self) -> set[Location]:
        """The files that hold the rows."""
        return {blob.path for blob in self._blobs}

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills `out` [n, D], contiguous and of the table's dtype, with the rows from `start` on.

        Raises:
            SnapshotError: a file cannot be read, or has become shorter.
        """
        stop = start + out.shape[0]
        for blob in self._blobs:
            if blob.row >= stop:
                break
            first, last = max(start, blob.row), min(stop, blob.row + blob.rows)
            if first >= last:
                continue
            row_bytes = blob.columns * self.dtype.itemsize
            part = out[first - start : last - start, blob.column : blob.column + blob.columns]
            whole = part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
            self._fill(blob.path, blob.offset_bytes + (first - blob.row) * row_bytes, whole)
            if whole is not part:
                part.copy_(whole)

    def _fill(self, path: Location, position: int, out: torch.Tensor) -> None:
        data = tensor_bytes(out)
        try:
            filled = read_range(path, position, data)
        except OSError as error:
            raise SnapshotError(f"{path}: cannot be read: {error.strerror}") from error
        if filled < len(data):
            raise SnapshotError(f"{path}: ends within the rows of '{self.name}'; it was truncated")

    def chunks(self, starts: range) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows from `starts.start` on, a chunk at each start: (first row, rows [n, D]).

        The tensor may be reused by the next chunk. Remote chunks are fetched ahead, several at a time.
        """
        if any(isinstance(blob.path, UPath) for blob in self._blobs):
            yield from self._fetched_chunks(starts)
            return
        buffer = torch.empty(min(starts.step, self.num_embeddings), self.embedding_dim, dtype=self.dtype)
        for start in starts:
            chunk = buffer[: self._length(starts, start)]
            self.read(start, chunk)
            yield start, chunk

    def _fetched_chunks(self, starts: range) -> Iterator[tuple[int, torch.Tensor]]:
        def fetch(start: int) -> torch.Tensor:
            chunk = torch.empty(self._length(starts, start), self.embedding_dim, dtype=self.dtype)
            self.read(start, chunk)
            return chunk

        fetches = max(1, min(_FETCHES, _FETCHED_BYTES // (starts.step * self.embedding_dim * self.dtype.itemsize)))
        pool = ThreadPoolExecutor(fetches)
        waiting: deque[tuple[int, Future[torch.Tensor]]] = deque()
        try:
            for start in starts:
                waiting.append((start, pool.submit(fetch, start)))
                if len(waiting) > fetches:
                    first, fetched = waiting.popleft()
                    yield first, fetched.result()
            while waiting:
                first, fetched = waiting.popleft()
                yield first, fetched.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _length(self, starts: range, start: int) -> int:
        return min(starts.step, self.num_embeddings - start)

    def describe(self) -> str:
        """Where every value comes from, as text: the same for the same rows of the same files."""
        blobs = [
            (str(blob.path), blob.offset_bytes, blob.row, blob.column, blob.rows, blob.columns) for blob in self._blobs
        ]
        return repr((self.num_embeddings, self.embedding_dim, self.dtype, blobs))
