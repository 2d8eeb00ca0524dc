"""The compiled passes over values, against numpy."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest

from export import row_kernels


def half_bits(x):
    return x.astype(np.float16).view(np.uint16)


@pytest.mark.parametrize("row", [0, 3, 6])
@pytest.mark.parametrize("column", [0, 12, 36])
def test_the_first_row_with_a_wrong_bit_is_found_wherever_the_bit_is(row, column):
    x = np.random.default_rng(1).normal(size=(7, 37)).astype(np.float32)
    stored, e = half_bits(x), np.empty_like(x)
    stored[row:, column] ^= 1
    assert row_kernels.compare_fp16(x, stored, e)[0] == row
    bits = x.view(np.uint32).copy()
    bits[row:, column] ^= 1 << 31
    assert row_kernels.compare_fp32(x.view(np.uint32), bits)[0] == row
    assert row_kernels.compare_fp32(bits, bits)[0] == -1


def test_errors_and_the_largest_of_them_are_those_of_numpy():
    x = (np.random.default_rng(2).normal(size=(50, 64)) * 10.0 ** np.arange(-8, 4).repeat(6)[:64]).astype(np.float32)
    e = np.empty_like(x)
    wrong, largest, peak = row_kernels.compare_fp16(x, half_bits(x), e)
    expected = x.astype(np.float16).astype(np.float32) - x
    assert wrong == -1
    assert np.array_equal(e, expected)
    assert largest == np.abs(expected).max()
    assert np.uint32(peak).view(np.float32) == np.abs(x).max()


def test_a_row_of_one_value_counts_as_constant_and_one_that_looks_like_it_does_not():
    x = np.random.default_rng(3).normal(size=(5, 9)).astype(np.float32)
    x[1], x[3] = 2.5, 2.5
    x[3, 5] = 2.0
    assert row_kernels.add_up_rows(x, np.zeros_like(x), np.empty((4, 5))) == 1
    assert row_kernels.add_up_rows(x[:, :1].copy(), np.zeros((5, 1), np.float32), np.empty((4, 5))) == 5


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-24, 2.0**-25, -(2.0**-25), 3 * 2.0**-26, 2.0**-14, 1 / 3, 65519.99])
def test_one_value_is_rounded_as_numpy_does(value):
    assert np.float32(row_kernels.fp16_of(np.float32(value))).tobytes() == np.float32(np.float16(value)).tobytes()


def test_a_function_that_cannot_be_kept_on_the_disk_is_compiled_all_the_same():
    scope = {}
    exec("def double(x):\n    return 2 * x", scope)  # of no file: there is no place for its cache
    assert row_kernels._compiled(scope["double"])(21) == 42


# --- Compiled code on the disk ---------------------------------------------------------------------------------------


def _add_one(x):
    return x + 1


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The folder with the code of `_add_one`, compiled and saved."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert row_kernels._compiled(_add_one)(1) == 2
    [index] = tmp_path.rglob("*.nbi")
    again = row_kernels._compiled(_add_one)
    assert again(1) == 2
    assert sum(again.stats.cache_hits.values()) == 1
    return index.parent


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_code_on_the_disk_is_compiled_again(cached, kind):
    [file] = cached.glob(f"*.{kind}")
    for data in (b"", file.read_bytes()[:-20], b"\x80\x04junk"):
        file.write_bytes(data)
        assert row_kernels._compiled(_add_one)(1) == 2


def test_a_place_that_can_neither_be_read_nor_written_any_more_fails_no_build(cached):
    function = row_kernels._compiled(_add_one)
    shutil.rmtree(cached)
    cached.write_text("a file where the folder was: every open fails, as on a full or broken disk")
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(function, [1, 2])) == [2, 3]
