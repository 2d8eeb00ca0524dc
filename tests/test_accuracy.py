"""Question 1 of parity and the accuracy figures, against numpy in float64."""

import math

import numpy as np
import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.accuracy import (
    ErrorSums,
    Examiner,
    LookupErrors,
    ProbeRows,
    UnstorableError,
    block_rows,
    check_budget,
    dequantize,
    describe_histogram,
    measure_lookups,
    outlier_limit,
    table_accuracy,
)
from export.config import Budget, DataType, EmbeddingBagConfig, Precision
from export.errors import GateError
from export.quantize import convert_rows, new_rows, quantized
from runtime_py.manifest import TableAccuracy

STORED = [Precision.FP32, Precision.FP16, Precision.INT8, Precision.INT4, Precision.INT2]
QUANTIZED = [precision for precision in STORED if quantized(precision)]
NO_LOOKUPS = LookupErrors(0, 0, "", None, None, None)


def store(trained, precision):
    stored = new_rows(len(trained), trained.shape[1], precision)
    convert_rows(trained, stored, precision)
    return stored


def examine(trained, stored, chunk=1000, precision=Precision.FP16, **options):
    """The sums over a table, chunk by chunk."""
    examiner = Examiner("wide", precision, **options)
    for start in range(0, len(trained), chunk):
        examiner.examine(start, trained[start : start + chunk], stored[start : start + chunk])
    return examiner.sums


def randn(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("chunk", [1000, 4096])
def test_figures_equal_those_of_numpy_over_every_row(precision, chunk):
    trained = randn(9000, 64)
    trained[8999, 63] = 60_000.0
    trained[17] = 0.0
    trained[18] = 0.1
    stored = store(trained, precision)
    x = trained.numpy().astype(np.float64)
    y = dequantize(stored, 64, precision).numpy().astype(np.float64)
    sums = examine(trained, stored, chunk, precision)
    figures = table_accuracy("wide", precision, (9000, 64), 9000 * 256, sums, NO_LOOKUPS)
    error, lengths = np.abs(y - x), np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosines = np.ones(9000)
    known = np.arange(9000) != 17
    cosines[known] = (x * y).sum(1)[known] / lengths[known]
    assert figures.max_absolute_error == pytest.approx(error.max(), rel=1e-6)
    assert figures.mean_absolute_error == pytest.approx(error.mean(), rel=1e-5)
    assert figures.root_mean_square_error == pytest.approx(math.sqrt((error**2).mean()), rel=1e-5)
    assert figures.relative_l2 == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-5)
    relative = (error**2).sum(1)[known] / (x**2).sum(1)[known]
    assert figures.row_relative_l2 == pytest.approx(math.sqrt(relative.mean()), rel=1e-5)
    assert figures.mean_cosine == pytest.approx(cosines[known].mean(), rel=1e-7)
    assert figures.worst_cosine == pytest.approx(cosines.min(), rel=1e-7)
    assert cosines[figures.worst_cosine_row] == pytest.approx(cosines.min(), rel=1e-7)
    assert figures.constant_rows == 2
    assert figures.rows == figures.rows_measured == 9000
    assert figures.bits_per_weight == {"fp32": 32, "fp16": 16, "int8": 8.5, "int4": 4.5, "int2": 2.5}[precision]
    assert figures.bytes_after == stored.numel() * stored.element_size()


@pytest.mark.parametrize("precision", STORED)
def test_figures_do_not_depend_on_how_rows_are_shared_out(precision):
    trained = randn(5000, 16) * torch.logspace(-6, 3, 5000)[:, None]
    stored = store(trained, precision)
    found = [examine(trained, stored, chunk, precision, outlier_limit=0.001) for chunk in (7, 512, 5000)]
    merged = ErrorSums()
    for start in (3000, 0):
        examiner = Examiner("wide", precision, 0.001)
        stop = 5000 if start else 3000
        examiner.examine(start, trained[start:stop], stored[start:stop])
        merged.merge(examiner.sums)
    figures = {table_accuracy("t", precision, (5000, 16), 0, sums, NO_LOOKUPS) for sums in [*found, merged]}
    assert len(figures) == 1
    assert len({str((sums.worst, sums.outliers, sums.histogram)) for sums in [*found, merged]}) == 1


