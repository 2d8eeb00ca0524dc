"""What `accuracy` does to every value, compiled: comparing stored rows with what they must be, and adding up errors.

One pass over a value instead of twenty over an array. What is exact and what is added up are functions apart: only sums may
be reordered (`_REORDERED`), so that the compiler can use vector instructions; it passes such a permission on to functions
that are called from there.

Shapes: n rows of D values (columns) or R stored bytes.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core.caching import FunctionCache

__all__ = [
    "FIRST_HALF_OCTAVE",
    "HALF_OCTAVES",
    "add_up_rows",
    "code_of",
    "compare_codes",
    "compare_fp16",
    "compare_fp32",
    "fp16_of",
    "rate_rows",
    "scale_bias",
]

# Rows are counted by their relative L2 error in half octaves: bin k holds 2**(k / 2) <= error < 2**((k + 1) / 2), the first
# one what is smaller as well, the last one what is larger.
FIRST_HALF_OCTAVE, HALF_OCTAVES = -48, 52
_LEAST_SQUARE = 1e-30  # of a stored row beside its trained one, so that no rounding makes it negative
_REORDERED = {"reassoc", "contract", "nnan", "ninf", "nsz"}

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Cache(FunctionCache):  # type: ignore[misc]
    """Compiled code on the disk, which is a convenience: numba lets a full disk, or a damaged file, fail the call."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None where it is not there or cannot be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # damaged pickles raise nearly anything
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Saves the compiled function, if it can be."""
        with suppress(Exception):  # the index, which may be damaged, is read again
            super().save_overload(sig, data)


def _compiled(function: _Function, fastmath: Any = False) -> _Function:
    """`function` compiled when it is first called, without the GIL; kept on the disk where there is a place for it."""
    dispatcher = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
    with suppress(RuntimeError):  # neither the package's folder nor the user's can be written
        dispatcher._cache = _Cache(function)  # as numba's enable_caching does it
    return cast(_Function, dispatcher)


# --- Binary16 by integer and float32 arithmetic ---------------------------------------------------------------------------


@_compiled
def _round_to_fp16(x: np.float32) -> np.uint32:
    """The bits of `x`, float32 and below 65520, rounded to binary16 by float32 arithmetic alone.

    binary16 has 11 significant bits and no step below 2**-24 (IEEE 754). With 2**E <= |x| < 2**(E + 1), the float32 numbers
    around m = 1.5 * 2**(E + 13) are 2**(E - 10) apart, so that x + m is x rounded to 11 bits, to nearest and ties to even,
    and subtracting m is exact. Below E = -14 the step does not shrink: m is at least 1.5 * 2**-1.
    """
    bits = np.float32(x).view(np.uint32)
    power = np.uint32(bits & np.uint32(0x7F800000)).view(np.float32)
    m = max(np.float32(power * np.float32(1.5 * 2**13)), np.float32(0.75))
    rounded = np.float32(np.float32(x + m) - m)
    return np.uint32(
        rounded.view(np.uint32) | np.uint32(bits & np.uint32(0x80000000))
    )  # what rounds to zero keeps its sign


@_compiled
def _widen_fp16(half: np.uint16) -> np.uint32:
    """The bits as float32 of a finite binary16 number given by its bits."""
    sign = np.uint32(np.uint32(half & np.uint16(0x8000)) << np.uint32(16))
    magnitude = np.uint32(half & np.uint16(0x7FFF))
    normal = np.uint32((magnitude << np.uint32(13)) + np.uint32(112 << 23))
    small = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    return np.uint32((small if magnitude < np.uint32(1 << 10) else normal) | sign)


@_compiled
def fp16_of(x: np.float32) -> np.float32:
    """`x`, float32 and below 65520, rounded to binary16."""
    return np.uint32(_round_to_fp16(x)).view(np.float32)


# --- What stored rows must be ---------------------------------------------------------------------------------------------


@_compiled
def compare_fp32(x: np.ndarray, stored: np.ndarray) -> tuple[int, np.uint32]:
    """The first row of `stored` that differs from `x`, both uint32 [n, D], or -1; and the peak, as of `compare_fp16`."""
    peak = np.uint32(0)
    for row in range(x.shape[0]):
        wrong = np.uint32(0)
        for column in range(x.shape[1]):
            wrong |= np.uint32(x[row, column] ^ stored[row, column])
            peak = max(peak, np.uint32(x[row, column] & np.uint32(0x7FFFFFFF)))
        if wrong:
            return row, peak
    return -1, peak


@_compiled
def compare_fp16(x: np.ndarray, stored: np.ndarray, e: np.ndarray) -> tuple[int, np.float32, np.uint32]:
    """Compares `stored`, uint16 [n, D], with float32 `x` [n, D] rounded; writes the errors into `e` [n, D].

    Returns:
        the first row with a value that is not, bit for bit, the rounded one, or -1; the largest magnitude of an error; and
        the peak: the largest magnitude of a value of `x` up to that row, as bits. NaN is larger than infinity there.
    """
    largest = peak = np.uint32(0)
    for row in range(x.shape[0]):
        wrong = np.uint32(0)
        for column in range(x.shape[1]):
            value = x[row, column]
            bits = _widen_fp16(stored[row, column])
            wrong |= np.uint32(_round_to_fp16(value) ^ bits)
            error = np.float32(np.uint32(bits).view(np.float32) - value)
            e[row, column] = error
            # Magnitudes are ordered as their bits are, and integers have a vector instruction for it.
            largest = max(largest, np.uint32(np.float32(error).view(np.uint32) & np.uint32(0x7FFFFFFF)))
            peak = max(peak, np.uint32(np.float32(value).view(np.uint32) & np.uint32(0x7FFFFFFF)))
        if wrong:
            return row, np.float32(0), peak
    return -1, np.uint32(largest).view(np.float32), peak


@_compiled
def _bounds(x: np.ndarray) -> tuple[np.float32, np.float32]:
    """The smallest and the largest of finite float32 [D], as integers that are ordered alike."""
    low, high = np.int32(2**31 - 1), np.int32(-(2**31))
    for column in range(x.shape[0]):
        bits = np.float32(x[column]).view(np.int32)
        key = np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low, high = min(low, key), max(high, key)
    low = np.int32(low ^ np.int32((low >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    high = np.int32(high ^ np.int32((high >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return np.int32(low).view(np.float32), np.int32(high).view(np.float32)


@_compiled
def scale_bias(low: np.float32, high: np.float32, top: np.int32) -> tuple[np.float32, np.float32]:
    """Scale and bias of a row from its smallest and largest value and the largest code `top`.

    bias = fp16(min); scale = fp16((max - bias) / top), 1 where the row is constant or that is 0. +0 stands for either zero:
    of a row's zeros, FBGEMM takes one of either sign for its smallest value; the other would mean the same.
    """
    bias = np.float32(fp16_of(low) + np.float32(0))
    if high == bias:
        return np.float32(1), bias
    spread = np.float32(np.float32(high - bias) / np.float32(top))
    scale = fp16_of(spread)
    return (np.float32(1) if scale == 0 else scale), bias


@_compiled
def code_of(value: np.float32, bias: np.float32, inverse: np.float32, top: np.int32) -> np.int32:
    """The code of a value, from the inverse of its row's scale."""
    code = np.int32(np.rint(np.float32(np.float32(value - bias) * inverse)))
    return min(max(code, np.int32(0)), top)


