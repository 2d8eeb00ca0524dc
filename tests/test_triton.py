"""Model repositories for Triton: whole, over one weight file, and as the server's backends would open them.

No server runs here. ONNX Runtime is the real one; of the Python backend, the test plays the server's side.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from support import make_rows, run_export, state_dict, write_config
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from export import build_artifact, triton
from export.errors import ExportError, PublishError
from export.triton import write_repository
from runtime_py import DigestMismatchError, verify_artifact
from runtime_py.golden import read_cases
from runtime_py.inputs import Request
from runtime_py.manifest import WEIGHTS

TABLES = [
    {"name": "a", "num_embeddings": 50, "embedding_dim": 16, "data_type": "fp32", "serving_precision": "int8"},
    {"name": "b", "num_embeddings": 30, "embedding_dim": 8, "data_type": "fp16", "pooling": "mean"},
    {"name": "c", "num_embeddings": 9, "embedding_dim": 4, "data_type": "fp32", "serving_precision": "int4"},
    {"name": "d", "num_embeddings": 40, "embedding_dim": 8, "data_type": "fp32", "serving_precision": "int2"},
    {"name": "e", "num_embeddings": 11, "embedding_dim": 3, "data_type": "fp32", "serving_precision": "fp32"},
]
WIDTH = sum(table["embedding_dim"] for table in TABLES)
ONNX, SCRIPT = "large_embeddings_onnx", "large_embeddings_torchscript"


def build(folder, *, weighted):
    rows = make_rows(TABLES, seed=4)
    torch.save(state_dict(rows), folder / "s.pt")
    tables = [table | {"weighted": weighted and table["name"] == "c"} for table in TABLES]
    config = write_config(folder / "r.yaml", folder / "s.pt", tables, serving={"graphs": ["torchscript", "onnx"]})
    return build_artifact(config, folder / "artifact", workers=1).artifact


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return build(tmp_path_factory.mktemp("plain"), weighted=False)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    return build(tmp_path_factory.mktemp("weighted"), weighted=True)


@pytest.fixture
def models(tmp_path):
    return tmp_path / "models"


def read_config(model):
    return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def signature(config):
    return [(entry.name, entry.data_type, list(entry.dims)) for entry in (*config.input, *config.output)]


# --- What is written -------------------------------------------------------------------------------------------------


def test_every_graph_is_a_model_that_says_what_goes_in_and_out(plain, weighted, models):
    int64, int32, fp32 = (
        ModelConfig().input.add(data_type=f"TYPE_{name}").data_type for name in ("INT64", "INT32", "FP32")
    )
    for artifact, name, weights in ((plain, "p", []), (weighted, "w", [("per_sample_weights", fp32, [-1])])):
        written = write_repository(artifact, models, name=name)
        assert [(model.name, model.version, model.graph, model.backend) for model in written] == [
            (f"{name}_torchscript", 1, "torchscript", "python"),
            (f"{name}_onnx", 1, "onnx", "onnxruntime"),
        ]
        for model in written:
            assert model.path == models / model.name / "1"
            config = read_config(models / model.name)
            assert (config.name, config.backend, config.max_batch_size) == (model.name, model.backend, 0)
            assert "max_batch_size: 0\n" in (models / model.name / "config.pbtxt").read_text()
            assert signature(config) == [
                ("values", int64, [-1]),
                ("lengths", int32, [-1]),
                *weights,
                ("pooled", fp32, [-1, WIDTH]),
            ]
            assert [group.kind for group in config.instance_group] == [ModelInstanceGroup.KIND_CPU]
    assert sorted(os.listdir(models)) == ["p_onnx", "p_torchscript", "w_onnx", "w_torchscript"]
    assert sorted(os.listdir(models.parent)) == ["models"]


@pytest.mark.parametrize("graph", ["onnx", "torchscript"])
def test_the_file_parses_to_the_message_that_was_meant(weighted, models, graph):
    [model] = write_repository(weighted, models, graphs=[graph])
    manifest = verify_artifact(weighted)
    assert read_config(models / model.name) == triton._make_config(manifest, model.name, graph)


def test_the_repository_is_other_names_of_the_artifacts_files_and_lives_without_them(plain, tmp_path, models):
    artifact = Path(shutil.copytree(plain, tmp_path / "artifact"))
    inode = (artifact / WEIGHTS).stat().st_ino
    write_repository(artifact, models)
    files = [path for path in models.rglob("*") if path.name == "tables.safetensors"]
    assert len(files) == 2
    assert {path.stat().st_ino for path in files} == {inode}
    assert not any(path.is_symlink() for path in models.rglob("*"))
    shutil.rmtree(artifact)
    for folder in (models / ONNX / "1", models / SCRIPT / "1" / "artifact"):
        assert verify_artifact(folder).artifact_id == verify_artifact(plain).artifact_id
    assert sorted(os.listdir(models / SCRIPT / "1")) == ["artifact", "model.py"]


# --- What it answers -------------------------------------------------------------------------------------------------


def summation_bound(artifact, case):
    """No less than the bound of FORMAT.md, by column: with the case's longest bag, largest weight and largest term."""
    manifest = verify_artifact(artifact)
    longest = int(case.request.lengths.max()) if len(case.request.lengths) else 0
    weights = case.request.per_sample_weights
    largest = 1.0 if weights is None or not len(weights) else max(1.0, float(weights.abs().max()))
    rows = make_rows(TABLES, seed=4)
    k = (2 * (longest + 1) + 2) * 2.0**-24
    bounds = []
    for feature in manifest.features:
        values = rows[feature.table].double()
        terms = 3 * values.abs().max()  # |code * scale| + |bias|, both within max - min of the row
        bounds += [float(2 * k / (1 - k) * longest * largest * terms)] * values.shape[1]
    return np.array(bounds)


