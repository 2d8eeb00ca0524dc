"""Where rows lie on a GPU: padded, aligned, within a budget, or refused with the numbers. No GPU is needed."""

import re

import pytest
from device_support import check_layout, describe
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, construct_cache_state
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
    nbit_construct_split_state,
    rounded_row_size_in_bytes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py import DeviceMemoryError, UnsupportedError
from runtime_py.device_layout import LOCATIONS, padded_row_bytes, plan_layout
from runtime_py.manifest import ROW_FORMATS, Manifest

MIXED = {"a": (10, 3, "fp32"), "b": (1000, 65, "fp16"), "c": (7, 66, "int8"), "d": (9, 12, "int4"), "e": (5, 8, "int4")}
HUGE = 1 << 50


@pytest.mark.parametrize("precision", ROW_FORMATS)
def test_padded_rows_are_as_long_as_fbgemm_says(precision: str) -> None:
    row_format = ROW_FORMATS[precision]  # type: ignore[index]
    for dim in range(row_format.dim_divisor, 600, row_format.dim_divisor):
        expected = rounded_row_size_in_bytes(dim, SparseType(precision), 16)
        assert padded_row_bytes(row_format.row_bytes(dim)) == expected, dim


def test_locations_have_the_numbers_of_fbgemm() -> None:
    assert {
        "device": EmbeddingLocation.DEVICE.value,
        "uvm": EmbeddingLocation.MANAGED.value,
        "uvm_cache": EmbeddingLocation.MANAGED_CACHING.value,
    } == LOCATIONS


def fbgemm_state(manifest: Manifest, locations: dict[str, EmbeddingLocation]):
    """How FBGEMM's own module lays the same tables out."""
    specs = [
        (
            table.name,
            table.num_embeddings,
            table.embedding_dim,
            SparseType(table.serving_precision),
            locations[table.name],
        )
        for table in manifest.tables
    ]
    return nbit_construct_split_state(specs, cacheable=True, row_alignment=16)


def test_offsets_and_sizes_are_those_of_fbgemm_s_own_module() -> None:
    manifest = describe(MIXED)
    layout = plan_layout(manifest, "device", HUGE)
    check_layout(manifest, layout)
    state = fbgemm_state(manifest, dict.fromkeys(MIXED, EmbeddingLocation.DEVICE))
    assert layout.offsets(manifest) == state.offsets
    assert layout.placements(manifest) == [location.value for location in state.placements]
    assert (layout.device_bytes, layout.uvm_bytes) == (state.dev_size, state.uvm_size)
    assert layout.cache is None
    assert layout.total_device_bytes == layout.device_bytes


def test_tables_that_many_features_read_go_to_the_device_first_and_small_ones() -> None:
    tables = {"often": (1000, 32, "fp16"), "seldom": (1000, 32, "fp16"), "small": (10, 32, "fp16")}
    features = {"s": "seldom", "o": "often", "o2": "often", "x": "small"}
    manifest = describe(tables, features)
    layout = plan_layout(manifest, "uvm", 64_000 + 640)
    check_layout(manifest, layout)
    assert {name: placed.location for name, placed in layout.tables.items()} == {
        "seldom": "uvm",
        "often": "device",
        "small": "device",
    }
    assert layout.placements(manifest) == [1, 0, 0, 0]
    assert layout.offsets(manifest) == [0, 0, 0, 64_000]
    state = fbgemm_state(
        manifest,
        {"seldom": EmbeddingLocation.MANAGED, "often": EmbeddingLocation.DEVICE, "small": EmbeddingLocation.DEVICE},
    )
    assert (layout.device_bytes, layout.uvm_bytes) == (state.dev_size, state.uvm_size)


def test_a_table_too_large_for_the_room_does_not_keep_a_smaller_one_out() -> None:
    manifest = describe({"big": (1000, 32, "fp16"), "small": (100, 32, "fp16")}, {"a": "big", "b": "big", "c": "small"})
    layout = plan_layout(manifest, "uvm", 10_000)
    assert [layout.tables[name].location for name in ("big", "small")] == ["uvm", "device"]


