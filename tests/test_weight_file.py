"""The weight file: what any safetensors reader finds in it, its layout, its digests, and what is never written."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import TYPES

from export.config import EmbeddingBagConfig, Precision, SnapshotConfig
from export.errors import PublishError, RowsError, SnapshotError
from export.journal import PieceResult
from export.snapshots import open_snapshot
from export.weight_file import (
    PlannedTable,
    WeightPlan,
    WrittenWeights,
    assemble,
    compare_written,
    create_weight_file,
    write_pieces,
)

# Tables of several chunks (1 MiB of stored rows each), of less than one, and of rows that are each larger than one.
# Name: num_embeddings, embedding_dim, type in training, type in the file.
SHAPES = {
    "large": (20_000, 64, "fp32", "fp16"),
    "exact": (9_000, 33, "fp32", "fp32"),
    "odd": (70_001, 3, "fp16", "fp16"),
    "widened": (1_000, 5, "fp16", "fp32"),
    "one": (1, 1, "fp32", "fp16"),
    "wide": (3, 300_000, "fp32", "fp32"),
}


NO_IDS = np.empty(0, np.int64)


def trained_rows(shapes: dict[str, tuple[int, int, str, str]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(rows, columns, generator=generator).to(TYPES[trained])
        for name, (rows, columns, trained, _) in shapes.items()
    }


def plan(folder: Path, rows: dict[str, torch.Tensor], precisions: dict[str, str]) -> list[PlannedTable]:
    """Tables whose rows come out of a real snapshot."""
    path = folder / "snapshot.safetensors"
    save_file({f"embedding_bags.{name}.weight": tensor for name, tensor in rows.items()}, path)
    snapshot = open_snapshot(SnapshotConfig(uri=str(path)))
    data_types = {torch.float32: "fp32", torch.float16: "fp16"}
    planned = []
    for name, tensor in rows.items():
        table = EmbeddingBagConfig.model_validate(
            {
                "name": name,
                "num_embeddings": tensor.shape[0],
                "embedding_dim": tensor.shape[1],
                "data_type": data_types[tensor.dtype],
            }
        )
        planned.append(PlannedTable(name, snapshot.table(table), Precision(precisions[name]), NO_IDS))
    return planned


def write_weight_file(
    path: Path, tables: list[PlannedTable], workers: int, finished: dict[str, PieceResult] | None = None
) -> WrittenWeights:
    """A whole file in one process."""
    plan = WeightPlan(tables)
    create_weight_file(path, plan)
    pieces = write_pieces(path, plan.pieces, workers, finished or {})
    return assemble(plan, {piece.key: result for piece, result in pieces})


def write(folder: Path, rows: dict[str, torch.Tensor], precisions: dict[str, str], workers: int = 2) -> WrittenWeights:
    return write_weight_file(folder / "tables.safetensors", plan(folder, rows, precisions), workers)


@pytest.fixture(scope="module")
def rows() -> dict[str, torch.Tensor]:
    return trained_rows(SHAPES)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, torch.Tensor]) -> list[PlannedTable]:
    return plan(tmp_path_factory.mktemp("snapshot"), rows, {name: shape[3] for name, shape in SHAPES.items()})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, planned: list[PlannedTable]) -> tuple[Path, WrittenWeights]:
    """The file of all of `SHAPES`, and what the writer says of it; never change it."""
    path = tmp_path_factory.mktemp("weights") / "tables.safetensors"
    return path, write_weight_file(path, planned, 2)


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The header, parsed, and the offset of the first byte of data."""
    data = path.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


# --- Rows ----------------------------------------------------------------------------------------------------------