@pytest.mark.parametrize("name", ["plain", "weighted"])
def test_the_onnx_model_gives_the_golden_answers_in_onnx_runtime(name, request, models):
    artifact = request.getfixturevalue(name)
    [model] = write_repository(artifact, models, graphs=["onnx"])
    session = onnxruntime.InferenceSession(model.path / "model.onnx")
    cases = read_cases(artifact, verify_artifact(artifact, "sizes"))
    assert len(cases) == 7
    for case in cases.values():
        inputs = {key: part.numpy() for key, part in case.request._asdict().items() if part is not None}
        assert sorted(inputs) == sorted(entry.name for entry in read_config(models / model.name).input)
        [pooled] = session.run(["pooled"], inputs)
        assert pooled.shape == case.pooled.shape
        assert (np.abs(pooled - case.pooled.numpy()) <= summation_bound(artifact, case)).all()


class FakeServer:
    """The server's side of the Python backend: its module, how it imports model.py, and its requests."""

    class Tensor:
        def __init__(self, name, array):
            self.name, self.array = name, array

        def as_numpy(self):
            return self.array

    class InferenceResponse:
        def __init__(self, output_tensors=(), error=None):
            self.output_tensors, self.error = output_tensors, error

    class TritonError:
        INVALID_ARG, INTERNAL = "INVALID_ARG", "INTERNAL"

        def __init__(self, message, code=None):
            self.message, self.code = message, code

    def __init__(self, monkeypatch, model, version="1", parameters=()):
        backend = types.ModuleType("triton_python_backend_utils")
        backend.Tensor, backend.InferenceResponse = self.Tensor, self.InferenceResponse
        backend.TritonError = self.TritonError
        backend.get_input_tensor_by_name = lambda request, name: request.get(name)
        monkeypatch.setitem(sys.modules, backend.__name__, backend)
        for name in (version, f"{version}.model"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        monkeypatch.syspath_prepend(model)  # where the stub finds the package "1" and in it "model"
        module = importlib.import_module(f"{version}.model")
        monkeypatch.delitem(sys.modules, version, raising=False)
        monkeypatch.delitem(sys.modules, f"{version}.model")
        config = read_config(model)
        for key, value in dict(parameters).items():
            config.parameters[key].string_value = value
        self.names = [entry.name for entry in config.input]
        document = {
            "input": [{"name": name} for name in self.names],
            "parameters": {key: {"string_value": entry.string_value} for key, entry in config.parameters.items()},
        }
        self.model = module.TritonPythonModel()
        self.model.initialize({"model_config": json.dumps(document)})

    def ask(self, *requests):
        return self.model.execute(
            [
                {name: self.Tensor(name, part.numpy()) for name, part in request._asdict().items() if part is not None}
                for request in requests
            ]
        )


@pytest.mark.parametrize("name", ["plain", "weighted"])
def test_the_python_model_gives_the_golden_answers_bit_for_bit(name, request, models, monkeypatch):
    artifact = request.getfixturevalue(name)
    write_repository(artifact, models, graphs=["torchscript"])
    server = FakeServer(monkeypatch, models / SCRIPT, parameters={"invalid_ids": "zero", "verify": "sizes"})
    cases = read_cases(artifact, verify_artifact(artifact, "sizes"))
    responses = server.ask(*(case.request for case in cases.values()))
    assert len(responses) == len(cases) == 7
    for response, case in zip(responses, cases.values(), strict=True):
        assert response.error is None
        [pooled] = response.output_tensors
        assert pooled.name == "pooled"
        assert pooled.array.dtype == np.float32
        np.testing.assert_array_equal(pooled.array.view(np.int32), case.pooled.numpy().view(np.int32))


def test_a_bad_request_is_refused_by_name_and_spoils_no_other(plain, models, monkeypatch):
    write_repository(plain, models, graphs=["torchscript"])
    server = FakeServer(monkeypatch, models / SCRIPT)
    cases = read_cases(plain, verify_artifact(plain, "sizes"))
    bad, good = server.ask(cases["05 ids out of range"].request, cases["04 duplicate ids"].request)
    assert bad.error.code == "INVALID_ARG"
    assert bad.error.message.startswith("feature 'a', bag ")
    assert "is outside [0, 49]" in bad.error.message
    assert good.error is None
    assert torch.equal(torch.from_numpy(good.output_tensors[0].array), cases["04 duplicate ids"].pooled)


def test_a_surgery_that_raises_fails_the_one_request_alone(tmp_path, models, monkeypatch):
    tables = [{"name": "user", "num_embeddings": 9, "embedding_dim": 8, "data_type": "fp32"}]
    torch.save(state_dict(make_rows(tables)), tmp_path / "s.pt")
    config = write_config(tmp_path / "r.yaml", tmp_path / "s.pt", tables, surgery={"module": "surgeries:AtMost"})
    write_repository(build_artifact(config, tmp_path / "artifact", workers=1).artifact, models)
    server = FakeServer(monkeypatch, models / SCRIPT)
    requests = [
        Request(torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.int32), None) for n in (1, 9999, 2)
    ]
    first, bad, last = server.ask(*requests)
    assert (first.error, last.error) == (None, None)
    assert last.output_tensors[0].array.shape == (2, 8)
    assert bad.error.code == "INTERNAL"
    assert "at most 5000 examples" in bad.error.message
    assert "\n" not in bad.error.message


