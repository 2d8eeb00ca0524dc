"""Writes the weight file: rows streamed from the snapshot, converted, digested and written, chunk by chunk.

A chunk is what one digest covers (`sha256-rows`), so that a chunk is read, converted, digested and written while it is
in the cache, and chunks can be done in any order by any number of workers (threads). Memory is two small
buffers a worker.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from export.config import Precision
from export.quantize import STORED_TYPES, convert_rows, describe_unstorable, storable
from export.snapshots import TableRows
from runtime_py.digests import ROWS, TABLES, Digest, chunk_groups, chunk_rows, combine
from runtime_py.manifest import Table, row_bytes
from runtime_py.parallel import map_ordered
from runtime_py.weights import encode_header, layout_tables, tensor_bytes

__all__ = ["PlannedTable", "WrittenWeights", "write_weight_file"]

_STAGES = ("read", "check", "convert", "digest", "write")


@dataclass(frozen=True)
class PlannedTable:
    """A table to write: where its rows come from, and how they are stored."""

    name: str
    rows: TableRows
    precision: Precision

    @property
    def num_embeddings(self) -> int:  # noqa: D102
        return self.rows.num_embeddings

    @property
    def embedding_dim(self) -> int:  # noqa: D102
        return self.rows.embedding_dim

    @property
    def serving_precision(self) -> Literal["fp32", "fp16"]:  # noqa: D102
        return "fp32" if self.precision is Precision.FP32 else "fp16"

    @property
    def row_bytes(self) -> int:  # noqa: D102
        return row_bytes(self.precision, self.embedding_dim)

    @property
    def bytes(self) -> int:
        """All rows, as stored."""
        return self.num_embeddings * self.row_bytes


@dataclass(frozen=True)
class WrittenWeights:
    """The finished file: its tables with their digests in the order given, its own digest, and the time of each stage.

    `stage_seconds` are summed over workers.
    """

    tables: list[Table]
    offset_bytes: int
    data_bytes: int
    digest: Digest
    stage_seconds: dict[str, float]


def write_weight_file(path: Path, tables: Sequence[PlannedTable], workers: int) -> WrittenWeights:
    """Writes the rows of all `tables` into a new file at `path`, with `workers` threads.

    Args:
        path: the file; it must not exist.
        tables: the tables, in configuration order.
        workers: how many chunks are in work at a time.

    Raises:
        RowsError: a table has values that its precision cannot store.
        SnapshotError: rows cannot be read.
        OSError: the file cannot be written; a full disk shows before the first row is read.
    """
    header = encode_header(tables)
    by_name = {table.name: table for table in tables}
    offsets = layout_tables(tables)
    data_bytes = sum(table.bytes for table in tables)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(fd, 0, len(header) + data_bytes)
        _write_at(fd, memoryview(header), 0)
        digests: dict[str, Digest] = {}
        stages = dict.fromkeys(_STAGES, 0.0)
        for name, offset in offsets.items():
            digests[name] = _write_table(fd, by_name[name], len(header) + offset, workers, stages)
    finally:
        os.close(fd)
    parts = [hashlib.sha256(header).digest(), *(bytes.fromhex(digests[name].value) for name in offsets)]
    written = [
        Table(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            serving_precision=table.serving_precision,
            row_bytes=table.row_bytes,
            offset_bytes=offsets[table.name],
            digest=digests[table.name],
        )
        for table in tables
    ]
    return WrittenWeights(written, len(header), data_bytes, combine(TABLES, parts), stages)


class _UnstorableError(Exception):
    """A chunk has a value that its precision cannot hold."""


def _write_table(fd: int, table: PlannedTable, position: int, workers: int, stages: dict[str, float]) -> Digest:
    def run(starts: range) -> tuple[bytes, dict[str, float]]:
        return _write_chunks(fd, table, position, starts)

    digests = []
    try:
        for part, seconds in map_ordered(run, chunk_groups(table.num_embeddings, table.row_bytes), workers):
            digests.append(part)
            for stage, value in seconds.items():
                stages[stage] += value
    except _UnstorableError:
        # Counted here and not by a worker, so that it is done once and a signal can stop it.
        chunks = table.rows.chunks(chunk_rows(table.row_bytes))
        raise describe_unstorable(table.name, chunks, table.precision) from None
    return combine(ROWS, digests)


def _write_chunks(fd: int, table: PlannedTable, position: int, starts: range) -> tuple[bytes, dict[str, float]]:
    """Converts and writes some chunks of one table; returns their digests and the seconds of each stage."""
    size = min(chunk_rows(table.row_bytes), table.num_embeddings)
    source = torch.empty(size, table.embedding_dim, dtype=table.rows.dtype)
    stored = torch.empty(size, table.embedding_dim, dtype=STORED_TYPES[table.precision])
    digests = []
    seconds = dict.fromkeys(_STAGES, 0.0)
    for start in starts:
        count = min(size, table.num_embeddings - start)
        times = [time.perf_counter()]
        table.rows.read(start, source[:count])
        times.append(time.perf_counter())
        if not storable(source[:count], table.precision):
            raise _UnstorableError
        times.append(time.perf_counter())
        convert_rows(source[:count], stored[:count])
        times.append(time.perf_counter())
        data = tensor_bytes(stored[:count])
        digests.append(hashlib.sha256(data).digest())
        times.append(time.perf_counter())
        _write_at(fd, data, position + start * table.row_bytes)
        times.append(time.perf_counter())
        for stage, (begin, end) in zip(_STAGES, pairwise(times), strict=True):
            seconds[stage] += end - begin
    return b"".join(digests), seconds


def _write_at(fd: int, data: memoryview, position: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, data[written:], position + written)