def test_the_rows_with_the_lowest_cosines_are_named():
    trained = randn(3000, 32)
    stored = store(trained, Precision.INT4)
    x, y = trained.double(), dequantize(stored, 32, Precision.INT4).double()
    cosines = torch.nn.functional.cosine_similarity(x, y, dim=1).numpy()
    worst = examine(trained, stored, 77, Precision.INT4).worst
    assert [int(row) for _, _, row in worst] == np.argsort(cosines)[:10].tolist()
    for cosine, error, row in worst:
        assert cosine == pytest.approx(cosines[int(row)], rel=1e-7)
        assert error == pytest.approx(float((y - x)[int(row)].norm() / x[int(row)].norm()), rel=1e-6)


def test_the_histogram_counts_rows_by_their_relative_error_in_half_octaves():
    trained = randn(2000, 16)
    trained[:30] = 0.25  # exact
    stored = store(trained, Precision.INT8)
    x, y = trained.double(), dequantize(stored, 16, Precision.INT8).double()
    errors = ((y - x).norm(dim=1) / x.norm(dim=1)).numpy()
    found = describe_histogram(examine(trained, stored, 100, Precision.INT8))
    assert found["exact_rows"] == int((errors == 0).sum()) >= 30
    edges = np.array([*found["lower_edges"], found["lower_edges"][-1] * math.sqrt(2)])
    assert found["rows"] == np.histogram(errors[errors > 0], edges)[0].tolist()
    assert sum(found["rows"]) + found["exact_rows"] == 2000


def test_errors_are_weighted_by_access_counts():
    trained = randn(1000, 8)
    stored = store(trained, Precision.INT4)
    counts = np.random.default_rng(5).integers(0, 9, 1000).astype(np.float64)
    sums = examine(trained, stored, 64, Precision.INT4, counts=counts)
    x, y = trained.double().numpy(), dequantize(stored, 8, Precision.INT4).double().numpy()
    relative = ((y - x) ** 2).sum(1) / (x**2).sum(1)
    expected = (counts * relative).sum() / counts.sum()
    assert sums.relative_square() == pytest.approx(expected, rel=1e-6)
    assert examine(trained, stored, 64, Precision.INT4).relative_square() != pytest.approx(expected, rel=1e-3)


def test_rows_that_are_not_measured_are_compared_and_do_not_count():
    trained = randn(10, 4)
    examiner = Examiner("wide", Precision.FP16)
    examiner.examine(0, trained, trained.half(), measure=False)
    assert examiner.sums == ErrorSums()
    with pytest.raises(GateError):
        examiner.examine(0, trained, trained.half() + 1, measure=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 65520.0, -65520.0])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_a_value_that_the_type_cannot_hold_is_seen_whatever_it_is_stored_as(value, precision):
    trained = randn(100, 24)
    trained[37, 5] = value
    examiner = Examiner("wide", precision)
    stored = store(trained, precision)
    if precision is Precision.FP32 and math.isfinite(value):
        examiner.examine(0, trained, stored)
        return
    with pytest.raises(UnstorableError):
        examiner.examine(0, trained, stored)
    stored[37, 5] = 1.0
    with pytest.raises(UnstorableError):
        examiner.examine(0, trained, stored)


# --- Outlier rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED)
def test_a_row_whose_largest_value_flattens_the_others_is_named(precision):
    trained = randn(500, 16)
    trained[33, 5] = 1e4
    trained[44, 0] = -3e3
    sums = examine(trained, store(trained, precision), 100, precision, outlier_limit=0.9)
    assert sums.outlier_rows == 2
    assert {(int(row), value) for _, value, row in sums.outliers} == {(33, 1e4), (44, -3e3)}
    x, y = trained.double(), dequantize(store(trained, precision), 16, precision).double()
    for relative, _, row in sums.outliers:
        others = x[int(row)].abs() < 1e3
        expected = (y - x)[int(row)][others].norm() / x[int(row)][others].norm()
        assert relative == pytest.approx(float(expected), rel=1e-6)


