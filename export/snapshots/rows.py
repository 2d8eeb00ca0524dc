"""A table's rows in a snapshot, whatever the format: blobs of raw values, read by row range with `pread`.

Every format comes down to this: a blob is a rectangle of the table that lies, little-endian and row-major, at some
offset of some file. Nothing is mapped and nothing is loaded whole, so memory does not grow with the table.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from export.errors import SnapshotError
from runtime_py.digests import Digest
from runtime_py.weights import tensor_bytes

__all__ = ["Blob", "SnapshotIndex", "StoredTensor", "TableRows", "read_commit_mark"]


@dataclass(frozen=True)
class Blob:
    """`rows` x `columns` values of a table, from (`row`, `column`) on, at `offset_bytes` of a file."""

    path: Path
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


class SnapshotIndex(Protocol):
    """What a format has to provide."""

    format: str
    digest: Digest  # of the index, which identifies the snapshot without reading its rows
    tensors: dict[str, StoredTensor]

    def locate(self, name: str) -> list[Blob]:
        """The blobs of one 2-D tensor; raises SnapshotError where the files are not what the index says."""


def read_commit_mark(file: Path) -> bytes:
    """The bytes of the file that a format writes last, and that says what the others hold.

    Raises:
        SnapshotError: it is missing, so the snapshot was never completed, or cannot be read.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise SnapshotError(f"{file}: is missing: the snapshot was never completed") from error
    except OSError as error:
        raise SnapshotError(f"{file}: cannot be read: {error.strerror}") from error


class TableRows:
    """The rows of one table: E = `num_embeddings`, D = `embedding_dim`, of type `dtype`."""

    def __init__(self, tensor: StoredTensor, blobs: Sequence[Blob]) -> None:
        """Checks that the blobs tile the table and lie within their files.

        Raises:
            SnapshotError: a hole, an overlap, a blob outside the table, a missing or short file.
        """
        self.name = tensor.name
        self.num_embeddings, self.embedding_dim = tensor.shape
        self.dtype = tensor.dtype
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
        for blob in self._blobs:
            end = blob.offset_bytes + blob.rows * blob.columns * self.dtype.itemsize
            try:
                size = blob.path.stat().st_size
            except OSError as error:
                raise SnapshotError(
                    f"{blob.path}: holds rows of '{self.name}', cannot be read: {error.strerror}"
                ) from error
            if size < end:
                raise SnapshotError(
                    f"{blob.path}: '{self.name}' ends at byte {end}, the file has {size}; it was truncated"
                )

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

    def _fill(self, path: Path, position: int, out: torch.Tensor) -> None:
        data = tensor_bytes(out)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                filled = 0
                while filled < len(data):
                    count = os.preadv(fd, [data[filled:]], position + filled)
                    if count == 0:
                        raise SnapshotError(f"{path}: ends within the rows of '{self.name}'; it was truncated")
                    filled += count
            finally:
                os.close(fd)
        except OSError as error:
            raise SnapshotError(f"{path}: cannot be read: {error.strerror}") from error

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows in order, `rows` at a time: (first row, rows [n, D]). The tensor is reused by the next chunk."""
        buffer = torch.empty(min(rows, self.num_embeddings), self.embedding_dim, dtype=self.dtype)
        for start in range(0, self.num_embeddings, rows):
            chunk = buffer[: min(rows, self.num_embeddings - start)]
            self.read(start, chunk)
            yield start, chunk
