"""Parity question 1 and the accuracy of every row: the staged rows against the snapshot's, all of them, in one pass.

The rows are read a second time, from the snapshot and from the staged file, and the stored bytes are derived again with
numpy, independently of the torch code that wrote them. On the way the pass picks up the few rows that the lookups of
`export.parity` need, so that no later check reads a table again.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch

from export.config import Budget, Precision
from export.errors import GateError
from export.quantize import STORED_TYPES
from export.weight_file import PlannedTable
from runtime_py.digests import chunk_groups, chunk_rows
from runtime_py.manifest import TableAccuracy
from runtime_py.parallel import map_ordered
from runtime_py.weights import WeightFile, tensor_bytes

__all__ = ["ProbeRows", "check_budget", "examine_table"]


@dataclass(frozen=True)
class ProbeRows:
    """Some rows of a table by id (ascending): as trained, in float32, and as stored, in the stored type. [n, D]."""

    ids: np.ndarray
    trained: torch.Tensor
    stored: torch.Tensor


def examine_table(
    table: PlannedTable, weights: WeightFile, probe_ids: np.ndarray, workers: int
) -> tuple[TableAccuracy, ProbeRows]:
    """Compares every stored row of a table with the snapshot's, and picks up the rows `probe_ids` (ascending).

    Raises:
        GateError: a stored value is not what numpy makes of the snapshot's.
    """
    stored_table = weights.manifest.table[table.name]
    size = min(chunk_rows(table.row_bytes), table.num_embeddings)
    stored_type = STORED_TYPES[table.precision]
    probes = ProbeRows(
        probe_ids,
        torch.empty(len(probe_ids), table.embedding_dim),
        torch.empty(len(probe_ids), table.embedding_dim, dtype=stored_type),
    )

    def run(starts: range) -> _Sums:
        sums = _Sums()
        trained_buffer = torch.empty(size, table.embedding_dim, dtype=table.rows.dtype)
        stored_buffer = torch.empty(size, table.embedding_dim, dtype=stored_type)
        for start in starts:
            count = min(size, table.num_embeddings - start)
            trained, stored = trained_buffer[:count], stored_buffer[:count]
            table.rows.read(start, trained)
            weights.read_rows(stored_table, start, tensor_bytes(stored))
            _check_rows(table, start, trained, stored)
            sums.add(trained.float(), stored.float())
            first, last = np.searchsorted(probe_ids, [start, start + count])
            picked = torch.from_numpy(probe_ids[first:last] - start)
            probes.trained[first:last] = trained[picked].float()
            probes.stored[first:last] = stored[picked]
        return sums

    total = _Sums()
    for sums in map_ordered(run, chunk_groups(table.num_embeddings, table.row_bytes), workers):
        total.merge(sums)
    return total.result(table), probes


def _check_rows(table: PlannedTable, start: int, trained: torch.Tensor, stored: torch.Tensor) -> None:
    """Question 1: the stored bytes are those of the reference, numpy's own conversion."""
    reference = trained.numpy().astype({Precision.FP32: np.float32, Precision.FP16: np.float16}[table.precision])
    integers = np.dtype(f"u{reference.dtype.itemsize}")
    if not np.array_equal(reference.view(integers), stored.numpy().view(integers)):
        different = reference.view(integers) != stored.numpy().view(integers)
        row, column = (int(part) for part in np.argwhere(different)[0])
        raise GateError(
            f"table '{table.name}': row {start + row}, column {column} is stored as {stored[row, column].item()!r}, the "
            f"reference makes {reference[row, column].item()!r} of the snapshot's {trained[row, column].item()!r}"
        )


class _Sums:
    """Error sums over chunks: float32 within a chunk (1 MiB of rows at most), float64 across chunks."""

    def __init__(self) -> None:
        self.largest = self.absolute = self.error_square = self.square = self.product = 0.0

    def add(self, trained: torch.Tensor, stored: torch.Tensor) -> None:
        x = trained.reshape(-1)
        e = stored.reshape(-1) - x
        self.largest = max(self.largest, _magnitude(e))
        self.absolute += float(e.abs().sum())  # summed pairwise
        if not 1e-15 < _magnitude(x) < 1e15:  # float32 squares would leave its range
            x, e = x.double(), e.double()
        self.error_square += float(torch.dot(e, e))
        self.square += float(torch.dot(x, x))
        self.product += float(torch.dot(x, e))

    def merge(self, other: "_Sums") -> None:
        self.largest = max(self.largest, other.largest)
        self.absolute += other.absolute
        self.error_square += other.error_square
        self.square += other.square
        self.product += other.product

    def result(self, table: PlannedTable) -> TableAccuracy:
        relative_l2 = cosine = None
        if self.square > 0:
            relative_l2 = math.sqrt(self.error_square / self.square)
            stored_square = self.square + 2 * self.product + self.error_square
            # All rows rounded to zero: no direction is left.
            cosine = (self.square + self.product) / math.sqrt(self.square * stored_square) if stored_square > 0 else 0.0
            cosine = min(cosine, 1.0)
        return TableAccuracy(
            table=table.name,
            serving_precision=table.serving_precision,
            rows=table.num_embeddings,
            bytes_before=table.rows.bytes,
            bytes_after=table.bytes,
            max_absolute_error=self.largest,
            mean_absolute_error=self.absolute / (table.num_embeddings * table.embedding_dim),
            relative_l2=relative_l2,
            cosine=cosine,
        )


def _magnitude(values: torch.Tensor) -> float:
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))


def check_budget(accuracy: TableAccuracy, budget: Budget) -> list[str]:
    """What of a table's accuracy is outside its budget, one line a figure."""
    figures = asdict(accuracy)
    names = {"max_relative_l2": "relative_l2", "min_cosine": "cosine"}
    lines = []
    for name, limit in budget:
        figure = figures[names.get(name, name)]
        if limit is None or figure is None:
            continue
        if figure < limit if name == "min_cosine" else figure > limit:
            side = "below" if name == "min_cosine" else "above"
            lines.append(
                f"table '{accuracy.table}': {names.get(name, name)} is {figure:.6g}, {side} its budget {name}: {limit:g} "
                f"({accuracy.serving_precision}); choose a wider serving_precision or another budget"
            )
    return lines
