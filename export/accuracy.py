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

from export import row_kernels
from export.config import DEFAULT_BUDGETS, Budget, EmbeddingBagConfig, Pooling, Precision
from export.errors import GateError
from export.quantize import OVERFLOWS, SCALE_BIAS_BYTES, levels, quantized, row_format, serving_precision
from export.row_kernels import FIRST_HALF_OCTAVE, HALF_OCTAVES
from runtime_py.manifest import TableAccuracy

__all__ = [
    "ErrorSums",
    "Examiner",
    "LookupErrors",
    "ProbeRows",
    "UnstorableError",
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
_SAFE_SQUARES = (1e-30, 1e30)  # squared norms that float32 adds up without leaving its range
_OF_RATED_ROWS = ("row_relative_l2", "mean_cosine", "worst_cosine")  # figures that have no value where all rows vanish
_DIGITS = 9  # of a figure: what the order in which float64 sums are added up cannot change


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
    histogram: list[int] = field(default_factory=lambda: [0] * HALF_OCTAVES)
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


class UnstorableError(Exception):
    """A row of `table` has a value that its type cannot hold."""

    def __init__(self, table: str) -> None:
        super().__init__(table)
        self.table = table


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
        self._overflow = np.float32(OVERFLOWS.get(precision, math.inf)).view(np.uint32)  # bits, ordered as magnitudes
        self.sums = ErrorSums()

    def examine(self, start: int, trained: torch.Tensor, stored: torch.Tensor, *, measure: bool = True) -> None:
        """Takes trained rows [n, D], the first of them row `start` of the table, and the same rows as stored.

        Of a quantized type they must be `storable`; of another one that is seen here, in the same pass.

        Blocks of `block_rows` are fastest. With `measure` false they are compared, and do not count in the figures.

        Raises:
            GateError: naming the first value that is not, bit for bit, what it must be.
            UnstorableError: a value is NaN, infinite, or would be infinite as it is stored.
        """
        e = _scratch("errors", trained.numel(), np.float32).reshape(trained.shape)
        x = trained.numpy()
        if trained.dtype is not torch.float32:
            x = _scratch("trained", trained.numel(), np.float32).reshape(trained.shape)
            x[:] = trained.numpy()
        peaks = _scratch("peaks", len(x), np.float64) if quantized(self._precision) else None
        wrong, largest, peak = self._compare(x, stored, e, peaks)
        if peak >= self._overflow:
            raise UnstorableError(self._table)
        if wrong >= 0:
            raise GateError(f"table '{self._table}': {self._describe_wrong(x[wrong], stored[wrong], start + wrong)}")
        if measure:
            self.sums.largest = max(self.sums.largest, float(largest))
            self._measure(start, x, e, peaks)

    # --- What the stored rows must be --------------------------------------------------------------------------------

    def _compare(
        self, x: np.ndarray, stored: torch.Tensor, e: np.ndarray, peaks: np.ndarray | None
    ) -> tuple[int, np.float32, np.uint32]:
        """The first row that is stored wrong, or -1; the largest error; and the bits of the largest value, where that counts.

        The errors are in `e`, row maxima in `peaks`.
        """
        if peaks is not None:
            bits = row_format(self._precision).bits
            return *row_kernels.compare_codes(x, stored.numpy(), bits, e, peaks), np.uint32(0)
        if self._precision is Precision.FP16:
            return row_kernels.compare_fp16(x, stored.numpy().view(np.uint16), e)
        e.fill(0.0)
        wrong, peak = row_kernels.compare_fp32(x.view(np.uint32), stored.numpy().view(np.uint32))
        return wrong, np.float32(0), peak

    def _describe_wrong(self, x: np.ndarray, stored: torch.Tensor, row: int) -> str:
        """What the first wrong value of a row is, and what it must be."""
        width = len(x)
        found = dequantize(stored[None], width, self._precision)[0].numpy()
        expected = x
        if self._precision is Precision.FP16:
            expected = np.array([row_kernels.fp16_of(value) for value in x], np.float32)
        what, of = "", True
        if quantized(self._precision):
            top = np.int32(levels(self._precision))
            scale, bias = row_kernels.scale_bias(x.min(), x.max(), top)
            expected = np.array([scale, bias], np.float32)
            found = stored[:SCALE_BIAS_BYTES].view(torch.float16).float().numpy()
            what, of = "scale and bias: ", False
            if (found == expected).all():
                inverse = np.float32(1) / np.float32(scale)
                expected = np.array(
                    [row_kernels.code_of(value, np.float32(bias), inverse, top) for value in x], np.float32
                )
                codes = torch.empty(1, width)
                _unpack_codes(stored[None], self._precision, codes)
                found, what, of = codes[0].numpy(), "code of ", True
        column = int((found.view(np.int32) != expected.view(np.int32)).argmax())
        return (
            f"{what}row {row}, column {column} is stored as {found[column].item()!r}, the reference makes "
            f"{expected[column].item()!r}" + (f" of the snapshot's {x[column].item()!r}" if of else "")
        )

    # --- How far they are ----------------------------------------------------------------------------------------------

    def _measure(self, start: int, x: np.ndarray, e: np.ndarray, peaks: np.ndarray | None) -> None:
        """Adds up rows `x` with errors `e`, of a quantized type with their largest magnitudes."""
        sums = self.sums
        sums.rows += len(x)
        figures = _scratch("figures", 4 * len(x), np.float64).reshape(4, -1)
        sums.constant_rows += row_kernels.add_up_rows(x, e, figures)
        square, error_square, product, absolute = figures
        lost = np.flatnonzero(~((square > _SAFE_SQUARES[0]) & (square < _SAFE_SQUARES[1])))
        if len(lost):  # but rows of zeros, of which a table may have many
            lost = lost[(x if len(lost) == len(x) else x[lost]).any(1)]
        if len(lost):
            wide, wide_error = x[lost].astype(np.float64), e[lost].astype(np.float64)
            square[lost] = np.einsum("ij,ij->i", wide, wide)
            error_square[lost] = np.einsum("ij,ij->i", wide_error, wide_error)
            product[lost] = np.einsum("ij,ij->i", wide, wide_error)
        sums.square += float(square.sum())
        sums.error_square += float(error_square.sum())
        sums.product += float(product.sum())
        sums.absolute += float(absolute.sum())
        self._rate_rows(start, figures)
        if peaks is not None:
            self._find_outliers(start, x, e, peaks, square)

    def _rate_rows(self, start: int, figures: np.ndarray) -> None:
        """Relative error and cosine of every row of which anything is stored."""
        sums = self.sums
        relative, cosine = _scratch("rates", 2 * figures.shape[1], np.float64).reshape(2, -1)
        histogram = np.array(sums.histogram)
        counts = np.empty(0) if self._counts is None else self._counts[start : start + len(relative)].astype(np.float64)
        rated, vanished, *added = row_kernels.rate_rows(figures, counts, relative, cosine, histogram)
        sums.histogram = histogram.tolist()
        sums.rated_rows += rated
        sums.vanished_rows += vanished
        for name, total in zip(("relative", "cosine", "accessed", "accessed_relative"), added, strict=True):
            setattr(sums, name, getattr(sums, name) + total)
        threshold = sums.worst[-1][0] if len(sums.worst) == _SHOWN_ROWS else math.inf
        worst = np.flatnonzero(cosine < threshold)
        if len(worst) > _SHOWN_ROWS:
            worst = worst[np.argsort(cosine[worst], kind="stable")[:_SHOWN_ROWS]]
        if len(worst):
            found = [[_shorten(cosine[row]), _shorten(math.sqrt(relative[row])), start + int(row)] for row in worst]
            sums.worst = sorted([*sums.worst, *found], key=lambda entry: (entry[0], entry[2]))[:_SHOWN_ROWS]

    def _find_outliers(self, start: int, x: np.ndarray, e: np.ndarray, peaks: np.ndarray, square: np.ndarray) -> None:
        """Rows whose largest value leaves so few codes for the others that these are lost."""
        if x.shape[1] < 2:
            return
        suspects = np.flatnonzero((peaks > 0) & (peaks * peaks >= _DOMINANT * square))
        if not len(suspects):
            return
        wide, error = torch.from_numpy(x[suspects]).double(), torch.from_numpy(e[suspects]).double()
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


def _scratch(name: str, count: int, dtype: type[np.floating]) -> np.ndarray:
    """An array [count] to work in, kept by each thread: the system clears the pages of a new one."""
    kept: dict[str, np.ndarray] = _OF_THREAD.__dict__
    if name not in kept or len(kept[name]) < count:
        kept[name] = np.empty(count, dtype)
    return kept[name][:count]


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
        "lower_edges": [2.0 ** ((number + FIRST_HALF_OCTAVE) / 2) for number in bins],
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
