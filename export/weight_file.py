"""Writes the weight file: rows streamed from the snapshot, converted, checked, digested and written, chunk by chunk.

A chunk is what one digest covers (`sha256-rows`), so that all of this happens to it in one pass while it is in the cache.
Chunks are independent: pieces of 64 go to any number of threads, processes and hosts. Memory is a few small buffers a
thread, whatever the table.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import xxhash

from export.accuracy import ErrorSums, Examiner, ProbeRows, UnstorableError, block_rows
from export.config import Precision
from export.errors import PublishError
from export.journal import PieceResult
from export.quantize import (
    convert_rows,
    describe_unstorable,
    new_rows,
    quantized,
    row_format,
    serving_precision,
    storable,
)
from export.snapshots import TableRows, identify
from runtime_py.digests import ROWS, TABLES, Digest, chunk_groups, chunk_rows, combine
from runtime_py.manifest import (
    PARAMETER_PREFIX,
    ParameterType,
    ServingPrecision,
    StoredParameter,
    Table,
    table_shape,
)
from runtime_py.parallel import map_ordered
from runtime_py.tensor_file import encode_header, layout_tables, tensor_bytes

__all__ = [
    "Piece",
    "PlannedParameter",
    "PlannedTable",
    "WeightPlan",
    "WrittenWeights",
    "assemble",
    "compare_written",
    "create_weight_file",
    "write_pieces",
]


@dataclass(frozen=True)
class PlannedTable:
    """A table to write: where its rows come from, how they are stored, and which rows the gates want (`probe_ids`).

    Rows in which one value leaves the others a relative L2 error beyond `outlier_limit` are counted and named.
    """

    name: str
    rows: TableRows
    precision: Precision
    probe_ids: np.ndarray  # int64, ascending
    outlier_limit: float = math.inf

    @property
    def num_embeddings(self) -> int:  # noqa: D102
        return self.rows.num_embeddings

    @property
    def embedding_dim(self) -> int:  # noqa: D102
        return self.rows.embedding_dim

    @property
    def serving_precision(self) -> ServingPrecision:  # noqa: D102
        return serving_precision(self.precision)

    @property
    def dtype(self) -> str:  # noqa: D102
        return str(row_format(self.precision).safetensors_dtype)

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.num_embeddings, row_format(self.precision).columns(self.embedding_dim)

    @property
    def row_bytes(self) -> int:  # noqa: D102
        return int(row_format(self.precision).row_bytes(self.embedding_dim))

    @property
    def bytes(self) -> int:
        """All rows, as stored."""
        return self.num_embeddings * self.row_bytes


@dataclass(frozen=True)
class PlannedParameter:
    """A tensor of the surgery module to write beside the tables: contiguous, and small enough to be in memory."""

    parameter: str
    dtype: ParameterType
    tensor: torch.Tensor

    @property
    def name(self) -> str:  # noqa: D102
        return f"{PARAMETER_PREFIX}{self.parameter}"

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return table_shape(self.tensor.shape)

    @property
    def row_bytes(self) -> int:  # noqa: D102
        return self.shape[1] * self.tensor.dtype.itemsize

    @property
    def bytes(self) -> int:
        """The whole tensor."""
        return self.shape[0] * self.row_bytes

    @property
    def digest(self) -> Digest:
        """`sha256-rows-1048576` of its rows."""
        data, step = tensor_bytes(self.tensor), chunk_rows(self.row_bytes) * self.row_bytes
        parts = (hashlib.sha256(data[start : start + step]).digest() for start in range(0, len(data), step))
        return combine(ROWS, parts)


@dataclass(frozen=True)
class Piece:
    """Some chunks of a table, the first rows of which are `starts`, and where the table's rows begin in the file."""

    table: PlannedTable
    position: int
    starts: range
    sample: int

    @property
    def key(self) -> str:
        """What a journal calls the piece."""
        return f"{self.starts.start} {self.table.name}"

    @property
    def end(self) -> int:
        """The row after the last one."""
        return min(self.starts[-1] + self.starts.step, self.table.num_embeddings)

    @property
    def bytes(self) -> int:
        """Its rows, as stored."""
        return (self.end - self.starts.start) * self.table.row_bytes


