"""From trained rows to stored rows, against numpy; and the text of the refusal."""

import numpy as np
import pytest
import references
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchrec.modules.embedding_configs import DataType as TorchrecType
from torchrec.quant.embedding_modules import quantize_state_dict

from export.config import Precision, dim_divisor
from export.errors import RowsError
from export.quantize import convert_rows, describe_unstorable, new_rows, storable

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
    out = new_rows(*rows.shape, precision)
    convert_rows(torch.from_numpy(rows), out, precision)
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


# --- Quantized rows --------------------------------------------------------------------------------------------------

QUANTIZED = [Precision.INT8, Precision.INT4, Precision.INT2]
WIDTHS = [8, 16, 64]
# What a row may hold without leaving the range of an fp16 bias or scale.
QUANTIZABLE = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.1, 65504.0, -65504.0, 2.0**-24, 2.0**-25, 1e-30, -1e-7, 2.0**-14]),
    st.floats(-65000, 65000, width=32),
    st.floats(-(2.0**-13), 2.0**-13, width=32, allow_subnormal=True),
)


@pytest.mark.parametrize("precision", QUANTIZED)
@settings(deadline=None, max_examples=150)
@given(
    rows=st.sampled_from(WIDTHS).flatmap(lambda width: hnp.arrays(np.float32, (3, width), elements=QUANTIZABLE)),
    half=st.booleans(),
)
def test_any_rows_are_quantized_as_the_plain_loops_do_it_byte_for_byte(
    precision: Precision, rows: np.ndarray, half: bool
) -> None:
    rows = (rows.astype(np.float16) if half else rows) + 0  # of zeros of both signs, either may be the smallest value
    with np.errstate(over="ignore", divide="ignore"):
        expected = references.stored_rows(rows, precision.value)
    assert storable(torch.from_numpy(rows), precision)
    assert np.array_equal(converted(rows, precision), expected)


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("dim", [4, 8, 10, 16, 64, 100, 128, 256])
@pytest.mark.parametrize("kind", ["normal", "outlier", "constant", "tiny", "half", "zero"])
def test_rows_of_every_width_are_those_that_torchrec_makes(precision: Precision, dim: int, kind: str) -> None:
    if dim % dim_divisor(precision):
        pytest.skip(f"{precision} has no rows of {dim} values; the configuration refuses them")
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(200, dim, generator=generator)
    if kind == "outlier":
        rows[:, 1] *= 1e4
    elif kind == "constant":
        rows = rows[:, :1].expand(-1, dim).contiguous()
    elif kind == "tiny":
        rows *= 1e-7
    elif kind == "half":
        rows = rows.half()
    elif kind == "zero":
        rows.zero_()
    tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    bags = torch.nn.ModuleDict({"t": torch.nn.Embedding.from_pretrained(rows)})
    quantize_state_dict(bags, tables, {"t": TorchrecType[precision.name]})
    codes, scale_bias = tables["t"]
    expected = torch.cat([scale_bias, codes], dim=1).numpy()
    assert np.array_equal(converted(rows.numpy(), precision), expected)
    assert np.array_equal(references.stored_rows(rows.numpy()[:20], precision.value), expected[:20])


def test_rows_do_not_depend_on_the_rows_beside_them() -> None:
    rows = torch.randn(333, 16, generator=torch.Generator().manual_seed(1)).numpy()
    whole = converted(rows, Precision.INT8)
    assert np.array_equal(np.concatenate([converted(rows[i : i + 7], Precision.INT8) for i in range(0, 333, 7)]), whole)


@pytest.mark.parametrize(
    ("row", "precision", "said"),
    [
        ([-65520.0] * 8, Precision.INT8, "column 0 is -65520.0; in all: 1 beyond the range of a row's fp16 bias"),
        ([65520.0] * 8, Precision.INT4, "column 0 is 65520.0; in all: 1 beyond the range of a row's fp16 bias"),
        (
            [0.0] * 7 + [65520.0 * 255],
            Precision.INT8,
            "column 7 is 16707600.0; in all: 1 too far from its row's smallest",
        ),
        ([0.0] * 7 + [65520.0 * 3], Precision.INT2, "column 7 is 196560.0; in all: 1 too far from its row's smallest"),
        (
            [-(2.0**127)] + [2.0**127] * 7,
            Precision.INT8,
            "column 0 is -1.7014118346046923e+38; in all: 1 beyond the range of a row's fp16 bias",
        ),
        ([0.0] * 7 + [float("nan")], Precision.INT8, "column 7 is nan; in all: 1 NaN; mend the training"),
        ([0.0] * 6 + [float("inf")] * 2, Precision.INT2, "column 6 is inf; in all: 2 infinite; mend the training"),
    ],
)
def test_what_scale_and_bias_cannot_hold_is_refused_with_its_row(
    row: list[float], precision: Precision, said: str
) -> None:
    rows = torch.zeros(5, 8)
    rows[3] = torch.tensor(row)
    assert not storable(rows, precision)
    message = describe(rows, precision)
    assert f"table 'user': cannot be stored as {precision}: row 3, {said}" in message


@pytest.mark.parametrize("precision", QUANTIZED)
def test_the_limit_of_a_scale_is_where_rounding_to_fp16_overflows(precision: Precision) -> None:
    top = {"int8": 255, "int4": 15, "int2": 3}[precision.value]
    rows = torch.zeros(1, 8)
    rows[0, 3] = float(np.nextafter(np.float32(65520.0 * top), np.float32(0)))
    assert storable(rows, precision)
    assert np.isfinite(converted(rows.numpy(), precision)[:, :4].copy().view(np.float16)).all()
    rows[0, 3] = 65520.0 * top
    assert not storable(rows, precision)
    assert np.isinf(converted(rows.numpy(), precision)[:, :4].copy().view(np.float16)).any()


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
