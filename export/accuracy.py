"""Parity question 1, and what storing rows cost: figures over every row of a table.

What stored rows must be is derived again from the definition of their type, in float32 arithmetic, without the code that
converts: fp16 without the instruction, codes without FBGEMM's operator. Any difference, in a single bit, fails the build.
Both happen to a block of rows while it is in the cache, in the one pass that writes it; that the file holds these bytes is
what its digests say.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from export.config import DEFAULT_BUDGETS, Budget, EmbeddingBagConfig, Pooling, Precision
from export.errors import GateError
from export.quantize import SCALE_BIAS_BYTES, levels, quantized, row_format, serving_precision
from runtime_py.manifest import TableAccuracy

__all__ = [
    "ErrorSums",
    "Examiner",
    "LookupErrors",
    "ProbeRows",
    "block_rows",
    "check_budget",
    "dequantize",
    "describe_histogram",
    "measure_lookups",
    "outlier_limit",
    "table_accuracy",
]

_OF_THREAD = threading.local()
_BLOCK_VALUES = (
    1 << 19
)  # smaller blocks pay for more calls, in which threads wait for one another; larger ones leave the cache
_SHOWN_ROWS = 10
_DOMINANT = 0.9  # of a row's squared norm: what one value has in an outlier row
_LEAST_SQUARE = 1e-30  # of a stored row beside its trained one, so that no rounding makes it negative
_SAFE_SQUARES = (1e-30, 1e30)  # squared norms that float32 adds up without leaving its range
_OF_RATED_ROWS = ("row_relative_l2", "mean_cosine", "worst_cosine")  # figures that have no value where all rows vanish
_DIGITS = 9  # of a figure: what the order in which float64 sums are added up cannot change

# Rows are counted by their relative L2 error in half octaves: bin k holds 2**(k / 2) <= error < 2**((k + 1) / 2), the first
# one what is smaller as well, the last one what is larger.
_FIRST_BIN, _BINS = -48, 52


def block_rows(embedding_dim: int) -> int:
    """How many rows to convert and examine at a time."""
    return max(1, _BLOCK_VALUES // embedding_dim)


@dataclass(frozen=True)
class ProbeRows:
    """Some rows of a table by id (ascending): as trained, in float32 [n, D], and as stored (`quantize.new_rows`)."""

    ids: np.ndarray
    trained: torch.Tensor
    stored: torch.Tensor

    def only(self, ids: np.ndarray) -> "ProbeRows":
        """Those of some of the ids, ascending."""
        places = torch.from_numpy(np.searchsorted(self.ids, ids))
        return ProbeRows(ids, self.trained[places], self.stored[places])


@dataclass
class ErrorSums:
    """Error sums over rows: float32 within a row, float64 across rows.

    With x the trained and y the stored values and e = y - x: the largest |e|, the sums of |e|, e * e, x * x, x * e. Of
    `rated_rows`, those that are zero neither as trained nor as stored, `relative` adds up the squared relative L2 error,
    `cosine` the cosine, and `accessed` and `accessed_relative` the row's count of accesses and that times its error.
    `worst` are the rows with the lowest cosines, as (cosine, relative L2 error, row), and `outliers` the worst outlier
    rows, as (relative L2 error of the other values, largest value, row).
    """

    rows: int = 0
    largest: float = 0.0
    absolute: float = 0.0
    error_square: float = 0.0
    square: float = 0.0
    product: float = 0.0
    rated_rows: int = 0
    relative: float = 0.0
    cosine: float = 0.0
    accessed: float = 0.0
    accessed_relative: float = 0.0
    constant_rows: int = 0
    vanished_rows: int = 0
    outlier_rows: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * _BINS)
    worst: list[list[float]] = field(default_factory=list)
    outliers: list[list[float]] = field(default_factory=list)

    def merge(self, other: "ErrorSums") -> None:
        """Adds the sums of other rows."""
        self.largest = max(self.largest, other.largest)
        for name in _ADDED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.histogram = [left + right for left, right in zip(self.histogram, other.histogram, strict=True)]
        self.worst = sorted([*self.worst, *other.worst], key=lambda entry: (entry[0], entry[2]))[:_SHOWN_ROWS]
        self.outliers = sorted([*self.outliers, *other.outliers], key=lambda entry: (-entry[0], entry[2]))[:_SHOWN_ROWS]

    def relative_l2(self) -> float | None:
        """||e|| / ||x||, or None where all trained values are zero."""
        return math.sqrt(self.error_square / self.square) if self.square > 0 else None

    def relative_square(self) -> float:
        """The mean over rated rows of ||e||^2 / ||x||^2, by access where it was counted; without any, 1 if rows vanished."""
        if self.accessed > 0:
            return self.accessed_relative / self.accessed
        return self.relative / self.rated_rows if self.rated_rows else float(self.vanished_rows > 0)

    def row_relative_l2(self) -> float | None:
        """The root mean square over rated rows of ||e|| / ||x||."""
        return math.sqrt(self.relative / self.rated_rows) if self.rated_rows else None

    def mean_cosine(self) -> float | None:
        """The mean over rated rows of x . y / (||x|| ||y||)."""
        return min(self.cosine / self.rated_rows, 1.0) if self.rated_rows else None


_ADDED = (
    *("rows", "absolute", "error_square", "square", "product", "rated_rows", "relative", "cosine", "accessed"),
    *("accessed_relative", "constant_rows", "vanished_rows", "outlier_rows"),
)


class Examiner:
    """Compares stored rows with what they must be, and adds up how far they are from the trained ones.

    Args:
        table: its name, for messages.
        precision: the type that its rows are stored in.
        outlier_limit: a row in which one value has most of the norm is an outlier row where the relative L2 error of the
            others is larger than this; only quantized rows have any.
        counts: how often each row of the table is accessed, [E], or None.
    """

    def __init__(
        self, table: str, precision: Precision, outlier_limit: float = math.inf, counts: np.ndarray | None = None
    ) -> None:
        self._table, self._precision = table, precision
        self._outlier_limit, self._counts = outlier_limit, counts
        self.sums = ErrorSums()

    def examine(self, start: int, trained: torch.Tensor, stored: torch.Tensor, *, measure: bool = True) -> None:
        """Takes finite trained rows [n, D], the first of them row `start` of the table, and the same rows as stored.

        Blocks of `block_rows` are fastest. With `measure` false they are compared, and do not count in the figures.

        Raises:
            GateError: naming the first value that is not, bit for bit, what it must be.
        """
        x, y, e, m = _scratch(trained.numel()).view(4, *trained.shape)
        x = trained if trained.dtype is torch.float32 else x.copy_(trained)
        largest = None
        if quantized(self._precision):
            low, high = torch.amin(x, 1), torch.amax(x, 1)
            self._compare_codes(start, x, stored, low, high, (y, e, m))
            largest = torch.maximum(-low, high).double().numpy()
        else:
            self._compare_values(start, x, stored, (y, e, m))
        if measure:
            # What was compared and had nothing to round is the same.
            exact = self._precision is Precision.FP32 or trained.dtype is stored.dtype
            self._measure(start, x, None if exact else torch.sub(y, x, out=e), largest)

    # --- What the stored rows must be --------------------------------------------------------------------------------

    def _compare_values(
        self, start: int, x: torch.Tensor, stored: torch.Tensor, scratch: Sequence[torch.Tensor]
    ) -> None:
        y, e, m = scratch
        y.copy_(stored)
        expected = _round_to_fp16(x, e, m) if self._precision is Precision.FP16 else x
        self._require_equal(start, "", x, y, expected)

    def _compare_codes(
        self,
        start: int,
        x: torch.Tensor,
        stored: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        scratch: Sequence[torch.Tensor],
    ) -> None:
        """The recipe of FBGEMM's `FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf`, operation by operation.

        bias = fp16(min); scale = fp16((max - bias) / levels), 1 where the row is constant or that is 0;
        code = round((x - bias) * (1 / scale)), ties to even, within [0, levels]. y becomes code * scale + bias.
        """
        y, e, m = scratch
        top = levels(self._precision)
        bias = _round_to_fp16(low, torch.empty_like(low), torch.empty_like(low))
        spread = (high - bias).div_(top)
        spread.masked_fill_(high == bias, 1.0)
        scale = _round_to_fp16(spread, torch.empty_like(low), torch.empty_like(low))
        scale.masked_fill_(scale == 0, 1.0)
        # Of a row's zeros, FBGEMM takes one of either sign for its smallest value; the other would mean the same.
        found = stored[:, :SCALE_BIAS_BYTES].contiguous().view(torch.float16).float().add_(0.0)
        expected = torch.stack([scale, bias], 1).add_(0.0)
        self._require_equal(start, "scale and bias: ", None, found, expected)
        scale, bias = scale[:, None], bias[:, None]
        torch.sub(x, bias, out=e).mul_(scale.reciprocal()).round_().clamp_(0, top)
        _unpack_codes(stored, self._precision, m)
        self._require_equal(start, "code of ", x, m, e.add_(0.0))  # -0 is no code
        torch.mul(m, scale, out=y).add_(bias)

    def _require_equal(
        self, start: int, what: str, x: torch.Tensor | None, found: torch.Tensor, expected: torch.Tensor
    ) -> None:
        same = np.equal(
            expected.numpy().view(np.int32), found.numpy().view(np.int32)
        )  # torch.equal is six times slower
        if not same.all():
            row, column = divmod(int(same.argmin()), found.shape[1])
            of = "" if x is None else f" of the snapshot's {x[row, column].item()!r}"
            raise GateError(
                f"table '{self._table}': {what}row {start + row}, column {column} is stored as "
                f"{found[row, column].item()!r}, the reference makes {expected[row, column].item()!r}{of}"
            )

    # --- How far they are ----------------------------------------------------------------------------------------------

    def _measure(self, start: int, x: torch.Tensor, e: torch.Tensor | None, largest: np.ndarray | None) -> None:
        """Adds up rows `x` with errors `e` (None: all are 0), of a quantized type with their `largest` magnitudes."""
        sums = self.sums
        sums.rows += len(x)
        sums.constant_rows += _count_constant(x)
        square = _row_dots(x, x)
        error_square = product = np.zeros_like(square)
        if e is not None:
            error_square, product = _row_dots(e, e), _row_dots(x, e)
        lost = np.flatnonzero(~((square > _SAFE_SQUARES[0]) & (square < _SAFE_SQUARES[1])))
        if len(lost):  # but rows of zeros, of which a table may have many
            lost = lost[(x if len(lost) == len(x) else x[lost]).any(1).numpy()]
        if len(lost):
            wide = x[lost].double()
            square[lost] = _row_dots(wide, wide)
            if e is not None:
                wide_error = e[lost].double()
                error_square[lost], product[lost] = _row_dots(wide_error, wide_error), _row_dots(wide, wide_error)
        sums.square += float(square.sum())
        sums.error_square += float(error_square.sum())
        sums.product += float(product.sum())
        self._rate_rows(start, square, error_square, product)
        if e is None:
            return
        if largest is not None:
            self._find_outliers(start, x, e, largest, square)
        magnitudes = e.abs_()
        sums.largest = max(sums.largest, float(magnitudes.max()))
        sums.absolute += float(np.einsum("ij->i", magnitudes.numpy()).astype(np.float64).sum())

    def _rate_rows(self, start: int, square: np.ndarray, error_square: np.ndarray, product: np.ndarray) -> None:
        """Relative error and cosine of every row of which anything is stored."""
        sums = self.sums
        vanished = (square > 0) & (error_square == square) & (product == -square)
        sums.vanished_rows += int(np.count_nonzero(vanished))
        rated = np.flatnonzero((square > 0) & ~vanished)
        if len(rated) < len(square):
            square, error_square, product = square[rated], error_square[rated], product[rated]
        relative = error_square / square
        sums.rated_rows += len(rated)
        sums.relative += float(relative.sum())
        if self._counts is not None:
            counts = self._counts[start + rated]
            sums.accessed += float(counts.sum())
            sums.accessed_relative += float((counts * relative).sum())
        inexact = relative > 0
        if inexact.any():
            # The exponent of the squared error is the half octave of the error.
            exponents = (relative[inexact].view(np.int64) >> 52) - 1023
            bins = np.bincount((exponents - _FIRST_BIN).clip(0, _BINS - 1), minlength=_BINS)
            sums.histogram = (np.array(sums.histogram) + bins).tolist()
        shift = product / square
        cosine = ((1 + shift) / np.sqrt(np.maximum(1 + 2 * shift + relative, _LEAST_SQUARE))).clip(-1.0, 1.0)
        sums.cosine += float(cosine.sum())
        threshold = sums.worst[-1][0] if len(sums.worst) == _SHOWN_ROWS else math.inf
        worst = np.flatnonzero(cosine < threshold)
        if len(worst) > _SHOWN_ROWS:
            worst = worst[np.argsort(cosine[worst], kind="stable")[:_SHOWN_ROWS]]
        if len(worst):
            found = [
                [_shorten(cosine[row]), _shorten(math.sqrt(relative[row])), start + int(rated[row])] for row in worst
            ]
            sums.worst = sorted([*sums.worst, *found], key=lambda entry: (entry[0], entry[2]))[:_SHOWN_ROWS]

    def _find_outliers(
        self, start: int, x: torch.Tensor, e: torch.Tensor, largest: np.ndarray, square: np.ndarray
    ) -> None:
        """Rows whose largest value leaves so few codes for the others that these are lost."""
        if x.shape[1] < 2:
            return
        suspects = np.flatnonzero((largest > 0) & (largest * largest >= _DOMINANT * square))
        if not len(suspects):
            return
        wide, error = x[suspects].double(), e[suspects].double()
        place = wide.abs().argmax(1, keepdim=True)
        value = wide.gather(1, place)[:, 0].numpy()
        others, error = wide.scatter_(1, place, 0.0), error.scatter_(1, place, 0.0)
        norm, error_norm = others.norm(dim=1).numpy(), error.norm(dim=1).numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(error_norm > 0, error_norm / norm, 0.0)
        flat = np.flatnonzero(relative > self._outlier_limit)
        self.sums.outlier_rows += len(flat)
        for row in flat[np.argsort(-relative[flat], kind="stable")[:_SHOWN_ROWS]]:
            # No number is larger than the one that stands for an error beside zeros.
            shown = _shorten(min(relative[row], 1e300))
            self.sums.outliers.append([shown, float(value[row]), start + int(suspects[row])])
        self.sums.outliers = sorted(self.sums.outliers, key=lambda entry: (-entry[0], entry[2]))[:_SHOWN_ROWS]


def _scratch(count: int) -> torch.Tensor:
    """Float32 [4, count] to work in, kept by each thread."""
    scratch: torch.Tensor | None = getattr(_OF_THREAD, "scratch", None)
    if scratch is None or scratch.shape[1] < count:
        scratch = _OF_THREAD.scratch = torch.empty(4, count)
    return scratch[:, :count]


def _count_constant(x: torch.Tensor) -> int:
    """How many rows have one value throughout: few look like it at three places, and only these are looked at."""
    values = x.numpy()
    first = values[:, 0]
    suspects = np.flatnonzero((first == values[:, -1]) & (first == values[:, values.shape[1] // 2]))
    return int((values[suspects] == first[suspects, None]).all(1).sum()) if len(suspects) else 0


def _row_dots(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """The product of each row with the same row, float64 [n], added up in the type of the rows."""
    products: np.ndarray = np.einsum("ij,ij->i", left.numpy(), right.numpy())
    return products.astype(np.float64)


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


def _unpack_codes(stored: torch.Tensor, precision: Precision, out: torch.Tensor) -> None:
    """The codes of quantized rows [n, R] as float32, in `out` [n, D]: the first value is in a byte's lowest bits."""
    packed = stored[:, SCALE_BIAS_BYTES:]
    bits = row_format(precision).bits
    if bits == 8:
        out.copy_(packed)
        return
    per_byte = 8 // bits
    by_byte = out.view(len(out), packed.shape[1], per_byte)
    for place in range(per_byte):
        by_byte[:, :, place] = packed.bitwise_right_shift(place * bits).bitwise_and_(levels(precision))


