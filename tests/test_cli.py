"""The command line as a release pipeline uses it: a process, its two outputs, its exit code, and what it leaves."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from support import FEATURES, TABLES, run_export, write_config

from runtime_py import load_artifact, verify_artifact


@pytest.fixture
def release(tmp_path, dcp_snapshot):
    """A folder of its own for the build's output, and a configuration outside of it."""
    (tmp_path / "out").mkdir()
    return write_config(tmp_path / "release.yaml", dcp_snapshot), tmp_path / "out"


def test_build_verify_and_inspect_from_end_to_end(release):
    config, out = release
    done = run_export("build", "--config", config, "--output", out / "artifact")
    assert done.returncode == 0, done.stderr
    for text in ("artifact", "user", "item, last_item", "fp16", "bit-equal to torchrec", "built in"):
        assert text in done.stdout
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == [
        "snapshot",
        "rows",
        "graphs",
        "digests",
        "parity",
        "report",
        "publish",
    ]
    assert os.listdir(out) == ["artifact"]

    done = run_export("verify", out / "artifact")
    assert done.returncode == 0
    assert "intact: 9 files" in done.stdout
    done = run_export("inspect", out / "artifact")
    assert done.returncode == 0
    assert "300" in done.stdout
    assert load_artifact(out / "artifact")({name: [[0]] for name in FEATURES}).keys() == FEATURES


def test_json_is_one_object_on_stdout(release):
    config, out = release
    built = json.loads(
        run_export("build", "--config", config, "--output", out / "a", "--json", "--workers", "1").stdout
    )
    assert {"artifact", "artifact_id", "bytes", "seconds", "parity"} <= built.keys()
    assert built["bytes"]["weights/tables.safetensors"] == (out / "a/weights/tables.safetensors").stat().st_size
    verified = json.loads(run_export("verify", out / "a", "--json", "--sizes").stdout)
    assert verified["artifact_id"] == built["artifact_id"]
    assert verified["verified"] == "sizes"
    assert json.loads(run_export("inspect", out / "a", "--json").stdout) == json.loads(
        (out / "a/manifest.json").read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["build"], "--config"),
        (["build", "--config", "c.yaml"], "--output"),
        (["build", "--config", "c", "--output", "o", "--workers", "0"], "workers"),
        (["bild"], "bild"),
        (["verify"], "ARTIFACT"),
        (["inspect", "a", "b"], "b"),
        (["build", "--confg", "c"], "confg"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, text):
    done = run_export(*arguments)
    assert done.returncode == 2
    assert text.lower() in done.stderr.lower()
    assert not done.stdout


