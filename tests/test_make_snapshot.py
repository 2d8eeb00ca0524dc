"""The demo's training job: it learns, saves what a trainer saves, and the builder takes it."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import write_config
from torch.distributed.checkpoint import FileSystemReader

from export import build_artifact

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_snapshot.py"
SGD = {"sgd": {"lr": 0.1}, "learning_rate": {"constant": 0.1}}
TABLES = [
    {
        "name": "user",
        "num_embeddings": 500,
        "embedding_dim": 8,
        "data_type": "fp32",
        "optimizer": {"adagrad": {"lr": 0.1, "eps": 1e-7}},
    },
    {"name": "item", "num_embeddings": 200, "embedding_dim": 4, "data_type": "fp16", "optimizer": SGD},
]


def make(config, output, *more):
    command = [
        sys.executable,
        SCRIPT,
        "--config",
        config,
        "--output",
        output,
        "--steps",
        "60",
        "--save-every",
        "40",
        *more,
    ]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_trained_snapshot_has_optimizer_state_and_steps_and_builds(tmp_path):
    config = write_config(tmp_path / "c.yaml", "snapshots", TABLES)
    done = make(config, tmp_path / "snapshots")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "snapshots" / step) for step in ("40", "60")]
    before = float(done.stderr.split("before training: ")[1].split()[0])
    after = float(done.stderr.split("held-out log loss ")[-1].split(",")[0])
    assert after < before

    names = FileSystemReader(tmp_path / "snapshots" / "60").read_metadata().state_dict_metadata
    assert "model.embeddings.ebc.embedding_bags.user.weight" in names
    assert "step" in names
    assert any(name.startswith("optimizer.") and "embedding_bags.user" in name for name in names)

    built = build_artifact(config, tmp_path / "artifact", workers=1)
    assert built.manifest.provenance.snapshots[0].step == 60

    again = make(config, tmp_path / "snapshots")
    assert again.returncode == 1
    assert "already there" in again.stderr
