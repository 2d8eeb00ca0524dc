"""torchsnapshot folders: what the library wrote is read back, and what does not hold together is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchsnapshot
from ruamel.yaml import YAML

from export.errors import SnapshotError
from export.snapshots.rows import TableRows
from export.snapshots.torchsnapshot import SNAPSHOT_METADATA, TorchsnapshotIndex

TABLE = torch.arange(24.0).reshape(6, 4)
NAME = "model.ebc.embedding_bags.user.weight"


def take(folder: Path, **tensors: torch.Tensor) -> Path:
    """A snapshot of an app state with these tensors, a primitive and an object."""
    state = torchsnapshot.StateDict(**{f"ebc.embedding_bags.{name}.weight": tensor for name, tensor in tensors.items()})
    torchsnapshot.Snapshot.take(str(folder), {"model": state, "progress": torchsnapshot.StateDict(step=3, o={1, 2})})
    return folder


def read(folder: Path, name: str = NAME) -> torch.Tensor:
    index = TorchsnapshotIndex(folder)
    table = TableRows(index.tensors[name], index.locate(name))
    out = torch.empty(table.num_embeddings, table.embedding_dim, dtype=table.dtype)
    table.read(0, out)
    return out


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Changes the metadata: `change` gets the document."""
    file = folder / SNAPSHOT_METADATA
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return folder


def user(document: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = document["manifest"]["0/model/ebc.embedding_bags.user.weight"]
    return entry


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return take(tmp_path / "snapshot", user=TABLE, item=torch.ones(3, 2).half())


def test_tables_in_one_slab_are_read_back(snapshot: Path) -> None:
    assert torch.equal(read(snapshot), TABLE)
    item = read(snapshot, "model.ebc.embedding_bags.item.weight")
    assert item.dtype is torch.float16
    assert torch.equal(item, torch.ones(3, 2).half())


def test_only_tensors_are_listed_and_no_object_is_read(snapshot: Path) -> None:
    assert set(TorchsnapshotIndex(snapshot).tensors) == {NAME, "model.ebc.embedding_bags.item.weight"}


def test_a_chunked_tensor_is_read_back(tmp_path: Path) -> None:
    with torchsnapshot.knobs.override_max_chunk_size_bytes(40), torchsnapshot.knobs.override_is_batching_disabled(True):
        folder = take(tmp_path / "chunked", user=TABLE)
    index = TorchsnapshotIndex(folder)
    assert len(index.locate(NAME)) > 1
    assert torch.equal(read(folder), TABLE)


def test_metadata_in_yaml_is_read_as_well(snapshot: Path) -> None:
    file = snapshot / SNAPSHOT_METADATA
    document = json.loads(file.read_text())
    with file.open("w") as stream:
        YAML().dump(document, stream)
    with pytest.raises(json.JSONDecodeError):
        json.loads(file.read_text())
    assert torch.equal(read(snapshot), TABLE)


def test_escaped_names_are_unescaped(tmp_path: Path) -> None:
    state = torchsnapshot.StateDict(**{"a/b%": TABLE})
    torchsnapshot.Snapshot.take(str(tmp_path / "s"), {"model": state})
    assert list(TorchsnapshotIndex(tmp_path / "s").tensors) == ["model.a/b%"]


def test_of_a_tensor_that_every_rank_has_the_lowest_ranks_is_taken(snapshot: Path) -> None:
    def other_rank(document: dict[str, Any]) -> None:
        entry = user(document) | {"location": "10/elsewhere"}
        document["manifest"] = {"10/model/ebc.embedding_bags.user.weight": entry} | document["manifest"]

    assert torch.equal(read(edit(snapshot, other_rank)), TABLE)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(version="0.2.0"), "version is '0.2.0', expected '0.1.0'"),
        (lambda d: d.pop("manifest"), "is damaged: KeyError: 'manifest'"),
        (lambda d: user(d).update(serializer="torch_save"), f"'{NAME}' was written with torch_save"),
        (lambda d: user(d).update(location="../outside"), f"'{NAME}': '../outside' leaves the folder"),
        (lambda d: user(d).update(location="/etc/passwd"), f"'{NAME}': '/etc/passwd' leaves the folder"),
        (lambda d: user(d).update(byte_range=[0, 92]), f"'{NAME}': byte range 0-92, expected 96 bytes"),
        (lambda d: user(d).update(byte_range=[-4, 92]), f"'{NAME}': byte range -4-92, expected 96 bytes"),
        (lambda d: user(d).update(shape=[6]), f"'{NAME}': byte range 0-96, expected 24 bytes"),
        (lambda d: user(d).update(shape="no"), "is damaged: "),
        (lambda d: user(d).pop("location"), f"'{NAME}' is damaged: KeyError: 'location'"),
        (lambda d: user(d).update(dtype="torch.save"), f"'{NAME}' has the types ['torch.save']"),
        (lambda d: user(d).update(dtype="torch.qint8x"), "is damaged: AttributeError"),
        (lambda d: d["manifest"].update({"x/y": {"type": "Tensor"}}), "is damaged: ValueError"),
        (lambda d: user(d).update(type="DTensor"), "is a DTensor, which format 0.1.0 does not have"),
        (
            lambda d: d["manifest"].update({"0/model/ebc/embedding_bags.user.weight": user(d)}),
            f"'model/ebc.embedding_bags.user.weight' and 'model/ebc/embedding_bags.user.weight' are both '{NAME}'",
        ),
    ],
)
def test_metadata_that_does_not_hold_together_is_refused(
    snapshot: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    with pytest.raises(SnapshotError) as caught:
        read(edit(snapshot, change))
    assert str(caught.value).startswith(f"{snapshot / SNAPSHOT_METADATA}: ")
    assert text in str(caught.value)


@pytest.mark.parametrize("change", [{"byte_range": [0.0, 96.0]}, {"location": "a\0b"}])
def test_a_place_that_is_none_is_refused(snapshot: Path, change: dict[str, Any]) -> None:
    with pytest.raises(SnapshotError, match="the place of a shard is damaged"):
        read(edit(snapshot, lambda d: user(d).update(change)))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"- a\n- b\n"])