def test_a_table_without_a_feature_is_not_loaded() -> None:
    manifest = describe(MIXED, {"x": "c"})
    layout = plan_layout(manifest, "device", 7 * 80 + 128)
    check_layout(manifest, layout)
    assert list(layout.tables) == ["c"]
    assert layout.device_bytes == 640  # 7 x 80, to the next 128


@pytest.mark.parametrize("placement", ["device", "uvm", "uvm_cache"])
def test_where_everything_fits_the_placement_makes_no_difference(placement) -> None:
    manifest = describe(MIXED)
    needed = plan_layout(manifest, "device", HUGE).device_bytes
    layout = plan_layout(manifest, placement, needed)
    assert layout == plan_layout(manifest, "device", HUGE)
    assert layout.cache_starts(manifest) == []


def test_rows_that_do_not_fit_are_refused_with_the_numbers_and_what_to_do() -> None:
    manifest = describe(MIXED)
    needed = 256 + 144_000 + 640 + 256 + 128
    text = (
        f"the rows need {needed} bytes of device memory, and {needed - 1} are to be used; the largest is table 'b': 144000 "
        "(1000 rows x 144 bytes); use placement='uvm' or 'uvm_cache', raise device_memory_bytes, or build with a smaller "
        "serving_precision"
    )
    assert plan_layout(manifest, "device", needed).device_bytes == needed
    with pytest.raises(DeviceMemoryError, match=f"^{re.escape(text)}$"):
        plan_layout(manifest, "device", needed - 1)


def test_the_cache_is_what_fbgemm_s_own_module_makes() -> None:
    tables = {"x": (1000, 64, "fp16"), "tiny": (3, 4, "fp32"), "y": (500, 100, "int8")}
    features = {"f0": "y", "f1": "tiny", "f2": "x", "f3": "y"}
    manifest = describe(tables, features)
    budget = 60_000
    layout = plan_layout(manifest, "uvm_cache", budget)
    check_layout(manifest, layout)
    assert {name: placed.location for name, placed in layout.tables.items()} == {
        "y": "uvm_cache",
        "tiny": "device",
        "x": "uvm_cache",
    }
    names = list(layout.tables)
    state = construct_cache_state(
        [tables[name][0] for name in names],
        [EmbeddingLocation(LOCATIONS[layout.tables[name].location]) for name in names],
        [names.index(table) for table in features.values()],
    )
    assert layout.cache is not None
    assert layout.cache_starts(manifest) == state.cache_hash_size_cumsum
    assert layout.cache.rows == state.total_cache_hash_size == 1500
    assert layout.cache.row_bytes == 128
    assert layout.cache.sets == (budget - 128 - 4 * 1500) // (32 * (128 + 16))
    assert layout.total_device_bytes <= budget


