"""Several processes that build together: over a real store, and with torchrun from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import make_rows, write_config, write_counts, write_dcp

from export import ranks as ranks_module
from export.config import Precision
from export.errors import GateError, PeerError, PublishError, RowsError, SnapshotChangedError, SnapshotError
from export.ranks import Ranks, joined_ranks, processes_of_this_host, rank_of_this_process
from export.snapshots.rows import StoredTensor, TableRows
from export.weight_file import PlannedTable, WeightPlan

TABLES = [
    {"name": "large", "num_embeddings": 1_200_000, "embedding_dim": 64, "data_type": "fp32"},
    {"name": "small", "num_embeddings": 5, "embedding_dim": 3, "data_type": "fp32"},
    {"name": "exact", "num_embeddings": 70_000, "embedding_dim": 64, "data_type": "fp32", "serving_precision": "fp32"},
]


@pytest.fixture
def three():
    store = torch.distributed.HashStore()
    return [Ranks(rank, 3, store) for rank in range(3)]


def test_without_torchrun_there_is_one_rank_that_waits_for_nobody(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # of something else
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert (rank_of_this_process(), processes_of_this_host()) == (0, 1)
    with joined_ranks() as ranks:
        assert (ranks.rank, ranks.world) == (0, 1)
        ranks.tell("anything", "to nobody")
        ranks.check()


def test_a_rank_waits_until_another_has_told(three):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(three[1].wait, "where", 0)
        time.sleep(0.2)
        assert not waiting.done()
        three[0].tell("where", "höre")
        assert waiting.result(10) == "höre"


@pytest.mark.parametrize("error", [GateError("table 'a': too far"), SnapshotError("gone"), PublishError("full")])
def test_what_makes_one_rank_fail_ends_those_that_wait_and_those_that_work(three, error):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(three[1].wait, "never", 0)
        three[2].fail(error)
        three[0].fail(PublishError("a later one does not count"))
        for ended in (lambda: waiting.result(10), three[0].check):
            with pytest.raises(PeerError) as caught:
                ended()
            assert str(caught.value) == f"rank 2: {error}"
            assert caught.value.exit_code == error.exit_code


@pytest.mark.parametrize(
    ("error", "refused"), [(RowsError("nan"), True), (SnapshotChangedError("new"), True), (PublishError("full"), False)]
)
def test_a_rank_that_refuses_the_rows_leaves_nothing_to_go_on_with(three, error, refused):
    assert not three[0].refused()
    three[2].fail(error)
    assert three[0].refused() == refused


def test_a_defect_of_one_rank_is_told_with_its_name(three):
    three[2].fail(ZeroDivisionError("division by zero"))
    with pytest.raises(PeerError, match=r"rank 2: failed: ZeroDivisionError\('division by zero'\)"):
        three[0].check()


def test_a_rank_that_falls_silent_ends_those_that_wait_for_it(three, monkeypatch):
    monkeypatch.setattr(ranks_module, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(ranks_module, "_SILENCE_SECONDS", 1.0)
    with ThreadPoolExecutor(1) as pool:
        with three[2].beating():
            waiting = pool.submit(three[0].wait, "never", 2)
            time.sleep(2)
            assert not waiting.done()
        with pytest.raises(PublishError, match="rank 2 has given no sign of life for 1 s"):
            waiting.result(10)


class _Rows(TableRows):
    """Rows of no file: a share is computed from sizes alone."""

    def _check_files(self):
        pass

    def _check_tiling(self):
        pass


@given(
    st.lists(st.tuples(st.integers(1, 10**7), st.integers(1, 300)), min_size=1, max_size=9),
    st.integers(1, 9),
)
def test_every_piece_has_one_rank_and_ranks_have_about_the_same(shapes, world):
    tables = [
        PlannedTable(
            str(number),
            _Rows(StoredTensor(str(number), shape, torch.float32), []),
            Precision.FP16,
            np.empty(0, np.int64),
        )
        for number, shape in enumerate(shapes)
    ]
    plan = WeightPlan(tables)
    shares = [plan.share(rank, world) for rank in range(world)]
    assert [piece.key for share in shares for piece in share] == [piece.key for piece in plan.pieces]
    sizes = [sum(piece.bytes for piece in share) for share in shares]
    largest = max(piece.bytes for piece in plan.pieces)
    assert sum(sizes) == plan.data_bytes
    assert all(abs(size - plan.data_bytes / world) <= largest for size in sizes)


# --- torchrun ------------------------------------------------------------------------------------------------------


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, "-m", "export", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=240
    )


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_dcp(folder / "snapshot", make_rows(TABLES, seed=5))
    return folder / "snapshot"


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one(snapshot, tmp_path):
    config = write_config(tmp_path / "release.yaml", snapshot, TABLES)
    from export import build_artifact

    one = build_artifact(config, tmp_path / "one", workers=1)
    done = torchrun(2, "build", "--config", config, "--output", tmp_path / "two", "--json", "--workers", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout)  # one object: rank 0 speaks for all
    assert two["artifact_id"] == one.manifest.artifact_id
    for name in ("weights/tables.safetensors", "graphs/lookup.torchscript.pt", "reports/accuracy.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one", "release.yaml", "two"]


@pytest.mark.slow
def test_what_one_process_chooses_and_draws_is_what_all_of_them_build(snapshot, tmp_path):
    from export import build_artifact

    rows = {table["name"]: table["num_embeddings"] for table in TABLES}
    counts = tmp_path / "counts.parquet"
    write_counts(counts, range(rows["small"]), range(1, rows["small"] + 1))
    tables = [dict(table) | {"serving_precision": "auto"} for table in TABLES]
    next(table for table in tables if table["name"] == "small")["access_counts"] = str(counts)
    serving = {"auto": {"max_relative_l2": 0.02}}
    config = write_config(tmp_path / "release.yaml", snapshot, tables, serving=serving)
    one = build_artifact(config, tmp_path / "one", workers=1)
    done = torchrun(2, "build", "--config", config, "--output", tmp_path / "two", "--json", "--workers", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["artifact_id"] == one.manifest.artifact_id
    for name in ("weights/tables.safetensors", "reports/accuracy.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_what_one_process_finds_ends_all_with_one_line_and_leaves_nothing(snapshot, tmp_path):
    rows = make_rows(TABLES, seed=5)
    rows["large"][-1, -1] = float("nan")  # in the share of the second process
    write_dcp(tmp_path / "bad", rows)
    config = write_config(tmp_path / "release.yaml", tmp_path / "bad", TABLES)
    done = torchrun(2, "build", "--config", config, "--output", tmp_path / "artifact")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    said = "table 'large': cannot be stored as fp16: row 1199999, column 63 is nan; in all: 1 NaN; mend the training"
    # The rank that found it says so; rank 0 passes it on, unless torchrun has stopped it before.
    assert errors[0] == f"error: {said}", done.stderr[-3000:]
    assert errors[1:] in ([], [f"error: rank 1: {said}"], ["error: stopped by SIGTERM; nothing was published"])
    assert done.stderr.count("Traceback") == done.stderr.count("ChildFailedError(") == 1  # torchrun's own
    assert sorted(os.listdir(tmp_path)) == ["bad", "release.yaml"]


@pytest.mark.slow
def test_a_configuration_that_one_process_cannot_read_is_said_by_it_and_ends_all(snapshot, tmp_path):
    write_config(tmp_path / "release-0.yaml", snapshot, TABLES)  # and no release-1.yaml
    program = (
        "import os, sys\nfrom export.cli import main\n"
        "sys.argv[3] = sys.argv[3].replace('RANK', os.environ['RANK'])\nmain()"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["build", "--config", tmp_path / "release-RANK.yaml", "--output", tmp_path / "out" / "artifact"]
    done = subprocess.run(
        [*command, tmp_path / "program.py", *arguments], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode != 0
    assert "release-1.yaml: cannot be read" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_build_of_two_processes_goes_on_with_three(snapshot, tmp_path):
    from export import build_artifact

    config = write_config(tmp_path / "release.yaml", snapshot, TABLES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "artifact"
    arguments = ["-m", "export", "build", "--config", config, "--output", output, "--workers", "1", "--resume"]
    with subprocess.Popen(
        [*command, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    ) as build:
        while build.poll() is None and len(list((tmp_path / "out").glob(".*/journal-*"))) < 2:
            time.sleep(0.001)
        os.killpg(build.pid, signal.SIGKILL)
        subprocess.run(
            ["pkill", "-9", "-f", str(output)], check=False
        )  # torchrun's children have sessions of their own
    assert not output.exists()
    done = torchrun(3, "build", "--config", config, "--output", output, "--json", "--workers", "1", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    one = build_artifact(config, tmp_path / "one", workers=1)
    assert json.loads(done.stdout)["artifact_id"] == one.manifest.artifact_id
    assert (output / "weights/tables.safetensors").read_bytes() == (
        tmp_path / "one/weights/tables.safetensors"
    ).read_bytes()
    assert os.listdir(tmp_path / "out") == ["artifact"]


@pytest.mark.slow
def test_what_torchrun_restarts_is_refused_with_advice(snapshot, tmp_path):
    config = write_config(tmp_path / "release.yaml", tmp_path / "absent", TABLES)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    done = subprocess.run(
        [*command, "-m", "export", "build", "--config", config, "--output", tmp_path / "artifact"],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode != 0
    assert "absent: no such file or folder" in done.stderr
    assert "torchrun has restarted the build; give it --max-restarts 0, and go on with --resume" in done.stderr
