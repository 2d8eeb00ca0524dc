"""Chooses the precision of tables that are left to `auto`: what each costs is measured on their rows, in one pass.

With figures to keep to, a table gets the precision of the fewest bytes that keeps to them. With a byte budget for the
artifact, the tables get those of the least total error that fit into it: a multiple-choice knapsack, solved exactly.
The total error is the sum over features of the squared relative L2 error that a looked-up row has on average: each row
counts as often as it was accessed where there are counts, and each table where all that are left to `auto` have them.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch

from export.access import AccessCounts
from export.accuracy import (
    ErrorSums,
    Examiner,
    ProbeRows,
    block_rows,
    check_budget,
    measure_lookups,
    outlier_limit,
    table_accuracy,
)
from export.config import EmbeddingBagConfig, Precision, ReleaseConfig
from export.errors import GateError
from export.progress import Progress
from export.quantize import convert_rows, describe_unstorable, new_rows, row_format, serving_precision, storable
from export.snapshots import TableRows
from runtime_py.manifest import PrecisionChoice, TableAccuracy
from runtime_py.parallel import map_ordered

__all__ = ["Candidate", "TableToMeasure", "choose_precisions", "measure_candidates"]

_GROUP_CHUNKS = 64


@dataclass(frozen=True)
class TableToMeasure:
    """A table, its rows in the snapshot, the bags of ids to measure lookups on, and the precisions to measure."""

    config: EmbeddingBagConfig
    rows: TableRows
    bags: list[np.ndarray]
    precisions: list[Precision]


@dataclass(frozen=True)
class Candidate:
    """What one precision would make of a table.

    `problems` are the budgets that it does not keep to, or why its rows cannot be stored (`accuracy` is None then).
    `relative_square` is the mean squared relative L2 error of a row, by access where it was counted; `seconds` is what
    reading, converting and examining all rows takes on one core.
    """

    precision: Precision
    bytes: int
    accuracy: TableAccuracy | None
    problems: list[str]
    relative_square: float
    seconds: float


@dataclass
class _Measured:
    """What is known of a table in one precision."""

    sums: ErrorSums = field(default_factory=ErrorSums)
    stored: bool = True
    seconds: float = 0.0

    def merge(self, other: "_Measured") -> None:
        self.sums.merge(other.sums)
        self.stored &= other.stored
        self.seconds += other.seconds


def measure_candidates(
    config: ReleaseConfig,
    tables: Sequence[TableToMeasure],
    workers: int,
    sample: int,
    progress: Progress,
) -> dict[str, list[Candidate]]:
    """Reads tables once, and measures what each of some precisions would make of their rows.

    Args:
        config: the release, for its budgets.
        tables: what to read.
        workers: threads.
        sample: of every so many blocks (`block_rows`) one is read; 1 reads all rows.
        progress: is told of bytes as trained.

    Raises:
        AccessCountsError: counts cannot be read, or do not fit their table.
        SnapshotError: rows cannot be read.
        RowsError: a table has values that none of its precisions can store.
        GateError: a stored value is not what the independent reference makes of the trained one.
    """
    threads = torch.get_num_threads()
    progress.start({table.config.name: _bytes_to_read(table.rows, _starts(table.rows, sample)) for table in tables})
    candidates = {}
    try:
        for table in tables:
            candidates[table.config.name] = _measure_table(config, table, workers, sample, progress)
    finally:
        torch.set_num_threads(threads)
    return candidates


def _measure_table(
    config: ReleaseConfig, table: TableToMeasure, workers: int, sample: int, progress: Progress
) -> list[Candidate]:
    name, rows, precisions = table.config.name, table.rows, table.precisions
    ids = np.unique(np.concatenate(table.bags))
    limits = {value: outlier_limit(value, config.budgets(table.config, value)) for value in precisions}
    step = block_rows(rows.embedding_dim)  # the grid by which a build samples, too
    starts = _starts(rows, sample)
    groups = [starts[first : first + _GROUP_CHUNKS] for first in range(0, len(starts), _GROUP_CHUNKS)]
    with ExitStack() as stack:
        counts = None
        if table.config.access_counts is not None:
            source = AccessCounts(name, rows.num_embeddings, table.config.access_counts)
            counts = stack.enter_context(source.by_row())

        def run(group: range) -> tuple[dict[Precision, _Measured], list[np.ndarray], list[torch.Tensor]]:
            torch.set_num_threads(1)  # of this thread: the groups are what runs in parallel
            examiners = {value: Examiner(name, value, limits[value], counts) for value in precisions}
            measured = {value: _Measured(examiners[value].sums) for value in precisions}
            buffers = {
                value: new_rows(block_rows(rows.embedding_dim), rows.embedding_dim, value) for value in precisions
            }
            seen, picked = [], []
            began = time.perf_counter()
            for start, chunk in _chunks(rows, group, step):
                reading = time.perf_counter() - began
                for part in measured.values():
                    part.seconds += reading
                _measure_chunk(start, chunk, examiners, measured, buffers)
                inside = ids[slice(*np.searchsorted(ids, [start, start + len(chunk)]))]
                if len(inside):
                    seen.append(inside)
                    picked.append(chunk[torch.from_numpy(inside - start)].float())
                began = time.perf_counter()
            return measured, seen, picked

        totals = {value: _Measured() for value in precisions}
        seen, picked = [], []
        for group, (parts, some, trained) in zip(groups, map_ordered(run, groups, workers), strict=True):
            for value, part in parts.items():
                totals[value].merge(part)
            seen += some
            picked += trained
            progress.advance(name, _bytes_to_read(rows, group))
    if not any(part.stored for part in totals.values()):
        raise describe_unstorable(name, rows.chunks(range(0, rows.num_embeddings, step)), precisions[0])
    found = np.concatenate([ids[:0], *seen])
    trained_rows = torch.cat([torch.empty(0, rows.embedding_dim), *picked])
    return [_candidate(config, table, value, totals[value], sample, found, trained_rows) for value in precisions]


def _starts(rows: TableRows, sample: int) -> range:
    """The first rows of the blocks that are read."""
    return range(0, rows.num_embeddings, block_rows(rows.embedding_dim) * sample)


def _bytes_to_read(rows: TableRows, starts: range) -> int:
    """What the blocks at `starts` take as trained."""
    step = block_rows(rows.embedding_dim)
    count = sum(min(step, rows.num_embeddings - start) for start in starts)
    return count * rows.embedding_dim * rows.dtype.itemsize


def _chunks(rows: TableRows, starts: range, step: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Chunks of `step` rows from each of `starts` on, which may leave rows out between them."""
    if starts.step == step:
        yield from rows.chunks(starts)
        return
    for start in starts:
        yield from rows.chunks(range(start, start + step, step))