@_compiled
def _unpack(packed: np.ndarray, bits: int, codes: np.ndarray) -> None:
    """The codes of one row, uint8 [D]: the first value is in a byte's lowest bits."""
    if bits == 8:
        for byte in range(packed.shape[0]):
            codes[byte] = packed[byte]
    elif bits == 4:
        for byte in range(packed.shape[0]):
            codes[2 * byte] = packed[byte] & np.uint8(15)
            codes[2 * byte + 1] = packed[byte] >> np.uint8(4)
    else:
        for byte in range(packed.shape[0]):
            for place in range(4):
                codes[4 * byte + place] = (packed[byte] >> np.uint8(2 * place)) & np.uint8(3)


@_compiled
def compare_codes(
    x: np.ndarray, stored: np.ndarray, bits: int, e: np.ndarray, peaks: np.ndarray
) -> tuple[int, np.float32]:
    """Compares quantized rows `stored`, uint8 [n, R], with those of float32 `x` [n, D]; writes the errors into `e` [n, D].

    The recipe of FBGEMM's `FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf`, operation by operation: `scale_bias`, and
    code = round((x - bias) * (1 / scale)), ties to even, within [0, 2**bits - 1]. A stored value is code * scale + bias.

    Returns:
        the first row with a scale, a bias or a code that is another, or -1; and the largest magnitude of an error. The
        largest magnitude of a value of each row is in `peaks`, float64 [n].
    """
    top = np.int32((1 << bits) - 1)
    codes = np.empty(x.shape[1], np.uint8)
    largest = np.uint32(0)
    for row in range(x.shape[0]):
        low, high = _bounds(x[row])
        peaks[row] = max(-low, high)
        scale, bias = scale_bias(low, high, top)
        found = stored[row]
        wrong = np.int32(0)
        for place, expected in ((0, scale), (2, bias)):
            half = np.uint16(np.uint16(found[place]) | np.uint16(np.uint16(found[place + 1]) << np.uint16(8)))
            if np.float32(np.uint32(_widen_fp16(half)).view(np.float32)) != expected:  # the two zeros are equal
                wrong = np.int32(1)
        _unpack(found[4:], bits, codes)
        inverse = np.float32(np.float32(1) / scale)
        for column in range(x.shape[1]):
            value = x[row, column]
            code = code_of(value, bias, inverse, top)
            wrong |= np.int32(code ^ np.int32(codes[column]))
            error = np.float32(np.float32(np.float32(np.float32(code) * scale) + bias) - value)
            e[row, column] = error
            largest = max(largest, np.uint32(np.float32(error).view(np.uint32) & np.uint32(0x7FFFFFFF)))
        if wrong:
            return row, np.float32(0)
    return -1, np.uint32(largest).view(np.float32)


