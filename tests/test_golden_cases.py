"""The golden cases of an artifact: what they hold, that a loader replays them, and that another answer is noticed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import FEATURES, TABLES, run_export

from export.errors import GateError
from export.golden import replay_cases
from runtime_py import load_artifact, verify_artifact
from runtime_py.digests import sha256
from runtime_py.errors import ArtifactError
from runtime_py.golden import GOLDEN

CASES = [
    "00 no bags",
    "01 empty bags",
    "02 one bag",
    "03 first and last row",
    "04 duplicate ids",
    "05 ids out of range",
    "06 random 0",
]


def test_the_cases_are_the_adversarial_batches_and_a_random_one(built_artifact):
    tensors = load_file(built_artifact / GOLDEN)
    assert sorted({name.partition("/")[0] for name in tensors}) == CASES
    width = sum(output.dim for output in verify_artifact(built_artifact).outputs)
    for case in CASES:
        values, lengths, pooled = (tensors[f"{case}/{part}"] for part in ("values", "lengths", "pooled"))
        assert (values.dtype, lengths.dtype, pooled.dtype) == (torch.int64, torch.int32, torch.float32)
        assert pooled.shape == (len(lengths) // len(FEATURES), width)
        assert int(lengths.sum()) == len(values)
    assert tensors["05 ids out of range/values"].min() == -(2**63)


def test_the_loader_replays_them(built_artifact):
    done = run_export("verify", built_artifact, "--replay")
    assert done.returncode == 0, done.stderr
    assert ", 7 golden cases bit for bit, in " in done.stdout
    assert json.loads(run_export("verify", built_artifact, "--replay", "--json").stdout)["replayed"] == 7
    assert json.loads(run_export("verify", built_artifact, "--json").stdout)["replayed"] == 0


def test_weights_are_kept_where_the_artifact_takes_them(rebuild):
    rows = {"t": torch.randn(20, 4)}
    table = {"name": "t", "num_embeddings": 20, "embedding_dim": 4, "data_type": "fp32", "weighted": True}
    artifact = rebuild([table], rows, serving={"precision": "fp32"})
    tensors = load_file(artifact / GOLDEN)
    assert tensors["06 random 0/per_sample_weights"].shape == tensors["06 random 0/values"].shape
    assert replay_cases(artifact, verify_artifact(artifact)) == 7


def test_an_answer_that_differs_in_one_bit_is_named(artifact_copy):
    manifest = load_artifact(artifact_copy).manifest
    tensors = load_file(artifact_copy / GOLDEN)
    tensors["04 duplicate ids/pooled"].view(torch.int32)[1, 11] ^= 1
    save_file(tensors, artifact_copy / GOLDEN)
    with pytest.raises(ArtifactError, match=r"golden/cases\.safetensors"):
        replay_cases(artifact_copy, manifest)  # its digest says so first
    digest = sha256((artifact_copy / GOLDEN).read_bytes())
    files = [replace(file, digest=digest) if file.path == GOLDEN else file for file in manifest.files]
    manifest = replace(manifest, files=files)
    (artifact_copy / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(GateError, match=r"golden case '04 duplicate ids': output 'last_item', bag 1: column 11 is "):
        replay_cases(artifact_copy, manifest)


def test_the_bytes_are_the_same_for_the_same_rows(built_artifact, dcp_snapshot, tmp_path):
    from support import write_config

    from export import build_artifact

    again = build_artifact(write_config(tmp_path / "r.yaml", dcp_snapshot, TABLES), tmp_path / "a", workers=1)
    assert (again.artifact / GOLDEN).read_bytes() == (built_artifact / GOLDEN).read_bytes()
