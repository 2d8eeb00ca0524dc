"""A module of the release inside every graph: right, mapped, in the manifest, and refused by name where it cannot be."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import surgeries
import torch
import torchsnapshot
from device_support import load_on_cpu
from safetensors.torch import load_file, save_file
from support import (
    SPLICED,
    TABLES,
    make_head,
    make_rows,
    run_export,
    state_dict,
    surgery_state,
    write_config,
)
from surgeries import Narrow
from torch.distributed import checkpoint

from export import build_artifact
from export.accuracy import ProbeRows
from export.config import Precision, SurgeryConfig
from export.config_file import load_config
from export.errors import GateError, SurgeryError
from export.golden import replay_cases
from export.parity import check_parity, probe_ids
from export.plan import Clock, plan_release, preview_release
from export.progress import NoProgress
from export.ranks import joined_ranks
from export.splice import OpenedSurgery, TensorSplice
from export.surgery import NormalizeAndProject
from export.surgery_code import check_operators, digest_code
from export.surgery_parity import check_answer, surgery_bound
from export.surgery_writes import check_writes
from runtime_py import (
    DigestMismatchError,
    GraphError,
    Jagged,
    ManifestError,
    UnsupportedError,
    load_artifact,
    verify_artifact,
)
from runtime_py.golden import read_cases
from runtime_py.manifest import Output, compute_artifact_id
from runtime_py.manifest_reader import read_manifest

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the graph with")
PROJECT = {
    "module": "export.surgery:NormalizeAndProject",
    "kwargs": {"keys": ["user", "last_item"], "in_features": 11, "out_features": 6, "keep": ["tag"]},
}


def projection(seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "project.weight": torch.randn(6, 11, generator=generator),
        "project.bias": torch.randn(6, generator=generator),
    }


def under_cut_point(state: dict[str, torch.Tensor], prefix: str = "model.embeddings") -> dict[str, torch.Tensor]:
    return {f"{prefix}.surgery_cut_point.{name}": tensor for name, tensor in state.items()}


def write_release(folder: Path, surgery: dict[str, Any], state: dict[str, torch.Tensor], **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state_dict(make_rows(TABLES)) | state, folder / "s.pt")
    return write_config(folder / "release.yaml", folder / "s.pt", TABLES, surgery=surgery, **sections)


def refusal(folder: Path, surgery: dict[str, Any], state: dict[str, torch.Tensor] | None = None, *graphs: str) -> str:
    """What planning a build says, before a row is read."""
    config = write_release(folder, surgery, state or {}, serving={"graphs": ["torchscript", *graphs]})
    with pytest.raises(SurgeryError) as caught, joined_ranks() as ranks:
        plan_release(load_config(config), ranks, 1, 1, Clock(NoProgress()))
    message = str(caught.value)
    assert message.startswith(f"surgery '{surgery['module']}': ")
    assert "\n" not in message
    return message.removeprefix(f"surgery '{surgery['module']}': ")


def planned(config: Path) -> dict[str, torch.Tensor]:
    """The parameters that a build would take from the snapshot, by name."""
    with joined_ranks() as ranks:
        surgery = plan_release(load_config(config), ranks, 1, 1, Clock(NoProgress())).surgery
    assert surgery is not None
    return dict(surgery.tensors)


def opened(module: torch.nn.Module, features: dict[str, int], columns: int) -> OpenedSurgery:
    """A module as a build has it, without a snapshot."""
    outputs = [Output("output", columns)]
    splice = TensorSplice(module.eval().requires_grad_(False), features, ["output"])
    return OpenedSurgery(SurgeryConfig(module="x:Y"), splice, outputs, dict(module.named_parameters()))


# --- From the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped example, built from a DCP snapshot by `python -m export build`."""
    folder = tmp_path_factory.mktemp("projected")
    checkpoint.save(
        {**state_dict(make_rows(TABLES)), **under_cut_point(projection()), "step": 7},
        storage_writer=checkpoint.FileSystemWriter(folder / "s"),
        no_dist=True,
    )
    config = write_config(folder / "release.yaml", folder / "s", TABLES, surgery=PROJECT)
    done = run_export("build", "--config", config, "--output", folder / "artifact", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["artifact_id"] == read_manifest(folder / "artifact").artifact_id
    return folder / "artifact"


def test_the_example_gives_the_projection_of_what_the_tables_pool(projected: Path) -> None:
    """Against the stored rows and plain numpy in float64."""
    artifact = load_artifact(projected)
    batch = {"user": [[3, 5], [], [299]], "item": [[0], [1], []], "last_item": [[40], [2, 2], []]}
    answer = artifact(batch | {"tag": [[0, 6], [1], []], "age": [[0], [], [0, 0]]})
    assert answer.keys() == ["projected", "tag"]
    assert answer.values.shape == (3, 22)
    rows = {name: table.double().numpy() for name, table in load_file(projected / "weights/tables.safetensors").items()}
    user = np.stack([rows["user"][bag].sum(0) for bag in batch["user"]])
    item = np.stack([rows["item"][bag].sum(0) for bag in batch["last_item"]])
    parts = [part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in (user, item)]
    state = {name: tensor.double().numpy() for name, tensor in projection().items()}
    expected = np.concatenate(parts, axis=1) @ state["project.weight"].T + state["project.bias"]
    assert np.abs(answer["projected"].numpy() - expected).max() < 2e-6
    tag = np.stack([rows["tag"][[0, 6]].mean(0), rows["tag"][1], np.zeros(16)])
    assert np.abs(answer["tag"].numpy() - tag).max() < 1e-6


def test_the_committed_example_builds_from_a_snapshot_that_has_its_parameters(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "artifacts/examples/surgery.yaml").read_text()
    (tmp_path / "surgery.yaml").write_text(text.replace("../../snapshots/retrieval", "retrieval"))
    tables = [
        {"name": "user_id", "num_embeddings": 2000, "embedding_dim": 32, "data_type": "fp32"},
        {"name": "item_id", "num_embeddings": 500, "embedding_dim": 64, "data_type": "fp32"},
    ]
    layer = torch.nn.Linear(96, 48)
    state = {f"project.{name}": tensor.detach() for name, tensor in layer.named_parameters()}
    checkpoint.save(
        {**state_dict(make_rows(tables)), **under_cut_point(state)},
        storage_writer=checkpoint.FileSystemWriter(tmp_path / "retrieval"),
        no_dist=True,
    )
    done = run_export("build", "--config", tmp_path / "surgery.yaml", "--output", tmp_path / "artifact")
    assert done.returncode == 0, done.stderr
    assert "gives projected [48], item_id [64]" in done.stdout
    answer = load_artifact(tmp_path / "artifact")({"user_id": [[1]], "item_id": [[2]], "last_item_id": [[3, 4]]})
    assert answer["projected"].norm().item() == pytest.approx(1.0, abs=1e-6)
    rows = make_rows(tables)["item_id"]
    assert torch.allclose(answer["item_id"][0], rows[2], atol=0.02)


def test_autocast_of_the_caller_changes_no_answer(projected: Path) -> None:
    artifact = load_artifact(projected)
    lengths = torch.full((len(artifact.manifest.features) * 3,), 4, dtype=torch.int32)
    values = torch.zeros(4 * len(lengths), dtype=torch.int64)
    expected = artifact.lookup(values, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(artifact.lookup(values, lengths), expected)
        assert torch.equal(load_artifact(projected).lookup(values, lengths), expected)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("bags", [0, 1, 2, 40])
def test_a_batch_of_any_size_has_a_row_for_each_example(projected: Path, bags: int) -> None:
    artifact = load_artifact(projected)
    answer = artifact({feature.name: [[]] * bags for feature in artifact.manifest.features})
    assert answer.values.shape == (bags, 22)
    assert torch.equal(answer["projected"], projection()["project.bias"].expand(bags, 6))  # N = 0: of zeros, the bias
    assert artifact.pool(torch.empty(0, dtype=torch.int64), torch.zeros(5 * bags, dtype=torch.int32)).shape == (
        bags,
        34,
    )


def test_the_manifest_says_what_the_surgery_is_and_the_weight_file_holds_its_parameters(projected: Path) -> None:
    manifest = verify_artifact(projected)
    surgery = manifest.surgery
    assert surgery is not None
    assert (surgery.module, json.loads(surgery.kwargs)) == (PROJECT["module"], PROJECT["kwargs"])
    assert [(p.parameter, p.dtype, p.dims) for p in surgery.parameters] == [
        ("project.weight", "F32", [6, 11]),
        ("project.bias", "F32", [6]),
    ]
    assert [(output.key, output.dim) for output in manifest.outputs] == [("projected", 6), ("tag", 16)]
    stored = load_file(projected / "weights/tables.safetensors")
    assert torch.equal(stored["surgery.project.weight"], projection()["project.weight"])
    assert torch.equal(stored["surgery.project.bias"], projection()["project.bias"][None])
    graph = (projected / "graphs/lookup.torchscript.pt").read_bytes()
    assert projection()["project.weight"].numpy().tobytes()[:16] not in graph
    assert "torchscript" in manifest.parity.serving.partition("export.surgery:NormalizeAndProject as in eager mode")[2]


def test_inspect_and_verify_say_so(projected: Path) -> None:
    shown = run_export("inspect", projected).stdout
    assert "surgery    export.surgery:NormalizeAndProject {" in shown
    assert "288 bytes of parameters, gives projected [6], tag [16]" in shown
    done = run_export("verify", projected, "--replay")
    assert done.returncode == 0
    assert "7 golden cases within their tolerance" in done.stdout


def test_a_surgery_that_raises_is_one_line_and_nothing_is_left(tmp_path: Path) -> None:
    config = write_release(tmp_path, {"module": "surgeries:Raises"}, {})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *_python_path()])}
    for command in (["build", "--output", tmp_path / "artifact"], ["plan"]):
        done = run_export(command[0], "--config", config, *command[1:], env=environment)
        assert done.returncode == 1
        assert done.stdout == ""
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert errors == [
            "error: surgery 'surgeries:Raises': raises LookupError: no such thing when it is called with the embeddings "
            "'user' [3, 8], 'item' [3, 3], 'last_item' [3, 3], 'tag' [3, 16], 'age' [3, 4]"
        ]
        assert done.stderr.splitlines()[-1] == errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release.yaml", "s.pt"]


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