def refused(config, out, code=1):
    """Runs a build that must fail with one line (or a line a problem), and leave nothing."""
    before = sorted(os.listdir(out))
    done = run_export("build", "--config", config, "--output", out / "artifact")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert sorted(os.listdir(out)) == before
    return [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_a_gate_that_fails_exits_with_3_and_names_table_and_number(release):
    config, out = release
    document = json.loads(config.read_text()) | {"parity": {"table_budgets": {"user": {"max_absolute_error": 1e-9}}}}
    config.write_text(json.dumps(document))
    (line,) = refused(config, out, code=3)
    assert line.startswith("table 'user': max_absolute_error is 0.000")
    assert "above its budget max_absolute_error: 1e-09" in line


def test_configuration_errors_are_lines_with_file_line_and_key(release):
    config, out = release
    config.write_text("large_embeddings:\n  tables:\n    - {name: a, num_embedings: 3}\nsnapshot: {uri: x}\n")
    lines = refused(config, out)
    assert f"{config}:3: large_embeddings.tables[0].num_embedings: unknown key; did you mean 'num_embeddings'?" in lines
    assert f"{config}:3: large_embeddings.tables[0].embedding_dim: Field required" in lines


def test_a_snapshot_that_is_not_there_or_not_readable_is_one_line(release, tmp_path):
    config, out = release
    cases = {
        tmp_path / "missing": "no such file or folder",
        tmp_path / "empty": "no complete snapshot",
        tmp_path / "text.pt": "is no snapshot of a known format|no complete",
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("not a snapshot")
    for snapshot, text in cases.items():
        (line,) = refused(write_config(config, snapshot), out)
        assert str(snapshot) in line
        assert any(part in line for part in text.split("|"))


def test_an_unreadable_folder_is_one_line(release, tmp_path):
    config, out = release
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    command = [sys.executable, "-m", "export", "build", "--config", write_config(config, closed), "--output", out / "a"]
    if os.geteuid() == 0:  # root reads every folder, unless it gives that right away
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv to give up the right to read every folder")
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {closed}: cannot be read: Permission denied"
    assert os.listdir(out) == []


@pytest.mark.parametrize(("size", "rows"), [("1m", 16384), ("12k", 16)], ids=["rows", "graph"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, size, rows):
    """A real file system: one that has no room for the rows (2 MiB), and one for no more than the rows."""
    tables = [{"name": "t", "num_embeddings": rows, "embedding_dim": 64, "data_type": "fp32"}]
    torch.save({"embedding_bags.t.weight": torch.zeros(rows, 64)}, tmp_path / "s.pt")
    config = write_config(tmp_path / "c.yaml", tmp_path / "s.pt", tables)
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", small], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        (line,) = refused(config, small)
        assert "the disk is full" in line
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_a_summary_that_cannot_be_written_is_said_and_the_artifact_stays(release):
    config, out = release
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "export", "build", "--config", config, "--output", out / "artifact"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: {out / 'artifact'} is complete, but its summary could not be written: No space left on device"
    )
    verify_artifact(out / "artifact")


def test_an_existing_target_is_refused_and_left_as_it_was(release):
    config, out = release
    (out / "artifact").mkdir()
    (out / "artifact" / "mine.txt").write_text("mine")
    (line,) = refused(config, out)
    assert "exists already" in line
    assert (out / "artifact" / "mine.txt").read_text() == "mine"


def test_verify_names_the_damaged_file_and_exits_with_1(artifact_copy):
    path = artifact_copy / "weights/tables.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = run_export("verify", artifact_copy)
    assert done.returncode == 1
    assert "weights/tables.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert run_export("inspect", artifact_copy).returncode == 0  # the manifest alone is intact
    assert run_export("verify", artifact_copy / "nothing").returncode == 1


@pytest.fixture(scope="module")
def large_release(tmp_path_factory):
    """64 MiB of rows: enough for a signal to arrive in every phase."""
    folder = tmp_path_factory.mktemp("large")
    tables = [{"name": "t", "num_embeddings": 262_144, "embedding_dim": 64, "data_type": "fp32"}]
    torch.save({"embedding_bags.t.weight": torch.zeros(262_144, 64)}, folder / "s.pt")
    return write_config(folder / "c.yaml", folder / "s.pt", tables)


def start(config, out):
    command = [sys.executable, "-m", "export", "build", "--config", str(config), "--output", str(out / "artifact")]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_build_cleans_up_and_says_so(large_release, tmp_path, number):
    with start(large_release, tmp_path) as build:
        for line in build.stderr:
            if "rows" in line:
                break
        build.send_signal(number)
        rest = build.stderr.read()
    assert build.returncode == 128 + number
    assert "nothing was published" in rest
    assert "Traceback" not in rest
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 0.3), (signal.SIGTERM, 0.6), (signal.SIGINT, 1.2)])
def test_a_signal_during_the_imports_is_one_line(large_release, tmp_path, number, seconds):
    with start(large_release, tmp_path) as build:
        time.sleep(seconds)
        build.send_signal(number)
        said = build.stderr.read()
    assert build.returncode == 128 + number
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"error: stopped by {number.name}")
    assert os.listdir(tmp_path) == []


def test_sigkill_at_any_moment_leaves_nothing_or_the_whole_artifact(large_release, tmp_path):
    seed = 20260
    print("seed", seed)
    rng = random.Random(seed)
    outcomes = []
    for attempt in range(3):
        out = tmp_path / str(attempt)
        out.mkdir()
        with start(large_release, out) as build:
            for _ in build.stderr:  # the first phase: imports are over
                break
            time.sleep(rng.uniform(0.0, 0.7))
            build.kill()
        visible = [name for name in os.listdir(out) if not name.startswith(".")]
        outcomes.append(bool(visible))
        if visible:
            assert visible == ["artifact"]
            verify_artifact(out / "artifact")
        else:
            done = run_export("build", "--config", large_release, "--output", out / "artifact")  # and it heals
            assert done.returncode == 0, done.stderr
            assert os.listdir(out) == ["artifact"]
        shutil.rmtree(out)
    assert not all(outcomes), "every build was over before it was killed: kill earlier"


def test_every_table_of_the_fixture_is_in_the_summary(built_artifact):
    text = run_export("inspect", built_artifact).stdout
    for table in TABLES:
        assert table["name"] in text
