"""One model, written as every kind of snapshot there is, gives one artifact, to the byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchsnapshot
from safetensors.torch import save_file
from support import make_rows, state_dict, write_config, write_dcp

from export import build_artifact
from export.config import SnapshotConfig
from export.snapshots import open_snapshot

# Rows and columns that two processes share unevenly, and one row, of which one process has nothing.
TABLES = [
    {"name": "by_row", "num_embeddings": 301, "embedding_dim": 8, "data_type": "fp32"},
    {"name": "by_column", "num_embeddings": 50, "embedding_dim": 64, "data_type": "fp16"},
    {"name": "by_table", "num_embeddings": 40, "embedding_dim": 15, "data_type": "fp32"},
    {"name": "everywhere", "num_embeddings": 1, "embedding_dim": 4, "data_type": "fp32"},
    {"name": "by_host", "num_embeddings": 23, "embedding_dim": 8, "data_type": "fp32"},
    {"name": "grid", "num_embeddings": 33, "embedding_dim": 256, "data_type": "fp32"},
]
WEIGHTS = "weights/tables.safetensors"


def write_state_dict(folder, rows):
    path = folder / "model.pt"
    torch.save(state_dict(rows), path)
    return path


def write_nested_state_dict(folder, rows):
    path = folder / "model.pt"
    bags = {name: {"weight": tensor} for name, tensor in rows.items()}
    torch.save({"model": {"ebc": {"embedding_bags": bags}}, "step": 3}, path)
    return path


def write_safetensors(folder, rows):
    path = folder / "model.safetensors"
    save_file(state_dict(rows), path)
    return path


def write_indexed_safetensors(folder, rows):
    state = state_dict(rows)
    files = {name: f"model-{number % 2 + 1:05}-of-00002.safetensors" for number, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in state.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def write_steps(folder, rows):
    write_dcp(folder / "2", make_rows(TABLES, seed=9))
    write_dcp(folder / "10", rows)
    return folder


def take(folder, rows):
    torchsnapshot.Snapshot.take(str(folder), {"model": torchsnapshot.StateDict(**state_dict(rows))})
    return folder


def write_torchsnapshot(folder, rows):
    with torchsnapshot.knobs.override_is_batching_disabled(True):
        take(folder, rows)
    assert not (folder / "batched").exists()
    return folder


def write_torchsnapshot_slabs(folder, rows):
    take(folder, rows)
    assert (folder / "batched").is_dir()
    return folder


def write_torchsnapshot_chunks(folder, rows):
    with torchsnapshot.knobs.override_max_chunk_size_bytes(4096):
        return take(folder, rows)


WRITERS = [
    write_dcp,
    write_indexed_safetensors,
    write_nested_state_dict,
    write_safetensors,
    write_state_dict,
    write_steps,
    write_torchsnapshot,
    write_torchsnapshot_chunks,
    write_torchsnapshot_slabs,
]

# What `write_sharded.py` writes, and how many parts it should have of each of `TABLES`, in their order.
SHARDED = {
    "dcp_torchrec": [2, 2, 1, 1, 2, 4],
    "dcp_dtensor_shard_0": [2, 2, 2, 1, 2, 2],
    "dcp_dtensor_shard_1": [2, 2, 2, 2, 2, 2],
    "dcp_dtensor_replicate": [1, 1, 1, 1, 1, 1],
    "safetensors_torchrec": [2, 2, 1, 1, 2, 1],
    "safetensors_dtensor_shard_0": [2, 2, 2, 1, 2, 2],
    "safetensors_dtensor_shard_1": [2, 2, 2, 2, 2, 2],
    "safetensors_dtensor_replicate": [1, 1, 1, 1, 1, 1],
    "safetensors_mapped": [2, 2, 2, 1, 2, 2],
    "safetensors_consolidated": [1, 1, 1, 1, 1, 1],
    "torchsnapshot_torchrec": [2, 2, 1, 1, 2, 4],
    "torchsnapshot_split": [4, 2, 1, 1, 2, 10],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Of OpenMP: two of them, on two cores that others use too, take five times as long for tables this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows():
    return make_rows(TABLES, seed=21)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, rows):
    """The artifact of the tables as they are."""
    folder = tmp_path_factory.mktemp("reference")
    return build(folder, write_state_dict(folder, rows))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, rows):
    """The folder of the snapshots `SHARDED`, written by two processes of one torchrun."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.save(rows, folder / "rows.pt")
    script = Path(__file__).parent / "write_sharded.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, script, folder / "rows.pt", folder],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def build(folder, snapshot):
    return build_artifact(write_config(folder / "release.yaml", snapshot, TABLES), folder / "artifact", workers=2)


def assert_same(result, reference):
    assert result.manifest.artifact_id == reference.manifest.artifact_id
    assert (result.artifact / WEIGHTS).read_bytes() == (reference.artifact / WEIGHTS).read_bytes()


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_every_source_of_one_process_gives_the_same_artifact_id_and_bytes(tmp_path, rows, reference, write):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    result = build(tmp_path, write(snapshot, rows))
    assert_same(result, reference)
    assert result.manifest.provenance.snapshots[0].step == (10 if write is write_steps else None)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_every_source_of_two_processes_gives_the_same_artifact_id_and_bytes(tmp_path, two_processes, reference, name):
    index = open_snapshot(SnapshotConfig(uri=str(two_processes / name)))._index
    stored = {stored.split(".")[-2]: stored for stored in index.tensors if "embedding_bags." in stored}
    assert [len(index.locate(stored[table["name"]])) for table in TABLES] == SHARDED[name]
    assert_same(build(tmp_path, two_processes / name), reference)


def test_other_rows_give_another_artifact(tmp_path, rows, reference):
    snapshot = write_state_dict(tmp_path, {**rows, "grid": rows["grid"] + 1})
    assert build(tmp_path, snapshot).manifest.artifact_id != reference.manifest.artifact_id