# --- The parameters, from every snapshot -----------------------------------------------------------------------------


def write_snapshot(kind: str, path: Path, state: dict[str, torch.Tensor]) -> Path:
    if kind == "state_dict":
        torch.save(state, path)
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif kind == "torchsnapshot":
        torchsnapshot.Snapshot.take(str(path), {"state": torchsnapshot.StateDict(**state)})
    else:
        checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(path), no_dist=True)
    return path


def test_parameters_of_any_shape_come_from_every_format_and_give_one_id(tmp_path: Path) -> None:
    """Scalars, vectors, matrices and a kernel of three dimensions, in four types."""
    state = state_dict(make_rows(SPLICED)) | surgery_state(make_head())
    surgery = {"module": "surgeries:Head", "kwargs": {"width": 39}}
    ids = {}
    for kind in ("state_dict", "safetensors", "torchsnapshot", "dcp"):
        snapshot = write_snapshot(kind, tmp_path / kind, state)
        config = write_config(tmp_path / f"{kind}.yaml", snapshot, SPLICED, surgery=surgery)
        manifest = build_artifact(config, tmp_path / f"{kind}-artifact", workers=1).manifest
        ids[kind] = manifest.artifact_id
    assert len(set(ids.values())) == 1, ids
    stored = load_file(tmp_path / "dcp-artifact/weights/tables.safetensors")
    head = make_head()
    for name, tensor in [*head.state_dict().items(), ("scale", head.scale)]:
        assert torch.equal(stored[f"surgery.{name}"].view(tensor.shape), tensor), name
    assert manifest.surgery is not None
    assert {tuple(parameter.dims) for parameter in manifest.surgery.parameters} >= {
        (),
        (39,),
        (2, 1, 3),
        (6, 78),
        (3, 6),
    }
    assert {parameter.dtype for parameter in manifest.surgery.parameters} == {"F32", "F16", "I64", "BOOL"}


