"""torch.distributed.checkpoint folders, whole and sharded over processes, and damaged or hostile ones."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PREFIX, TABLES, make_rows, write_dcp
from torch.distributed import checkpoint
from torch.distributed.checkpoint import _extension
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from export.errors import SnapshotError
from export.snapshots.dcp import METADATA, DcpIndex
from export.snapshots.rows import TableRows
from export.snapshots.torch_files import FileSlice
from runtime_py.digests import sha256

# Two processes save three tables. Each cell: the process that holds it, first row, first column, rows, columns.
ROW_WISE = [(0, 0, 0, 7, 6), (1, 7, 0, 4, 6)]
COLUMN_WISE = [(0, 0, 0, 11, 2), (1, 0, 2, 11, 4)]
GRID = [(0, 0, 0, 5, 4), (1, 0, 4, 5, 2), (1, 5, 0, 6, 1), (0, 5, 1, 6, 5)]

SAVE_ONE_RANK = """
import os, sys, torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

rank, folder, layouts = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
whole = torch.arange(66.0).reshape(11, 6)

def sharded(table, cells):
    shards = [
        Shard.from_tensor_and_offsets(table[row:row + rows, column:column + columns].contiguous(), [row, column], rank)
        for owner, row, column, rows, columns in cells if owner == rank
    ]
    return ShardedTensor._init_from_local_shards(shards, *table.shape)