# --- Again, and refusals ---------------------------------------------------------------------------------------------


def test_a_newer_artifact_is_the_next_version_and_the_file_of_the_user_stays(plain, models):
    write_repository(plain, models)
    path = models / ONNX / "config.pbtxt"
    edited = path.read_text().replace("count: 1", "count: 4") + "dynamic_batching { }\n"
    path.write_text(edited)
    before = tree(models / ONNX / "1")
    (models / ONNX / "7").mkdir()
    (models / ONNX / "notes").mkdir()
    [model] = write_repository(plain, models, graphs=["onnx"])
    assert (model.version, model.path) == (8, models / ONNX / "8")
    assert tree(model.path) == before
    assert path.read_text() == edited
    assert sorted(os.listdir(models.parent)) == ["models"]


def refuse(artifact, models, text, error=ExportError, **options):
    """A refusal: one line, and nothing changes."""
    before = tree(models.parent)
    with pytest.raises(error, match=text) as caught:
        write_repository(artifact, models, **options)
    assert "\n" not in str(caught.value)
    assert tree(models.parent) == before


def test_a_model_of_that_name_with_another_interface_is_refused(plain, weighted, models):
    write_repository(plain, models)
    refuse(weighted, models, rf"{SCRIPT}/config.pbtxt: a version of this model must have input values TYPE_INT64 \[-1\], "
           r"lengths TYPE_INT32 \[-1\], per_sample_weights TYPE_FP32 \[-1\], the file says values ")  # fmt: skip
    path = models / SCRIPT / "config.pbtxt"
    for old, new, what in (
        (f"dims: {WIDTH}", "dims: 7", rf"output pooled TYPE_FP32 \[-1, {WIDTH}\], the file says pooled"),
        ("max_batch_size: 0", "max_batch_size: 8", "max_batch_size 0, the file says 8"),
        ('"python"', '"pytorch"', "backend 'python', the file says 'pytorch'"),
        ('string_value: "torchscript"', 'string_value: "aot_inductor"', "graph 'torchscript', the file says 'aot_ind"),
    ):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        refuse(plain, models, what, graphs=["torchscript"])
        path.write_text(text)


def test_features_in_another_order_are_no_version_of_a_model_whose_clients_know_only_places(tmp_path, models):
    """The same inputs, and an output as wide: nothing in config.pbtxt tells them apart."""
    same = [{"name": name, "num_embeddings": 9, "embedding_dim": 8, "data_type": "fp32"} for name in ("a", "b")]
    torch.save(state_dict(make_rows(same)), tmp_path / "s.pt")
    other = {
        "swapped": (same[::-1], r"features are b, a; a, b as served"),
        "pooled otherwise": ([same[0] | {"pooling": "mean"}, same[1]], "feature 'a' pools by mean, by sum as served"),
    }
    for name, tables in (("served", same), *((name, tables) for name, (tables, _) in other.items())):
        build_artifact(write_config(tmp_path / "r.yaml", tmp_path / "s.pt", tables), tmp_path / name, workers=1)
    write_repository(tmp_path / "served", models)
    (models / SCRIPT / "7").mkdir()
    for name, (_, problem) in other.items():
        refuse(tmp_path / name, models, rf"{SCRIPT}/1/artifact: clients of this version would be failed by the artifact: "
               rf"{problem}; .*choose another --name")  # fmt: skip
    [model] = write_repository(tmp_path / "served", models)
    assert model.version == 8
    (model.path / "artifact/manifest.json").unlink()
    (model.path / "artifact/manifest.json").write_text("{}")
    refuse(
        tmp_path / "served", models, rf"{SCRIPT}/8/artifact/manifest.json: .*; choose another --name, or mend the model"
    )
    for version in ("1", "8"):
        shutil.rmtree(models / SCRIPT / version)
    refuse(
        tmp_path / "served", models, rf"{SCRIPT}: no version of it holds an artifact to compare this one with; choose"
    )


