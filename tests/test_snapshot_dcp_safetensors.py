"""The safetensors files that DCP's processes write: their parts make the tables, and what is missing is noticed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

from export.config import EmbeddingBagConfig, SnapshotConfig
from export.errors import SnapshotError
from export.snapshots import open_snapshot

TABLE = torch.arange(24.0).reshape(6, 4)
NAME = "ebc.embedding_bags.user.weight"
USER = EmbeddingBagConfig.model_validate({"name": "user", "num_embeddings": 6, "embedding_dim": 4, "data_type": "fp32"})
Parts = Mapping[str, tuple[torch.Tensor, list[int]]]


def write_shard(folder: Path, process: int, parts: Parts, model: str = "00001-of-00001", **metadata: str) -> Path:
    """A file as torch 2.13 writes it: parts by name, each with its offsets."""
    info = {name: {"saved_offsets": offsets} for name, (_, offsets) in parts.items()}
    path = folder / f"shard-{process:05}-model-{model}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt", **metadata}
    save_file({name: tensor.contiguous() for name, (tensor, _) in parts.items()}, path, metadata=fields)
    return path


def read(path: Path, step: int | None = None) -> torch.Tensor:
    rows = open_snapshot(SnapshotConfig(uri=str(path), step=step)).table(USER)
    out = torch.empty(rows.num_embeddings, rows.embedding_dim)
    rows.read(0, out)
    return out


def refusal(path: Path, step: int | None = None) -> str:
    with pytest.raises(SnapshotError) as caught:
        read(path, step)
    return str(caught.value)


def rows(first: int, last: int, column: int = 0, end: int = 4) -> Parts:
    """The part of the table of rows `first` to `last` (excluded) and columns `column` to `end` (excluded)."""
    return {NAME: (TABLE[first:last, column:end], [first, column])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three processes hold two rows each."""
    for process in (1, 2, 3):
        write_shard(tmp_path / "snapshot", process, rows(2 * process - 2, 2 * process))
    return tmp_path / "snapshot"


@pytest.mark.parametrize(
    "parts",
    [
        [rows(0, 6)],
        [rows(0, 4), rows(4, 6)],
        [rows(0, 6, 0, 3), rows(0, 6, 3, 4)],
        [rows(0, 3, 0, 1), rows(0, 3, 1, 4), rows(3, 6, 0, 3), rows(3, 6, 3, 4)],
        [rows(0, 6), rows(6, 6)],
    ],
    ids=["whole", "rows", "columns", "grid", "empty part"],
)
def test_the_parts_make_the_table(tmp_path: Path, parts: list[Parts]) -> None:
    for process, part in enumerate(parts, start=1):
        write_shard(tmp_path, process, part)
    assert torch.equal(read(tmp_path), TABLE)


def test_scalars_and_tensors_of_other_dimensions_stand_beside_a_table(tmp_path: Path) -> None:
    write_shard(tmp_path, 1, {**rows(0, 3), "step": (torch.tensor(3), []), "cube": (torch.ones(2, 2, 2), [0, 0, 0])})
    write_shard(tmp_path, 2, {**rows(3, 6), "cube": (torch.ones(1, 2, 2), [2, 0, 0])})
    assert torch.equal(read(tmp_path), TABLE)


def test_the_files_that_one_process_writes_by_a_mapping_are_read_together(tmp_path: Path) -> None:
    state = {NAME: TABLE, "dense": torch.ones(3)}
    writer = checkpoint.HuggingFaceStorageWriter(
        str(tmp_path), fqn_to_index_mapping={NAME: 1, "dense": 2}, save_distributed=True
    )
    checkpoint.save(state, storage_writer=writer, no_dist=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-00001-model-00001-of-00002.safetensors",
        "shard-00001-model-00002-of-00002.safetensors",
    ]
    assert torch.equal(read(tmp_path), TABLE)
    (tmp_path / "shard-00001-model-00001-of-00002.safetensors").unlink()
    assert refusal(tmp_path) == f"{tmp_path}: has the files 2 of 2, by their names; the others are missing"


def test_one_part_is_never_taken_for_the_table(folder: Path) -> None:
    path = folder / "shard-00002-model-00001-of-00001.safetensors"
    assert refusal(path).startswith(f"{path}: holds 8 of the 16 values of '{NAME}'; a shard file is missing")


@pytest.mark.parametrize("process", [1, 2])
def test_a_missing_file_leaves_a_hole(folder: Path, process: int) -> None:
    (folder / f"shard-{process:05}-model-00001-of-00001.safetensors").unlink()
    assert refusal(folder) == (
        f"{folder}: holds 16 of the 24 values of '{NAME}'; a shard file is missing, or a process had several parts of it, "
        "of which torch's safetensors writer keeps one"
    )


def test_a_missing_last_file_leaves_a_smaller_table(folder: Path) -> None:
    (folder / "shard-00003-model-00001-of-00001.safetensors").unlink()
    assert refusal(folder) == (
        f"table 'user': {folder} has '{NAME}' of shape [4, 4], the configuration says [6, 4] (num_embeddings, "
        "embedding_dim); correct one of them, or bring back a missing shard file"
    )


def test_a_missing_column_leaves_a_narrower_table(tmp_path: Path) -> None:
    write_shard(tmp_path, 1, rows(0, 6, 0, 3))
    assert "shape [6, 3], the configuration says [6, 4]" in refusal(tmp_path)


