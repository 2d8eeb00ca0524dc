"""Question 1 of parity and the accuracy figures, against numpy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.accuracy import ErrorSums, Examiner, check_budget
from export.config import Budget, Precision
from export.errors import GateError
from runtime_py.manifest import TableAccuracy


def examine(trained, stored, chunk=1000, precision=Precision.FP16):
    """The sums over a table, chunk by chunk."""
    examiner = Examiner("wide", precision)
    for start in range(0, len(trained), chunk):
        examiner.examine(start, trained[start : start + chunk], stored[start : start + chunk])
    return examiner.sums


def randn(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_figures_equal_those_of_numpy_over_every_row():
    trained = randn(9000, 64)
    trained[8999, 63] = 60_000.0
    x = trained.numpy().astype(np.float64)
    y = x.astype(np.float16).astype(np.float64)
    sums = examine(trained, trained.half())
    assert sums.largest == np.abs(y - x).max()
    assert sums.absolute == pytest.approx(np.abs(y - x).sum(), rel=1e-5)
    assert sums.relative_l2() == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-5)
    assert sums.cosine() == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_float32_are_added_in_float64(scale):
    trained = randn(50, 8) * scale
    sums = examine(trained, trained.clone(), precision=Precision.FP32)
    assert sums.square == pytest.approx((trained.double() ** 2).sum().item(), rel=1e-6)
    assert (sums.relative_l2(), sums.cosine()) == (0.0, 1.0)


def test_a_table_of_zeros_has_no_relative_error_and_an_exact_one_has_none():
    zero = examine(torch.zeros(5, 4), torch.zeros(5, 4).half())
    assert (zero.largest, zero.relative_l2(), zero.cosine()) == (0.0, None, None)
    half = examine(randn(5, 4).half(), randn(5, 4).half())
    assert (half.largest, half.relative_l2(), half.cosine()) == (0.0, 0.0, 1.0)
    for value in (1e-9, 3e-16, 1e-30):
        lost = examine(torch.full((5, 4), value), torch.zeros(5, 4).half())
        assert (lost.relative_l2(), lost.cosine()) == (1.0, 0.0)


def test_sums_add_up_over_pieces():
    trained = randn(900, 8)
    whole, parts = examine(trained, trained.half()), ErrorSums()
    for part in trained.split(300):
        parts.merge(examine(part, part.half()))
    assert parts.largest == whole.largest
    assert parts.relative_l2() == pytest.approx(whole.relative_l2(), rel=1e-6)


@pytest.mark.parametrize("trained_type", [torch.float32, torch.float16])
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.FP32])
def test_one_wrong_bit_is_named(trained_type, precision):
    trained = randn(2000, 64).half().to(trained_type)  # so that every pair of types stores it exactly
    stored = trained.to({Precision.FP16: torch.float16, Precision.FP32: torch.float32}[precision], copy=True)
    examine(trained, stored, precision=precision)
    stored.view(torch.int16 if precision is Precision.FP16 else torch.int32)[1500, 17] ^= 1
    with pytest.raises(GateError, match=r"table 'wide': row 1500, column 17 is stored as .* the reference makes"):
        examine(trained, stored, precision=precision)


def test_the_sign_of_what_rounds_to_zero_counts():
    trained = torch.tensor([[-1e-10, 1e-10, -0.0, 0.0]])
    examine(trained, trained.half())
    with pytest.raises(GateError, match="column 0"):
        examine(trained, trained.half().abs())


# Ties, the largest value below infinity, subnormals of both types: everything but NaN and what overflows.
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200))
def test_the_reference_rounds_as_ieee_754_says(patterns):
    values = np.array([*patterns, *(pattern & 0xFFFFE000 | 0x1000 for pattern in patterns)], np.uint32).view(np.float32)
    values = np.append(values[np.isfinite(values) & (np.abs(values) < 65520)], np.float32(0))
    trained, stored = torch.from_numpy(values)[None], torch.from_numpy(values.astype(np.float16))[None]
    examine(trained, stored)  # numpy's conversion is what it expects
    with pytest.raises(GateError):  # and nothing else
        examine(trained, (stored.view(torch.int16) ^ 1).view(torch.float16))


def accuracy_of(**figures):
    base = {"max_absolute_error": 0.5, "mean_absolute_error": 0.1, "relative_l2": 0.01, "cosine": 0.99}
    return TableAccuracy("t", "fp16", 1, 4, 2, **(base | figures))


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (
            Budget(max_absolute_error=0.4),
            "table 't': max_absolute_error is 0.5, above its budget max_absolute_error: 0.4",
        ),
        (Budget(mean_absolute_error=0.05), "table 't': mean_absolute_error is 0.1, above"),
        (Budget(max_relative_l2=0.001), "table 't': relative_l2 is 0.01, above its budget max_relative_l2: 0.001"),
        (Budget(min_cosine=0.999), "table 't': cosine is 0.99, below its budget min_cosine: 0.999"),
    ],
)
def test_a_figure_outside_its_budget_is_one_line(budget, text):
    (line,) = check_budget(accuracy_of(), budget)
    assert line.startswith(text)


def test_figures_at_their_budget_pass_and_missing_figures_are_not_gated():
    at = Budget(max_absolute_error=0.5, mean_absolute_error=0.1, max_relative_l2=0.01, min_cosine=0.99)
    assert check_budget(accuracy_of(), at) == []
    assert check_budget(accuracy_of(relative_l2=None, cosine=None), Budget(max_relative_l2=0.0, min_cosine=1.0)) == []
