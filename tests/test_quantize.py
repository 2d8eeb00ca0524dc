"""From trained rows to stored rows, against numpy; and the text of the refusal."""

import numpy as np
import pytest
import references
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from export.config import Precision
from export.errors import RowsError
from export.quantize import STORED_TYPES, convert_rows, describe_unstorable, storable

BELOW_OVERFLOW = float(np.nextafter(np.float32(65520), np.float32(0)))  # 65519.996: rounds to 65504, fp16's largest
EDGES = [
    0.0,
    -0.0,
    1.0,
    65504.0,
    -65504.0,
    65519.0,
    BELOW_OVERFLOW,
    -BELOW_OVERFLOW,
    65520.0,
    -65520.0,
    float(np.finfo(np.float32).max),
    float(np.finfo(np.float32).smallest_subnormal),
    2.0**-14,  # fp16's smallest normal value
    2.0**-14 - 2.0**-25,  # halfway between that and the largest subnormal
    2.0**-24,  # fp16's smallest subnormal
    2.0**-25,  # halfway to it: to even, zero
    float(np.nextafter(np.float32(2.0**-25), np.float32(1))),
    1.0 + 2.0**-11,  # halfway between two values, the even one below
    1.0 + 3 * 2.0**-11,  # halfway, the even one above
    float("inf"),
    float("-inf"),
    float("nan"),
]

VALUES = st.one_of(
    st.sampled_from(EDGES),
    st.floats(width=32),
    st.floats(-70000, 70000, width=32),
    st.floats(-(2.0**-13), 2.0**-13, width=32, allow_subnormal=True),
)
ROWS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=VALUES)
HALF_ROWS = hnp.arrays(np.float16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))


def is_storable(rows: np.ndarray, precision: Precision) -> bool:
    """In plain loops: every value is finite, and finite still when it is rounded."""
    for value in rows.ravel().tolist():
        with np.errstate(over="ignore"):
            rounded = float(np.float16(np.float32(value))) if precision is Precision.FP16 else value
        if not np.isfinite(value) or not np.isfinite(rounded):
            return False
    return True


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


def converted(rows: np.ndarray, precision: Precision) -> np.ndarray:
    out = torch.full(rows.shape, float("nan"), dtype=STORED_TYPES[precision])
    convert_rows(torch.from_numpy(rows), out)
    return out.numpy()


# --- storable ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(rows=ROWS, precision=st.sampled_from([Precision.FP32, Precision.FP16]))
def test_rows_are_storable_where_every_value_stays_finite(rows: np.ndarray, precision: Precision) -> None:
    assert storable(torch.from_numpy(rows), precision) == is_storable(rows, precision)


@settings(deadline=None, max_examples=100)
@given(rows=HALF_ROWS, precision=st.sampled_from([Precision.FP32, Precision.FP16]))
def test_rows_that_were_trained_in_fp16_are_storable_where_they_are_finite(
    rows: np.ndarray, precision: Precision
) -> None:
    assert storable(torch.from_numpy(rows), precision) == bool(np.isfinite(rows).all())


@pytest.mark.parametrize(
    ("value", "fp16", "fp32"),
    [
        (65504.0, True, True),
        (BELOW_OVERFLOW, True, True),
        (-BELOW_OVERFLOW, True, True),
        (65520.0, False, True),
        (-65520.0, False, True),
        (3.4028234663852886e38, False, True),
        (1e-45, True, True),
        (float("inf"), False, False),
        (float("-inf"), False, False),
        (float("nan"), False, False),
    ],
)
@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 3)])
def test_one_value_decides_wherever_it_stands(value: float, fp16: bool, fp32: bool, place: tuple[int, int]) -> None:
    rows = torch.zeros(3, 4)
    rows[place] = value
    assert storable(rows, Precision.FP16) is fp16
    assert storable(rows, Precision.FP32) is fp32


def test_the_limit_is_where_rounding_to_fp16_overflows() -> None:
    assert torch.tensor(BELOW_OVERFLOW).half().item() == 65504
    assert torch.tensor(65520.0).half().item() == float("inf")


# --- convert_rows --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(rows=ROWS, precision=st.sampled_from([Precision.FP32, Precision.FP16]))
@example(rows=np.array([EDGES[:9]], np.float32), precision=Precision.FP16)
@example(rows=np.array([EDGES[11:19]], np.float32), precision=Precision.FP16)
def test_storable_rows_are_stored_as_numpy_rounds_them_bit_for_bit(rows: np.ndarray, precision: Precision) -> None:
    rows = np.where(np.abs(rows) < 65520, rows, np.float32(1))  # NaN and the infinities too
    expected = references.stored_rows(rows, precision.value)
    assert np.array_equal(bits(converted(rows, precision)), bits(expected))