def test_metadata_that_is_none_is_refused(snapshot: Path, data: bytes) -> None:
    (snapshot / SNAPSHOT_METADATA).write_bytes(data)
    with pytest.raises(SnapshotError, match="is damaged"):
        TorchsnapshotIndex(snapshot)


def test_a_missing_and_a_truncated_file_are_refused(snapshot: Path) -> None:
    (file,) = (snapshot / "batched").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(SnapshotError, match=f"{file}: '{NAME}' ends at byte .* the file has 50; it was truncated"):
        read(snapshot)
    file.unlink()
    with pytest.raises(SnapshotError, match=f"{file}: holds rows of '{NAME}', cannot be read"):
        read(snapshot)


def sharded(*shards: tuple[int, int]) -> Callable[[dict[str, Any]], None]:
    """Makes the table a ShardedTensor of these row ranges, of the same bytes."""

    def change(document: dict[str, Any]) -> None:
        entry = user(document)
        start = entry["byte_range"][0]
        parts = []
        for first, last in shards:
            tensor = entry | {"shape": [last - first, 4], "byte_range": [start + first * 16, start + last * 16]}
            parts.append({"offsets": [first, 0], "sizes": [last - first, 4], "tensor": tensor})
        for rank, part in enumerate(parts):
            path = f"{rank}/model/ebc.embedding_bags.user.weight"
            document["manifest"][path] = {"type": "ShardedTensor", "shards": [part]}

    return change


def test_the_shards_of_all_ranks_make_the_table(snapshot: Path) -> None:
    assert torch.equal(read(edit(snapshot, sharded((0, 2), (2, 5), (5, 6)))), TABLE)


def test_a_shard_that_two_ranks_list_counts_once(snapshot: Path) -> None:
    assert torch.equal(read(edit(snapshot, sharded((0, 3), (3, 6), (3, 6)))), TABLE)


def test_holes_and_overlaps_are_refused(snapshot: Path) -> None:
    with pytest.raises(SnapshotError, match="leave 4 values of the table out"):
        read(edit(snapshot, sharded((0, 2), (3, 6))))


def test_overlapping_shards_are_refused(snapshot: Path) -> None:
    with pytest.raises(SnapshotError, match="overlaps another one"):
        read(edit(snapshot, sharded((0, 4), (3, 6))))


def test_a_folder_without_the_commit_mark_is_refused(snapshot: Path) -> None:
    (snapshot / SNAPSHOT_METADATA).unlink()
    with pytest.raises(SnapshotError, match="the snapshot was never completed"):
        TorchsnapshotIndex(snapshot)
