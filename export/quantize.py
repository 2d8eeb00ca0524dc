"""From a chunk of trained rows to canonical rows, and the refusal of what they cannot hold.

A value that is NaN or infinite, or that the serving precision would turn into infinity, is never stored: a table with
one is refused, with the first such value and how many of each kind there are.

int8, int4 and int2 are quantized row by row, by the operator that torchrec quantizes with: `bias` is the row's smallest
value, `scale` a 255th (15th, 3rd) of the way to its largest, both rounded to fp16. What these two cannot hold is refused.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import cast

import torch

from export.config import Precision
from export.errors import RowsError
from runtime_py.manifest import ROW_FORMATS, RowFormat, ServingPrecision

__all__ = [
    "OVERFLOWS",
    "SCALE_BIAS_BYTES",
    "convert_rows",
    "describe_unstorable",
    "levels",
    "new_rows",
    "quantized",
    "row_format",
    "serving_precision",
    "storable",
]

SCALE_BIAS_BYTES = 4

# The smallest magnitude that rounds to infinity. fp16: halfway between its largest value, 65504, and 2**16 (IEEE 754,
# round half to even). fp32: infinity itself, since sources are fp32 or fp16.
OVERFLOWS = {Precision.FP32: float("inf"), Precision.FP16: 65520.0}
_FP16_OVERFLOW = 65520.0


def serving_precision(precision: Precision) -> ServingPrecision:
    """What the manifest calls a precision other than `auto`."""
    return cast(ServingPrecision, precision.value)


def row_format(precision: Precision) -> RowFormat:
    """How rows of a precision other than `auto` are stored."""
    return ROW_FORMATS[serving_precision(precision)]


def quantized(precision: Precision) -> bool:
    """Whether rows of this precision are codes behind a scale and a bias of their own."""
    return bool(row_format(precision).scale_bias_bytes)


def levels(precision: Precision) -> int:
    """The largest code of a quantized precision: 255, 15 or 3."""
    return (1 << row_format(precision).bits) - 1


def new_rows(count: int, embedding_dim: int, precision: Precision) -> torch.Tensor:
    """An uninitialised buffer for `count` canonical rows: float32 or float16 [count, D], uint8 [count, R] if quantized."""
    kinds = {Precision.FP32: torch.float32, Precision.FP16: torch.float16}
    return torch.empty(count, row_format(precision).columns(embedding_dim), dtype=kinds.get(precision, torch.uint8))


def storable(rows: torch.Tensor, precision: Precision) -> bool:
    """Whether every value of `rows` [n, D] is finite and stays finite in `precision`; NaN fails it."""
    low, high = (float(bound) for bound in torch.aminmax(rows))
    if not quantized(precision):
        limit = OVERFLOWS[precision]
        return -limit < low and high < limit
    if low >= -65504.0 and high <= 65504.0:  # fp16 holds any bias, and a third of any span
        return True
    return not bool(_unstorable_rows(rows, precision).any())


def convert_rows(rows: torch.Tensor, out: torch.Tensor, precision: Precision) -> None:
    """Writes storable float32 or float16 `rows` [n, D] into `out`, as `new_rows` makes it.

    fp16 is rounded to nearest, ties to even. Codes, scale and bias are FBGEMM's, which puts the scale and the bias behind
    the codes; its lookup reads them before.
    """
    if not quantized(precision):
        out.copy_(rows)
        return
    fused = _quantize_operator()(rows, row_format(precision).bits)
    codes = fused.shape[1] - SCALE_BIAS_BYTES
    out[:, SCALE_BIAS_BYTES:] = fused[:, :codes]
    out[:, :SCALE_BIAS_BYTES] = fused[:, codes:]


@cache
def _quantize_operator() -> Callable[[torch.Tensor, int], torch.Tensor]:
    import fbgemm_gpu  # noqa: F401  # registers it; takes half a second

    operator: Callable[[torch.Tensor, int], torch.Tensor] = (
        torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf
    )
    return operator


def _unstorable_rows(rows: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Which rows [n, D] a quantized precision cannot hold, bool [n]: not finite, or beyond the bias or the scale."""
    low, high = torch.amin(rows, 1).float(), torch.amax(rows, 1).float()
    scale = (high - low.half().float()) / levels(precision)  # as FBGEMM computes it, before it rounds to fp16
    return ~((low.abs() < _FP16_OVERFLOW) & (scale.abs() < _FP16_OVERFLOW))


@dataclass
class _Unstorable:
    """Counts by kind, and the first value of any kind."""

    counts: dict[str, int] = field(default_factory=dict)
    first: str = ""


def describe_unstorable(table: str, chunks: Iterable[tuple[int, torch.Tensor]], precision: Precision) -> RowsError:
    """The error for a table that `storable` has refused, from all of its chunks (first row, rows [n, D])."""
    found = _Unstorable()
    for start, rows in chunks:
        if storable(rows, precision):
            continue
        kinds = _kinds(rows, precision)
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


def _kinds(rows: torch.Tensor, precision: Precision) -> dict[str, torch.Tensor]:
    """Which values of `rows` [n, D] cannot be stored, and why."""
    values = rows.float()
    kinds = {"NaN": values.isnan(), "infinite": values.isinf()}
    if not quantized(precision):
        kinds[f"beyond the range of {precision}"] = (values.abs() >= OVERFLOWS[precision]) & ~values.isinf()
        return kinds
    finite = values.isfinite().all(1, keepdim=True)
    low = values == torch.amin(values, 1, keepdim=True)
    high = values == torch.amax(values, 1, keepdim=True)
    bias = low & finite & (values.abs() >= _FP16_OVERFLOW)
    wide = _unstorable_rows(rows, precision)[:, None] & finite & ~bias.any(1, keepdim=True)
    kinds["beyond the range of a row's fp16 bias (its smallest value)"] = _first_in_row(bias)
    kinds["too far from its row's smallest value for an fp16 scale"] = _first_in_row(high & wide)
    return kinds


def _first_in_row(mask: torch.Tensor) -> torch.Tensor:
    return mask & (mask.cumsum(1) == 1)