@settings(deadline=None, max_examples=100)
@given(rows=HALF_ROWS, precision=st.sampled_from([Precision.FP32, Precision.FP16]))
def test_rows_that_were_trained_in_fp16_are_stored_exactly(rows: np.ndarray, precision: Precision) -> None:
    rows = np.where(np.isfinite(rows), rows, np.float16(1))
    stored = converted(rows, precision)
    assert stored.dtype == {"fp32": np.float32, "fp16": np.float16}[precision.value]
    assert np.array_equal(bits(stored.astype(np.float16)), bits(rows))


def test_every_fp16_value_is_stored_as_it_is() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    rows = every[np.isfinite(every)].reshape(-1, 32)
    assert rows.size == 2 * 31 * 1024
    assert np.array_equal(bits(converted(rows.astype(np.float32), Precision.FP16)), bits(rows))


@pytest.mark.parametrize("columns", [1, 3, 8, 17, 64])
def test_rows_of_any_width_are_rounded_alike(columns: int) -> None:
    """Widths that are no multiple of a vector register take another path through the conversion."""
    rows = np.resize(np.array(EDGES[:9] + EDGES[11:19], np.float32), (5, columns))
    rows = np.where(np.abs(rows) < 65520, rows, np.float32(1))
    expected = references.stored_rows(rows, "fp16")
    assert np.array_equal(bits(converted(rows, Precision.FP16)), bits(expected))


# --- describe_unstorable -------------------------------------------------------------------------------------------

NEXT = "mend the training"


def describe(rows: torch.Tensor, precision: Precision, chunk: int = 2) -> str:
    chunks = ((start, rows[start : start + chunk]) for start in range(0, len(rows), chunk))
    error = describe_unstorable("user", chunks, precision)
    assert isinstance(error, RowsError)
    return str(error)


def test_the_refusal_has_the_table_the_first_value_and_the_number_of_each_kind() -> None:
    rows = torch.zeros(7, 3)
    rows[3, 2], rows[3, 1], rows[4, 0], rows[6, 2] = float("nan"), 70000.0, float("-inf"), -65520.0
    assert describe(rows, Precision.FP16) == (
        "table 'user': cannot be stored as fp16: row 3, column 1 is 70000.0; "
        f"in all: 1 NaN, 1 infinite, 2 beyond the range of fp16; {NEXT}"
    )


@pytest.mark.parametrize(
    ("value", "shown", "kind"),
    [
        (float("nan"), "nan", "NaN"),
        (float("inf"), "inf", "infinite"),
        (float("-inf"), "-inf", "infinite"),
        (65520.0, "65520.0", "beyond the range of fp16"),
        (-1e30, "-1.0000000150474662e+30", "beyond the range of fp16"),
    ],
)
def test_the_refusal_names_each_kind(value: float, shown: str, kind: str) -> None:
    rows = torch.zeros(5, 2)
    rows[4, 1] = value
    message = describe(rows, Precision.FP16)
    assert f"cannot be stored as fp16: row 4, column 1 is {shown}; in all: 1 {kind}; " in message


def test_a_value_that_fp32_can_hold_is_not_counted_there() -> None:
    rows = torch.tensor([[1e30, 65520.0], [float("inf"), float("nan")]])
    assert "row 1, column 0 is inf; in all: 1 NaN, 1 infinite; " in describe(rows, Precision.FP32)


def test_the_refusal_is_the_same_for_rows_that_were_trained_in_fp16() -> None:
    rows = torch.zeros(3, 2, dtype=torch.float16)
    rows[2, 0] = float("inf")
    assert "row 2, column 0 is inf; in all: 1 infinite; " in describe(rows, Precision.FP16)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_the_refusal_does_not_depend_on_the_chunks(chunk: int) -> None:
    rows = torch.zeros(9, 2)
    rows[2, 1] = rows[5, 0] = rows[8, 1] = float("nan")
    assert "row 2, column 1 is nan; in all: 3 NaN; " in describe(rows, Precision.FP16, chunk)


@pytest.mark.parametrize(
    ("value", "precision", "helps"),
    [
        (70000.0, Precision.FP16, True),
        (float("nan"), Precision.FP16, False),
        (float("inf"), Precision.FP16, False),
        (float("nan"), Precision.FP32, False),
    ],
)
def test_a_wider_precision_is_advised_only_where_it_would_help(value: float, precision: Precision, helps: bool) -> None:
    message = describe(torch.full((1, 1), value), precision)
    assert "mend the training" in message
    assert ("wider serving_precision" in message) == helps