def test_a_prefix_says_where_the_parameters_are(tmp_path: Path) -> None:
    state = {f"tower.{name}": tensor for name, tensor in projection().items()}
    config = write_release(tmp_path, PROJECT | {"prefix": "tower"}, state)
    artifact = build_artifact(config, tmp_path / "artifact", workers=1).artifact
    stored = load_file(artifact / "weights/tables.safetensors")
    assert torch.equal(stored["surgery.project.weight"], projection()["project.weight"])


def test_beside_the_collection_of_a_prefix_is_the_cut_point(tmp_path: Path) -> None:
    """Two models in one snapshot: `snapshot.prefix` chooses the tables and, with them, the parameters."""
    state = under_cut_point(projection()) | under_cut_point(projection(seed=4), "other.embeddings")
    state |= {name.replace("model.", "other."): rows for name, rows in state_dict(make_rows(TABLES, seed=1)).items()}
    config = write_release(tmp_path, PROJECT, state)
    document = json.loads(config.read_text())
    document["snapshot"]["prefix"] = "other.embeddings.ebc"
    config.write_text(json.dumps(document))
    artifact = build_artifact(config, tmp_path / "artifact", workers=1).artifact
    stored = load_file(artifact / "weights/tables.safetensors")
    assert torch.equal(stored["surgery.project.weight"], projection(seed=4)["project.weight"])


def test_a_cut_point_of_another_model_gives_no_parameters(tmp_path: Path) -> None:
    """One parameter stands in each of two other towers, and both must come from beside the tables."""
    parts = under_cut_point(projection())
    foreign = {
        name.replace("model.embeddings", tower): tensor
        for (name, tensor), tower in zip(parts.items(), ("tower_x", "tower_y"), strict=True)
    }
    message = refusal(tmp_path / "foreign", PROJECT, foreign)
    assert "has no tensor 'model.embeddings.surgery_cut_point.project.weight' for 'project.weight'; beside" in message
    assert "tower_x.surgery_cut_point.project.weight" in message
    assert message.endswith("or say with surgery.prefix where its parameters are")
    found = planned(write_release(tmp_path / "beside", PROJECT, foreign | parts))
    assert torch.equal(found["project.weight"], projection()["project.weight"])


def test_parameters_lie_beside_the_tables_of_the_release_and_not_beside_pretrained_ones(tmp_path: Path) -> None:
    """Two models in one snapshot, both with a cut point; a table of the other one is taken on purpose."""
    rows = state_dict(make_rows(TABLES))
    moved = {name.replace("model.", "other." if ".tag." in name else "model."): tensor for name, tensor in rows.items()}
    both = under_cut_point(projection()) | under_cut_point(projection(seed=4), "other.embeddings")
    config = write_release(tmp_path / "one", PROJECT, both)
    torch.save(moved | both, tmp_path / "one/s.pt")
    document = json.loads(config.read_text())
    for table in document["large_embeddings"]["tables"]:
        if table["name"] == "tag":
            table["pretrained"] = {"embedding_snapshot_uri": "s.pt", "emb_name": "tag"}
    config.write_text(json.dumps(document))
    assert torch.equal(planned(config)["project.weight"], projection()["project.weight"])
    document["surgery"]["prefix"] = "other.embeddings.surgery_cut_point"
    config.write_text(json.dumps(document))
    assert torch.equal(planned(config)["project.weight"], projection(seed=4)["project.weight"])
    del document["surgery"]["prefix"]
    torch.save(rows, tmp_path / "one/tables.pt")
    for table in document["large_embeddings"]["tables"]:
        table["pretrained"] = {"embedding_snapshot_uri": str(tmp_path / "one/tables.pt"), "emb_name": table["name"]}
    config.write_text(json.dumps(document))
    with pytest.raises(SurgeryError, match=r"and no table is read from it; say with surgery\.prefix"):
        planned(config)


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (
            {},
            "has no tensor 'model.embeddings.surgery_cut_point.project.weight' for 'project.weight'; beside tables it has: "
            "nothing; correct the module, or say with surgery.prefix where its parameters are",
        ),
        (
            under_cut_point({"projection.weight": torch.zeros(6, 11)}),
            "beside tables it has: model.embeddings.surgery_cut_point.projection.weight",
        ),
        (
            under_cut_point(projection() | {"project.weight": torch.zeros(11, 6)}),
            "has 'model.embeddings.surgery_cut_point.project.weight' of shape [11, 6] and type torch.float32, the module's "
            "'project.weight' is [6, 11] torch.float32; correct kwargs or the module",
        ),
        (
            under_cut_point(projection() | {"project.bias": torch.zeros(6, dtype=torch.float64)}),
            "of shape [6] and type torch.float64, the module's 'project.bias' is [6] torch.float32",
        ),
        (
            under_cut_point(projection() | {"project.bias": torch.tensor([1.0, 2, 3, float("nan"), 5, 6])}),
            "'project.bias' has values that are not finite",
        ),
    ],
    ids=["none", "another name", "another shape", "another type", "not finite"],
)
def test_parameters_that_the_snapshot_does_not_have_are_refused_with_what_it_has(
    tmp_path: Path, state: dict[str, torch.Tensor], problem: str
) -> None:
    assert problem in refusal(tmp_path, PROJECT, state)


# --- Refusals --------------------------------------------------------------------------------------------------------


def returns(what: str) -> dict[str, Any]:
    return {"module": "surgeries:Returns", "kwargs": {"what": what}}