def _measure_chunk(
    start: int,
    chunk: torch.Tensor,
    examiners: Mapping[Precision, Examiner],
    measured: Mapping[Precision, _Measured],
    buffers: Mapping[Precision, torch.Tensor],
) -> None:
    step = block_rows(chunk.shape[1])
    for first in range(0, len(chunk), step):
        block = chunk[first : first + step]
        for value, examiner in examiners.items():
            began = time.perf_counter()
            if measured[value].stored and storable(block, value):
                stored = buffers[value][: len(block)]
                convert_rows(block, stored, value)
                examiner.examine(start + first, block, stored)
            else:
                measured[value].stored = False
            measured[value].seconds += time.perf_counter() - began


def _candidate(
    config: ReleaseConfig,
    table: TableToMeasure,
    precision: Precision,
    measured: _Measured,
    sample: int,
    ids: np.ndarray,
    trained: torch.Tensor,
) -> Candidate:
    name, rows = table.config.name, table.rows
    shape = rows.num_embeddings, rows.embedding_dim
    size = shape[0] * row_format(precision).row_bytes(shape[1])
    seconds = measured.seconds * sample
    if not measured.stored:
        problem = f"table '{name}': has values that {precision} cannot store"
        return Candidate(precision, size, None, [problem], math.inf, seconds)
    stored = new_rows(len(ids), shape[1], precision)
    convert_rows(trained, stored, precision)
    bags = [bag[np.isin(bag, ids)] for bag in table.bags]  # of a sample, what it holds
    lookups = measure_lookups(ProbeRows(ids, trained, stored), precision, bags, table.config)
    accuracy = table_accuracy(name, precision, shape, rows.bytes, measured.sums, lookups)
    problems = [line for budget in config.budgets(table.config, precision) for line in check_budget(accuracy, budget)]
    return Candidate(precision, size, accuracy, problems, measured.sums.relative_square(), seconds)


# --- The choice ------------------------------------------------------------------------------------------------------