class WeightPlan:
    """A weight file to write: its header, its tables in configuration order, and the pieces in file order.

    Every `sample`th block of a table is measured, the first one always; all are compared with what they must be. The
    parameters of a surgery are written with the header.
    """

    def __init__(
        self,
        tables: Sequence[PlannedTable],
        sample: int = 1,
        snapshots: Sequence[Digest] = (),
        parameters: Sequence[PlannedParameter] = (),
    ) -> None:
        self.tables, self._snapshots = list(tables), [str(digest) for digest in snapshots]
        self.parameters = list(parameters)
        self.sample = sample
        tensors: list[PlannedTable | PlannedParameter] = [*self.tables, *self.parameters]
        self.header = encode_header(tensors)
        self.offsets = layout_tables(tensors)
        self.data_bytes = sum(tensor.bytes for tensor in tensors)
        self._table_bytes = sum(table.bytes for table in tables)
        by_name = {table.name: table for table in tables}
        self.pieces = [
            Piece(by_name[name], len(self.header) + offset, starts, sample)
            for name, offset in self.offsets.items()
            if name in by_name
            for starts in chunk_groups(by_name[name].num_embeddings, by_name[name].row_bytes)
        ]
        self.fingerprint = self._fingerprint()

    def share(self, rank: int, world: int) -> list[Piece]:
        """The pieces of one of `world` processes: row ranges of about as many bytes each."""
        share = []
        end = 0
        for piece in self.pieces:
            middle = end + piece.bytes // 2
            end += piece.bytes
            if middle * world // self._table_bytes == rank:
                share.append(piece)
        return share

    def _fingerprint(self) -> str:
        """SHA-256 of all that the file and what is known of it follow from: the snapshots' files, and who reads them."""
        tables = [
            [
                table.name,
                table.serving_precision,
                table.rows.describe(),
                table.outlier_limit,
                hashlib.sha256(table.probe_ids.tobytes()).hexdigest(),
            ]
            for table in self.tables
        ]
        files = identify(location for table in self.tables for location in table.rows.locations)
        versions = [importlib.metadata.version("large-embeddings-export"), torch.__version__, np.__version__]
        parameters = [str(parameter.digest) for parameter in self.parameters]
        text = json.dumps([self.header.hex(), self.sample, self._snapshots, tables, parameters, files, versions])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class WrittenWeights:
    """The finished file: tables with their digests, error sums and probes, in configuration order, and its own digest.

    `checksums` are of pieces, by key: XXH3 with 128 bits of each of their chunks, 16 bytes each.
    `stage_seconds` are summed over all threads and processes, and builds, where one has gone on with another.
    """

    tables: list[Table]
    parameters: list[StoredParameter]
    offset_bytes: int
    data_bytes: int
    digest: Digest
    bytes_before: dict[str, int]
    sums: dict[str, ErrorSums]
    probes: dict[str, ProbeRows]
    checksums: dict[str, bytes]
    stage_seconds: dict[str, float]