@pytest.mark.parametrize(
    ("surgery", "problem"),
    [
        ({"module": "nowhere.to_be:Found"}, "cannot import 'nowhere.to_be': ModuleNotFoundError: No module named 'nowhere'"),
        ({"module": "surgeries:Pasing"}, "'surgeries' has no 'Pasing'; did you mean 'Passing'?"),
        ({"module": "surgeries:function"}, "is a function, expected a subclass of torch.nn.Module"),
        ({"module": "surgeries:NoModule"}, "is the class NoModule, expected a subclass of torch.nn.Module"),
        (
            {"module": "surgeries:Head", "kwargs": {"widht": 3}},
            """its constructor refuses kwargs {"widht": 3}: TypeError: """,
        ),
        (
            {"module": "surgeries:Refusing", "kwargs": {"width": 3}},
            """its constructor refuses kwargs {"width": 3}: OSError: no file for 3""",
        ),
        (
            PROJECT | {"kwargs": PROJECT["kwargs"] | {"keep": ["tag", "projected"]}},
            """its constructor refuses kwargs {"keys": ["user", "last_item"], "in_features": 11, "out_features": 6, """
            """"keep": ["tag", "projected"]}: ValueError: keep names 'projected', which is the output of the""",
        ),
        ({"module": "surgeries:Counting"}, "changes its own 'calls' when it is called; served parameters are read-only"),
        ({"module": "surgeries:Hiding"}, "'mask' is a tensor, and neither a parameter nor a buffer; use register"),
        ({"module": "surgeries:CountingUnseen"}, "changes its own 'calls' when it is called; served parameters are "),
        (
            {"module": "surgeries:HidingDeep", "kwargs": {"kind": "list"}},
            "'inner.masks' (Identity) is a list with tensors, which graphs would hold beside the weight file; read ",
        ),
        ({"module": "surgeries:HidingDeep", "kwargs": {"kind": "tuple"}}, "'inner.masks' (Identity) is a tuple with tensors"),
        ({"module": "surgeries:HidingDeep", "kwargs": {"kind": "dict"}}, "'inner.masks' (Identity) is a dict with tensors"),
        ({"module": "surgeries:Recurrent", "kwargs": {"kind": "GRU"}}, "'cell._flat_weights' (GRU) is a list with tensors"),
        ({"module": "surgeries:Recurrent", "kwargs": {"kind": "LSTM"}}, "'cell._flat_weights' (LSTM) is a list with tensors"),
        ({"module": "surgeries:Lazy"}, "'layer.weight' has no shape before the first call; give it one, as torch.nn.Linear"),
        ({"module": "surgeries:MadeInInferenceMode"}, "'scale' was made in torch.inference_mode(); make it outside of that"),
        (
            {"module": "surgeries:Salted", "kwargs": {"what": "buffer"}},
            "its constructor makes another 'salt' when it is called again; draw from torch's default generator, which is",
        ),
        ({"module": "surgeries:Salted", "kwargs": {"what": "number"}}, "its constructor makes another 'number' when it is"),
        (
            {"module": "surgeries:Exits", "kwargs": {"where": "constructor"}},
            """its constructor refuses kwargs {"where": "constructor"}: SystemExit: no licence""",
        ),
        (
            {"module": "surgeries:Exits", "kwargs": {"where": "forward"}},
            "raises SystemExit: 3 when it is called with the embeddings 'user' [3, 8], ",
        ),
        ({"module": "surgeries:NotInitialised"}, "its constructor refuses kwargs {}: AttributeError: "),
        ({"module": "surgeries:Infinite"}, "'big' has values that are not finite"),
        ({"module": "surgeries:Empty"}, "'nothing' of shape [0] is empty"),
        ({"module": "surgeries:Quantized"}, "'codes' is torch.int16 torch.strided on cpu; expected a dense tensor"),
        (returns("list"), "returns a list, expected a tensor or a dict of tensors"),
        (returns("empty"), "returns an empty dict, expected a tensor or a dict of tensors"),
        (returns("text"), "returns a str for 'a', expected a tensor"),
        (returns("number key"), "returns the key 1; a key is printable text, and not empty"),
        (returns("half"), "returns torch.float16 for 'output', expected torch.float32; end with .float()"),
        (returns("integers"), "returns torch.int64 for 'a', expected torch.float32; end with .float()"),
        (returns("other batch"), "returns the shape [6, 8] for 'output' of 3 examples, expected [3, columns]"),
        (returns("vector"), "returns the shape [3] for 'a' of 3 examples, expected [3, columns]"),
        (returns("no columns"), "returns the shape [3, 0] for 'output' of 3 examples, expected [3, columns]"),
        (returns("by batch"), "gives other outputs for a batch of 1 than for one of 3: b [B, 8], and a [B, 8]"),
        (returns("other keys"), "gives other outputs when it is called again: a [B, 8], and b [B, 8]"),
        (returns("random"), "gives another 'output' when it is called again with the same embeddings"),
        (returns("counting"), "gives another 'output' when it is called again with the same embeddings"),
        ({"module": "surgeries:Untyped"}, "torchscript cannot express it: "),
        ({"module": "surgeries:Foreign"}, "torchscript: it uses the operator 'fbgemm::FloatToHFP8Quantized', which a server"),
        ({"module": "surgeries:Ignoring"}, "torchscript: it calls the Python function 'helper', which no server has; "),
        (
            {"module": "surgeries:Unused"},
            "torchscript compiles it, and cannot write or run it: RuntimeError: This Python function is annotated to be ",
        ),
        ({"module": "surgeries:Forking"}, "torchscript: it runs a part of itself as a task ('prim::fork'), "),
        ({"module": "surgeries:Assigning"}, "torchscript: it may assign its own 'count' when it is called; requests share "),
        ({"module": "surgeries:Objects"}, "torchscript: keeps a Scale in 'scale'; expected numbers, text, "),
        ({"module": "surgeries:Printing"}, "torchscript: it prints when it is called, and would to a server's stdout"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_module_that_cannot_be_served_is_refused_by_name(
    tmp_path: Path, surgery: dict[str, Any], problem: str
) -> None:
    assert refusal(tmp_path, surgery).startswith(problem)


@pytest.mark.parametrize(
    ("surgery", "state", "problem"),
    [
        (
            {"module": "surgeries:Tied"},
            {"first.weight": torch.eye(8), "second.weight": 5 * torch.eye(8)},
            "'first.weight' has other values than the snapshot once its state dict is loaded: it is one tensor with "
            "'second.weight', of which the snapshot has other values",
        ),
        (
            {"module": "surgeries:Deaf", "kwargs": {"how": "loads nothing"}},
            {"scale": torch.full((8,), 3.0)},
            "'scale' has other values than the snapshot once its state dict is loaded: ",
        ),
        (
            {"module": "surgeries:Deaf", "kwargs": {"how": "refuses"}},
            {"scale": torch.full((8,), 3.0)},
            "its state dict cannot be loaded: LookupError: not mine",
        ),
        (
            {"module": "surgeries:Deaf", "kwargs": {"how": "hides"}},
            {"scale": torch.full((8,), 3.0)},
            "its state dict has no 'scale', which is a parameter; ",
        ),
    ],
    ids=["tied", "loads nothing", "refuses", "hides"],
)
def test_a_module_that_does_not_have_what_the_snapshot_gave_it_is_refused(
    tmp_path: Path, surgery: dict[str, Any], state: dict[str, torch.Tensor], problem: str
) -> None:
    assert refusal(tmp_path, surgery, under_cut_point(state)).startswith(problem)


def test_tied_parameters_with_the_same_values_are_taken(tmp_path: Path) -> None:
    state = under_cut_point({"first.weight": torch.eye(8), "second.weight": torch.eye(8)})
    config = write_release(tmp_path, {"module": "surgeries:Tied"}, state)
    with joined_ranks() as ranks:
        plan = plan_release(load_config(config), ranks, 1, 1, Clock(NoProgress()))
    assert plan.surgery is not None
    assert list(plan.surgery.tensors) == ["first.weight", "second.weight"]


@pytest.mark.parametrize(
    ("name", "graph", "problem"),
    [
        ("Branching", "aot_inductor", "aot_inductor: torch.export cannot express it: GuardOnDataDependentSymNode: "),
        ("Branching", "onnx", "onnx would hold it only for the batch that it was traced with: Converting a tensor"),
        ("MakingConstants", "aot_inductor", "aot_inductor: it makes the constant tensors module.lifted_tensor_0 when"),
        ("MakingConstants", "onnx", "onnx would hold it only for the batch that it was traced with: torch.tensor results"),
        ("Unknown", "onnx", "onnx cannot express it: UnsupportedOperatorError: Exporting the operator 'aten::special_"),
    ],
)  # fmt: skip
def test_a_graph_that_cannot_express_the_module_is_named_and_says_nothing_else(
    tmp_path: Path, name: str, graph: str, problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert refusal(tmp_path, {"module": f"surgeries:{name}"}, {}, graph).startswith(problem)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name", ["WritesData", "WritesView", "WritesFromList", "WritesResult", "WritesFromObject"], ids=str
)
def test_a_write_to_a_parameter_is_found_where_no_batch_of_the_checks_leads(tmp_path: Path, name: str) -> None:
    """Served, it would end the process: parameters are mapped read-only."""
    assert refusal(tmp_path, {"module": f"surgeries:{name}"}).startswith(
        "torchscript: it may write to its own 'own' when it is called; served parameters are read-only"
    )


def test_writes_to_what_is_not_its_own_are_taken() -> None:
    module = surgeries.WritingElsewhere().eval().requires_grad_(False)
    scripted = torch.jit.script(TensorSplice(module, {"user": 8}, ["output"]))
    check_operators(scripted)
    check_writes(scripted)
    assert ".add_(" in scripted.module.norm.code  # of its counter, in training
    module.train()
    with pytest.raises(SurgeryError, match=r"it may write to its own 'norm\.num_batches_tracked'"):
        check_writes(torch.jit.script(TensorSplice(module, {"user": 8}, ["output"])))


def test_what_one_graph_cannot_express_another_can(tmp_path: Path) -> None:
    config = write_release(tmp_path, {"module": "surgeries:Branching"}, {})
    loaded = load_artifact(build_artifact(config, tmp_path / "artifact", workers=1).artifact)
    assert loaded.manifest.outputs == [Output("output", 8)]


def test_plan_refuses_what_build_would(tmp_path: Path) -> None:
    config = write_release(tmp_path, {"module": "surgeries:Unknown"}, {}, serving={"graphs": ["torchscript", "onnx"]})
    with pytest.raises(SurgeryError, match="onnx cannot express it"):
        preview_release(load_config(config), 1, 1, Clock(NoProgress()))


# --- The artifact ----------------------------------------------------------------------------------------------------


def test_a_module_without_parameters_needs_none_of_the_snapshot(tmp_path: Path) -> None:
    config = write_release(tmp_path, {"module": "surgeries:Passing"}, {})
    artifact = load_artifact(build_artifact(config, tmp_path / "artifact", workers=1).artifact)
    assert artifact.manifest.surgery is not None
    assert artifact.manifest.surgery.parameters == []
    answer = artifact({"user": [[1]], "item": [[2]], "last_item": [[3, 4]], "tag": [[]], "age": [[0]]})
    rows = {name: table.to(torch.float16).float() for name, table in make_rows(TABLES).items()}
    assert torch.equal(answer["sum"][0], rows["item"][2] + (rows["item"][3] + rows["item"][4]))
    assert torch.equal(answer["age"][0], make_rows(TABLES)["age"][0])


def test_the_id_is_of_the_parameters_the_arguments_and_the_code(projected: Path) -> None:
    manifest = read_manifest(projected)
    surgery = manifest.surgery
    assert surgery is not None
    others = [
        replace(surgery, module="export.surgery:Other"),
        replace(surgery, kwargs="{}"),
        replace(surgery, code=replace(surgery.code, value="0" * 64)),
        replace(surgery, parameters=surgery.parameters[:1]),
        replace(surgery, parameters=[replace(surgery.parameters[0], dims=[11, 6]), surgery.parameters[1]]),
    ]
    ids = {compute_artifact_id(replace(manifest, surgery=other)) for other in [*others, surgery, None]}
    assert len(ids) == 7
    assert compute_artifact_id(manifest) == manifest.artifact_id


@pytest.mark.parametrize("other", [{"scale": 2.0}, {"inner": 2.0}, {"constant": 2.0}, {"scale": 0.5 + 2**-53}], ids=str)
def test_the_code_s_digest_is_of_every_value_that_it_answers_from(other: dict[str, float]) -> None:
    one, same, another = (
        digest_code(torch.jit.script(surgeries.Scaled(**values).eval())) for values in ({}, {"scale": 0.5}, other)
    )
    assert one == same
    assert one != another


def test_a_default_of_the_example_is_in_the_digest() -> None:
    digests = {
        digest_code(torch.jit.script(NormalizeAndProject(["user"], 8, 2, eps=eps).eval())) for eps in (1e-12, 1e-6)
    }
    assert len(digests) == 2


def test_the_digest_has_no_place_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner blocks of a graph are printed with files and lines, which another machine has elsewhere."""
    text = (
        "import torch\n\n{}class Deep(torch.nn.Module):\n    def forward(self, x: torch.Tensor) -> torch.Tensor:\n"
        "        for _ in range(3):\n            x = x * 2\n        return x\n"
    )
    digests = set()
    for folder, lines in (("here", ""), ("there", "\n\n")):
        path = tmp_path / folder / "deep.py"
        path.parent.mkdir()
        path.write_text(text.format(lines))
        spec = importlib.util.spec_from_file_location("deep", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "deep", module)
        spec.loader.exec_module(module)
        scripted = torch.jit.script(module.Deep().eval())
        assert f"{path}:" in scripted.inlined_graph.str(False)
        digests.add(digest_code(scripted))
    assert len(digests) == 1


def test_a_changed_parameter_is_found_by_name_before_the_graph_runs(projected: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(projected, tmp_path / "artifact"))
    manifest = read_manifest(copy)
    assert manifest.surgery is not None
    place = manifest.weights_offset_bytes + manifest.surgery.parameters[0].offset_bytes
    with (copy / "weights/tables.safetensors").open("r+b") as file:
        file.seek(place + 5)
        old = file.read(1)
        file.seek(place + 5)
        file.write(bytes([old[0] ^ 1]))
    with pytest.raises(DigestMismatchError, match=r"'surgery\.project\.weight' are not those that were published"):
        load_artifact(copy)


def edited(artifact: Path, folder: Path, change: Callable[[Any], Any]) -> Path:
    """A copy whose manifest was changed, and is consistent with itself."""
    copy = Path(shutil.copytree(artifact, folder / "artifact"))
    manifest = change(read_manifest(copy))
    manifest = replace(manifest, artifact_id=compute_artifact_id(manifest))
    (copy / "manifest.json").write_bytes(manifest.to_bytes())
    return copy


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: replace(m, surgery=replace(m.surgery, module="")), "'' cannot name a surgery"),
        (lambda m: replace(m, surgery=replace(m.surgery, kwargs="\n")), r"'\\n' cannot name a surgery"),
        (lambda m: replace(m, outputs=[]), "outputs of surgery 'export.surgery:NormalizeAndProject': expected one or more"),
        (lambda m: replace(m, outputs=[Output("a", 0)]), "expected one or more, of at least one column each"),
        (lambda m: replace(m, outputs=[Output("", 22)]), "'' cannot name an output"),
        (lambda m: replace(m, outputs=[Output("a", 6), Output("a", 16)]), "outputs: 'a' is listed 2 times"),
        (lambda m: replace(m, surgery=None), "outputs do not follow from the features"),
        (
            lambda m: replace(m, surgery=replace(m.surgery, parameters=m.surgery.parameters * 2)),
            r"tables and parameters: 'surgery\.project\.weight' is listed 2 times",
        ),
        (
            lambda m: replace(m, surgery=replace(m.surgery, parameters=[replace(m.surgery.parameters[0], dims=[0, 3])])),
            r"parameter 'project\.weight': shape \[0, 3\] is empty",
        ),
        (
            lambda m: replace(m, surgery=replace(m.surgery, code=replace(m.surgery.code, algorithm="md5"))),
            "surgery: digest algorithm 'md5', expected 'sha256'",
        ),
        (
            lambda m: replace(m, surgery=replace(m.surgery, parameters=[replace(m.surgery.parameters[0], dims=[2**40] * 2)])),
            "more bytes than 64 bits can count",
        ),
    ],
)  # fmt: skip
def test_a_manifest_that_contradicts_its_surgery_is_refused(
    projected: Path, tmp_path: Path, change: Callable[[Any], Any], problem: str
) -> None:
    with pytest.raises(ManifestError, match=problem):
        load_artifact(edited(projected, tmp_path, change))


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        (
            [Output("tag", 6), Output("projected", 16)],
            "its output_keys is ['projected', 'tag'], the manifest says ['tag', ",
        ),
        ([Output("projected", 16), Output("tag", 6)], ""),
    ],
)
def test_a_graph_of_another_surgery_is_refused(
    projected: Path, tmp_path: Path, outputs: list[Output], problem: str
) -> None:
    """Dims of outputs are the module's own: a graph with the same keys and width is told apart by its digest alone."""
    copy = edited(projected, tmp_path, lambda manifest: replace(manifest, outputs=outputs))
    if problem:
        with pytest.raises(GraphError) as caught:
            load_artifact(copy)
        assert problem in str(caught.value)
    else:
        assert load_artifact(copy).manifest.outputs == outputs


def test_golden_cases_fail_beyond_their_tolerance(projected: Path, tmp_path: Path) -> None:
    cases = read_cases(projected, read_manifest(projected))
    assert all(case.tolerance is not None and case.tolerance.shape == case.pooled.shape for case in cases.values())
    case = cases["03 first and last row"]
    moved = case.pooled.clone()
    moved[0, 0] += 0.9 * case.tolerance[0, 0]
    assert not case.differs(moved).any()
    moved[0, 0] += 0.9 * case.tolerance[0, 0]
    assert case.differs(moved).nonzero().tolist() == [[0, 0]]
    moved[0, 0] = float("nan")
    assert case.differs(moved).nonzero().tolist() == [[0, 0]]
    assert case.tolerance.max() < 2e-4
    assert replay_cases(projected, read_manifest(projected)) == 7


def test_the_path_without_the_graphs_own_checks_has_the_surgery_too(projected: Path) -> None:
    artifact = load_artifact(projected)
    case = read_cases(projected, artifact.manifest)["03 first and last row"]
    inputs = [part for part in case.request if part is not None]
    assert hasattr(artifact.graph, "lookup_checked")
    assert torch.equal(artifact.lookup(*case.request), artifact.graph(*inputs))


def test_it_is_not_loaded_onto_a_gpu(projected: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"^an artifact with a surgery is not loaded onto a GPU yet; use device='cpu'$"
    ):
        load_on_cpu(projected)


def test_every_process_writes_the_same_graph(tmp_path: Path) -> None:
    """Python's sets of texts, by which torch orders what it writes, have another order in each."""
    program = (
        "import hashlib, pathlib, sys\n"
        "from runtime_py.manifest import Digest, Feature, Table\n"
        "from export.lookup import make_lookup\n"
        "import torch\n"
        "from export.splice import TensorSplice\n"
        "from export.surgery_code import digest_code\n"
        "from export.torchscript import write_torchscript\n"
        "from support import make_head\n"
        "splice = TensorSplice(make_head().requires_grad_(False), {'a': 39}, ['output'])\n"
        "table = Table('a', 5, 39, 'fp32', 156, 0, Digest('', ''))\n"
        "write_torchscript(make_lookup([table], [Feature('a', 'a', 'sum', False)], splice), pathlib.Path(sys.argv[1]))\n"
        "print(digest_code(torch.jit.script(splice).module).value)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    said = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / seed],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert (tmp_path / "1").stat().st_size < 30_000


# --- The gate --------------------------------------------------------------------------------------------------------


def test_the_gate_fails_where_the_graph_holds_another_parameter(tmp_path: Path) -> None:
    """As if the weight file had a weight that is off by a thousandth: the staged artifact against the snapshot's module."""
    config = load_config(write_release(tmp_path, PROJECT, under_cut_point(projection())))
    artifact = build_artifact(config, tmp_path / "artifact", workers=1).artifact
    with joined_ranks() as ranks:
        plan = plan_release(config, ranks, 1, 1, Clock(NoProgress()))
    assert plan.surgery is not None
    plan.surgery.splice.module.project.weight[3, 2] *= 1.001
    rows, ids = make_rows(TABLES), probe_ids(config.large_embeddings, plan.cases)
    types = {Precision.FP32: torch.float32, Precision.FP16: torch.float16}
    probes = {
        name: ProbeRows(
            ids[name], rows[name][ids[name]].float(), rows[name][ids[name]].to(types[plan.precisions[name]])
        )
        for name in rows
    }
    with pytest.raises(GateError, match=r"case '.*': the torchscript graph: output 'projected', bag \d+, column 3: "):
        check_parity(artifact, config.large_embeddings, plan.precisions, plan.cases, probes, 0, plan.surgery)


def test_the_bound_holds_for_sums_in_any_order_and_is_a_few_hundred_units_at_most() -> None:
    """Of a layer of 512 inputs: float32 sums forwards, backwards and by pairs are all within it, and not far within."""
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(512, 16)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, pooled: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.layer(pooled["a"])

    surgery = opened(Layer(), {"a": 512}, 16)
    pooled = {"a": torch.randn(20, 512, generator=generator)}
    bound = surgery_bound(surgery, pooled)
    products = (pooled["a"][:, None] * layer.weight).numpy()
    bias = layer.bias.numpy()
    orders = [
        np.add.accumulate(products, axis=2, dtype=np.float32)[:, :, -1] + bias,
        np.add.accumulate(products[:, :, ::-1], axis=2, dtype=np.float32)[:, :, -1] + bias,
        products.sum(2, dtype=np.float32) + bias,
        surgery(pooled).numpy(),
    ]
    exact = (pooled["a"].double() @ layer.weight.double().T + layer.bias.double()).numpy()
    worst = max(np.abs(order - exact).max() for order in orders)
    assert all((np.abs(order - other) <= bound).all() for order in orders for other in orders)
    assert bound.max() < 500 * worst


@pytest.mark.parametrize(("name", "share"), [("float16", 0.02), ("bfloat16", 0.15)])
def test_a_module_that_computes_in_16_bits_may_be_fused_and_so_rounded_nowhere(name: str, share: float) -> None:
    generator = torch.Generator().manual_seed(2)
    pooled = {
        "user": torch.randn(16, 8, generator=generator) * 2.0 ** torch.randint(-30, 3, (16, 1), generator=generator)
    }
    pooled["user"][3] = 0.0
    kept, fused = (opened(Narrow(name, keep), {"user": 8}, 8) for keep in (True, False))
    bound = surgery_bound(kept, pooled)
    figures = check_answer("case", kept.outputs, fused(pooled), kept(pooled), bound)
    assert not figures["surgery_bit_equal"]
    terms = opened(Narrow("float32"), {"user": 8}, 8)({"user": pooled["user"].abs()})  # of sums without cancellation
    assert (bound < share * terms.max().item()).all()  # and so a wrong column is beyond it
    with pytest.raises(GateError, match="the bound is"):
        check_answer("case", kept.outputs, kept(pooled).flip(1), kept(pooled), bound)


def test_a_narrow_parameter_that_is_widened_costs_nothing_of_the_bound() -> None:
    class Widened(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linspace(1, 2, 8).half())

        def forward(self, pooled: dict[str, torch.Tensor]) -> torch.Tensor:
            return pooled["user"] * self.weight.float()

    bound = surgery_bound(opened(Widened(), {"user": 8}, 8), {"user": torch.ones(2, 8)})
    assert 0 < bound.max() < 300 * 2.0**-24


def test_a_module_in_float16_is_built_for_onnx(tmp_path: Path) -> None:
    serving = {"graphs": ["torchscript", "onnx"]}
    config = write_release(tmp_path, {"module": "surgeries:HalfScaled"}, {}, serving=serving)
    assert (
        "surgeries:HalfScaled as in eager mode"
        in build_artifact(config, tmp_path / "a", workers=1).manifest.parity.serving
    )


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_an_answer_that_is_not_finite_is_right_where_the_module_gives_it(tmp_path: Path) -> None:
    config = write_release(tmp_path, {"module": "surgeries:Unguarded"}, {}, serving={"graphs": ["torchscript", "onnx"]})
    artifact = build_artifact(config, tmp_path / "artifact", workers=1).artifact
    answer = load_artifact(artifact)({feature: [[]] for feature in ("user", "item", "last_item", "tag", "age")})
    assert answer["log"].tolist() == [[-np.inf] * 8]
    assert answer["unit"].isnan().all()
    cases = read_cases(artifact, read_manifest(artifact))
    assert any(case.pooled.isnan().any() for case in cases.values())
    assert any(case.pooled.isinf().any() for case in cases.values())
    assert replay_cases(artifact, read_manifest(artifact)) == 7
    for case in cases.values():
        assert case.tolerance is not None
        assert case.tolerance.isfinite().all()
        other = case.pooled.clone()
        other.view(torch.int32)[case.pooled.isnan()] ^= 1 << 31 | 5
        assert not case.differs(other).any()
        other[case.pooled.isnan()] = 0.0
        assert torch.equal(case.differs(other), case.pooled.isnan())
        assert torch.equal(case.differs(-case.pooled) & case.pooled.isinf(), case.pooled.isinf())


def test_a_value_that_is_not_finite_is_no_answer_for_another() -> None:
    inf, nan, bound = np.inf, np.nan, np.array([[0.5] * 3])
    wanted = torch.tensor([[-inf, nan, 1.0]])
    figures = check_answer("case", [Output("o", 3)], torch.tensor([[-inf, -nan, 1.25]]), wanted, bound)
    assert figures == {"surgery_bit_equal": False, "surgery_max_difference": 0.25, "surgery_max_share_of_bound": 0.5}
    for column, value in ((0, inf), (0, nan), (0, -3e38), (1, 0.0), (1, inf), (2, nan), (2, inf)):
        got = wanted.clone()
        got[0, column] = value
        with pytest.raises(GateError, match=rf"output 'o', bag 0, column {column}: .*, the bound is 0.5"):
            check_answer("case", [Output("o", 3)], got, wanted, bound)


def test_where_roundings_alone_leave_the_numbers_only_the_same_value_is_right() -> None:
    surgery = opened(Root(), {"a": 2}, 2)
    pooled = {"a": torch.tensor([[1.0, 2.0]])}
    bound = surgery_bound(surgery, pooled)
    assert np.isnan(bound[0, 0])
    assert bound[0, 1] < 1e-4
    answer = surgery(pooled)
    check_answer("case", surgery.outputs, answer, answer, bound)
    with pytest.raises(GateError, match="there is no bound, as roundings alone make the value infinite or no number"):
        check_answer("case", surgery.outputs, answer + torch.tensor([1e-6, 0.0]), answer, bound)


class Root(torch.nn.Module):
    def forward(self, pooled: dict[str, torch.Tensor]) -> torch.Tensor:
        return (pooled["a"] - 1.0).sqrt()


def test_noise_of_the_embeddings_counts_in_the_bound() -> None:
    surgery = opened(Sum(), {"a": 4}, 4)
    pooled = {"a": torch.ones(3, 4)}
    plain, noisy = (surgery_bound(surgery, pooled, noise) for noise in (None, {"a": np.full((3, 4), 0.01)}))
    assert plain.max() < 1e-4
    assert (noisy > 0.01).all()
    assert (noisy < 0.03).all()


class Sum(torch.nn.Module):
    def forward(self, pooled: dict[str, torch.Tensor]) -> torch.Tensor:
        return pooled["a"] + 0.5


# --- All three graphs ------------------------------------------------------------------------------------------------


def spliced_request(artifact: Any, bags: int, seed: int = 0) -> dict[str, Any]:
    """Bags of 0 to 3 ids of every feature of `SPLICED`."""
    generator = np.random.default_rng(seed)
    request: dict[str, Any] = {}
    for feature in artifact.manifest.features:
        lengths = generator.integers(0, 4, bags)
        ids = generator.integers(0, artifact.manifest.table[feature.table].num_embeddings, lengths.sum())
        weights = generator.normal(size=len(ids)).astype(np.float32)
        request[feature.name] = Jagged(
            torch.from_numpy(ids), torch.from_numpy(lengths), torch.from_numpy(weights) if feature.weighted else None
        )
    return request


@pytest.mark.slow
@needs_compiler
def test_all_three_graphs_hold_the_surgery_and_no_parameter(surgery_artifact: Path) -> None:
    manifest = verify_artifact(surgery_artifact)
    assert manifest.outputs == [Output("output", 2)]
    assert sum(file.bytes for file in manifest.files) < manifest.file["weights/tables.safetensors"].bytes + 4_000_000
    cases = json.loads((surgery_artifact / "reports/parity.json").read_text())["cases"]
    assert {case["graph"] for case in cases} == {"torchscript for cpu", "aot_inductor for cpu", "onnx for cpu"}
    assert max(case["surgery_max_share_of_bound"] for case in cases) <= 1
    hidden = make_head().state_dict()["hidden.weight"].numpy().tobytes()
    for file in manifest.files:
        held = hidden[64:128] in (surgery_artifact / file.path).read_bytes()
        assert held == (file.path == "weights/tables.safetensors"), file.path
    model = onnx.load_model(surgery_artifact / "model.onnx", load_external_data=False)
    external = {tensor.name for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
    assert {"surgery/module.hidden.weight", "surgery/module.norm.running_var", "tables/seen"} <= external


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("bags", [0, 1, 2, 300])
def test_all_three_graphs_answer_alike(surgery_artifact: Path, bags: int) -> None:
    scripted, compiled = (load_artifact(surgery_artifact, backend=name) for name in ("torchscript", "aot_inductor"))
    request = spliced_request(scripted, bags)
    answers = [artifact(request).values for artifact in (scripted, compiled)]
    values, lengths, weights = scripted._reader.read(request)
    session = onnxruntime.InferenceSession(surgery_artifact / "model.onnx")
    given = {"values": values.numpy(), "lengths": lengths.numpy(), "per_sample_weights": weights.numpy()}
    answers.append(torch.from_numpy(session.run(None, given)[0]))
    pooled = scripted.pool(values, lengths, weights)
    features = {
        feature.name: scripted.manifest.table[feature.table].embedding_dim for feature in scripted.manifest.features
    }
    with torch.no_grad():
        expected = make_head()(dict(zip(features, pooled.split(list(features.values()), dim=1), strict=True)))
    for answer in answers:
        assert answer.shape == (bags, 2)
        assert torch.allclose(answer, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match="a graph of aot_inductor does not show what it pools; use torchscript"):
        compiled.pool(values, lengths, weights)


@pytest.mark.slow
@needs_compiler
def test_the_loader_needs_no_class_of_the_user(surgery_artifact: Path, tmp_path: Path) -> None:
    program = (
        "import sys, runtime_py\n"
        "for backend in ('torchscript', 'aot_inductor'):\n"
        "    loaded = runtime_py.load_artifact(sys.argv[1], backend=backend)\n"
        "    assert loaded.manifest.outputs[0].key == 'output'\n"
        "assert not {'surgeries', 'export', 'onnx', 'torchrec'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, surgery_artifact], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