def choose_precisions(
    config: ReleaseConfig,
    candidates: Mapping[str, Sequence[Candidate]],
    other_bytes: int,
    accesses: Mapping[str, float],
) -> list[PrecisionChoice]:
    """The precision of every table that is left to `auto`, in configuration order, and why.

    Args:
        config: the release.
        candidates: what was measured of these tables, by name.
        other_bytes: what the artifact takes besides their rows.
        accesses: how often each of them is looked up: a count, or its number of features.

    Raises:
        GateError: no precision of a table keeps to its budgets, or the byte budget cannot be met; by how much.
    """
    auto = config.serving.auto
    names = [
        table.name for table in config.large_embeddings.tables if config.serving_precision(table) is Precision.AUTO
    ]
    if auto is None:
        return []
    fit = {name: [entry for entry in candidates[name] if not entry.problems] for name in names}
    for name, kept in fit.items():
        if not kept:
            problems = "; ".join(entry.problems[0].partition(": ")[2] for entry in candidates[name])
            raise GateError(f"table '{name}': no precision of serving.auto.precisions keeps to its budgets: {problems}")
    if auto.max_bytes is None:
        picked = {name: min(kept, key=lambda entry: entry.bytes) for name, kept in fit.items()}
        aim = "the fewest bytes that keep to its budgets"
    else:
        room = int(auto.max_bytes) - other_bytes
        least = sum(min(entry.bytes for entry in kept) for kept in fit.values())
        if least > room:
            raise GateError(
                f"serving.auto.max_bytes is {int(auto.max_bytes):,}: the artifact needs at least {other_bytes + least:,} "
                f"bytes ({least:,} for rows of tables left to auto, {other_bytes:,} for all else), {least - room:,} more; "
                "raise it, loosen the budgets, or offer a narrower type in serving.auto.precisions"
            )
        picked = _solve(fit, accesses, room)
        aim = f"the least total error of all tables within {int(auto.max_bytes):,} bytes"
    return [
        PrecisionChoice(name, serving_precision(entry.precision), f"{aim}: {_compare(entry, candidates[name])}")
        for name, entry in picked.items()
    ]


def _compare(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    """The figures of the one that was chosen, and what keeps the next narrower one from being it."""
    narrower = [entry for entry in candidates if entry.bytes < chosen.bytes]
    text = f"{chosen.precision} has rows with a relative L2 error of {math.sqrt(chosen.relative_square):.3g}"
    if not narrower:
        return f"{text}, and nothing is narrower"
    following = max(narrower, key=lambda entry: entry.bytes)
    if following.problems:
        problem = following.problems[0].partition(": ")[2].partition(" (")[0]
        return f"{text}; {following.precision}: {problem}"
    return f"{text}, {following.precision} {math.sqrt(following.relative_square):.3g}"


def _solve(fit: Mapping[str, Sequence[Candidate]], accesses: Mapping[str, float], room: int) -> dict[str, Candidate]:
    """One candidate a table, of the least total error, that take at most `room` bytes; such a choice exists.

    An integer program: x = 1 for the candidates that are taken, one a table. The solver works in float64 with a tolerance,
    so the bytes are added up again as integers, and what is over is taken off its limit.
    """
    from scipy import optimize, sparse  # takes a moment, and only a byte budget needs it

    entries = [(name, entry) for name, kept in fit.items() for entry in kept]
    errors = np.array([accesses[name] * entry.relative_square for name, entry in entries])
    # The solver stops at a gap of 1e-6. A term far below the errors that count makes the narrowest of equal ones win.
    sizes = np.array([entry.bytes for _, entry in entries], np.float64)
    costs = 1e6 * errors / (errors.max() or 1.0) + 1e-3 * sizes / sizes.max()
    numbers = {name: number for number, name in enumerate(fit)}
    tables = [numbers[name] for name, _ in entries]
    one_each = sparse.csr_array((np.ones(len(entries)), (tables, range(len(entries)))))
    limit = room
    while True:
        solution = optimize.milp(
            costs,
            integrality=np.ones(len(entries)),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(sizes[None, :] / room, -np.inf, limit / room),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if solution.x is None:  # only within the tolerance of the smallest choice: take that
            smallest = {name: min(kept, key=lambda entry: entry.bytes) for name, kept in fit.items()}
            return _widen(smallest, fit, accesses, room)
        picked = {name: entry for (name, entry), taken in zip(entries, solution.x, strict=True) if taken > 0.5}
        over = sum(entry.bytes for entry in picked.values()) - room
        if over <= 0:
            return _widen(picked, fit, accesses, room)
        limit -= over


def _widen(
    picked: dict[str, Candidate], fit: Mapping[str, Sequence[Candidate]], accesses: Mapping[str, float], room: int
) -> dict[str, Candidate]:
    """Spends bytes that are left on tables whose errors are too small beside others' for the solver to see."""
    left = room - sum(entry.bytes for entry in picked.values())
    for name in sorted(picked, key=lambda name: (-accesses[name] * picked[name].relative_square, name)):
        now = picked[name]
        better = [e for e in fit[name] if e.relative_square < now.relative_square and e.bytes - now.bytes <= left]
        if better:
            picked[name] = min(better, key=lambda entry: (entry.relative_square, entry.bytes))
            left -= picked[name].bytes - now.bytes
    return picked