def dequantize(stored: torch.Tensor, embedding_dim: int, precision: Precision) -> torch.Tensor:
    """What stored rows (`quantize.new_rows`) mean, float32 [n, D]: code * scale + bias where they are quantized."""
    if not quantized(precision):
        return stored.float()
    values = torch.empty(len(stored), embedding_dim)
    _unpack_codes(stored, precision, values)
    scale, bias = stored[:, :SCALE_BIAS_BYTES].contiguous().view(torch.float16).float().split(1, dim=1)
    return values.mul_(scale).add_(bias)


# --- Figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LookupErrors:
    """What storing rows does to pooled bags: over `bags` of them, `ids` ids in all, `drawn` as said here."""

    bags: int
    ids: int
    drawn: str
    relative_l2: float | None
    mean_cosine: float | None
    worst_cosine: float | None


def measure_lookups(
    probes: ProbeRows, precision: Precision, bags: Sequence[np.ndarray], table: EmbeddingBagConfig
) -> LookupErrors:
    """Pools `bags` of ids (`access.draw_bags`), all of them in `probes`, over rows as trained and as stored, in float64."""
    trained = probes.trained.double().numpy()
    stored = dequantize(probes.stored, trained.shape[1], precision).double().numpy()
    pooled = np.zeros((2, len(bags), trained.shape[1]))
    for number, bag in enumerate(bags):
        places = np.searchsorted(probes.ids, bag)
        share = len(bag) if table.pooling is Pooling.MEAN and len(bag) else 1
        pooled[0, number] = trained[places].sum(0) / share
        pooled[1, number] = stored[places].sum(0) / share
    norms = np.linalg.norm(pooled, axis=2)
    known = norms[0] > 0
    cosines = np.einsum("ij,ij->i", *pooled)[known]
    lengths = (norms[0] * norms[1])[known]
    cosines = np.divide(cosines, lengths, out=np.zeros_like(cosines), where=lengths > 0).clip(-1.0, 1.0)
    total = float(np.linalg.norm(pooled[0]))
    return LookupErrors(
        bags=len(bags),
        ids=int(sum(len(bag) for bag in bags)),
        drawn="by access counts" if table.access_counts else "uniformly",
        relative_l2=_shorten(float(np.linalg.norm(pooled[1] - pooled[0])) / total) if total > 0 else None,
        mean_cosine=_shorten(float(cosines.mean())) if len(cosines) else None,
        worst_cosine=_shorten(float(cosines.min())) if len(cosines) else None,
    )