def test_no_row_is_an_outlier_where_its_others_keep_to_the_limit_or_are_zero_as_stored():
    trained = randn(500, 16)
    trained[33, 5] = 1e4
    stored = store(trained, Precision.INT8)
    assert examine(trained, stored, 100, Precision.INT8, outlier_limit=math.inf).outlier_rows == 0
    alone = torch.zeros(3, 16)
    alone[1, 2] = 1e4  # the bias is 0, and so are the codes of the others
    assert examine(alone, store(alone, Precision.INT8), 3, Precision.INT8, outlier_limit=0.01).outlier_rows == 0
    alone[1, 2] = -1e4  # the others are bias + 255 * scale, which fp16 rounds away from 0
    [[relative, value, row]] = examine(
        alone, store(alone, Precision.INT8), 3, Precision.INT8, outlier_limit=1.0
    ).outliers
    assert (relative, value, row) == (1e300, -1e4, 1)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.FP32])
def test_rows_that_are_not_quantized_have_no_outliers(precision):
    trained = randn(50, 16)
    trained[3, 5] = 1e4
    assert examine(trained, store(trained, precision), 50, precision, outlier_limit=0.0).outlier_rows == 0


def test_the_limit_of_outliers_is_the_tables_budget_or_the_default_one():
    assert outlier_limit(Precision.INT8, [Budget(max_relative_l2=0.5), Budget(max_relative_l2=0.25)]) == 0.25
    assert outlier_limit(Precision.INT8, [Budget(min_cosine=0.5)]) == 0.02
    assert outlier_limit(Precision.FP32, [Budget()]) == math.inf


# --- Edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED)
def test_constant_zero_and_single_rows_are_right(precision):
    trained = torch.stack([torch.zeros(8), torch.full((8,), 0.1), torch.full((8,), -60_000.0), torch.full((8,), 1e-9)])
    stored = store(trained, precision)
    values = dequantize(stored, 8, precision)
    assert torch.equal(values[0], trained[0])
    assert torch.allclose(values[1], trained[1], rtol=2**-11, atol=0)
    assert torch.allclose(values[2], trained[2], rtol=2**-11, atol=0)
    assert float(values[3].abs().max()) <= 2.0**-25  # below fp16's smallest subnormal
    sums = examine(trained, stored, 4, precision)
    assert sums.constant_rows == 4
    assert (sums.vanished_rows, sums.rated_rows) == (1, 2)
    one = randn(1, 8)
    assert examine(one, store(one, precision), 1, precision).rows == 1


@pytest.mark.parametrize("precision", QUANTIZED)
def test_zeros_of_either_sign_are_one_smallest_value(precision):
    for first in (0.0, -0.0):
        trained = torch.tensor([[first, -first] * 8, [-0.0] * 15 + [0.0], [0.0] * 15 + [-0.0]])
        assert examine(trained, store(trained, precision), 3, precision).largest == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_float32_are_added_in_float64(scale):
    trained = randn(50, 8) * scale
    sums = examine(trained, trained.clone(), precision=Precision.FP32)
    assert sums.square == pytest.approx((trained.double() ** 2).sum().item(), rel=1e-6)
    assert (sums.relative_l2(), sums.mean_cosine()) == (0.0, 1.0)