# --- How far they are -----------------------------------------------------------------------------------------------------


def _add_up_rows(x: np.ndarray, e: np.ndarray, figures: np.ndarray) -> int:
    """Writes the sums of x * x, e * e, x * e and |e| over each row, float32 [n, D], into `figures`, float64 [4, n].

    Returns:
        how many rows have one value throughout.
    """
    constant = 0
    for row in range(x.shape[0]):
        square = error_square = product = absolute = np.float32(0)
        for column in range(x.shape[1]):
            value, error = x[row, column], e[row, column]
            square += value * value
            error_square += error * error
            product += value * error
            absolute += abs(error)
        figures[0, row], figures[1, row], figures[2, row], figures[3, row] = square, error_square, product, absolute
        first, last = x[row, 0], x.shape[1] - 1
        if (x[row, last] == first) & (x[row, last // 2] == first):  # few rows look like it
            others = 0
            for column in range(x.shape[1]):
                others += x[row, column] != first
            constant += others == 0
    return constant


add_up_rows = _compiled(_add_up_rows, fastmath=_REORDERED)


@_compiled
def rate_rows(
    figures: np.ndarray, counts: np.ndarray, relative: np.ndarray, cosine: np.ndarray, histogram: np.ndarray
) -> tuple[int, int, float, float, float, float]:
    """Relative error and cosine of every row of which anything is stored.

    Args:
        figures: of `add_up_rows`, float64 [4, n].
        counts: how often each row is accessed, float64 [n], or [0] where that is not known.
        relative: the squared relative L2 error is written here, float64 [n].
        cosine: the cosine is written here, float64 [n]; infinity for a row that is not rated.
        histogram: rows are counted here by the half octave of their error, int64 [`HALF_OCTAVES`].

    Returns:
        rated rows, vanished rows, and the sums of `relative`, of `cosine`, of counts, and of counts times `relative`.
    """
    rated = vanished = 0
    relative_sum = cosine_sum = accessed = accessed_relative = 0.0
    for row in range(figures.shape[1]):
        square, error_square, product = figures[0, row], figures[1, row], figures[2, row]
        gone = (error_square == square) & (product == -square)
        divisor = square if square > 0 else 1.0
        ratio, shift = error_square / divisor, product / divisor
        angle = (1 + shift) / math.sqrt(max(1 + 2 * shift + ratio, _LEAST_SQUARE))
        relative[row] = ratio
        cosine[row] = min(max(angle, -1.0), 1.0) if (square > 0) & ~gone else math.inf
    for row in range(figures.shape[1]):
        if cosine[row] == math.inf:
            vanished += figures[0, row] > 0
            continue
        rated += 1
        relative_sum += relative[row]
        cosine_sum += cosine[row]
        if relative[row] > 0:
            # The exponent of the squared error is the half octave of the error.
            octave = int(np.float64(relative[row]).view(np.int64) >> 52) - 1023 - FIRST_HALF_OCTAVE
            histogram[min(max(octave, 0), HALF_OCTAVES - 1)] += 1
        if len(counts):
            accessed += counts[row]
            accessed_relative += counts[row] * relative[row]
    return rated, vanished, relative_sum, cosine_sum, accessed, accessed_relative
