"""Builds that are killed, and go on: nothing of what is finished is done twice, and nothing of it is believed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import make_rows, run_export, state_dict, write_config, write_dcp

from export import build_artifact, weight_file
from export.errors import RowsError, SnapshotError
from export.progress import NoProgress
from export.snapshots import Snapshot

# Some ten pieces of 64 MiB.
TABLES = [
    {"name": "a", "num_embeddings": 1_500_000, "embedding_dim": 64, "data_type": "fp16", "serving_precision": "fp32"},
    {"name": "b", "num_embeddings": 600_000, "embedding_dim": 32, "data_type": "fp32"},
    {"name": "c", "num_embeddings": 9, "embedding_dim": 3, "data_type": "fp32"},
]
WEIGHTS = "weights/tables.safetensors"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return write_dcp(tmp_path_factory.mktemp("resume") / "snapshot", make_rows(TABLES, seed=8))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, snapshot):
    """The artifact id of an undisturbed build."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "release.yaml", snapshot, TABLES)
    return build_artifact(config, folder / "artifact", workers=2).manifest.artifact_id


@pytest.fixture
def release(tmp_path, snapshot):
    (tmp_path / "out").mkdir()
    return write_config(tmp_path / "release.yaml", snapshot, TABLES), tmp_path / "out" / "artifact"


