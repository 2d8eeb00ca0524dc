"""Finding a snapshot: its format, its step, and each table's tensor in it, or what is there instead."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import PREFIX, state_dict, write_dcp

from export.config import EmbeddingBagConfig, SnapshotConfig
from export.errors import SnapshotError
from export.snapshots import open_snapshot
from export.snapshots.dcp import METADATA
from runtime_py.digests import sha256

TABLE = torch.arange(24.0).reshape(6, 4)
USER = EmbeddingBagConfig.model_validate({"name": "user", "num_embeddings": 6, "embedding_dim": 4, "data_type": "fp32"})
STORED = "embedding_bags.user.weight"
KNOWN_FORMATS = "is no snapshot of a known format (DCP folder, torchsnapshot, safetensors, torch.save in its zip form)"


def write_pt(path: Path, rows: dict[str, torch.Tensor]) -> Path:
    torch.save(state_dict(rows), path)
    return path


def write_safetensors(path: Path, rows: dict[str, torch.Tensor]) -> Path:
    save_file(state_dict(rows), path)
    return path


def read(path: Path | str, table: EmbeddingBagConfig = USER, stored_name: str | None = None, **options: Any) -> Any:
    """The rows of a table, and the identity of the snapshot that they come from."""
    snapshot = open_snapshot(SnapshotConfig.model_validate({"uri": str(path), **options}))
    rows = snapshot.table(table, stored_name)
    out = torch.empty(rows.num_embeddings, rows.embedding_dim, dtype=rows.dtype)
    rows.read(0, out)
    return out, snapshot.identity


def refusal(path: Path | str, table: EmbeddingBagConfig = USER, **options: Any) -> str:
    with pytest.raises(SnapshotError) as caught:
        read(path, table, **options)
    return str(caught.value)


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """Steps 9, 80 and 700, whose tables are filled with their number; in between, what other tools leave there."""
    for step in (80, 700, 9):
        write_dcp(tmp_path / "steps" / str(step), {"user": torch.full((6, 4), float(step))})
    (tmp_path / "steps" / "latest.txt").write_text("700")
    (tmp_path / "steps" / "best").mkdir()
    (tmp_path / "steps" / "-1").mkdir()
    return tmp_path / "steps"


# --- Formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write", "kind"),
    [
        ("snapshot", write_dcp, "dcp"),
        ("7", write_dcp, "dcp"),
        ("model.safetensors", write_safetensors, "safetensors"),
        ("model.pt", write_pt, "state_dict"),
        ("model.bin", write_pt, "state_dict"),
        ("7", write_pt, "state_dict"),
    ],
)
@pytest.mark.parametrize("given", [True, False], ids=["given", "auto"])
def test_the_format_is_found_by_looking_at_the_files(
    tmp_path: Path, name: str, write: Callable[[Path, dict[str, torch.Tensor]], Path], kind: str, given: bool
) -> None:
    path = write(tmp_path / name, {"user": TABLE})
    rows, identity = read(path, **({"format": kind} if given else {}))
    assert torch.equal(rows, TABLE)
    assert (identity.uri, identity.format, identity.step) == (str(path), kind, None)


def test_a_folder_of_safetensors_files_is_one_snapshot(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"user": TABLE})
    rows, identity = read(tmp_path)
    assert torch.equal(rows, TABLE)
    assert identity.format == "safetensors"


def test_the_identity_has_the_digest_of_the_index(tmp_path: Path) -> None:
    _, identity = read(write_dcp(tmp_path / "dcp", {"user": TABLE}))
    assert identity.digest == sha256((tmp_path / "dcp" / METADATA).read_bytes())


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("state_dict", "is no torch.save file"),
        ("safetensors", "0 safetensors files"),
        ("dcp", "cannot be read"),
    ],
)
def test_a_snapshot_of_another_format_than_the_given_one_is_refused(tmp_path: Path, kind: str, problem: str) -> None:
    path = {
        "state_dict": lambda: write_safetensors(tmp_path / "model.safetensors", {"user": TABLE}),
        "safetensors": lambda: write_dcp(tmp_path / "dcp", {"user": TABLE}),
        "dcp": lambda: write_pt(tmp_path / "model.pt", {"user": TABLE}),
    }[kind]()
    message = refusal(path, format=kind)
    assert str(path) in message
    assert problem in message


def test_a_file_that_is_given_as_a_dcp_folder_is_not_called_incomplete(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "model.pt", {"user": TABLE})
    assert "never completed" not in refusal(path, format="dcp")


@pytest.mark.parametrize("content", [b"", b"hello\n", bytes(1000), b"PK\x03\x04 but no more"])
def test_a_file_of_no_known_format_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    cut = "; it begins as a torch.save file, and its end is missing: it was cut short" if content[:2] == b"PK" else ""
    assert refusal(path) == f"{path}: {KNOWN_FORMATS}{cut}"


def test_a_torchsnapshot_is_known_by_its_commit_mark(tmp_path: Path) -> None:
    (tmp_path / ".snapshot_metadata").write_text('{"version": "0.1.0", "world_size": 1, "manifest": {}}')
    assert open_snapshot(SnapshotConfig(uri=str(tmp_path))).identity.format == "torchsnapshot"


def test_a_torch_save_file_in_its_old_form_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(state_dict({"user": TABLE}), path, _use_new_zipfile_serialization=False)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert "zip" in message, f"the file is a torch.save file, so say what is wrong with it: {message}"


# --- Steps ---------------------------------------------------------------------------------------------------------


def test_the_newest_complete_step_is_taken_by_number_not_by_name(steps: Path) -> None:
    rows, identity = read(steps)
    assert identity.step == 700
    assert torch.equal(rows, torch.full((6, 4), 700.0))
    assert identity.uri == str(steps)


@pytest.mark.parametrize("step", [9, 80, 700])
def test_a_given_step_is_taken(steps: Path, step: int) -> None:
    rows, identity = read(steps, step=step)
    assert identity.step == step
    assert torch.equal(rows, torch.full((6, 4), float(step)))


def test_a_step_without_its_commit_mark_is_skipped(steps: Path) -> None:
    (steps / "700" / METADATA).unlink()
    (steps / "5000").mkdir()
    rows, identity = read(steps)
    assert identity.step == 80
    assert torch.equal(rows, torch.full((6, 4), 80.0))


def test_a_step_whose_safetensors_file_was_cut_short_is_skipped(tmp_path: Path) -> None:
    for step in (9, 80):
        (tmp_path / str(step)).mkdir()
        write_safetensors(tmp_path / str(step) / "model.safetensors", {"user": torch.full((6, 4), float(step))})
    newest = tmp_path / "80" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert read(tmp_path)[1].step == 9
    assert "incomplete" in refusal(tmp_path, step=80)


def test_a_step_that_is_missing_lists_those_that_are_there(steps: Path) -> None:
    assert refusal(steps, step=10) == f"{steps}: no complete step 10; complete steps: 9, 80, 700"


def test_a_step_that_is_incomplete_is_refused_with_the_others(steps: Path) -> None:
    (steps / "700" / METADATA).unlink()
    assert refusal(steps, step=700) == (
        f"{steps}: no complete step 700; complete steps: 9, 80; "
        "incomplete (without a commit mark, .metadata, .snapshot_metadata, or with files cut short or missing): 700"
    )


def test_steps_of_which_none_is_complete_are_refused(steps: Path) -> None:
    for step in ("9", "80", "700"):
        (steps / step / METADATA).unlink()
    assert refusal(steps) == (
        f"{steps}: no complete snapshot; complete steps: none; "
        "incomplete (without a commit mark, .metadata, .snapshot_metadata, or with files cut short or missing): 9, 80, 700"
    )


def test_files_that_are_named_by_their_step_are_steps(tmp_path: Path) -> None:
    for step in (9, 80):
        write_pt(tmp_path / f"{step}.pt", {"user": torch.full((6, 4), float(step))})
    rows, identity = read(tmp_path)
    assert (identity.step, identity.format) == (80, "state_dict")
    assert torch.equal(rows, torch.full((6, 4), 80.0))
    assert read(tmp_path, step=9)[1].step == 9


@pytest.mark.parametrize("numbers", [[100], [100, 90, 200]])
def test_safetensors_files_that_are_named_by_their_step_are_steps(tmp_path: Path, numbers: list[int]) -> None:
    for number in numbers:
        write_safetensors(tmp_path / f"{number}.safetensors", {"user": torch.full((6, 4), float(number))})
    for step in (None, 100):
        wanted = step or max(numbers)
        snapshot = open_snapshot(SnapshotConfig(uri=str(tmp_path), step=step))
        assert snapshot.identity.step == wanted


def test_folders_of_safetensors_files_that_are_named_by_their_step_are_steps(tmp_path: Path) -> None:
    for step in (9, 80):
        (tmp_path / str(step)).mkdir()
        write_safetensors(tmp_path / str(step) / "model.safetensors", {"user": torch.full((6, 4), float(step))})
    rows, identity = read(tmp_path)
    assert (identity.step, identity.format) == (80, "safetensors")
    assert torch.equal(rows, torch.full((6, 4), 80.0))


def test_a_folder_that_another_tool_has_not_finished_is_no_step(steps: Path) -> None:
    shutil.copytree(steps / "80", steps / "9000.tmp")
    shutil.copytree(steps / "80", steps / "8000.orbax-checkpoint-tmp-3")
    assert read(steps)[1].step == 700


def test_two_snapshots_of_one_step_are_refused_rather_than_one_of_them_taken(steps: Path) -> None:
    shutil.copytree(steps / "80", steps / "0700")
    message = refusal(steps)
    assert "0700" in message


def test_a_step_of_a_snapshot_that_is_alone_is_refused(tmp_path: Path, steps: Path) -> None:
    for path in (steps / "700", write_pt(tmp_path / "model.pt", {"user": TABLE})):
        assert refusal(path, step=700) == (
            f"{path}: is one snapshot, not a folder of step-numbered ones; remove snapshot.step"
        )


def test_a_snapshot_that_was_never_completed_says_so(tmp_path: Path) -> None:
    path = write_dcp(tmp_path / "dcp", {"user": TABLE})
    (path / METADATA).unlink()
    message = refusal(path)
    assert message.startswith(f"{path}: no complete snapshot")
    assert METADATA in message, f"the folder has .distcp files, and no commit mark: {message}"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    names = "a step is called 30, step_30, step-30, checkpoint-30 or the like, and here is"
    assert refusal(tmp_path) == f"{tmp_path}: no complete snapshot; complete steps: none; {names}: nothing"
    for number in range(7):
        (tmp_path / f"run{number}").mkdir()
    assert refusal(tmp_path).endswith(f"; {names}: run0, run1, run2, run3, run4, …")


@pytest.mark.parametrize(
    "name", ["30", "step_30", "step-30", "step=30", "step30", "checkpoint-30", "global_step30", "iter_30"]
)
def test_a_step_may_be_called_as_trainers_call_it(tmp_path: Path, name: str) -> None:
    write_dcp(tmp_path / name, {"user": TABLE})
    for other in ("x30", "30.0", "model_v40", "_50", "step_", "step_60_tmp"):
        write_dcp(tmp_path / other, {"user": TABLE})
    snapshot = open_snapshot(SnapshotConfig(uri=str(tmp_path)))
    assert snapshot.identity.step == 30
    assert snapshot.passed_over == []


def test_newer_steps_that_are_not_complete_are_told(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_dcp(tmp_path / f"step_{step}", {"user": TABLE})
    assert open_snapshot(SnapshotConfig(uri=str(tmp_path))).passed_over == []
    for step in (20, 30):
        (tmp_path / f"step_{step}" / METADATA).unlink()
    snapshot = open_snapshot(SnapshotConfig(uri=str(tmp_path)))
    assert (snapshot.identity.step, snapshot.passed_over) == (10, [f"{tmp_path}/step_30", f"{tmp_path}/step_20"])
    assert open_snapshot(SnapshotConfig(uri=str(tmp_path), step=10)).passed_over == []


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", write_pt(tmp_path / "model.pt", {"user": TABLE}) / "below-a-file"):
        assert refusal(path) == f"{path}: no such file or folder; see snapshot.uri in the configuration"


# --- Tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "ebc.", "model.embeddings.ebc.", "module.a.b.c."])
def test_a_table_is_found_under_any_prefix(tmp_path: Path, before: str) -> None:
    path = tmp_path / "model.pt"
    torch.save({before + STORED: TABLE, f"optimizer.{before}user.momentum": TABLE + 1}, path)
    assert torch.equal(read(path)[0], TABLE)
    assert torch.equal(read(path, prefix=before.rstrip("."))[0], TABLE)


def test_a_table_that_only_ends_like_the_wanted_one_is_another(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a.embedding_bags.super.user.weight": TABLE, "b.my_embedding_bags.user.weight": TABLE}, path)
    assert "has no tensor" in refusal(path)


def test_several_candidates_are_listed_and_the_prefix_decides(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({f"online.{STORED}": TABLE, f"ema.{STORED}": TABLE + 1, STORED: TABLE + 2}, path)
    assert refusal(path) == (
        f"table 'user': {path} has 3 candidates: online.{STORED}, ema.{STORED}, {STORED}; "
        "say which with snapshot.prefix (what stands before 'embedding_bags')"
    )
    for prefix, number in {"online": 0, "ema": 1, "ema.": 1, "": 2}.items():
        assert torch.equal(read(path, prefix=prefix)[0], TABLE + number)


def test_a_prefix_under_which_there_is_nothing_lists_what_there_is(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "model.pt", {"user": TABLE, "item": TABLE})
    message = refusal(path, prefix="model.ebc")
    assert message.startswith(f"table 'user': {path} has no tensor 'model.ebc.{STORED}'; it has: ")
    assert f"{PREFIX}.{STORED}" in message
    assert f"{PREFIX}.embedding_bags.item.weight" in message


def test_a_missing_table_lists_the_tables_that_were_found_the_nearest_first(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    names = ["ebc.embedding_bags.users.weight", "ebc.embedding_bags.country.weight"]
    torch.save({**dict.fromkeys(names, TABLE), "dense.weight": TABLE, "optimizer.users.sum": TABLE}, path)
    assert refusal(path) == f"table 'user': {path} has no tensor '…{STORED}'; it has: {', '.join(names)}"


def test_a_snapshot_without_any_table_lists_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"user.weight": TABLE, "bias": TABLE}, path)
    message = refusal(path)
    assert message.startswith(f"table 'user': {path} has no tensor '…{STORED}'; it has: ")
    assert "user.weight" in message
    assert "bias" in message


def test_a_snapshot_without_any_tensor_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"step": 3}, path)
    assert refusal(path) == f"table 'user': {path} has no tensor '…{STORED}'; it has: no tensor at all"


def test_the_tables_that_are_listed_are_not_too_many_to_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({f"ebc.embedding_bags.table_{number}.weight": TABLE for number in range(500)}, path)
    assert refusal(path).count("embedding_bags.table_") == 10


def test_a_table_may_have_another_name_in_the_snapshot(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "model.pt", {"members": TABLE, "user": TABLE + 1})
    assert torch.equal(read(path, stored_name="members")[0], TABLE)
    with pytest.raises(SnapshotError) as caught:
        read(path, stored_name="visitors")
    assert str(caught.value).startswith(f"table 'user': {path} has no tensor '…embedding_bags.visitors.weight'")


@pytest.mark.parametrize("shape", [(5, 4), (7, 4), (6, 3), (4, 6), (24,), (6, 4, 1)])
@pytest.mark.parametrize("write", [write_pt, write_safetensors, write_dcp])
def test_a_table_of_another_shape_is_refused_with_both_shapes(
    tmp_path: Path, write: Callable[[Path, dict[str, torch.Tensor]], Path], shape: tuple[int, ...]
) -> None:
    path = write(
        tmp_path / ("model.safetensors" if write is write_safetensors else "model"), {"user": torch.ones(shape)}
    )
    assert refusal(path) == (
        f"table 'user': {path} has '{PREFIX}.{STORED}' of shape {list(shape)}, the configuration says [6, 4] "
        "(num_embeddings, embedding_dim); correct one of them"
    )


OTHER_TYPE = "rows are read from torch.float32 or torch.float16: save them as one of these"


@pytest.mark.parametrize(
    ("stored", "data_type", "name", "remedy"),
    [
        (torch.float16, "fp32", "torch.float16", "correct one of them"),
        (torch.float32, "fp16", "torch.float32", "correct one of them"),
        (torch.bfloat16, "fp16", "torch.bfloat16", OTHER_TYPE),
        (torch.float64, "fp32", "torch.float64", OTHER_TYPE),
    ],
)
@pytest.mark.parametrize("write", [write_pt, write_safetensors, write_dcp])
def test_a_table_of_another_type_is_refused_with_both_types(
    tmp_path: Path,
    write: Callable[[Path, dict[str, torch.Tensor]], Path],
    stored: torch.dtype,
    data_type: str,
    name: str,
    remedy: str,
) -> None:
    path = write(
        tmp_path / ("model.safetensors" if write is write_safetensors else "model"), {"user": TABLE.to(stored)}
    )
    table = EmbeddingBagConfig.model_validate({**USER.model_dump(), "data_type": data_type})
    assert refusal(path, table) == (
        f"table 'user': {path} has '{PREFIX}.{STORED}' of type {name}, the configuration says data_type: {data_type}; "
        f"{remedy}"
    )


def test_a_step_is_named_where_its_table_does_not_fit(steps: Path) -> None:
    table = EmbeddingBagConfig.model_validate({**USER.model_dump(), "num_embeddings": 7})
    assert refusal(steps, table).startswith(f"table 'user': {steps / '700'} has '{PREFIX}.{STORED}' of shape [6, 4]")


def test_marker_files_beside_a_step_are_no_steps(steps: Path) -> None:
    for name in ("700.done", "700.json", "800.lock"):
        (steps / name).write_text("")
    assert read(steps)[1].step == 700


def test_a_safetensors_step_that_is_cut_short_is_not_taken(tmp_path: Path) -> None:
    rows = state_dict({"user": TABLE})
    for step in ("3", "4"):
        (tmp_path / step).mkdir()
        save_file(rows, tmp_path / step / "model.safetensors")
    path = tmp_path / "4" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert read(tmp_path)[1].step == 3


def test_a_folder_with_the_marks_of_two_formats_is_read_as_the_one_that_is_named(tmp_path: Path) -> None:
    path = write_dcp(tmp_path / "both", {"user": TABLE})
    (path / ".snapshot_metadata").write_text('{"version": "0.1.0", "world_size": 1, "manifest": {}}')
    assert refusal(path) == (
        f"{path}: has the commit marks of two formats, .metadata (dcp) and .snapshot_metadata (torchsnapshot); say with "
        "snapshot.format which one to read"
    )
    assert torch.equal(read(path, format="dcp")[0], TABLE)


def test_a_zip_that_torch_has_not_written_is_no_step(tmp_path: Path) -> None:
    write_pt(tmp_path / "7.pt", {"user": TABLE})
    with zipfile.ZipFile(tmp_path / "13.zip", "w") as archive:
        archive.writestr("notes.txt", "13")
    snapshot = open_snapshot(SnapshotConfig(uri=str(tmp_path)))
    assert (snapshot.identity.step, snapshot.passed_over) == (7, [f"{tmp_path}/13.zip"])