def create_weight_file(path: Path, plan: WeightPlan) -> None:
    """Makes the file at its full length, with its header and the parameters; what an earlier build has written stays.

    Raises:
        OSError: it cannot be written; a full disk shows here, before the first row is read.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(fd, 0, len(plan.header) + plan.data_bytes)
        _write_at(fd, memoryview(plan.header), 0)
        for parameter in plan.parameters:
            _write_at(fd, tensor_bytes(parameter.tensor), len(plan.header) + plan.offsets[parameter.name])
    finally:
        os.close(fd)


def write_pieces(
    path: Path, pieces: Sequence[Piece], workers: int, finished: Mapping[str, PieceResult]
) -> Generator[tuple[Piece, PieceResult], None, None]:
    """Writes the rows of some pieces into the file at `path`; what it yields is in the file.

    Args:
        path: the file, as `create_weight_file` made it.
        pieces: what to write.
        workers: how many pieces are in work at a time, a thread each.
        finished: what an interrupted build says it has done, by key; believed where the file's bytes have its digests, and
            the first chunk of the snapshot's rows still has.

    Yields:
        each piece with its result, in the order of `pieces`; the very one of `finished` where that was right.

    Raises:
        RowsError: a table has values that its precision cannot store.
        SnapshotError: rows cannot be read.
        GateError: a stored value is not what the independent reference makes of the trained one.
        OSError: the file cannot be written.
    """
    threads = torch.get_num_threads()

    def run(piece: Piece) -> PieceResult:
        torch.set_num_threads(1)  # of this thread: the pieces are what runs in parallel
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # a signal may end the build before the last piece
        try:
            earlier = finished.get(piece.key)
            return earlier if earlier and _is_right(fd, piece, earlier) else _write_piece(fd, piece)
        finally:
            os.close(fd)

    try:
        yield from zip(pieces, map_ordered(run, pieces, workers), strict=True)
    except UnstorableError as error:
        # Counted here and not by a worker, so that it is done once and a signal can stop it.
        table = next(piece.table for piece in pieces if piece.table.name == error.table)
        chunks = table.rows.chunks(range(0, table.num_embeddings, chunk_rows(table.row_bytes)))
        raise describe_unstorable(table.name, chunks, table.precision) from None
    finally:
        torch.set_num_threads(threads)  # for threads to come, who start with what was set last


def compare_written(path: Path, plan: WeightPlan, written: WrittenWeights, workers: int) -> None:
    """Reads the finished file at `path` again, and compares it with the checksums of what was digested.

    XXH3 with 128 bits finds whatever went wrong between memory and file, at the speed of reading. SHA-256, of which the
    file's digests are made and that a loader compares, would take a third of a build again.

    Raises:
        PublishError: naming the table and the rows that are not what was written.
    """

    def compare(piece: Piece) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = b"".join(_checksum(chunk) for chunk in _read_chunks(fd, piece))
        finally:
            os.close(fd)
        if found != written.checksums[piece.key]:
            raise PublishError(
                f"{path}: table '{piece.table.name}': rows {piece.starts.start} to {piece.end - 1} are not in the file as "
                "they were written; check the disk and build again"
            )

    small = [("the header", 0, plan.header)]
    for parameter in plan.parameters:
        position = len(plan.header) + plan.offsets[parameter.name]
        small.append((f"parameter '{parameter.parameter}'", position, bytes(tensor_bytes(parameter.tensor))))
    with path.open("rb") as file:
        for what, position, data in small:
            file.seek(position)
            if file.read(len(data)) != data:
                raise PublishError(
                    f"{path}: {what} is not in the file as it was written; check the disk and build again"
                )
    for _ in map_ordered(compare, plan.pieces, workers):
        pass


def assemble(plan: WeightPlan, results: Mapping[str, PieceResult]) -> WrittenWeights:
    """What the pieces of a plan add up to."""
    parts: dict[str, list[PieceResult]] = {table.name: [] for table in plan.tables}
    stages: dict[str, float] = {}
    for piece in plan.pieces:
        result = results[piece.key]
        parts[piece.table.name].append(result)
        for stage, seconds in result.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    digests = {name: combine(ROWS, (result.digests for result in found)) for name, found in parts.items()}
    digests |= {parameter.name: parameter.digest for parameter in plan.parameters}
    order = [hashlib.sha256(plan.header).digest(), *(bytes.fromhex(digests[name].value) for name in plan.offsets)]
    written = [
        Table(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            serving_precision=table.serving_precision,
            row_bytes=table.row_bytes,
            offset_bytes=plan.offsets[table.name],
            digest=digests[table.name],
        )
        for table in plan.tables
    ]
    parameters = [
        StoredParameter(
            parameter=parameter.parameter,
            dtype=parameter.dtype,
            dims=list(parameter.tensor.shape),
            offset_bytes=plan.offsets[parameter.name],
            digest=digests[parameter.name],
        )
        for parameter in plan.parameters
    ]
    return WrittenWeights(
        tables=written,
        parameters=parameters,
        offset_bytes=len(plan.header),
        data_bytes=plan.data_bytes,
        digest=combine(TABLES, order),
        bytes_before={table.name: table.rows.bytes for table in plan.tables},
        sums={table.name: _add_up(parts[table.name]) for table in plan.tables},
        probes={table.name: _join_probes(table, parts[table.name]) for table in plan.tables},
        checksums={piece.key: results[piece.key].checksums for piece in plan.pieces},
        stage_seconds={stage: round(seconds, 3) for stage, seconds in stages.items()},
    )


def _add_up(results: Sequence[PieceResult]) -> ErrorSums:
    total = ErrorSums()
    for result in results:
        total.merge(result.sums)
    return total


def _join_probes(table: PlannedTable, results: Sequence[PieceResult]) -> ProbeRows:
    trained = torch.cat([result.trained for result in results])
    stored = torch.cat([result.stored for result in results])
    return ProbeRows(table.probe_ids, trained, stored)


class _Stopwatch:
    """Seconds by stage: `lap` adds what has passed since the last one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def _write_piece(fd: int, piece: Piece) -> PieceResult:
    """Reads, checks, converts, compares, measures, digests and writes the chunks of one piece."""
    table = piece.table
    ids = table.probe_ids[slice(*np.searchsorted(table.probe_ids, [piece.starts.start, piece.end]))]
    picked_trained = torch.empty(len(ids), table.embedding_dim)
    picked_stored = new_rows(len(ids), table.embedding_dim, table.precision)
    buffer = new_rows(min(piece.starts.step, table.num_embeddings), table.embedding_dim, table.precision)
    examiner = Examiner(table.name, table.precision, table.outlier_limit)
    block = block_rows(table.embedding_dim)
    digests, checksums = [], []
    watch = _Stopwatch()
    for start, trained in table.rows.chunks(piece.starts):
        watch.lap("read")
        stored = buffer[: len(trained)]
        # What fits into the cache; of a sample the blocks of the table, by which `choose` samples, too.
        edge = start % block if piece.sample > 1 else 0
        for first, last in pairwise([0, *range(block - edge, len(trained), block), len(trained)]):
            measure = (start + first) // block % piece.sample == 0
            few, few_stored = trained[first:last], stored[first:last]
            if quantized(table.precision) and not storable(few, table.precision):
                raise UnstorableError(table.name)
            watch.lap("check")
            convert_rows(few, few_stored, table.precision)
            watch.lap("convert")
            examiner.examine(start + first, few, few_stored, measure=measure)
            watch.lap("examine")
        data = tensor_bytes(stored)
        # Before SHA-256: what changes in memory from here on is found in the file by one or the other.
        checksums.append(_checksum(data))
        digests.append(hashlib.sha256(data).digest())
        watch.lap("digest")
        _write_at(fd, data, piece.position + start * table.row_bytes)
        first, last = np.searchsorted(ids, [start, start + len(trained)])
        chosen = torch.from_numpy(ids[first:last] - start)
        picked_trained[first:last] = trained[chosen].float()
        picked_stored[first:last] = stored[chosen]
        watch.lap("write")
    # Linux starts to write dirty pages back, so that fsync has little left to wait for; they stay in the cache.
    os.posix_fadvise(fd, piece.position + piece.starts.start * table.row_bytes, piece.bytes, os.POSIX_FADV_DONTNEED)
    watch.lap("flush")
    return PieceResult(
        b"".join(digests), b"".join(checksums), examiner.sums, picked_trained, picked_stored, watch.seconds
    )


