"""Where rows lie on a GPU: which tables in its memory, which in memory that it shares with the host, at which offset.

Pure arithmetic over the manifest, so that all of it is tested without a GPU. FBGEMM's CUDA kernels copy rows 16 bytes at a
time: canonical rows are padded to a multiple of that on their way, and tables start at a multiple of 128 bytes, a cache
line. Names and numbers of the places are those of FBGEMM's `EmbeddingLocation`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from runtime_py.errors import DeviceMemoryError, UnsupportedError
from runtime_py.manifest import Manifest, ServingPrecision, Table

__all__ = [
    "CACHE_WAYS",
    "LOCATIONS",
    "ROW_ALIGNMENT",
    "CacheLayout",
    "DeviceLayout",
    "Location",
    "PlacedTable",
    "Placement",
    "padded_row_bytes",
    "plan_layout",
]

Placement = Literal["device", "uvm", "uvm_cache"]
Location = Placement  # of one table
LOCATIONS: dict[Location, int] = {"device": 0, "uvm": 1, "uvm_cache": 2}  # DEVICE, MANAGED, MANAGED_CACHING

ROW_ALIGNMENT = 16
_TABLE_ALIGNMENT = 128
CACHE_WAYS = 32  # rows of a set: one for each lane of a warp
_CACHE_STATE_BYTES = 16  # a cached row's number and the time of its last use, int64 each
_CACHE_MAP_BYTES = 4  # for each row that may be cached: its feature, int32
_MOST_CACHED_ROWS = 2**31 - 1

# The longest padded row that each kernel was compiled for: 64, 64, 32 and 16 times 128 bytes (`max_*_128b_rows`
# in FBGEMM's embedding_forward_quantized_split_nbit_host_template.cu).
_MOST_ROW_BYTES: dict[ServingPrecision, int] = {"fp32": 8192, "fp16": 8192, "int8": 4096, "int4": 2048}
_MOST_ROWS = 2**31 - 1  # the kernels hold ids in int32


@dataclass(frozen=True)
class PlacedTable:
    """One table's place: R' = `row_bytes`, padded, at `offset_bytes` of the memory of its `location`.

    "uvm" and "uvm_cache" share one memory, that which the host and the device share.
    """

    table: Table
    location: Location
    row_bytes: int
    offset_bytes: int

    @property
    def bytes(self) -> int:
        """All of the table's padded rows."""
        return self.table.num_embeddings * self.row_bytes


@dataclass(frozen=True)
class CacheLayout:
    """FBGEMM's cache of the rows of all "uvm_cache" tables: `sets` of 32 rows, each of `row_bytes`.

    A row of these tables is numbered from its table's `first_row` on, up to `rows`.
    """

    sets: int
    row_bytes: int
    first_row: Mapping[str, int]
    rows: int

    @property
    def bytes(self) -> int:
        """Device memory for cached rows, their state, and the map from rows to features."""
        return self.sets * _set_bytes(self.row_bytes) + self.rows * _CACHE_MAP_BYTES


@dataclass(frozen=True)
class DeviceLayout:
    """The place of every table that has a feature, by name; the others are never read, and not loaded."""

    tables: Mapping[str, PlacedTable]
    device_bytes: int
    uvm_bytes: int
    cache: CacheLayout | None

    @property
    def total_device_bytes(self) -> int:
        """Device memory for rows and cache."""
        return self.device_bytes + (self.cache.bytes if self.cache else 0)

    def offsets(self, manifest: Manifest) -> list[int]:
        """The graph's `weights_offsets`: of each feature's table."""
        return [self.tables[feature.table].offset_bytes for feature in manifest.features]

    def placements(self, manifest: Manifest) -> list[int]:
        """The graph's `weights_placements`."""
        return [LOCATIONS[self.tables[feature.table].location] for feature in manifest.features]

    def cache_starts(self, manifest: Manifest) -> list[int]:
        """FBGEMM's `cache_hash_size_cumsum` [F + 1]: each feature's table's first row in the cache, -1 of no cached table."""
        if self.cache is None:
            return []
        first = self.cache.first_row
        return [*(first.get(feature.table, -1) for feature in manifest.features), self.cache.rows]


def padded_row_bytes(row_bytes: int) -> int:
    """Bytes of a row on a GPU."""
    return _round_up(row_bytes, ROW_ALIGNMENT)


def plan_layout(manifest: Manifest, placement: Placement, memory_bytes: int) -> DeviceLayout:
    """Places every table that has a feature.

    Tables that many features read for their size go to the device first. Where not all of them fit, "uvm" leaves the others
    in shared memory, and "uvm_cache" gives half of `memory_bytes` to a cache of their rows.

    Args:
        manifest: the artifact's.
        placement: "device" (everything in the device's memory), "uvm" or "uvm_cache".
        memory_bytes: device memory that rows and cache may take.

    Raises:
        UnsupportedError: a table is beyond what the kernels were made for.
        DeviceMemoryError: the rows do not fit, or the cache holds no set of rows.
    """
    if placement not in get_args(Placement):
        raise ValueError(f"placement must be 'device', 'uvm' or 'uvm_cache', got {placement!r}")
    tables = [manifest.table[name] for name in dict.fromkeys(feature.table for feature in manifest.features)]
    for table in tables:
        _check_kernel(table)
    everything = _layout(tables, dict.fromkeys((table.name for table in tables), "device"), None)
    if everything.device_bytes <= memory_bytes:
        return everything
    if placement == "device":
        raise _does_not_fit(everything, memory_bytes)
    room = memory_bytes if placement == "uvm" else memory_bytes // 2
    locations = _fill(tables, _reads(manifest), placement, room)
    left = [table for table in tables if locations[table.name] == "uvm_cache"]
    cache = _plan_cache(left, memory_bytes, _layout(tables, locations, None).device_bytes) if left else None
    return _layout(tables, locations, cache)


