"""Parity question 1, and what storing rows cost: figures over every row of a table.

What float32 becomes in fp16 is derived again from the definition of the type, without the instruction that converts; every
other pair of types is exact, and the stored value must equal the trained one. Both happen to a chunk while it is in the
cache, in the one pass that writes it; that the file holds these bytes is what its digests say.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch

from export.config import Budget, Precision
from export.errors import GateError
from runtime_py.manifest import TableAccuracy

__all__ = ["ErrorSums", "Examiner", "ProbeRows", "check_budget"]

_BLOCK = 1 << 18  # values


@dataclass(frozen=True)
class ProbeRows:
    """Some rows of a table by id (ascending): as trained, in float32, and as stored, in the stored type. [n, D]."""

    ids: np.ndarray
    trained: torch.Tensor
    stored: torch.Tensor


@dataclass
class ErrorSums:
    """Error sums over blocks of values: float32 within a block, float64 across blocks.

    With x the trained and y the stored values and e = y - x: the largest |e|, and the sums of |e|, e * e, x * x, x * e.
    """

    largest: float = 0.0
    absolute: float = 0.0
    error_square: float = 0.0
    square: float = 0.0
    product: float = 0.0

    def merge(self, other: "ErrorSums") -> None:
        """Adds the sums of other chunks."""
        self.largest = max(self.largest, other.largest)
        self.absolute += other.absolute
        self.error_square += other.error_square
        self.square += other.square
        self.product += other.product

    def relative_l2(self) -> float | None:
        """||e|| / ||x||, or None where all trained values are zero."""
        return math.sqrt(self.error_square / self.square) if self.square > 0 else None

    def cosine(self) -> float | None:
        """x . y / (||x|| ||y||), or None where all trained values are zero; 0 where only the stored ones are."""
        if not self.square > 0:
            return None
        stored_square = self.square + 2 * self.product + self.error_square
        if not stored_square > 0:
            return 0.0
        return min((self.square + self.product) / math.sqrt(self.square * stored_square), 1.0)


class Examiner:
    """Compares stored chunks with what they must be, and adds up how far they are from the trained ones.

    It goes through a chunk in blocks, with buffers of its own: smaller ones pay for more calls, larger ones for the memory.
    """

    def __init__(self, table: str, precision: Precision) -> None:
        self._table, self._precision = table, precision
        self._scratch = torch.empty(4, _BLOCK)
        self.sums = ErrorSums()

    def examine(self, start: int, trained: torch.Tensor, stored: torch.Tensor) -> None:
        """Takes finite trained rows [n, D], the first of them row `start` of the table, and the same rows as stored.

        Raises:
            GateError: naming the first value that is not, bit for bit, what it must be.
        """
        blocks = zip(trained.reshape(-1).split(_BLOCK), stored.reshape(-1).split(_BLOCK), strict=True)
        for number, (trained_block, stored_block) in enumerate(blocks):
            x, y, e, m = self._scratch[:, : len(trained_block)]
            x = trained_block if trained_block.dtype is torch.float32 else x.copy_(trained_block)
            y.copy_(stored_block)
            expected = _round_to_fp16(x, e, m) if self._precision is Precision.FP16 else x
            same = np.equal(
                expected.numpy().view(np.int32), y.numpy().view(np.int32)
            )  # torch.equal is six times slower
            if not same.all():
                place = int(same.argmin())
                row, column = divmod(number * _BLOCK + place, trained.shape[1])
                raise GateError(
                    f"table '{self._table}': row {start + row}, column {column} is stored as {y[place].item()!r}, the "
                    f"reference makes {expected[place].item()!r} of the snapshot's {x[place].item()!r}"
                )
            self._measure(x, y, e)

    def _measure(self, x: torch.Tensor, y: torch.Tensor, e: torch.Tensor) -> None:
        sums = self.sums
        square = float(torch.dot(x, x))
        low, high = torch.aminmax(torch.sub(y, x, out=e))
        largest = max(-float(low), float(high))
        sums.largest = max(sums.largest, largest)
        if not largest and not square and not x.any():
            return
        wide = not 1e-30 < square < 1e30 or 0 < largest < 1e-15  # float32 squares would leave its range
        if wide:
            x, e = x.double(), e.double()
        sums.square += float(torch.dot(x, x)) if wide else square
        if largest:
            sums.error_square += float(torch.dot(e, e))
            sums.product += float(torch.dot(x, e))
            sums.absolute += float(e.abs_().sum())  # summed pairwise


def _round_to_fp16(x: torch.Tensor, out: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """`x`, float32 and below 65520, rounded to binary16 by float32 arithmetic alone: in `out`, float32. `m` is scratch.

    binary16 has 11 significant bits and no step below 2**-24 (IEEE 754). With 2**E <= |x| < 2**(E + 1), the float32 numbers
    around m = 1.5 * 2**(E + 13) are 2**(E - 10) apart, so that x + m is x rounded to 11 bits, to nearest and ties to even,
    and subtracting m is exact. Below E = -14 the step does not shrink: m is at least 1.5 * 2**-1.
    """
    bits, pattern = x.view(torch.int32), m.view(torch.int32)
    torch.bitwise_and(bits, 0x7F800000, out=pattern)  # m = 2**E
    m.mul_(1.5 * 2**13).clamp_(min=0.75)
    torch.add(x, m, out=out)
    out.sub_(m)
    torch.bitwise_and(bits, -(2**31), out=pattern)  # what rounds to zero keeps its sign
    out.view(torch.int32).bitwise_or_(pattern)
    return out


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