def test_a_step_of_which_a_file_is_missing_is_skipped(folder: Path) -> None:
    steps = folder.parent / "steps"
    for process, part in ((1, rows(0, 3)), (2, rows(3, 6))):
        write_shard(steps / "8", process, part)
        write_shard(steps / "9", process, part)
    assert open_snapshot(SnapshotConfig(uri=str(steps))).identity.step == 9
    (steps / "9" / "shard-00001-model-00001-of-00001.safetensors").unlink()
    assert torch.equal(read(steps), TABLE)
    assert open_snapshot(SnapshotConfig(uri=str(steps))).identity.step == 8
    assert refusal(steps, step=9).endswith("or with files cut short or missing): 9")


def test_a_file_that_is_cut_short_is_refused(folder: Path) -> None:
    path = folder / "shard-00002-model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(folder) == f"{path}: has 31 bytes of data, its header says 32; it was truncated"


@pytest.mark.parametrize("part", [rows(2, 4), rows(0, 6), rows(3, 5)], ids=["same", "whole", "some"])
def test_a_part_that_two_files_hold_is_refused(folder: Path, part: Parts) -> None:
    write_shard(folder, 4, part)
    assert "overlaps another one" in refusal(folder)


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (TABLE[2:4].half(), "is torch.float16 of 2 dimensions, in {} torch.float32 of 2"),
        (TABLE[2], "is torch.float32 of 1 dimensions, in {} torch.float32 of 2"),
    ],
)
def test_parts_of_different_tensors_are_refused(folder: Path, part: torch.Tensor, problem: str) -> None:
    path = write_shard(folder, 2, {NAME: (part, [2, 0][: part.dim()])})
    problem = problem.format("shard-00001-model-00001-of-00001.safetensors")
    assert refusal(folder) == f"{path}: '{NAME}' {problem}; they are no parts of one tensor"


@pytest.mark.parametrize("offsets", [[2], [2, 0, 0], [], [-2, 0], [2.0, 0], [True, 0], ["2", 0], [2**63, 0], 2, None])
def test_offsets_that_are_none_of_the_tensors_are_refused(folder: Path, offsets: Any) -> None:
    path = write_shard(folder, 2, {NAME: (TABLE[2:4], offsets)})
    assert refusal(folder) == f"{path}: '{NAME}' of shape [2, 4] has the offsets {offsets!r}; it is damaged"


@pytest.mark.parametrize(
    "info",
    ["", "{", "[]", "7", "null", "{}", '{"other": 1}', f'{{"{NAME}": [2, 0]}}', f'{{"{NAME}": {{}}}}', "[" * 100_000],
    ids=["empty", "cut", "list", "number", "null", "no name", "other name", "bare", "no offsets", "nested"],
)
def test_damaged_sharding_information_is_refused(folder: Path, info: str) -> None:
    path = write_shard(folder, 2, rows(2, 4), DCP_SHARDING_INFO=info)
    assert refusal(folder).startswith(f"{path}: DCP_SHARDING_INFO is damaged: ")


def test_sharding_information_of_another_version_is_refused(folder: Path) -> None:
    path = write_shard(folder, 2, rows(2, 4), DCP_VERSION="2.0")
    assert refusal(folder) == f"{path}: DCP_VERSION is '2.0', expected '1.0'"


def test_files_with_and_without_sharding_information_are_refused(folder: Path) -> None:
    save_file({NAME: TABLE}, folder / "model.safetensors")
    assert refusal(folder) == (
        f"{folder}: other files have DCP_SHARDING_INFO, not model.safetensors; leave one snapshot in the folder"
    )


def test_an_index_says_which_files_count(folder: Path) -> None:
    save_file({NAME: TABLE + 1}, folder / "model.safetensors")
    weight_map = {NAME: "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(read(folder), TABLE + 1)


def test_a_file_with_an_object_before_the_tensors_says_what_to_save(tmp_path: Path) -> None:
    writer = checkpoint.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    checkpoint.save({NAME: TABLE, "step": 7}, storage_writer=writer, no_dist=True)
    path = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    assert refusal(tmp_path) == (
        f"{path}: begins with a torch.save file: DCP's safetensors writer puts values that are no tensors there; "
        "save tensors only"
    )


def test_consolidated_files_whose_parts_left_a_hole_are_refused(tmp_path: Path) -> None:
    """torch 2.13 writes zeros there: consolidate_safetensors_files starts from an empty table."""
    write_shard(tmp_path / "sharded", 1, rows(0, 2))
    write_shard(tmp_path / "sharded", 3, rows(4, 6))

    def consolidate() -> None:
        consolidate_safetensors_files(str(tmp_path / "sharded"), str(tmp_path), {NAME: 1})

    consolidate()
    assert torch.equal(load_file(tmp_path / "model-00001-of-00001.safetensors")[NAME][2:4], torch.zeros(2, 4))
    assert refusal(tmp_path).startswith(
        f"{tmp_path}: was consolidated from parts that are not whole, and has zeros there: {tmp_path / 'sharded'}: "
        f"holds 16 of the 24 values of '{NAME}'; "
    )
    write_shard(tmp_path / "sharded", 2, rows(2, 4))
    consolidate()
    assert torch.equal(read(tmp_path), TABLE)
