"""safetensors snapshots: one file or several with an index, and damaged headers and indexes."""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from support import state_dict
from torch.distributed import checkpoint

from export.errors import SnapshotError
from export.snapshots.rows import TableRows
from export.snapshots.safetensors_files import SafetensorsIndex, is_safetensors

INDEX = "model.safetensors.index.json"


def read(index: SafetensorsIndex, name: str) -> torch.Tensor:
    """A whole table."""
    rows = TableRows(index.tensors[name], index.locate(name))
    out = torch.empty(rows.num_embeddings, rows.embedding_dim, dtype=rows.dtype)
    rows.read(0, out)
    return out


def refusal(path: Path, name: str | None = None) -> str:
    """What opening the snapshot, or reading one of its tables, is refused with."""
    with pytest.raises(SnapshotError) as caught:
        index = SafetensorsIndex(path)
        if name is not None:
            read(index, name)
    return str(caught.value)


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    """A file of two tables, `user` [6, 4] and `item` [3, 2], to damage."""
    path = tmp_path / "model.safetensors"
    save_file({"user": torch.arange(24.0).reshape(6, 4), "item": torch.ones(3, 2)}, path)
    return path


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Parses the header, changes it, and writes it back before the same values."""
    data = path.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    write_header(path, json.dumps(header).encode(), data[8 + length :])


def write_header(path: Path, header: bytes, values: bytes = bytes(120)) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + values)


# --- Rows ----------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_file_are_those_that_were_saved(tmp_path: Path, rows: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state_dict(rows), path, metadata={"format": "pt", "step": "7"})
    index = SafetensorsIndex(path)
    assert set(index.tensors) == set(state_dict(rows))
    assert index.format == "safetensors"
    for name, tensor in state_dict(rows).items():
        stored = read(index, name)
        assert stored.dtype == tensor.dtype
        assert torch.equal(stored, tensor)
    assert {tensor.dtype for tensor in rows.values()} == {torch.float32, torch.float16}


def test_a_folder_with_one_file_needs_no_index(one_file: Path) -> None:
    (one_file.parent / "notes.txt").write_text("beside")
    assert torch.equal(read(SafetensorsIndex(one_file.parent), "user"), torch.arange(24.0).reshape(6, 4))


def test_the_files_and_the_index_that_dcp_writes_for_hugging_face_are_read_together(
    tmp_path: Path, rows: dict[str, torch.Tensor]
) -> None:
    state = state_dict(rows)
    mapping = {name: number % 3 + 1 for number, name in enumerate(state)}
    writer = checkpoint.HuggingFaceStorageWriter(str(tmp_path), fqn_to_index_mapping=mapping)
    checkpoint.save(state, storage_writer=writer, no_dist=True)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert (tmp_path / INDEX).exists()
    index = SafetensorsIndex(tmp_path)
    assert set(index.tensors) == set(state)
    for name, tensor in state.items():
        assert torch.equal(read(index, name), tensor)


def test_a_file_takes_part_only_with_the_tensors_that_the_index_gives_it(tmp_path: Path) -> None:
    new, old = torch.ones(3, 2), torch.zeros(3, 2)
    save_file({"user": new}, tmp_path / "a.safetensors")
    save_file({"user": old, "item": old.clone()}, tmp_path / "b.safetensors")
    save_file({"stale": old}, tmp_path / "c.safetensors")
    weight_map = {"user": "a.safetensors", "item": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map}))
    index = SafetensorsIndex(tmp_path)
    assert set(index.tensors) == {"user", "item"}
    assert torch.equal(read(index, "user"), new)
    assert torch.equal(read(index, "item"), old)


def test_values_in_a_file_with_any_header_length_are_found(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    table = torch.arange(24.0).reshape(6, 4)
    entry = {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 96]}
    for spaces in range(9):
        write_header(path, json.dumps({"user": entry}).encode() + b" " * spaces, table.numpy().tobytes())
        assert torch.equal(read(SafetensorsIndex(path), "user"), table)


def test_tensors_of_other_kinds_stand_beside_a_table(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    table = torch.arange(24.0).reshape(6, 4)
    others = {
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "cube": torch.zeros(2, 2, 2, dtype=torch.float64),
        "fp8": torch.zeros(4, dtype=torch.float8_e4m3fn),
    }
    save_file({"user": table, **others}, path)
    index = SafetensorsIndex(path)
    assert set(index.tensors) == {"user", *others}
    assert torch.equal(read(index, "user"), table)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.bfloat16, torch.float64])
def test_the_index_says_what_a_tensors_type_is(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"user": torch.ones(3, 2).to(dtype)}, path)
    assert SafetensorsIndex(path).tensors["user"].dtype == dtype


def test_the_digest_changes_with_the_headers_and_with_nothing_else(one_file: Path, tmp_path: Path) -> None:
    digest = SafetensorsIndex(one_file).digest
    assert digest.algorithm == "sha256-safetensors-headers"
    copy = tmp_path / "copy" / "other-name.safetensors"
    copy.parent.mkdir()
    shutil.copy(one_file, copy)
    assert SafetensorsIndex(copy).digest == digest
    save_file({"user": torch.zeros(6, 4), "item": torch.ones(2, 3)}, copy)
    assert SafetensorsIndex(copy).digest != digest


def test_a_safetensors_snapshot_is_known_by_the_names_of_its_files(one_file: Path, tmp_path: Path) -> None:
    assert is_safetensors(one_file)
    assert is_safetensors(one_file.parent)
    other = tmp_path / "empty"
    other.mkdir()
    assert not is_safetensors(other)
    (other / "model.pt").write_bytes(one_file.read_bytes())
    assert not is_safetensors(other)
    assert not is_safetensors(other / "model.pt")


# --- Indexes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["../model.safetensors", "/tmp/model.safetensors", "sub/model.safetensors"])
def test_an_index_with_a_path_that_leaves_the_folder_is_refused(one_file: Path, file: str) -> None:
    folder = one_file.parent / "snapshot"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub"):
        shutil.copy(one_file, place)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"user": file}}))
    assert refusal(folder) == f"{folder / INDEX}: '{file}' leaves the folder"


def test_an_index_with_a_file_that_is_missing_is_refused(one_file: Path) -> None:
    weight_map = {"user": "model.safetensors", "tag": "model-2.safetensors"}
    (one_file.parent / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(one_file.parent) == (
        f"{one_file.parent / 'model-2.safetensors'}: cannot be read: No such file or directory"
    )


def test_an_index_with_a_tensor_that_is_missing_from_its_file_is_refused(one_file: Path) -> None:
    weight_map = {"user": "model.safetensors", "tag": "model.safetensors"}
    (one_file.parent / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(one_file.parent) == f"{one_file}: has no tensor 'tag', which the index expects in it"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": 7}', '{"weight_map": ["user"]}', "\xff", "[" * 100_000],
    ids=["empty", "cut", "list", "no map", "number", "names only", "not UTF-8", "nested"],
)
def test_an_index_that_is_none_is_refused(one_file: Path, text: str) -> None:
    (one_file.parent / INDEX).write_bytes(text.encode("latin-1"))
    assert refusal(one_file.parent).startswith(f"{one_file.parent / INDEX}: is no safetensors index: ")


@pytest.mark.parametrize("content", [{"user": 7}, {"user": ["model.safetensors"]}], ids=["number", "list"])
def test_an_index_whose_map_is_no_map_of_names_to_files_is_refused(one_file: Path, content: Mapping[str, Any]) -> None:
    (one_file.parent / INDEX).write_text(json.dumps({"weight_map": content}))
    assert str(one_file.parent) in refusal(one_file.parent, "user")


def test_several_files_need_one_index(one_file: Path) -> None:
    folder = one_file.parent
    shutil.copy(one_file, folder / "model-2.safetensors")
    assert refusal(folder) == (
        f"{folder}: 2 safetensors files and 0 index files (*.safetensors.index.json), expected one"
    )
    for name in ("a.safetensors.index.json", "b.safetensors.index.json"):
        (folder / name).write_text(json.dumps({"weight_map": {"user": "model.safetensors"}}))
    assert refusal(folder) == (
        f"{folder}: 2 safetensors files and 2 index files (*.safetensors.index.json), expected one"
    )


# --- Damaged files -------------------------------------------------------------------------------------------------


def test_a_file_that_ends_early_is_refused_wherever_it_ends(one_file: Path) -> None:
    data = one_file.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    for end in range(len(data)):
        one_file.write_bytes(data[:end])
        message = refusal(one_file)
        if end < 8 + length:
            assert message == f"{one_file}: is no safetensors file, or was truncated within its header"
        else:
            has = f"has {end - 8 - length} bytes of data, its header says {len(data) - 8 - length}"
            assert message == f"{one_file}: {has}; it was truncated"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08",
        b"\xff" * 8,
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 100_000_001) + b"{}",
    ],
    ids=["empty", "one byte", "largest length", "a length beyond the file", "a length beyond the limit"],
)
def test_a_file_that_is_no_safetensors_file_is_refused(one_file: Path, data: bytes) -> None:
    one_file.write_bytes(data)
    assert refusal(one_file) == f"{one_file}: is no safetensors file, or was truncated within its header"


@pytest.mark.parametrize(
    "header",
    [b"", b"not json", b'{"user": ', b"\xff\xfe", b"[]", b"7", b"null", b"[" * 100_000],
    ids=["empty", "text", "cut", "not UTF-8", "list", "number", "null", "nested"],
)
def test_a_header_that_is_no_json_object_is_refused(one_file: Path, header: bytes) -> None:
    write_header(one_file, header)
    assert refusal(one_file).startswith(f"{one_file}: the safetensors header is damaged: ")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        7,
        [],
        {},
        {"dtype": "F32", "shape": [6, 4]},
        {"dtype": "F32", "data_offsets": [24, 120]},
        {"shape": [6, 4], "data_offsets": [24, 120]},
        {"dtype": "F32", "shape": 6, "data_offsets": [24, 120]},
        {"dtype": "F32", "shape": ["six", 4], "data_offsets": [24, 120]},
        {"dtype": "F32", "shape": [6, 4], "data_offsets": [24]},
        {"dtype": "F32", "shape": [6, 4], "data_offsets": [24, 120, 120]},
        {"dtype": "F32", "shape": [6, 4], "data_offsets": [24, None]},
        {"dtype": ["F32"], "shape": [6, 4], "data_offsets": [24, 120]},
        {"dtype": "F32", "shape": [float("inf"), 4], "data_offsets": [24, 120]},
        {"dtype": "F32", "shape": [6, 4], "data_offsets": [24, float("inf")]},
    ],
    ids=lambda entry: json.dumps(entry),
)
def test_a_header_entry_of_the_wrong_form_is_refused_with_the_tensors_name(one_file: Path, entry: Any) -> None:
    change_header(one_file, lambda header: header.update(user=entry))
    assert refusal(one_file).startswith(f"{one_file}: the header's entry for 'user' is damaged: ")


@pytest.mark.parametrize(
    ("shape", "dtype", "offsets", "problem"),
    [
        ([6, 4], "F32", [24, 119], "has 120 bytes of data, its header says 119; it has bytes beyond its tensors"),
        ([6, 5], "F32", [24, 120], "'user' has 96 bytes, expected 120 for (6, 5) F32"),
        ([6, 4], "F16", [24, 120], "'user' has 96 bytes, expected 48 for (6, 4) F16"),
        ([6, 4], "F32", [120, 24], "has 120 bytes of data, its header says 24; it has bytes beyond its tensors"),
        ([6, 4], "F32", [-96, 0], "'user'"),
    ],
)
def test_a_header_entry_whose_figures_disagree_is_refused(
    one_file: Path, shape: list[int], dtype: str, offsets: list[int], problem: str
) -> None:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    change_header(one_file, lambda header: header.update(user=entry))
    assert problem in refusal(one_file)


def test_a_header_that_gives_two_tensors_the_same_bytes_is_refused_as_the_library_does(one_file: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        header["item"]["data_offsets"] = [header["user"]["data_offsets"][0], header["user"]["data_offsets"][0] + 24]

    change_header(one_file, overlap)
    with pytest.raises(SafetensorError), safe_open(one_file, "pt"):
        pass
    assert refusal(one_file, "item").startswith(f"{one_file}: ")


def test_a_header_that_leaves_bytes_between_tensors_is_refused_as_the_library_does(one_file: Path) -> None:
    def leave_a_hole(header: dict[str, Any]) -> None:
        header["user"]["data_offsets"] = [offset + 4 for offset in header["user"]["data_offsets"]]

    change_header(one_file, leave_a_hole)
    with one_file.open("ab") as file:
        file.write(bytes(4))
    with pytest.raises(SafetensorError), safe_open(one_file, "pt"):
        pass
    assert refusal(one_file, "user").startswith(f"{one_file}: ")


def test_a_missing_file_is_refused(one_file: Path) -> None:
    index = SafetensorsIndex(one_file)
    one_file.unlink()
    with pytest.raises(SnapshotError) as caught:
        read(index, "user")
    assert str(caught.value) == f"{one_file}: holds rows of 'user', cannot be read: No such file or directory"