def _is_right(fd: int, piece: Piece, earlier: PieceResult) -> bool:
    """Whether the file has what an earlier build says, and the snapshot is still the one that it was made of.

    The first chunk is made again: a snapshot that was written again may have the names, sizes and times of the one before.
    """
    _, trained = next(iter(piece.table.rows.chunks(piece.starts[:1])))
    table = piece.table
    stored = new_rows(len(trained), table.embedding_dim, table.precision)
    if not storable(trained, table.precision):
        return False
    convert_rows(trained, stored, table.precision)
    first = hashlib.sha256(tensor_bytes(stored)).digest()
    if not earlier.digests.startswith(first):
        return False
    return b"".join(hashlib.sha256(chunk).digest() for chunk in _read_chunks(fd, piece)) == earlier.digests


def _read_chunks(fd: int, piece: Piece) -> Iterator[memoryview]:
    """The bytes of a piece's chunks as they are in the file; each is good until the next, and shorter at the file's end."""
    row_bytes = piece.table.row_bytes
    buffer = memoryview(bytearray(piece.starts.step * row_bytes))
    for start in piece.starts:
        chunk = buffer[: (min(start + piece.starts.step, piece.end) - start) * row_bytes]
        filled = 0
        while filled < len(chunk):
            count = os.preadv(fd, [chunk[filled:]], piece.position + start * row_bytes + filled)
            if count == 0:
                break
            filled += count
        yield chunk[:filled]


def _checksum(data: memoryview) -> bytes:
    """XXH3 with 128 bits, by the object: the function of one call holds the interpreter's lock meanwhile."""
    hasher = xxhash.xxh3_128()
    hasher.update(data)
    return bytes(hasher.digest())


def _write_at(fd: int, data: memoryview, position: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, data[written:], position + written)