def test_a_model_that_cannot_be_read_is_refused(plain, models):
    (models / ONNX).mkdir(parents=True)
    refuse(plain, models, rf"{ONNX}/config.pbtxt: cannot be read: No such file or directory; choose another --name")
    (models / ONNX / "config.pbtxt").write_text("name: {{{")
    refuse(plain, models, rf"{ONNX}/config.pbtxt: cannot be read: 1:7 : ")


def test_what_cannot_be_a_repository_of_this_artifact_is_refused(plain, artifact_copy, models):
    for name in ("", "a/b", "../x", ".hidden", "a b"):
        refuse(plain, models, r"--name: .*: give letters, digits and _ \. - only", name=name)
    refuse(plain, models, "--graph: the artifact has no graph 'aot_inductor'; it has: torchscript, onnx; build it with",
           graphs=["onnx", "aot_inductor"])  # fmt: skip
    refuse(plain, plain / "models", "--repository: .*/models is inside the artifact .*, which never changes")
    models.write_text("a file")
    refuse(plain, models, "models", PublishError)
    data = bytearray((artifact_copy / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (artifact_copy / WEIGHTS).write_bytes(data)
    refuse(artifact_copy, models.with_name("others"), "are not those that were published", DigestMismatchError)


def test_a_model_that_onnx_runtime_cannot_open_or_that_has_another_signature_is_not_published(
    plain, models, monkeypatch
):
    monkeypatch.setattr(triton, "_take_files", lambda artifact, manifest, folder, copy: None)
    monkeypatch.setattr(triton, "verify_artifact", lambda *_: verify_artifact(plain))
    refuse(plain, models, "ONNX Runtime cannot open the model: .*model.onnx", graphs=["onnx"])
    monkeypatch.undo()
    monkeypatch.setattr(triton, "_TYPES", {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"})
    refuse(plain, models, r"model.onnx has input values TYPE_INT64 \[-1\], lengths TYPE_INVALID \[-1\], the manifest says",
           graphs=["onnx"])  # fmt: skip
    assert not models.exists()


@pytest.fixture
def other_file_system(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_another_file_system_takes_a_copy_when_told_so(plain, other_file_system):
    models = other_file_system / "models"
    refuse(plain, models, r"manifest.json cannot be hard-linked there: Invalid cross-device link; name a folder on the "
           r"artifact's file system, or give --copy, which takes [\d,]+ bytes", PublishError)  # fmt: skip
    written = write_repository(plain, models, graphs=["onnx"], copy=True)
    assert (written[0].path / WEIGHTS).stat().st_dev != (plain / WEIGHTS).stat().st_dev
    verify_artifact(written[0].path)
    assert os.listdir(other_file_system) == ["models"]


def test_a_repository_that_is_a_mount_point_is_refused(plain, other_file_system):
    for copy in (True, False):
        refuse(plain, other_file_system, r"^--repository: .*/other is a mount point, and a model is written beside the "
               "repository before it appears there whole; name a folder below the mount point", PublishError,
               copy=copy)  # fmt: skip
    assert os.listdir(other_file_system) == []


# --- The command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_has_written(plain, models):
    done = run_export("triton", plain, "--repository", models, "--name", "emb")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{models}/emb_torchscript/1: torchscript, Triton's python backend",
        f"{models}/emb_onnx/1: onnx, Triton's onnxruntime backend",
    ]
    done = run_export("triton", plain, "--repository", models, "--name", "emb", "--graph", "onnx", "--json")
    assert json.loads(done.stdout) == {
        "repository": str(models),
        "models": [
            {
                "name": "emb_onnx",
                "version": 1,  # as before: it is this artifact
                "graph": "onnx",
                "backend": "onnxruntime",
                "path": f"{models}/emb_onnx/1",
            }
        ],
    }
    done = run_export("triton", plain, "--repository", models, "--graph", "tensorrt")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --graph: the artifact has no graph 'tensorrt'; it has: torchscript, onnx; ")