def test_a_table_of_zeros_has_no_relative_error_and_an_exact_one_has_none():
    zero = examine(torch.zeros(5, 4), torch.zeros(5, 4).half())
    assert (zero.largest, zero.relative_l2(), zero.mean_cosine(), zero.worst) == (0.0, None, None, [])
    half = examine(randn(5, 4).half(), randn(5, 4).half())
    assert (half.largest, half.relative_l2(), half.mean_cosine()) == (0.0, 0.0, 1.0)
    for value in (1e-9, 3e-16, 1e-30):
        lost = examine(torch.full((5, 4), value), torch.zeros(5, 4).half())
        assert lost.relative_l2() == pytest.approx(1.0, rel=1e-12)
        assert (lost.vanished_rows, lost.rated_rows, lost.mean_cosine()) == (5, 0, None)


@pytest.mark.parametrize("trained_type", [torch.float32, torch.float16])
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.FP32])
def test_one_wrong_bit_is_named(trained_type, precision):
    trained = randn(2000, 64).half().to(trained_type)  # so that every pair of types stores it exactly
    stored = trained.to({Precision.FP16: torch.float16, Precision.FP32: torch.float32}[precision], copy=True)
    examine(trained, stored, precision=precision)
    stored.view(torch.int16 if precision is Precision.FP16 else torch.int32)[1500, 17] ^= 1
    with pytest.raises(GateError, match=r"table 'wide': row 1500, column 17 is stored as .* the reference makes"):
        examine(trained, stored, precision=precision)


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize(
    ("column", "named"),
    [(0, "scale and bias: row 1500, column 0"), (3, "scale and bias: row 1500, column 1"), (7, "code of")],
)
def test_one_wrong_bit_of_a_quantized_row_is_named(precision, column, named):
    trained = randn(2000, 64)
    stored = store(trained, precision)
    examine(trained, stored, 2000, precision)
    stored[1500, column] ^= 1
    with pytest.raises(GateError, match=f"table 'wide': {named}.*the reference makes"):
        examine(trained, stored, 2000, precision)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_what_rows_mean_is_what_the_plain_loops_say(precision):
    trained = randn(50, 16) * torch.logspace(-5, 2, 50)[:, None]
    stored = store(trained, precision)
    expected = references.dequantized_rows(stored.numpy(), precision.value, 16)
    assert np.array_equal(dequantize(stored, 16, precision).numpy(), expected)


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


# --- Lookups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_lookups_are_measured_over_pooled_bags(pooling):
    trained = randn(40, 8)
    stored = store(trained, Precision.INT4)
    ids = np.arange(0, 80, 2)  # the rows are those of even ids
    bags = [np.array(bag, np.int64) for bag in ([0, 2], [78, 78, 4], [])]
    table = EmbeddingBagConfig(name="t", num_embeddings=80, embedding_dim=8, data_type=DataType.FP32, pooling=pooling)
    found = measure_lookups(ProbeRows(ids, trained, stored), Precision.INT4, bags, table)
    y = dequantize(stored, 8, Precision.INT4)
    pooled = []
    for rows in (trained.double(), y.double()):
        bag = [rows[[0, 1]].sum(0), rows[[39, 39, 2]].sum(0), torch.zeros(8)]
        if pooling == "mean":
            bag = [bag[0] / 2, bag[1] / 3, bag[2]]
        pooled.append(torch.stack(bag))
    cosines = torch.nn.functional.cosine_similarity(*pooled, dim=1)[:2]
    assert found.relative_l2 == pytest.approx(float((pooled[1] - pooled[0]).norm() / pooled[0].norm()), rel=1e-8)
    assert found.mean_cosine == pytest.approx(float(cosines.mean()), rel=1e-8)
    assert found.worst_cosine == pytest.approx(float(cosines.min()), rel=1e-8)
    assert (found.bags, found.ids, found.drawn) == (3, 5, "uniformly")


def test_blocks_are_of_whole_rows_and_at_least_one():
    assert block_rows(64) * 64 == block_rows(1)
    assert block_rows(10**7) == 1


# --- Budgets ---------------------------------------------------------------------------------------------------------