def start_build(config: Path, output: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "export", "build", "--config", config, "--output", output, *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def journals(output: Path) -> list[Path]:
    return sorted(output.parent.glob(".artifact.staging-*/journal-*.jsonl"))


def finished(output: Path) -> int:
    count = 0
    for path in journals(output):
        with contextlib.suppress(FileNotFoundError):  # the build has ended since they were listed
            count += sum(line.count(b'"key"') for line in path.read_bytes().splitlines())
    return count


def kill_after(build: subprocess.Popen, output: Path, pieces: int, number: int = signal.SIGKILL) -> str:
    """Sends the signal as soon as so many pieces are journalled, or the build has ended; returns its stderr."""
    while build.poll() is None and finished(output) < pieces:
        time.sleep(0.001)
    build.send_signal(number)
    return build.communicate()[1]


def resume(config, output):
    return build_artifact(config, output, workers=2, resume=True).manifest.artifact_id


def test_a_killed_build_goes_on_where_it_was(release, whole):
    config, output = release
    build = start_build(config, output)
    kill_after(build, output, 3)
    assert finished(output) >= 3
    assert resume(config, output) == whole
    assert os.listdir(output.parent) == ["artifact"]


class _Interrupted(BaseException):
    pass


class Interrupting(NoProgress):
    """Ends the build as a signal would, when a phase begins."""

    def __init__(self, phase):
        self._phase = phase

    def phase(self, name):
        if name == self._phase:
            raise _Interrupted


def test_what_is_finished_is_not_converted_again(release, whole, monkeypatch):
    config, output = release
    with pytest.raises(_Interrupted) as ended:
        build_artifact(config, output, workers=2, resume=True, progress=Interrupting("parity"))
    [note] = ended.value.__notes__
    assert "holds what is finished; go on with --resume, or remove it" in note
    monkeypatch.setattr(weight_file, "_write_piece", None)  # would be called for a piece that is not there
    assert resume(config, output) == whole
    assert os.listdir(output.parent) == ["artifact"]


def test_a_scratch_folder_that_was_left_is_removed(release, whole):
    config, output = release
    with pytest.raises(_Interrupted):
        build_artifact(config, output, workers=2, resume=True, progress=Interrupting("graphs"))
    [container] = output.parent.glob(".artifact.staging-*")
    (container / "scratch-x").mkdir()
    with pytest.raises(_Interrupted):
        build_artifact(config, output, workers=2, resume=True, progress=Interrupting("rows"))
    assert list(output.parent.glob(".artifact.staging-*")) == [container]
    assert not (container / "scratch-x").exists()


def test_what_no_later_build_could_use_is_not_kept(tmp_path):
    tables = TABLES[2:]
    rows = make_rows(tables, seed=8)
    config = write_config(tmp_path / "r.yaml", write_dcp(tmp_path / "s", rows), tables)
    (tmp_path / "out").mkdir()
    with pytest.raises(_Interrupted):  # nothing is finished yet
        build_artifact(config, tmp_path / "out" / "a", workers=1, resume=True, progress=Interrupting("rows"))
    assert os.listdir(tmp_path / "out") == []
    rows["c"][0, 0] = float("inf")
    config = write_config(tmp_path / "r.yaml", write_dcp(tmp_path / "bad", rows), tables)
    with pytest.raises(RowsError):
        build_artifact(config, tmp_path / "out" / "a", workers=1, resume=True)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.slow
def test_ten_kills_at_random_moments_and_the_same_artifact(release, whole):
    config, output = release
    rng = random.Random(3)
    for _ in range(10):
        build = start_build(config, output, "--resume")
        if rng.random() < 0.5:  # by time: also in the imports, the graphs, the gates
            time.sleep(rng.uniform(0.5, 6))
            build.kill()
            build.communicate()
        else:
            kill_after(build, output, finished(output) + rng.randint(1, 3))
        if output.exists():
            break
    if not output.exists():
        done = run_export("build", "--config", config, "--output", output, "--resume", "--json")
        assert done.returncode == 0, done.stderr
    assert json.loads((output / "manifest.json").read_text())["artifact_id"] == whole
    assert os.listdir(output.parent) == ["artifact"]


def test_rows_that_changed_on_the_disk_meanwhile_are_written_again(release, whole):
    config, output = release
    kill_after(start_build(config, output), output, 4)
    [weights] = output.parent.glob(f".artifact.staging-*/artifact/{WEIGHTS}")
    with weights.open("r+b") as file:
        file.seek(4096 + 5)
        byte = file.read(1)
        file.seek(4096 + 5)
        file.write(bytes([byte[0] ^ 1]))
    assert resume(config, output) == whole


@pytest.mark.parametrize("change", ["snapshot", "precision", "weights gone", "journal gone"])
def test_what_no_longer_fits_is_not_gone_on_with(release, snapshot, tmp_path, change):
    config, output = release
    kill_after(start_build(config, output), output, 3)
    tables = [dict(table) for table in TABLES]
    rows = make_rows(TABLES, seed=8)
    if change == "snapshot":
        rows["a"][0, 0] += 1
        config = write_config(config, write_dcp(tmp_path / "other", rows), tables)
    elif change == "precision":
        tables[0]["serving_precision"] = "fp16"
        config = write_config(config, snapshot, tables)
    elif change == "weights gone":
        next(output.parent.glob(f".artifact.staging-*/artifact/{WEIGHTS}")).unlink()
    else:
        journals(output)[0].unlink()
    resume(config, output)
    stored = load_file(output / WEIGHTS)["a"]
    assert torch.equal(stored, rows["a"].to(stored.dtype))
    assert os.listdir(output.parent) == ["artifact"]


def test_a_snapshot_that_was_replaced_under_the_same_names_sizes_and_times_is_read_again(tmp_path):
    tables = [{"name": "t", "num_embeddings": 1_200_000, "embedding_dim": 32, "data_type": "fp32"}]
    (tmp_path / "out").mkdir()
    path, output = tmp_path / "s.safetensors", tmp_path / "out" / "artifact"
    save_file(state_dict(make_rows(tables, seed=1)), path)
    times = path.stat()
    config = write_config(tmp_path / "release.yaml", path, tables)
    kill_after(start_build(config, output, "--resume"), output, 1)
    assert not output.exists()
    rows = make_rows(tables, seed=2)
    save_file(state_dict(rows), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    resume(config, output)
    assert torch.equal(load_file(output / WEIGHTS)["t"], rows["t"].half())


def test_a_signal_keeps_what_is_finished_only_where_it_was_asked_to(release, whole):
    config, output = release
    build = start_build(config, output)
    kill_after(build, output, 2, signal.SIGTERM)
    assert build.returncode == 143
    assert os.listdir(output.parent) == []
    build = start_build(config, output, "--resume")
    assert "stopped by SIGTERM; nothing was published" in kill_after(build, output, 2, signal.SIGTERM)
    assert build.returncode == 143
    assert finished(output) >= 2
    assert resume(config, output) == whole


def test_a_build_without_resume_starts_anew_and_cleans_up(release, whole):
    config, output = release
    kill_after(start_build(config, output), output, 2)
    result = build_artifact(config, output, workers=2)
    assert result.manifest.artifact_id == whole
    assert result.stage_seconds["write"] > 0
    assert os.listdir(output.parent) == ["artifact"]


def test_a_snapshot_that_is_written_again_while_it_is_read_is_refused(tmp_path):
    tables = TABLES[2:]
    rows = make_rows(tables, seed=8)
    snapshot = write_dcp(tmp_path / "snapshot", rows)
    config = write_config(tmp_path / "release.yaml", snapshot, tables)

    class Rewriting(NoProgress):
        def advance(self, table, count):
            [data] = snapshot.glob("*.distcp")
            data.write_bytes(data.read_bytes())

    with pytest.raises(SnapshotError, match="snapshot changed while it was read"):
        build_artifact(config, tmp_path / "artifact", workers=1, progress=Rewriting())
    assert not (tmp_path / "artifact").exists()


def test_a_snapshot_that_is_replaced_between_the_first_look_and_the_plan_is_refused(tmp_path, monkeypatch):
    tables = [{"name": name, "num_embeddings": 9, "embedding_dim": 4, "data_type": "fp32"} for name in ("a", "b")]
    rows = {"a": torch.ones(9, 4), "b": torch.full((9, 4), 2.0)}
    path = tmp_path / "latest.pt"
    torch.save(state_dict(rows), path)
    config = write_config(tmp_path / "r.yaml", path, tables)
    find = Snapshot.table
    once = threading.Lock()

    def replace_then_find(self, *arguments):
        if once.acquire(blocking=False):
            (tmp_path / "next").mkdir()  # the same name, and so the same layout
            torch.save(state_dict(dict(reversed(rows.items()))), tmp_path / "next" / path.name)
            (tmp_path / "next" / path.name).rename(path)
        return find(self, *arguments)

    monkeypatch.setattr(Snapshot, "table", replace_then_find)
    with pytest.raises(SnapshotError, match="snapshot changed while it was read"):
        build_artifact(config, tmp_path / "artifact", workers=1)
    assert not (tmp_path / "artifact").exists()
