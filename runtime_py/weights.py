"""The weight file: one safetensors file whose data starts on a page boundary, read, checked and mapped.

The layout is a function of the tables (`layout_tables`), so that the builder that writes the file and the reader that
checks it cannot disagree. Digests are read with `pread`, never through the mapping: checking a file does not make it
resident in the process.
"""

import hashlib
import json
import mmap
import os
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from runtime_py.digests import ROWS, TABLES, Digest, chunk_groups, chunk_rows, combine
from runtime_py.errors import DigestMismatchError, WeightFileError
from runtime_py.manifest import ROW_FORMATS, WEIGHTS, Manifest, Table
from runtime_py.parallel import map_ordered

__all__ = ["ALIGNMENT_BYTES", "TableShape", "WeightFile", "encode_header", "layout_tables", "tensor_bytes"]

ALIGNMENT_BYTES = 4096
_PREFIX = struct.Struct("<Q")


class TableShape(Protocol):
    """What the layout needs to know of a table; `manifest.Table` is one."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def num_embeddings(self) -> int: ...  # noqa: D102
    @property
    def embedding_dim(self) -> int: ...  # noqa: D102
    @property
    def serving_precision(self) -> str: ...  # noqa: D102
    @property
    def row_bytes(self) -> int: ...  # noqa: D102


def layout_tables(tables: Iterable[TableShape]) -> dict[str, int]:
    """Table name to the offset of its first row from the start of the data, in bytes, in file order.

    Tables follow one another without fillers, ordered by the largest power of two up to 4096 that divides their row
    bytes, descending, then by name: every table then starts at least as aligned as its own rows.
    """

    def order(table: TableShape) -> tuple[int, str]:
        alignment = min(table.row_bytes & -table.row_bytes, ALIGNMENT_BYTES)
        return -alignment, table.name

    offsets: dict[str, int] = {}
    end = 0
    for table in sorted(tables, key=order):
        offsets[table.name] = end
        end += table.num_embeddings * table.row_bytes
    return offsets


def encode_header(tables: Iterable[TableShape]) -> bytes:
    """The first bytes of the weight file: length prefix, JSON, and spaces up to a multiple of 4096 bytes."""
    by_name = {table.name: table for table in tables}
    entries = {}
    for name, offset in layout_tables(by_name.values()).items():
        table = by_name[name]
        entries[name] = {
            "dtype": ROW_FORMATS[table.serving_precision].safetensors_dtype,
            "shape": [table.num_embeddings, table.embedding_dim],
            "data_offsets": [offset, offset + table.num_embeddings * table.row_bytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padded = -(_PREFIX.size + len(text)) % ALIGNMENT_BYTES + len(text)
    return _PREFIX.pack(padded) + text.ljust(padded)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable and without a copy."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


class WeightFile:
    """An open weight file that agrees with a manifest.

    The file stays open: what was verified is what is mapped, whatever happens to the path meanwhile.
    """

    def __init__(self, artifact: Path, manifest: Manifest) -> None:
        """Opens the file and checks its header.

        Raises:
            WeightFileError: the header is not the one that follows from the manifest's tables.
        """
        self.path = artifact / WEIGHTS
        self.manifest = manifest
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._header = self._check_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; a mapping made before stays valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_header(self) -> bytes:
        expected = encode_header(self.manifest.tables)
        if self.manifest.weights_offset_bytes != len(expected):
            raise WeightFileError(
                f"{self.path}: the manifest says that data starts at {self.manifest.weights_offset_bytes}, "
                f"its tables say {len(expected)}"
            )
        for table, offset in layout_tables(self.manifest.tables).items():
            if self.manifest.table[table].offset_bytes != offset:
                raise WeightFileError(
                    f"{self.path}: table '{table}': the manifest says offset {self.manifest.table[table].offset_bytes}, "
                    f"the layout rule gives {offset}"
                )
        data_bytes = sum(table.bytes for table in self.manifest.tables)
        if self.manifest.weights_bytes != data_bytes:
            raise WeightFileError(
                f"{self.path}: the manifest says {self.manifest.weights_bytes} bytes of rows, its tables have {data_bytes}"
            )
        if os.pread(self._fd, len(expected), 0) != expected:
            raise WeightFileError(f"{self.path}: the header is not the one that follows from the manifest's tables")
        return expected

    def read_rows(self, table: Table, start: int, out: memoryview) -> None:
        """Fills `out` with the bytes of rows from `start` on, a whole number of them."""
        position = self.manifest.weights_offset_bytes + table.offset_bytes + start * table.row_bytes
        filled = 0
        while filled < len(out):
            count = os.preadv(self._fd, [out[filled:]], position + filled)
            if count == 0:
                raise WeightFileError(
                    f"{self.path}: table '{table.name}': the file ends within the rows; it was truncated"
                )
            filled += count

    def verify_digests(self, threads: int) -> None:
        """Compares every row with the digests of the manifest, on `threads` cores.

        Raises:
            DigestMismatchError: naming the table, or the header, whose bytes differ.
        """
        parts = [hashlib.sha256(self._header).digest()]
        for name in layout_tables(self.manifest.tables):
            table = self.manifest.table[name]
            digest = self._digest(table, threads)
            if digest != table.digest:
                raise DigestMismatchError(
                    f"{self.path}: the rows of table '{name}' are not those that were published: "
                    f"digest {digest}, expected {table.digest}; restore the file or build again"
                )
            parts.append(bytes.fromhex(digest.value))
        whole, expected = combine(TABLES, parts), self.manifest.file[WEIGHTS].digest
        if whole != expected:
            raise DigestMismatchError(
                f"{self.path}: digest {whole}, expected {expected}; restore the file or build again"
            )

    def _digest(self, table: Table, threads: int) -> Digest:
        rows = chunk_rows(table.row_bytes)

        def run(starts: range) -> bytes:
            buffer = memoryview(bytearray(min(rows, table.num_embeddings) * table.row_bytes))
            digests = []
            for start in starts:
                chunk = buffer[: min(rows, table.num_embeddings - start) * table.row_bytes]
                self.read_rows(table, start, chunk)
                digests.append(hashlib.sha256(chunk).digest())
            return b"".join(digests)

        return combine(ROWS, map_ordered(run, chunk_groups(table.num_embeddings, table.row_bytes), threads))

    def map(self) -> torch.Tensor:
        """The rows of all tables as one uint8 tensor that shares its pages with every process that maps the file.

        The mapping is read-only: writing to the tensor is a segmentation fault. It lives as long as the tensor.
        """
        mapping: Any = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(mapping, dtype=torch.uint8, offset=self.manifest.weights_offset_bytes)