def test_the_safetensors_library_reads_the_rows_that_numpy_makes_of_the_trained_ones(
    written: tuple[Path, WrittenWeights], rows: dict[str, torch.Tensor]
) -> None:
    path, _ = written
    stored = load_file(path)
    assert set(stored) == set(SHAPES)
    for name, tensor in stored.items():
        expected = references.stored_rows(rows[name].numpy(), SHAPES[name][3])
        assert tensor.dtype == TYPES[SHAPES[name][3]]
        assert tensor.shape == SHAPES[name][:2]
        assert np.array_equal(tensor.numpy().view(np.uint8), expected.view(np.uint8)), name


@pytest.fixture(scope="module")
def many_chunks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[torch.Tensor, Path]]:
    """A table of 67 chunks, 66 MiB, no two alike, and a folder to write in: chunks are handed out 64 at a time."""
    folder = tmp_path_factory.mktemp("many")
    values = torch.arange(67 * 2**19 - 256, dtype=torch.int32).remainder_(60_013).sub_(30_000).half()
    yield values.view(-1, 256), folder
    shutil.rmtree(folder)


def test_chunks_land_in_their_places_and_digests_in_order_whoever_writes_them(
    many_chunks: tuple[torch.Tensor, Path],
) -> None:
    table, folder = many_chunks
    tables = plan(folder, {"user": table}, {"user": "fp16"})
    expected = f"sha256-rows-1048576:{rows_digest(table.numpy().tobytes(), 512)}"
    for workers in (1, 2, 5):
        path = folder / f"{workers}.safetensors"
        weights = write_weight_file(path, tables, workers)
        assert torch.equal(load_file(path)["user"], table)
        assert str(weights.tables[0].digest) == expected
        path.unlink()


def test_the_first_of_several_bad_values_is_named_whoever_finds_one(many_chunks: tuple[torch.Tensor, Path]) -> None:
    table, folder = many_chunks[0].clone(), many_chunks[1]
    table[64 * 2048, 1] = table[64 * 2048 - 1, 255] = float(
        "nan"
    )  # the first row of the second lot, the last before it
    tables = plan(folder, {"user": table}, {"user": "fp16"})
    with pytest.raises(RowsError, match="row 131071, column 255 is nan; in all: 2 NaN"):
        write_weight_file(folder / "bad.safetensors", tables, 2)


@pytest.mark.parametrize("workers", [1, 5])
def test_the_file_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, planned: list[PlannedTable], written: tuple[Path, WrittenWeights], workers: int
) -> None:
    path, weights = written
    again = write_weight_file(tmp_path / "tables.safetensors", planned, workers)
    assert (again.tables, again.digest) == (weights.tables, weights.digest)
    assert sha256_of(tmp_path / "tables.safetensors") == sha256_of(path)


def test_nor_on_the_order_of_the_tables(
    tmp_path: Path, planned: list[PlannedTable], written: tuple[Path, WrittenWeights]
) -> None:
    path, weights = written
    again = write_weight_file(tmp_path / "tables.safetensors", planned[::-1], 2)
    assert again.digest == weights.digest
    assert sha256_of(tmp_path / "tables.safetensors") == sha256_of(path)
    assert [table.name for table in again.tables] == list(SHAPES)[::-1]


@pytest.mark.parametrize("place", ["header", "first", "last"])
def test_a_finished_file_that_is_not_what_was_written_is_refused_by_table_and_rows(
    planned: list[PlannedTable], tmp_path: Path, place: str
) -> None:
    path = tmp_path / "weights"
    plan = WeightPlan(planned)
    create_weight_file(path, plan)
    written = assemble(plan, {piece.key: result for piece, result in write_pieces(path, plan.pieces, 2, {})})
    compare_written(path, plan, written, 2)
    piece = plan.pieces[0] if place == "first" else plan.pieces[-1]
    offset = {"header": 9, "first": piece.position, "last": path.stat().st_size - 1}[place]
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)
    rows = f"table '{piece.table.name}': rows {piece.starts.start} to {piece.end - 1} are not in the file as they were"
    with pytest.raises(PublishError, match="the header is not" if place == "header" else rows):
        compare_written(path, plan, written, 2)
    path.write_bytes(data[:-1])
    with pytest.raises(PublishError, match="check the disk and build again"):
        compare_written(path, plan, written, 2)