def _fill(tables: list[Table], reads: Mapping[str, int], rest: Location, room: int) -> dict[str, Location]:
    """Each table's location: the device's memory, as long as there is `room`, else `rest`."""
    locations: dict[str, Location] = {}
    for table in sorted(tables, key=lambda table: (_table_bytes(table) / reads[table.name], table.name)):
        taken = _round_up(_table_bytes(table), _TABLE_ALIGNMENT)
        locations[table.name] = "device" if taken <= room else rest
        room -= taken if taken <= room else 0
    return locations


def _plan_cache(tables: list[Table], memory_bytes: int, device_bytes: int) -> CacheLayout:
    row_bytes = max(padded_row_bytes(table.row_bytes) for table in tables)
    first_row, rows = {}, 0
    for table in tables:
        first_row[table.name] = rows
        rows += table.num_embeddings
    room = memory_bytes - device_bytes - rows * _CACHE_MAP_BYTES
    most = -(-min(rows, _MOST_CACHED_ROWS - CACHE_WAYS) // CACHE_WAYS)
    sets = min(room // _set_bytes(row_bytes), most)
    if sets < 1:
        needed = device_bytes + rows * _CACHE_MAP_BYTES + _set_bytes(row_bytes)
        raise DeviceMemoryError(
            f"a cache for the {rows} rows of {_names(tables)} needs at least {needed} bytes of device memory, with the "
            f"tables that lie there, and {memory_bytes} are to be used; raise device_memory_bytes, or use placement='uvm'"
        )
    return CacheLayout(sets, row_bytes, first_row, rows)


def _layout(tables: list[Table], locations: Mapping[str, Location], cache: CacheLayout | None) -> DeviceLayout:
    placed, ends = {}, {"device": 0, "uvm": 0}
    for table in tables:
        location = locations[table.name]
        memory = "device" if location == "device" else "uvm"
        placed[table.name] = PlacedTable(table, location, padded_row_bytes(table.row_bytes), ends[memory])
        ends[memory] += _round_up(placed[table.name].bytes, _TABLE_ALIGNMENT)
    return DeviceLayout(placed, ends["device"], ends["uvm"], cache)


def _check_kernel(table: Table) -> None:
    if table.serving_precision == "int2":
        # Of 16 values `VecNT<16, PrimitiveType::INT>::store(float*)` writes at most 4 (vecn.cuh: its pointer steps over
        # float4, not over float), and others from behind them, up to FBGEMM 1.8. FBGEMM's own tests leave this pair out.
        raise UnsupportedError(
            f"table '{table.name}': is stored as int2, of which FBGEMM's CUDA kernel writes wrong float32 values; use "
            "device='cpu', or build it with serving_precision int4"
        )
    most = _MOST_ROW_BYTES[table.serving_precision]
    row_bytes = padded_row_bytes(table.row_bytes)
    if row_bytes > most:
        raise UnsupportedError(
            f"table '{table.name}': a row of {table.embedding_dim} values in {table.serving_precision} is {row_bytes} bytes "
            f"on a GPU, and FBGEMM's kernel takes at most {most}; use device='cpu', or build with a smaller serving_precision"
        )
    if table.num_embeddings > _MOST_ROWS:
        raise UnsupportedError(
            f"table '{table.name}': has {table.num_embeddings} rows, and FBGEMM's CUDA kernels take at most {_MOST_ROWS}; "
            "use device='cpu', or split the table"
        )


def _does_not_fit(layout: DeviceLayout, memory_bytes: int) -> DeviceMemoryError:
    largest = max(layout.tables.values(), key=lambda placed: placed.bytes)
    return DeviceMemoryError(
        f"the rows need {layout.device_bytes} bytes of device memory, and {memory_bytes} are to be used; the largest is "
        f"table '{largest.table.name}': {largest.bytes} ({largest.table.num_embeddings} rows x {largest.row_bytes} bytes); "
        "use placement='uvm' or 'uvm_cache', raise device_memory_bytes, or build with a smaller serving_precision"
    )


def _reads(manifest: Manifest) -> dict[str, int]:
    """How many features read each table."""
    reads: dict[str, int] = {}
    for feature in manifest.features:
        reads[feature.table] = reads.get(feature.table, 0) + 1
    return reads


def _names(tables: Iterable[Table]) -> str:
    return ", ".join(f"'{table.name}'" for table in tables)


def _table_bytes(table: Table) -> int:
    return table.num_embeddings * padded_row_bytes(table.row_bytes)


def _set_bytes(row_bytes: int) -> int:
    return CACHE_WAYS * (row_bytes + _CACHE_STATE_BYTES)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
