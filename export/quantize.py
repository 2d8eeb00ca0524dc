"""From a chunk of trained rows to canonical rows, and the refusal of what they cannot hold.

A value that is NaN or infinite, or that the serving precision would turn into infinity, is never stored: a table with
one is refused, with the first such value and how many of each kind there are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from export.config import Precision
from export.errors import RowsError

__all__ = ["STORED_TYPES", "convert_rows", "describe_unstorable", "storable"]

STORED_TYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16}

# The smallest magnitude that rounds to infinity. fp16: halfway between its largest value, 65504, and 2**16 (IEEE 754,
# round half to even). fp32: infinity itself, since sources are fp32 or fp16.
_OVERFLOWS = {Precision.FP32: float("inf"), Precision.FP16: 65520.0}


def storable(rows: torch.Tensor, precision: Precision) -> bool:
    """Whether every value of `rows` is finite and stays finite in `precision`; one pass, and NaN fails it."""
    low, high = torch.aminmax(rows)
    limit = _OVERFLOWS[precision]
    return bool(-limit < low) and bool(high < limit)


def convert_rows(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Writes float32 or float16 `rows` [n, D] into `out` [n, D] of the stored type: round to nearest even."""
    out.copy_(rows)


@dataclass
class _Unstorable:
    """Counts by kind, and the first value of any kind."""

    counts: dict[str, int] = field(default_factory=dict)
    first: str = ""


def describe_unstorable(table: str, chunks: Iterable[tuple[int, torch.Tensor]], precision: Precision) -> RowsError:
    """The error for a table that `storable` has refused, from all of its chunks (first row, rows [n, D])."""
    found = _Unstorable()
    limit = _OVERFLOWS[precision]
    for start, rows in chunks:
        if storable(rows, precision):
            continue
        magnitudes = rows.float().abs()
        kinds = {
            "NaN": magnitudes.isnan(),
            "infinite": magnitudes.isinf(),
            f"beyond the range of {precision}": (magnitudes >= limit) & ~magnitudes.isinf(),
        }
        for kind, mask in kinds.items():
            found.counts[kind] = found.counts.get(kind, 0) + int(mask.sum())
        bad = torch.stack(list(kinds.values())).any(0)
        if not found.first and bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            found.first = f"row {start + row}, column {column} is {rows[row, column].item()!r}"
    counts = {kind: count for kind, count in found.counts.items() if count}
    finite = counts.keys().isdisjoint(("NaN", "infinite"))
    advice = "choose a wider serving_precision or mend the training" if finite else "mend the training"
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return RowsError(f"table '{table}': cannot be stored as {precision}: {found.first}; in all: {listed}; {advice}")