def test_the_time_of_every_stage_is_reported(written: tuple[Path, WrittenWeights]) -> None:
    _, weights = written
    assert list(weights.stage_seconds) == ["read", "check", "convert", "examine", "digest", "write", "flush"]
    assert all(seconds > 0 for stage, seconds in weights.stage_seconds.items() if stage != "check")  # of codes only


@pytest.mark.parametrize("name", ["ünï", 'quo"ted', "a b/c", "back\\slash", "表"])
def test_a_table_of_any_name_that_the_configuration_takes_is_found_by_the_library(tmp_path: Path, name: str) -> None:
    weights = write(tmp_path, {name: torch.ones(3, 2)}, {name: "fp16"})
    assert weights.tables[0].name == name
    path = tmp_path / "tables.safetensors"
    assert torch.equal(load_file(path)[name], torch.ones(3, 2, dtype=torch.float16))
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')  # and nothing else is, says artifacts/FORMAT.md
    header = f'{{"{escaped}":{{"dtype":"F16","shape":[3,2],"data_offsets":[0,12]}}}}'.encode()
    assert path.read_bytes()[8:4096] == header.ljust(4088)


# --- Layout --------------------------------------------------------------------------------------------------------


def test_the_data_starts_on_a_page_boundary_and_the_file_ends_with_it(
    written: tuple[Path, WrittenWeights],
) -> None:
    path, weights = written
    _, start = header_of(path)
    assert start == weights.offset_bytes == 4096
    assert weights.data_bytes == sum(
        rows * columns * {"fp32": 4, "fp16": 2}[stored] for rows, columns, _, stored in SHAPES.values()
    )
    assert path.stat().st_size == start + weights.data_bytes


@pytest.mark.parametrize(("tables", "start"), [(1, 4096), (40, 4096), (70, 8192), (150, 12288)])
def test_a_longer_header_is_padded_to_the_next_page(tmp_path: Path, tables: int, start: int) -> None:
    rows = {f"table_{number:04}": torch.full((2, 1), float(number)) for number in range(tables)}
    weights = write(tmp_path, rows, dict.fromkeys(rows, "fp16"))
    path = tmp_path / "tables.safetensors"
    header, data_start = header_of(path)
    assert data_start == weights.offset_bytes == start
    assert len(header) == tables
    assert path.read_bytes()[8:start].rstrip(b" ").endswith(b"}")  # nothing but spaces after the JSON object
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, rows[name].half())


