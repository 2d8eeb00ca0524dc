"""Snapshots that torchrec's DistributedModelParallel wrote on two processes give the artifact of the whole tables."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import make_rows, state_dict, write_config

from export import build_artifact
from export.snapshots.dcp import DcpIndex
from export.snapshots.torchsnapshot import TorchsnapshotIndex

TABLES = [
    {"name": "by_row", "num_embeddings": 301, "embedding_dim": 8, "data_type": "fp32"},
    {"name": "by_column", "num_embeddings": 50, "embedding_dim": 64, "data_type": "fp32"},
    {"name": "by_table", "num_embeddings": 40, "embedding_dim": 16, "data_type": "fp32"},
    {"name": "everywhere", "num_embeddings": 7, "embedding_dim": 4, "data_type": "fp32"},
]


@pytest.fixture(scope="module")
def rows():
    return make_rows(TABLES, seed=21)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory, rows):
    """The folder with `dcp`, `torchsnapshot` and `split` (shards of at most 4 KiB), written by two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.save(rows, folder / "rows.pt")
    script = Path(__file__).parent / "write_sharded.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, script, folder / "rows.pt", folder], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dcp", "torchsnapshot", "split"])
def test_a_sharded_snapshot_gives_the_artifact_of_the_whole_tables(snapshots, rows, tmp_path, name):
    torch.save(state_dict(rows), tmp_path / "whole.pt")
    whole = build_artifact(write_config(tmp_path / "w.yaml", tmp_path / "whole.pt", TABLES), tmp_path / "w", workers=1)
    config = write_config(tmp_path / "s.yaml", snapshots / name, TABLES)
    sharded = build_artifact(config, tmp_path / "s", workers=2)
    assert sharded.manifest.artifact_id == whole.manifest.artifact_id
    weights = "weights/tables.safetensors"
    assert (sharded.artifact / weights).read_bytes() == (whole.artifact / weights).read_bytes()


@pytest.mark.slow
def test_the_snapshots_are_sharded_as_meant(snapshots):
    for index in (DcpIndex(snapshots / "dcp"), TorchsnapshotIndex(snapshots / "torchsnapshot")):
        blobs = {
            table["name"]: index.locate(next(name for name in index.tensors if f".{table['name']}." in name))
            for table in TABLES
        }
        assert len({blob.row for blob in blobs["by_row"]}) == 2
        assert len({blob.column for blob in blobs["by_column"]}) == 2
        assert len(blobs["by_table"]) == 1
        assert len(blobs["everywhere"]) == 1
    split = TorchsnapshotIndex(snapshots / "split")
    name = next(name for name in split.tensors if ".by_row." in name)
    assert len(split.locate(name)) > 2