state = {name: sharded(whole.to(getattr(torch, dtype)), cells) for name, (dtype, cells) in layouts.items()}
checkpoint.save({**state, "step": 3}, storage_writer=checkpoint.FileSystemWriter(folder + "/3"))
dist.barrier()
os._exit(0)  # gloo's threads may abort a process that ends as usual
"""


def read(index: DcpIndex, name: str) -> torch.Tensor:
    """A whole table."""
    rows = TableRows(index.tensors[name], index.locate(name))
    out = torch.empty(rows.num_embeddings, rows.embedding_dim, dtype=rows.dtype)
    rows.read(0, out)
    return out


def refusal(folder: Path, name: str | None = None) -> str:
    """What opening the folder, or reading one of its tables, is refused with."""
    with pytest.raises(SnapshotError) as caught:
        index = DcpIndex(folder)
        if name is not None:
            read(index, name)
    return str(caught.value)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot that two processes of a real process group saved; never change it."""
    folder = tmp_path_factory.mktemp("dcp")
    layouts = {"by_row": ("float32", ROW_WISE), "by_column": ("float16", COLUMN_WISE), "grid": ("float32", GRID)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SAVE_ONE_RANK, str(rank), str(folder), repr(layouts)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return folder / "3"


@pytest.fixture
def one_table(tmp_path: Path) -> Path:
    """A snapshot of one table, `user`, to damage."""
    checkpoint.save(
        {"user": torch.arange(24.0).reshape(6, 4)}, storage_writer=checkpoint.FileSystemWriter(tmp_path), no_dist=True
    )
    return tmp_path


def change_metadata(folder: Path, change: Callable[[Metadata], object]) -> None:
    """Loads `.metadata` as upstream does, changes it, and pickles it again."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


# --- Rows ----------------------------------------------------------------------------------------------------------


def test_the_rows_are_those_that_were_saved(dcp_snapshot: Path, rows: dict[str, torch.Tensor]) -> None:
    index = DcpIndex(dcp_snapshot)
    for name, tensor in rows.items():
        stored = read(index, f"{PREFIX}.embedding_bags.{name}.weight")
        assert stored.dtype == tensor.dtype
        assert torch.equal(stored, tensor)
    assert {tensor.dtype for tensor in rows.values()} == {torch.float32, torch.float16}


def test_the_index_names_every_tensor_and_nothing_else(dcp_snapshot: Path) -> None:
    index = DcpIndex(dcp_snapshot)
    tables = {f"{PREFIX}.embedding_bags.{table['name']}.weight" for table in TABLES}
    assert set(index.tensors) == tables | {f"optimizer.state.{table['name']}.sum" for table in TABLES}
    user = index.tensors[f"{PREFIX}.embedding_bags.user.weight"]
    assert (user.name, user.shape, user.dtype) == (f"{PREFIX}.embedding_bags.user.weight", (300, 8), torch.float32)
    assert index.format == "dcp"


@pytest.mark.parametrize(
    ("table", "dtype", "cells"),
    [
        ("by_row", torch.float32, ROW_WISE),
        ("by_column", torch.float16, COLUMN_WISE),
        ("grid", torch.float32, GRID),
    ],
)
def test_shards_that_several_processes_saved_make_the_table(
    two_processes: Path, table: str, dtype: torch.dtype, cells: list[tuple[int, ...]]
) -> None:
    index = DcpIndex(two_processes)
    assert index.tensors[table].shape == (11, 6)
    blobs = index.locate(table)
    assert sorted((blob.row, blob.column, blob.rows, blob.columns) for blob in blobs) == sorted(
        cell[1:] for cell in cells
    )
    assert {blob.path.name for blob in blobs} == {"__0_0.distcp", "__1_0.distcp"}
    assert torch.equal(read(index, table), torch.arange(66.0).reshape(11, 6).to(dtype))


def test_several_files_of_one_process_make_the_snapshot(tmp_path: Path) -> None:
    state = {f"table{number}": torch.full((5, 3), float(number)) for number in range(4)}
    writer = checkpoint.FileSystemWriter(tmp_path, single_file_per_rank=False)
    checkpoint.save(state, storage_writer=writer, no_dist=True)
    assert len(list(tmp_path.glob("*.distcp"))) == 4
    index = DcpIndex(tmp_path)
    for name, tensor in state.items():
        assert torch.equal(read(index, name), tensor)


def test_a_table_that_is_a_view_of_a_larger_tensor_is_read_as_the_view(tmp_path: Path) -> None:
    whole = torch.arange(60.0).reshape(10, 6)
    state = {"rows": whole[3:7], "all": whole}
    checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(tmp_path), no_dist=True)
    index = DcpIndex(tmp_path)
    assert torch.equal(read(index, "rows"), whole[3:7])
    assert torch.equal(read(index, "all"), whole)


def test_a_transposed_table_is_refused(tmp_path: Path) -> None:
    table = torch.arange(24.0).reshape(6, 4).t()
    checkpoint.save({"user": table}, storage_writer=checkpoint.FileSystemWriter(tmp_path), no_dist=True)
    assert refusal(tmp_path, "user") == (
        f"{tmp_path / '__0_0.distcp'}: 'user' is stored with strides (1, 4); save a contiguous tensor"
    )


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_slice_of_a_file_reads_and_seeks_like_a_file_of_its_own(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytes(range(40))
    path = tmp_path_factory.getbasetemp() / "content"
    path.write_bytes(content)
    offset = data.draw(st.integers(0, 40), "offset")
    length = data.draw(st.integers(0, 40 - offset), "length")
    expected = BytesIO(content[offset : offset + length])
    with path.open("rb") as file:
        part = FileSlice(file, offset, length)
        for _ in range(data.draw(st.integers(1, 6), "steps")):
            whence = data.draw(st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]), "whence")
            lowest = {os.SEEK_SET: 0, os.SEEK_CUR: -expected.tell(), os.SEEK_END: -length}[whence]
            place = data.draw(st.integers(lowest, 50), "place")
            assert part.seek(place, whence) == expected.seek(place, whence)
            count = data.draw(st.integers(-1, 50), "bytes")
            assert part.read(count) == expected.read(count)
            assert part.tell() == expected.tell()


def test_an_empty_shard_is_no_rows(one_table: Path) -> None:
    def add_empty_shard(metadata: Metadata) -> None:
        empty = ChunkStorageMetadata(offsets=torch.Size([6, 0]), sizes=torch.Size([0, 4]))
        metadata.state_dict_metadata["user"].chunks.append(empty)
        place = _StorageInfo(relative_path="__7_0.distcp", offset=0, length=0)
        metadata.storage_data[MetadataIndex("user", torch.Size([6, 0]))] = place

    change_metadata(one_table, add_empty_shard)
    assert torch.equal(read(DcpIndex(one_table), "user"), torch.arange(24.0).reshape(6, 4))


def test_the_digest_is_of_the_metadata_file(dcp_snapshot: Path, tmp_path: Path) -> None:
    assert DcpIndex(dcp_snapshot).digest == sha256((dcp_snapshot / METADATA).read_bytes())
    other = write_dcp(tmp_path, make_rows([TABLES[0]]))
    assert DcpIndex(other).digest != DcpIndex(dcp_snapshot).digest


# --- Hostile metadata ----------------------------------------------------------------------------------------------


def global_pickle(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a global, found by its full name, with one string."""
    parts = [b"\x80\x04"]
    for text in (module, name):
        parts.append(b"\x8c" + bytes([len(text)]) + text.encode())
    parts.append(b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R.")
    return b"".join(parts)


def test_metadata_that_runs_a_command_is_refused_and_does_not_run_it(one_table: Path) -> None:
    witness = one_table / "ran"

    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {witness}",)

    data = pickle.dumps(Command())
    pickle.loads(data)
    assert witness.exists()  # the pickle does work
    witness.unlink()
    (one_table / METADATA).write_bytes(data)
    message = refusal(one_table)
    assert message == (
        f"{one_table / METADATA}: is damaged: it names {os.system.__module__}.system, which is not part of the format"
    )
    assert not witness.exists()


def test_metadata_that_hides_a_command_among_its_entries_is_refused(one_table: Path) -> None:
    witness = one_table / "ran"

    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {witness}",)

    change_metadata(one_table, lambda metadata: metadata.state_dict_metadata.update(extra=Command()))
    assert "which is not part of the format" in refusal(one_table)
    assert not witness.exists()


def test_metadata_that_changes_the_classes_it_names_changes_copies(one_table: Path) -> None:
    def poison(module: str, name: str) -> bytes:  # BUILD with a slot state is setattr
        return f"c{module}\n{name}\n(N(S'poisoned'\nI1\ndtb0".encode()

    names = [("pathlib", "PosixPath"), ("torch.distributed.checkpoint.metadata", "Metadata")]
    (one_table / METADATA).write_bytes(b"".join(poison(*name) for name in names) + b"N.")
    assert "is damaged: expected Metadata, got NoneType" in refusal(one_table)
    assert not hasattr(PosixPath, "poisoned")
    assert not hasattr(PurePosixPath, "poisoned")
    assert not hasattr(Metadata, "poisoned")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch", "os.system"),
        ("torch.serialization", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("collections", "Counter"),
        ("pathlib", "os.system"),
    ],
)
def test_metadata_that_names_anything_outside_the_format_is_refused(one_table: Path, module: str, name: str) -> None:
    (one_table / METADATA).write_bytes(global_pickle(module, name, "exit 1"))
    assert refusal(one_table) == (
        f"{one_table / METADATA}: is damaged: it names {module}.{name}, which is not part of the format"
    )


def test_a_shard_that_holds_an_object_is_refused_and_does_not_run_it(one_table: Path) -> None:
    witness = one_table / "ran"

    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {witness}",)

    file = BytesIO()
    torch.save(Command(), file)
    (one_table / "__0_0.distcp").write_bytes(file.getvalue())
    place = _StorageInfo(relative_path="__0_0.distcp", offset=0, length=len(file.getvalue()))
    index = MetadataIndex("user", torch.Size([0, 0]))
    change_metadata(one_table, lambda metadata: metadata.storage_data.update({index: place}))
    message = refusal(one_table, "user")
    assert message.startswith(f"{one_table / '__0_0.distcp'}: holds more than tensors and plain data")
    assert not witness.exists()


@pytest.mark.parametrize("path", ["../elsewhere/__0_0.distcp", "/etc/passwd", "sub/__0_0.distcp"])
def test_a_shard_outside_the_folder_is_refused(one_table: Path, path: str) -> None:
    def point_elsewhere(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = path

    change_metadata(one_table, point_elsewhere)
    assert refusal(one_table, "user") == f"{one_table}: 'user': '{path}' leaves the folder"


# --- Damaged metadata ----------------------------------------------------------------------------------------------


def test_metadata_that_ends_early_is_refused_wherever_it_ends(one_table: Path) -> None:
    data = (one_table / METADATA).read_bytes()
    for length in range(0, len(data), 5):
        (one_table / METADATA).write_bytes(data[:length])
        assert refusal(one_table).startswith(f"{one_table / METADATA}: is damaged: ")


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage\n", bytes(100), b"\xff" * 100, b"\x80\x05\x8a\xff", b"(" * 100_000 + b"."],
    ids=["empty", "text", "zeros", "ones", "half a number", "marks"],
)
def test_metadata_that_is_no_pickle_is_refused(one_table: Path, data: bytes) -> None:
    (one_table / METADATA).write_bytes(data)
    assert refusal(one_table).startswith(f"{one_table / METADATA}: is damaged: ")


def test_a_pickle_of_something_else_is_refused(one_table: Path) -> None:
    (one_table / METADATA).write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    assert refusal(one_table) == f"{one_table / METADATA}: is damaged: expected Metadata, got dict"


def without(name: str) -> Callable[[Metadata], None]:
    """Takes an attribute from whichever object of the metadata has it."""

    def change(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["user"]
        [place] = metadata.storage_data.values()
        owner = next(part for part in (metadata, entry, entry.chunks[0], place) if name in part.__dict__)
        object.__delattr__(owner, name)

    return change


@pytest.mark.parametrize(
    "name",
    [
        "state_dict_metadata",
        "storage_data",
        "size",
        "properties",
        "chunks",
        "offsets",
        "sizes",
        "relative_path",
        "offset",
        "length",
    ],
)
def test_metadata_without_one_of_its_fields_is_refused(one_table: Path, name: str) -> None:
    change_metadata(one_table, without(name))
    message = refusal(one_table, "user")
    assert str(one_table) in message or "'user'" in message


@pytest.mark.parametrize("shape", [(24,), (6, 4, 1)])
def test_a_shard_of_another_rank_than_its_table_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = {"user": torch.arange(24.0).reshape(shape)}
    checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(tmp_path), no_dist=True)

    def claim_two_dimensions(metadata: Metadata) -> None:
        metadata.state_dict_metadata["user"].size = torch.Size([6, 4])

    change_metadata(tmp_path, claim_two_dimensions)
    message = refusal(tmp_path, "user")
    assert str(tmp_path) in message
    assert "'user'" in message


def test_missing_metadata_means_that_the_snapshot_was_never_completed(one_table: Path) -> None:
    (one_table / METADATA).unlink()
    assert refusal(one_table) == (f"{one_table / METADATA}: is missing: the snapshot was never completed")


# --- Damaged shards ------------------------------------------------------------------------------------------------


def test_a_missing_shard_file_is_named_with_the_table(one_table: Path) -> None:
    (one_table / "__0_0.distcp").unlink()
    assert refusal(one_table, "user") == (
        f"{one_table / '__0_0.distcp'}: holds rows of 'user', cannot be read: No such file or directory"
    )


def test_the_missing_file_of_one_process_is_named(two_processes: Path, tmp_path: Path) -> None:
    for path in two_processes.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "__1_0.distcp").unlink()
    for table in ("by_row", "by_column", "grid"):
        message = refusal(tmp_path, table)
        assert message.startswith(f"{tmp_path / '__1_0.distcp'}: holds rows of '{table}', cannot be read")


def test_a_truncated_shard_file_is_refused_wherever_it_ends(one_table: Path) -> None:
    path = one_table / "__0_0.distcp"
    data = path.read_bytes()
    for length in range(0, len(data), 41):
        path.write_bytes(data[:length])
        message = refusal(one_table, "user")
        assert message.startswith(f"{path}: ")
        assert "truncated" in message or "damaged" in message, message


def test_a_shard_that_is_not_in_the_metadata_is_missing(one_table: Path) -> None:
    change_metadata(one_table, lambda metadata: metadata.storage_data.clear())
    assert refusal(one_table, "user") == f"{one_table}: 'user': the shard at (0, 0) is in no file"


def test_a_table_with_a_shard_less_than_its_size_is_refused(two_processes: Path, tmp_path: Path) -> None:
    for path in two_processes.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change_metadata(tmp_path, lambda metadata: metadata.state_dict_metadata["grid"].chunks.pop())
    assert "'grid': the shards leave " in refusal(tmp_path, "grid")


@pytest.mark.parametrize(
    ("shape", "dtype", "got"),
    [
        ((6, 5), torch.float32, r"[6, 4] torch.float32, expected [6, 5] torch.float32"),
        ((5, 4), torch.float32, r"[6, 4] torch.float32, expected [5, 4] torch.float32"),
        ((6, 4), torch.float16, r"[6, 4] torch.float32, expected [6, 4] torch.float16"),
    ],
)
def test_a_shard_that_is_not_what_the_metadata_says_is_refused(
    one_table: Path, shape: tuple[int, int], dtype: torch.dtype, got: str
) -> None:
    entry = TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=torch.Size(shape),
        chunks=[ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=torch.Size(shape))],
    )
    change_metadata(one_table, lambda metadata: metadata.state_dict_metadata.update(user=entry))
    path = one_table / "__0_0.distcp"
    assert refusal(one_table, "user") == f"{path}: the shard of 'user' at (0, 0) is {got}"