def test_the_cache_is_no_larger_than_all_rows_that_it_may_hold() -> None:
    manifest = describe({"x": (100, 64, "fp16"), "y": (10_000, 64, "fp16")}, {"x": "x", "y": "y"})
    layout = plan_layout(manifest, "uvm_cache", 1_290_000)  # half of it would not hold y
    assert layout.cache is not None
    assert layout.cache.first_row == {"y": 0}
    assert layout.cache.sets == min(-(-10_000 // 32), (1_290_000 - 12_800 - 40_000) // (32 * 144))


def test_a_budget_without_room_for_one_set_of_rows_is_refused() -> None:
    manifest = describe({"x": (10_000, 64, "fp16")})
    needed = 4 * 10_000 + 32 * (128 + 16)
    text = (
        f"a cache for the 10000 rows of 'x' needs at least {needed} bytes of device memory, with the tables that lie there, "
        f"and {needed - 1} are to be used; raise device_memory_bytes, or use placement='uvm'"
    )
    with pytest.raises(DeviceMemoryError, match=f"^{re.escape(text)}$"):
        plan_layout(manifest, "uvm_cache", needed - 1)
    assert plan_layout(manifest, "uvm_cache", needed).cache.sets == 1  # type: ignore[union-attr]


# The largest dims that FBGEMM's CUDA kernels take; the next that a table of that precision can have is refused.
@pytest.mark.parametrize(
    ("precision", "largest", "next_one"),
    [("fp32", 2048, 2049), ("fp16", 4096, 4097), ("int8", 4092, 4094), ("int4", 4088, 4092)],
)
def test_dims_beyond_the_kernels_are_refused(precision: str, largest: int, next_one: int) -> None:
    plan_layout(describe({"wide": (2, largest, precision)}), "device", HUGE)
    with pytest.raises(
        UnsupportedError, match=rf"^table 'wide': a row of {next_one} values in {precision} is \d+ bytes on a GPU"
    ):
        plan_layout(describe({"wide": (2, next_one, precision)}), "uvm", HUGE)


def test_int2_rows_which_the_kernel_writes_wrongly_are_refused() -> None:
    text = (
        "table 'e': is stored as int2, of which FBGEMM's CUDA kernel writes wrong float32 values; use device='cpu', or build "
        "it with serving_precision int4"
    )
    manifest = describe(MIXED | {"e": (5, 8, "int2")})
    for placement in ("device", "uvm", "uvm_cache"):
        with pytest.raises(UnsupportedError, match=f"^{re.escape(text)}$"):
            plan_layout(manifest, placement, HUGE)
    unread = describe(MIXED | {"e": (5, 8, "int2")}, {"x": "a"})  # a table without a feature is not loaded
    assert list(plan_layout(unread, "device", HUGE).tables) == ["a"]


def test_more_rows_than_int32_counts_are_refused() -> None:
    plan_layout(describe({"long": (2**31 - 1, 4, "fp32")}), "device", HUGE)
    text = f"table 'long': has {2**31} rows, and FBGEMM's CUDA kernels take at most {2**31 - 1}"
    with pytest.raises(UnsupportedError, match=f"^{re.escape(text)}"):
        plan_layout(describe({"long": (2**31, 4, "fp32")}), "device", HUGE)


def test_offsets_beyond_4_gib_are_exact() -> None:
    manifest = describe({"one": (2**31 - 1, 64, "fp32"), "two": (2**31 - 1, 65, "fp16")})
    layout = plan_layout(manifest, "device", HUGE)
    check_layout(manifest, layout)
    assert layout.offsets(manifest) == [0, -(-(2**31 - 1) * 256 // 128) * 128]


def test_an_unknown_placement_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="placement must be 'device', 'uvm' or 'uvm_cache', got 'hbm'"):
        plan_layout(describe(MIXED), "hbm", HUGE)  # type: ignore[arg-type]


@given(
    rows=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    placement=st.sampled_from(["uvm", "uvm_cache"]),
    memory_bytes=st.integers(0, 2_000_000),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_no_plan_takes_more_than_its_budget(rows, placement, memory_bytes, data) -> None:
    precisions = [data.draw(st.sampled_from(["fp32", "fp16", "int8", "int4"])) for _ in rows]
    tables = {f"t{i}": (count, 16 * (i + 1), precisions[i]) for i, count in enumerate(rows)}
    features = {f"f{i}": data.draw(st.sampled_from(list(tables))) for i in range(8)}
    manifest = describe(tables, features)
    try:
        layout = plan_layout(manifest, placement, memory_bytes)
    except DeviceMemoryError:
        assert placement == "uvm_cache"
        return
    check_layout(manifest, layout)
    assert layout.total_device_bytes <= memory_bytes
    assert (layout.cache is not None) == any(each.location == "uvm_cache" for each in layout.tables.values())