def test_tables_follow_one_another_by_the_alignment_of_their_rows_then_by_name(tmp_path: Path) -> None:
    # In the order of the file. Rows of 8192 bytes count as aligned to 4096, the largest power that counts.
    shapes = {
        "a4096": (2, 1024, "fp32"),
        "b8192": (1, 2048, "fp32"),
        "c12288": (1, 6144, "fp16"),
        "a128": (3, 64, "fp16"),
        "b384": (2, 96, "fp32"),
        "Z4": (5, 1, "fp32"),
        "a4": (5, 2, "fp16"),
        "b12": (5, 3, "fp32"),
        "a6": (1, 3, "fp16"),
        "z2": (1, 1, "fp16"),
    }
    mixed = sorted(shapes, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert mixed != list(shapes)
    rows = {name: torch.ones(shapes[name][:2]) for name in mixed}
    weights = write(tmp_path, rows, {name: shape[2] for name, shape in shapes.items()})

    header, _ = header_of(tmp_path / "tables.safetensors")
    assert list(header) == list(shapes)
    end = 0
    for name, (count, columns, precision) in shapes.items():
        row_bytes = columns * {"fp32": 4, "fp16": 2}[precision]
        assert header[name] == {
            "dtype": {"fp32": "F32", "fp16": "F16"}[precision],
            "shape": [count, columns],
            "data_offsets": [end, end + count * row_bytes],
        }
        alignment = max(power for power in (2**exponent for exponent in range(13)) if row_bytes % power == 0)
        assert end % alignment == 0
        end += count * row_bytes
    assert [table.name for table in weights.tables] == mixed
    assert {table.name: table.offset_bytes for table in weights.tables} == {
        name: entry["data_offsets"][0] for name, entry in header.items()
    }


def test_the_writer_describes_each_table_as_it_stored_it(written: tuple[Path, WrittenWeights]) -> None:
    path, weights = written
    assert [table.name for table in weights.tables] == list(SHAPES)
    data = path.read_bytes()
    for table in weights.tables:
        count, columns, _, precision = SHAPES[table.name]
        assert (table.num_embeddings, table.embedding_dim, table.serving_precision) == (count, columns, precision)
        assert table.row_bytes == columns * {"fp32": 4, "fp16": 2}[precision]
        assert table.bytes == count * table.row_bytes
        start = weights.offset_bytes + table.offset_bytes
        with safe_open(path, "np") as file:
            assert data[start : start + table.bytes] == file.get_tensor(table.name).tobytes()


# --- Digests, from the specification in runtime_py/digests.py -----------------------------------------------------


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows_digest(data: bytes, row_bytes: int) -> str:
    """`sha256-rows-1048576`: over the digests of chunks of as many whole rows as fit in 1 MiB, at least one."""
    chunk_bytes = max(1, 1048576 // row_bytes) * row_bytes
    outer = hashlib.sha256()
    for start in range(0, len(data), chunk_bytes):
        outer.update(hashlib.sha256(data[start : start + chunk_bytes]).digest())
    return outer.hexdigest()


def test_the_digests_are_those_of_the_specification(written: tuple[Path, WrittenWeights]) -> None:
    path, weights = written
    data = path.read_bytes()
    header, start = header_of(path)
    whole = hashlib.sha256(hashlib.sha256(data[:start]).digest())
    expected = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        value = rows_digest(data[start + first : start + last], (last - first) // entry["shape"][0])
        expected[name] = f"sha256-rows-1048576:{value}"
        whole.update(bytes.fromhex(value))
    assert {table.name: str(table.digest) for table in weights.tables} == expected
    assert str(weights.digest) == f"sha256-tables:{whole.hexdigest()}"


def test_a_changed_value_changes_the_digest_of_its_table_and_of_the_file_only(tmp_path: Path) -> None:
    digests, files = [], []
    for number, value in enumerate((1.0, 2.0)):
        rows = {"user": torch.ones(9, 4), "item": torch.ones(5, 4)}
        rows["user"][8, 3] = value
        folder = tmp_path / str(number)
        folder.mkdir()
        weights = write(folder, rows, {"user": "fp16", "item": "fp16"})
        digests.append({table.name: table.digest for table in weights.tables})
        files.append(weights.digest)
    assert digests[0]["item"] == digests[1]["item"]
    assert digests[0]["user"] != digests[1]["user"]
    assert files[0] != files[1]


# --- What is never written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(
    ("value", "precision", "problem"),
    [
        (float("nan"), "fp16", "is nan; in all: 2 NaN"),
        (float("inf"), "fp16", "is inf; in all: 2 infinite"),
        (65520.0, "fp16", "is 65520.0; in all: 2 beyond the range of fp16"),
        (float("nan"), "fp32", "is nan; in all: 2 NaN"),
        (float("-inf"), "fp32", "is -inf; in all: 2 infinite"),
    ],
)
def test_a_value_that_cannot_be_stored_is_refused_with_the_first_place_whichever_worker_sees_it(
    tmp_path: Path, value: float, precision: str, problem: str, workers: int
) -> None:
    rows = {"good": torch.ones(3, 2), "user": torch.zeros(30_000, 32)}
    rows["user"][16_500, 7] = rows["user"][29_999, 31] = value
    with pytest.raises(RowsError) as caught:
        write(tmp_path, rows, {"good": "fp16", "user": precision}, workers)
    assert str(caught.value).startswith(f"table 'user': cannot be stored as {precision}: row 16500, column 7 {problem}")


def test_what_overflows_in_fp16_is_stored_in_fp32(tmp_path: Path) -> None:
    rows = {"user": torch.tensor([[65520.0, 1e30]])}
    write(tmp_path, rows, {"user": "fp32"})
    assert torch.equal(load_file(tmp_path / "tables.safetensors")["user"], rows["user"])


def test_a_snapshot_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    tables = plan(tmp_path, {"user": torch.ones(30_000, 32)}, {"user": "fp16"})
    path = tmp_path / "snapshot.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(SnapshotError) as caught:
        write_weight_file(tmp_path / "tables.safetensors", tables, 3)
    [stored] = [f"{path}: ends within the rows of 'embedding_bags.user.weight'; it was truncated"]
    assert str(caught.value) == stored


@pytest.mark.parametrize("existing", ["dangling symlink", "symlink"])
def test_a_link_is_never_followed(tmp_path: Path, existing: str) -> None:
    path, elsewhere = tmp_path / "tables.safetensors", tmp_path / "elsewhere"
    path.symlink_to(elsewhere)
    if existing == "symlink":
        elsewhere.write_text("precious")
    with pytest.raises(OSError) as caught:
        write(tmp_path, {"user": torch.ones(3, 2)}, {"user": "fp16"})
    assert caught.value.errno == errno.ELOOP
    assert not elsewhere.exists() or elsewhere.read_text() == "precious"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command to make a full disk with")
    if mounted.returncode:
        pytest.skip(f"a full disk needs the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_shows_before_the_first_row_is_read(tmp_path: Path, tiny_disk: Path) -> None:
    whole = WeightPlan(plan(tmp_path, {"user": torch.ones(3000, 16)}, {"user": "fp16"}))
    with pytest.raises(OSError) as caught:
        create_weight_file(tiny_disk / "tables.safetensors", whole)
    assert caught.value.errno == errno.ENOSPC


def test_a_file_that_just_fits_the_disk_is_written(tmp_path: Path, tiny_disk: Path) -> None:
    tables = plan(tmp_path, {"user": torch.ones(15 * 128, 16)}, {"user": "fp16"})
    weights = write_weight_file(tiny_disk / "tables.safetensors", tables, 2)
    assert weights.offset_bytes + weights.data_bytes == 64 << 10
    assert torch.equal(load_file(tiny_disk / "tables.safetensors")["user"], torch.ones(15 * 128, 16).half())


def test_a_folder_that_is_not_there_is_an_oserror_that_names_the_file(tmp_path: Path) -> None:
    tables = plan(tmp_path, {"user": torch.ones(3, 2)}, {"user": "fp16"})
    with pytest.raises(FileNotFoundError) as caught:
        write_weight_file(tmp_path / "absent" / "tables.safetensors", tables, 1)
    assert os.fspath(caught.value.filename) == os.fspath(tmp_path / "absent" / "tables.safetensors")


def test_no_file_is_left_open(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    write(tmp_path, {"user": torch.ones(9, 4)}, {"user": "fp16"})
    with pytest.raises(RowsError):
        bad = tmp_path / "bad"
        bad.mkdir()
        write(bad, {"user": torch.full((9, 4), float("nan"))}, {"user": "fp16"})
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_another_limit_of_outliers_or_another_sample_is_another_plan(planned: list[PlannedTable]) -> None:
    first = WeightPlan(planned).fingerprint
    assert WeightPlan(planned).fingerprint == first
    assert WeightPlan(planned, sample=2).fingerprint != first
    stricter = [dataclasses.replace(planned[0], outlier_limit=0.5), *planned[1:]]
    assert WeightPlan(stricter).fingerprint != first