def table_accuracy(
    table: str, precision: Precision, shape: tuple[int, int], bytes_before: int, sums: ErrorSums, lookups: LookupErrors
) -> TableAccuracy:
    """The figures of one table with `shape` (E, D), from the sums over its rows."""
    bytes_after = shape[0] * row_format(precision).row_bytes(shape[1])
    values = sums.rows * shape[1]
    return TableAccuracy(
        table=table,
        serving_precision=serving_precision(precision),
        rows=shape[0],
        rows_measured=sums.rows,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        bits_per_weight=_shorten(bytes_after * 8 / (shape[0] * shape[1])),
        max_absolute_error=sums.largest,
        mean_absolute_error=_shorten(sums.absolute / values),
        root_mean_square_error=_shorten(math.sqrt(sums.error_square / values)),
        relative_l2=_shorten(sums.relative_l2()),
        row_relative_l2=_shorten(sums.row_relative_l2()),
        mean_cosine=_shorten(sums.mean_cosine()),
        worst_cosine=sums.worst[0][0] if sums.worst else None,
        worst_cosine_row=int(sums.worst[0][2]) if sums.worst else None,
        constant_rows=sums.constant_rows,
        vanished_rows=sums.vanished_rows,
        outlier_rows=sums.outlier_rows,
        lookup_relative_l2=lookups.relative_l2,
        lookup_mean_cosine=lookups.mean_cosine,
    )