# --- What DCP can write, and this reader does not read -------------------------------------------------------------


class Inverted(_extension.StreamTransformExtension):
    """A stream transform as DCP's plug-ins are: every byte is stored inverted."""

    @staticmethod
    def registry_name() -> str:
        return "stream.inverted"

    @staticmethod
    def from_descriptor(version: str) -> "Inverted":
        return Inverted()

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def transform_to(self, output: Any) -> Any:
        class Writer:
            def write(self, data: Any) -> int:
                return int(output.write(bytes(byte ^ 0xFF for byte in bytes(data))))

            def flush(self) -> None:
                output.flush()

            def close(self) -> None:
                output.flush()

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                self.close()

        return Writer()

    def transform_from(self, input: Any) -> Any:  # noqa: A002
        raise NotImplementedError


def test_a_snapshot_that_was_written_through_a_transform_is_refused(tmp_path: Path) -> None:
    writer = checkpoint.FileSystemWriter(tmp_path, _extensions=[Inverted()])
    checkpoint.save({"user": torch.zeros(6, 4)}, storage_writer=writer, no_dist=True)
    assert refusal(tmp_path, "user") == (
        f"{tmp_path}: 'user' was written through ['stream.inverted/1']; save it plainly"
    )


def test_shards_in_another_serialization_are_refused(tmp_path: Path) -> None:
    writer = checkpoint.FileSystemWriter(tmp_path, serialization_format=SerializationFormat.SAFETENSORS)
    checkpoint.save({"user": torch.zeros(6, 4)}, storage_writer=writer, no_dist=True)
    assert refusal(tmp_path, "user").startswith(f"{tmp_path / '__0_0.distcp'}: is no torch.save file")