def accuracy_of(**figures):
    base = {
        "table": "t",
        "serving_precision": "int8",
        "rows": 1,
        "rows_measured": 1,
        "bytes_before": 4,
        "bytes_after": 2,
        "bits_per_weight": 8.0,
        "max_absolute_error": 0.5,
        "mean_absolute_error": 0.1,
        "root_mean_square_error": 0.2,
        "relative_l2": 0.01,
        "row_relative_l2": 0.015,
        "mean_cosine": 0.99,
        "worst_cosine": 0.9,
        "worst_cosine_row": 7,
        "constant_rows": 0,
        "vanished_rows": 2,
        "outlier_rows": 3,
        "lookup_relative_l2": 0.02,
        "lookup_mean_cosine": 0.98,
    }
    return TableAccuracy(**(base | figures))


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (
            Budget(max_absolute_error=0.4),
            "table 't': max_absolute_error is 0.5, above its budget max_absolute_error: 0.4",
        ),
        (Budget(mean_absolute_error=0.05), "table 't': mean_absolute_error is 0.1, above"),
        (Budget(max_relative_l2=0.001), "table 't': relative_l2 is 0.01, above its budget max_relative_l2: 0.001"),
        (Budget(max_row_relative_l2=0.01), "table 't': row_relative_l2 is 0.015, above"),
        (Budget(max_vanished_rows=1), "table 't': vanished_rows is 2, above"),
        (Budget(min_cosine=0.999), "table 't': mean_cosine is 0.99, below its budget min_cosine: 0.999"),
        (Budget(min_worst_cosine=0.95), "table 't': worst_cosine is 0.9, below its budget min_worst_cosine: 0.95"),
        (Budget(max_lookup_relative_l2=0.01), "table 't': lookup_relative_l2 is 0.02, above its budget"),
        (Budget(max_outlier_rows=2), "table 't': outlier_rows is 3, above its budget max_outlier_rows: 2 (int8)"),
    ],
)
def test_a_figure_outside_its_budget_is_one_line(budget, text):
    (line,) = check_budget(accuracy_of(), budget)
    assert line.startswith(text)


def test_figures_at_their_budget_pass_and_missing_figures_are_not_gated():
    at = Budget(
        max_absolute_error=0.5,
        mean_absolute_error=0.1,
        max_relative_l2=0.01,
        min_cosine=0.99,
        min_worst_cosine=0.9,
        max_lookup_relative_l2=0.02,
        max_outlier_rows=3,
    )
    assert check_budget(accuracy_of(), at) == []
    figures = {"relative_l2": None, "mean_cosine": None, "worst_cosine": None, "lookup_relative_l2": None}
    zero = accuracy_of(**figures, vanished_rows=0)
    assert check_budget(zero, Budget(max_relative_l2=0.0, min_cosine=1.0, min_worst_cosine=1.0)) == []
    (line,) = check_budget(accuracy_of(**figures, vanished_rows=1), Budget(max_relative_l2=0.0, min_cosine=0.1))
    assert line.startswith(
        "table 't': mean_cosine has no value, as all rows that are not zero vanish; its budget is min_cosine"
    )


def test_a_row_is_dominated_by_a_value_from_nine_tenths_of_its_squared_norm_on():
    trained = torch.full((2, 101), 0.1)
    trained[:, 0] = 0.0  # so that the others are not the smallest value, which is exact
    trained[0, 7] = math.sqrt(0.99 * 0.85 / 0.15)
    trained[1, 7] = math.sqrt(0.99 * 0.95 / 0.05)
    trained = trained[:, :100].contiguous()
    sums = examine(trained, store(trained, Precision.INT4), 2, Precision.INT4, outlier_limit=0.01)
    assert [int(row) for _, _, row in sums.outliers] == [1]


def test_rows_by_id_are_those_of_the_ids():
    probes = ProbeRows(np.array([3, 5, 9]), randn(3, 4), randn(3, 4))
    some = probes.only(np.array([3, 9]))
    assert torch.equal(some.trained, probes.trained[[0, 2]])
    assert torch.equal(some.stored, probes.stored[[0, 2]])