def _shorten(value: float | None) -> Any:
    """Nine digits, so that a figure does not depend on how the rows were shared out."""
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def describe_histogram(sums: ErrorSums) -> dict[str, Any]:
    """Rows by relative L2 error: those without any, and how many from each lower edge up to the next, sqrt(2) times it.

    Rows that vanished are in none of these.
    """
    filled = [number for number, count in enumerate(sums.histogram) if count]
    bins = range(filled[0], filled[-1] + 1) if filled else range(0)
    return {
        "exact_rows": sums.rows - sums.vanished_rows - sum(sums.histogram),
        "lower_edges": [2.0 ** ((number + _FIRST_BIN) / 2) for number in bins],
        "rows": [sums.histogram[number] for number in bins],
    }


def outlier_limit(precision: Precision, budgets: Sequence[Budget]) -> float:
    """The relative L2 error that a table may have, by its budgets or, where they do not say, by the default one."""
    given = [budget.max_relative_l2 for budget in budgets if budget.max_relative_l2 is not None]
    default = DEFAULT_BUDGETS[precision].max_relative_l2
    return min(given) if given else math.inf if default is None else default


def check_budget(accuracy: TableAccuracy, budget: Budget) -> list[str]:
    """What of a table's accuracy is outside its budget, one line a figure."""
    figures = asdict(accuracy)
    lines = []
    for name, limit in budget:
        figure_name = Budget.FIGURES.get(name, name)
        figure = figures[figure_name]
        if limit is not None and figure is None and accuracy.vanished_rows and figure_name in _OF_RATED_ROWS:
            lines.append(
                f"table '{accuracy.table}': {figure_name} has no value, as all rows that are not zero vanish; its budget is "
                f"{name}: {limit:g} ({accuracy.serving_precision}); choose a wider serving_precision or another budget"
            )
        if limit is None or figure is None:
            continue
        least = name.startswith("min_")
        if figure < limit if least else figure > limit:
            lines.append(
                f"table '{accuracy.table}': {figure_name} is {figure:.6g}, {'below' if least else 'above'} its budget "
                f"{name}: {limit:g} ({accuracy.serving_precision}); choose a wider serving_precision or another budget"
            )
    return lines
