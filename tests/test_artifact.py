"""The loader: what it refuses, what a loaded artifact computes, and what it may cost."""

import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references
import torch
from support import FEATURES, TABLES, make_rows, state_dict, surgery_state, write_config

from export import build_artifact
from export.surgery import NormalizeAndProject
from runtime_py import (
    Artifact,
    GraphError,
    InvalidInputError,
    Jagged,
    Pooled,
    UnsupportedError,
    WeightFileError,
    load_artifact,
    verify_artifact,
)
from runtime_py import artifact as runtime_artifact
from runtime_py.digests import Digest, sha256
from runtime_py.manifest import (
    Feature,
    File,
    Graph,
    Manifest,
    Output,
    ParitySummary,
    Provenance,
    Table,
    TableAccuracy,
    compute_artifact_id,
)
from runtime_py.manifest_reader import read_manifest
from runtime_py.tensor_file import encode_header

WEIGHTS = "weights/tables.safetensors"
GRAPH = "graphs/lookup.torchscript.pt"
BATCH: dict[str, list[list[int]]] = {
    "user": [[3, 5], [], [299]],
    "item": [[7], [1, 2], [40]],
    "last_item": [[], [], [0]],
    "tag": [[0, 6, 6], [3], []],
    "age": [[0], [0], [0]],
}


@pytest.fixture(scope="module")
def artifact(built_artifact: Path) -> Artifact:
    return load_artifact(built_artifact)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds an artifact of these tables for the whole module."""
    from export import build_artifact

    def build(tables: list[dict[str, Any]], **sections: Any) -> Path:
        folder = tmp_path_factory.mktemp("build")
        torch.save(state_dict(make_rows(tables)), folder / "snapshot.pt")
        config = write_config(folder / "release.yaml", folder / "snapshot.pt", tables, **sections)
        return build_artifact(config, folder / "artifact", workers=2).artifact

    return build


SIXTEEN_BYTES = {"name": "zzz", "num_embeddings": 1, "embedding_dim": 8, "data_type": "fp32"}


def edited_tables(edit: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
    tables = copy.deepcopy(TABLES)
    edit(tables)
    return tables


def seal(artifact: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Changes the manifest and gives it fresh digests, as somebody who means to would."""
    manifest = change(read_manifest(artifact))
    (artifact / "manifest.json").write_bytes(manifest.to_bytes())


def replace_graph(artifact: Path, data: bytes) -> None:
    (artifact / GRAPH).write_bytes(data)
    described = File(GRAPH, len(data), sha256(data))
    seal(artifact, lambda m: replace(m, files=[described if file.path == GRAPH else file for file in m.files]))
    verify_artifact(artifact)


# --- Pooled ----------------------------------------------------------------------------------------------------------


def test_pooled_embeddings_are_views_by_output_key(artifact: Artifact) -> None:
    pooled = artifact(BATCH)
    assert pooled.values.shape == (3, 8 + 3 + 3 + 16 + 4)
    assert pooled.values.dtype is torch.float32
    assert pooled.keys() == FEATURES
    assert torch.equal(torch.cat([pooled[key] for key in pooled.keys()], 1), pooled.values)  # noqa: SIM118
    assert [pooled[key].shape[1] for key in FEATURES] == [8, 3, 3, 16, 4]
    assert pooled["tag"].data_ptr() == pooled.values[:, 14:].data_ptr()


def test_pooled_embeddings_become_a_dictionary(artifact: Artifact) -> None:
    pooled = artifact(BATCH)
    by_key = pooled.to_dict()
    assert list(by_key) == FEATURES
    assert all(torch.equal(by_key[key], pooled[key]) for key in FEATURES)


def test_an_unknown_output_key_is_a_key_error_that_names_it(artifact: Artifact) -> None:
    with pytest.raises(KeyError, match="items"):
        artifact(BATCH)["items"]


def test_columns_follow_the_outputs_of_the_manifest() -> None:
    pooled = Pooled(torch.arange(6.0).view(2, 3), {"a": (0, 1), "b": (1, 3)}, "id")
    assert pooled["a"].tolist() == [[0], [3]]
    assert pooled["b"].tolist() == [[1, 2], [4, 5]]


# --- What it computes ------------------------------------------------------------------------------------------------

DIMS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 64, 65, 100, 128, 200]


@pytest.fixture(scope="module")
def many(build: Callable[..., Path]) -> Artifact:
    """Forty tables of both precisions and all dims around the vector widths of the kernel: sum, mean and weighted."""
    tables = []
    for i, dim in enumerate(DIMS):
        for precision in ("fp32", "fp16"):
            table = {"name": f"{precision}_{dim}", "num_embeddings": 500, "embedding_dim": dim, "data_type": "fp32"}
            kind = [{}, {"pooling": "mean"}, {"weighted": True}][(i + (precision == "fp16")) % 3]
            tables.append(table | kind | {"serving_precision": precision})
    return load_artifact(build(tables, parity={"batches": 1}))


def test_every_dim_precision_and_pooling_equals_the_reference_to_the_last_bit(many: Artifact) -> None:
    """No tolerance: the reference adds in the kernel's order, product and sum rounded once (fused multiply-add)."""
    generator = np.random.default_rng(5)
    manifest = many.manifest
    trained = make_rows([vars(table) | {"data_type": "fp32"} for table in manifest.tables])
    lengths = generator.integers(0, 60, (len(manifest.features), 4))
    features, expected = {}, {}
    for feature, bag_lengths in zip(manifest.features, lengths, strict=True):
        rows = references.stored_rows(trained[feature.table].numpy(), manifest.table[feature.table].serving_precision)
        bags = [generator.integers(0, 500, length).tolist() for length in bag_lengths]
        weights = [generator.normal(size=length).astype(np.float32).tolist() for length in bag_lengths]
        flat_weights = [weight for bag in weights for weight in bag] if feature.weighted else None
        features[feature.name] = Jagged([row for bag in bags for row in bag], bag_lengths, flat_weights)
        expected[feature.name] = np.stack(
            [
                references.pooled_bag(rows, bag, feature.pooling, bag_weights if feature.weighted else None)
                for bag, bag_weights in zip(bags, weights, strict=True)
            ]
        )
    pooled = many(features)
    for name, values in expected.items():
        assert pooled[name].numpy().tobytes() == values.tobytes(), name


def test_weights_may_lie_in_any_memory(build: Callable[..., Path]) -> None:
    """FBGEMM reads them one after the other, whatever their strides; here no feature's are replaced on the way."""
    tables = [{**table, "weighted": True} for table in TABLES[:2]]
    artifact = load_artifact(build(tables))
    values, lengths = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([2, 2, 2], dtype=torch.int32)
    weights = torch.tensor([0.5, -1.0, 2.0, 3.0, 0.25, 7.0])
    expected = artifact.lookup(values, lengths, weights)
    rows = make_rows(tables)["user"].half().float()
    assert torch.equal(expected[0, :8], 0.5 * rows[1] - rows[2])

    strided = weights.repeat_interleave(3)[::3]
    assert torch.equal(artifact.lookup(values.repeat_interleave(3)[::3], lengths, strided), expected)
    features = {
        name: Jagged(values[2 * i : 2 * i + 2], [2], weights.repeat_interleave(2)[4 * i : 4 * i + 4 : 2])
        for i, name in enumerate(["user", "item", "last_item"])
    }
    assert torch.equal(artifact(features).values, expected)


@pytest.mark.parametrize("batch", [0, 1, 2, 1000])
def test_any_batch_size_works_with_and_without_ids(artifact: Artifact, batch: int) -> None:
    empty = artifact({name: [[]] * batch for name in FEATURES}).values
    assert torch.equal(empty, torch.zeros(batch, 34))
    full = artifact({name: [[0]] * batch for name in FEATURES}).values
    assert torch.equal(full, artifact({name: [[0]] for name in FEATURES}).values.expand(batch, -1))


def test_a_batch_without_bags_and_without_ids_is_empty(artifact: Artifact) -> None:
    nothing = artifact.lookup(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))
    assert nothing.shape == (0, 34)


def test_lookup_is_the_same_call_in_the_raw_signature(artifact: Artifact) -> None:
    values = torch.tensor([row for name in FEATURES for bag in BATCH[name] for row in bag])
    lengths = torch.tensor([len(bag) for name in FEATURES for bag in BATCH[name]], dtype=torch.int32)
    assert torch.equal(artifact.lookup(values, lengths), artifact(BATCH).values)


def test_results_are_plain_tensors_of_their_own(artifact: Artifact) -> None:
    first = artifact(BATCH).values
    kept = first.clone()
    second = artifact(BATCH).values
    assert not first.requires_grad
    second.zero_()
    assert torch.equal(first, kept)
    assert torch.equal(artifact(BATCH).values, kept)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_lookup_works_in_every_gradient_mode(artifact: Artifact, mode: Callable[[], Any]) -> None:
    expected = artifact(BATCH).values
    with mode():
        assert torch.equal(artifact(BATCH).values, expected)


def test_eight_threads_share_one_artifact(artifact: Artifact) -> None:
    generator = np.random.default_rng(0)
    sizes = [artifact.manifest.table[feature.table].num_embeddings for feature in artifact.manifest.features]
    requests, expected = [], []
    for i in range(40):
        batch = i % 7
        bags = {
            name: [generator.integers(0, size, generator.integers(0, 9)).tolist() for _ in range(batch)]
            for name, size in zip(FEATURES, sizes, strict=True)
        }
        if i % 10 == 9:
            bags["user"] = [[300]] * batch
        requests.append(bags)
        expected.append(None if i % 10 == 9 and batch else artifact(bags).values)

    def serve(first: int) -> int:
        for round_ in range(200):
            i = (first * 5 + round_) % len(requests)
            if expected[i] is None:
                with pytest.raises(InvalidInputError, match=r"feature 'user', bag 0, position 0: id 300"):
                    artifact(requests[i])
            else:
                assert torch.equal(artifact(requests[i]).values, expected[i])
        return first

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(serve, range(8))) == list(range(8))


def test_a_representation_names_the_artifact_and_its_features(artifact: Artifact) -> None:
    short = artifact.manifest.artifact_id[:12]
    assert repr(artifact) == f"Artifact({short}, features=['user', 'item', 'last_item', 'tag', 'age'])"


# --- What the process around it has set ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weighted_artifact(build: Callable[..., Path]) -> Path:
    return build(edited_tables(lambda tables: tables[0].update(weighted=True)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_of_the_process_makes_no_difference(
    built_artifact: Path, weighted_artifact: Path, dtype: torch.dtype
) -> None:
    request = {name: [[0]] for name in FEATURES}
    weighted_request = {**request, "user": Jagged([0], [1], [1.0])}
    expected = load_artifact(weighted_artifact)(weighted_request).values
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(load_artifact(built_artifact)(request).values, expected)
        assert torch.equal(load_artifact(weighted_artifact)(weighted_request).values, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_default_device_of_the_process_makes_no_difference(
    built_artifact: Path, weighted_artifact: Path
) -> None:
    """As in a server that calls `torch.set_default_device("cuda")` for its dense model; "meta" needs no GPU."""
    request = {name: [[0]] for name in FEATURES}
    weighted_request = {**request, "user": Jagged([0], [1], [1.0])}
    expected = load_artifact(built_artifact)(request).values
    with torch.device("meta"):
        assert torch.equal(load_artifact(built_artifact)(request).values, expected)
        assert torch.equal(load_artifact(weighted_artifact)(weighted_request).values, expected)


# --- What it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backend": "aot_inductor"}, "no graph 'aot_inductor' for device 'cpu'; it has: torchscript for cpu"),
        ({"backend": "lite", "device": "tpu"}, "no graph 'lite' for device 'tpu'; it has: torchscript for cpu"),
    ],
)
def test_another_device_or_backend_is_refused_with_what_there_is(
    built_artifact: Path, options: dict[str, str], text: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"^the artifact has {re.escape(text)}$"):
        load_artifact(built_artifact, **options)  # type: ignore[arg-type]


def test_a_graph_of_other_rows_is_refused_by_its_bytes(artifact_copy: Path, build: Callable[..., Path]) -> None:
    other = build(edited_tables(lambda tables: tables[0].update(num_embeddings=301)))
    replace_graph(artifact_copy, (other / GRAPH).read_bytes())
    ours, theirs = (read_manifest(folder).weights_bytes for folder in (artifact_copy, other))
    assert theirs == ours + 16
    text = f"{GRAPH} was built for other rows: its weights_bytes is {theirs}, the manifest says {ours}"
    with pytest.raises(GraphError, match=f"^{re.escape(text)}"):
        load_artifact(artifact_copy)


@pytest.mark.parametrize(
    ("edit", "attribute"),
    [
        (lambda tables: tables[1].update(feature_names=["item"]), "weights_offsets"),
        (lambda tables: tables[1].update(feature_names=["item", "last_item", "first_item"]), "weights_offsets"),
        (lambda tables: tables.reverse(), "weights_offsets"),
        (lambda tables: tables[3].update(embedding_dim=8, serving_precision="fp16"), "weights_types"),
        (lambda tables: (tables[0].update(num_embeddings=299), tables.append(SIXTEEN_BYTES)), "weights_offsets"),
        (lambda tables: tables[0].update(num_embeddings=150, embedding_dim=16), "weights_offsets"),
        (lambda tables: tables[1].update(num_embeddings=123, embedding_dim=1), "num_embeddings"),
        (lambda tables: tables[0].update(pooling="mean"), "is_mean"),
        (lambda tables: tables[0].update(weighted=True), "is_weighted"),
    ],
    ids=[
        "fewer features",
        "more features",
        "order of features",
        "precision",
        "number of rows",
        "dims",
        "rows and dims",
        "pooling",
        "weights",
    ],
)
def test_a_graph_of_another_lookup_over_as_many_bytes_is_refused(
    artifact_copy: Path,
    build: Callable[..., Path],
    edit: Callable[[list[dict[str, Any]]], object],
    attribute: str,
) -> None:
    """Each would give wrong vectors, most of them without an error."""
    other = build(edited_tables(edit))
    assert read_manifest(other).weights_bytes == read_manifest(artifact_copy).weights_bytes
    replace_graph(artifact_copy, (other / GRAPH).read_bytes())
    with pytest.raises(GraphError, match=f"^{GRAPH} was built for other rows: its {attribute} is "):
        load_artifact(artifact_copy)


def test_an_unweighted_graph_of_a_weighted_artifact_is_refused(
    weighted_artifact: Path, built_artifact: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(weighted_artifact, tmp_path / "artifact"))
    replace_graph(folder, (built_artifact / GRAPH).read_bytes())
    with pytest.raises(GraphError, match=f"^{GRAPH} "):
        load_artifact(folder)


class Constant(torch.nn.Module):
    """Says all that the graph of an artifact has to say, and gives something else than it."""

    def __init__(self, graph: Path, pooled: torch.Tensor) -> None:
        super().__init__()
        original = torch.jit.load(graph)
        self.weights_bytes = int(original.weights_bytes)
        for name, value in original.named_buffers():
            self.register_buffer(name, value)
        self.register_buffer("pooled", pooled)

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.pooled


class Pair(Constant):
    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pooled, self.pooled


class NoLengths(Constant):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.pooled


class Raising(Constant):
    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.pooled.view(7, -1)


@pytest.mark.parametrize(
    ("kind", "pooled", "text"),
    [
        (Constant, torch.zeros(1, 34, dtype=torch.float64), "expected [1, 34] float32"),
        (Constant, torch.zeros(1, 33), "expected [1, 34] float32"),
        (Constant, torch.zeros(2, 34), "expected [1, 34] float32"),
        (Constant, torch.zeros(34), "expected [1, 34] float32"),
        (Pair, torch.zeros(1, 34), "gives a tuple, expected a tensor"),
        (NoLengths, torch.zeros(1, 34), "forward() expected at most 2 argument(s)"),
        (Raising, torch.zeros(1, 34), "shape '[7, -1]' is invalid"),
    ],
    ids=["float64", "too narrow", "two bags", "no batch", "two tensors", "no lengths", "an error"],
)
def test_a_graph_that_takes_or_gives_something_else_is_refused(
    artifact_copy: Path, kind: type[Constant], pooled: torch.Tensor, text: str
) -> None:
    scripted = torch.jit.script(kind(artifact_copy / GRAPH, pooled))
    replace_graph(artifact_copy, saved(torch.jit.save, scripted))
    with pytest.raises(GraphError, match=f"^{GRAPH} .*{re.escape(text)}"):
        load_artifact(artifact_copy)


class Identity(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Floats(Identity):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.zeros(64))


def saved(save: Callable[[Any, Any], None], what: object) -> bytes:
    buffer = io.BytesIO()
    save(what, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (lambda _: b"", "cannot be loaded: "),
        (lambda _: b"garbage", "cannot be loaded: "),
        (lambda _: b"\0" * 5000, "cannot be loaded: "),
        (lambda graph: graph[: len(graph) // 2], "cannot be loaded: "),
        (lambda _: saved(torch.save, {"a": 1}), "cannot be loaded: "),
        (
            lambda _: saved(lambda m, f: torch.jit.save(torch.jit.script(m), f), Identity()),
            "has no uint8 attribute 'weights'",
        ),
        (
            lambda _: saved(lambda m, f: torch.jit.save(torch.jit.script(m), f), Floats()),
            "has no uint8 attribute 'weights'",
        ),
    ],
    ids=["empty", "text", "zeros", "half", "state dict", "another module", "float weights"],
)
def test_a_graph_file_that_is_no_lookup_is_refused(
    artifact_copy: Path, data: Callable[[bytes], bytes], text: str
) -> None:
    replace_graph(artifact_copy, data((artifact_copy / GRAPH).read_bytes()))
    with pytest.raises(GraphError, match=f"^{GRAPH} {text}") as caught:
        load_artifact(artifact_copy)
    assert len(str(caught.value).splitlines()) == 1
    if text.startswith("cannot"):
        built_with = f"it was built with torch {torch.__version__} and FBGEMM "
        assert re.search(
            re.escape(built_with) + rf"\S+, this is torch {re.escape(torch.__version__)}$", str(caught.value)
        )


def test_a_library_of_operators_that_is_not_there_is_refused(artifact_copy: Path) -> None:
    def change(manifest: Manifest) -> Manifest:
        return replace(manifest, graphs=[replace(manifest.graphs[0], operator_libraries=["fbgemm_gpu_none"])])

    seal(artifact_copy, change)
    text = rf"^{GRAPH} needs \S+/fbgemm_gpu/fbgemm_gpu_none.so, which cannot be loaded: .*it was built with torch "
    with pytest.raises(GraphError, match=text):
        load_artifact(artifact_copy)


# --- In a serving image ----------------------------------------------------------------------------------------------

# What torch itself needs, and the FBGEMM kernels: no torchrec, no pydantic, no typer, no safetensors, no export.
IMAGE = """torch torchgen functorch numpy numpy.libs nvidia triton typing_extensions.py filelock sympy mpmath networkx
jinja2 markupsafe fsspec setuptools"""


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program where nothing else can be imported than `IMAGE`, `runtime_py` and what is named."""

    def serve(program: str, *arguments: Path | str, packages: str = "") -> subprocess.CompletedProcess[str]:
        image = tmp_path / "image"
        image.mkdir()
        installed = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
        for name in f"{IMAGE} {packages}".split():
            found = [folder / name for folder in installed if (folder / name).exists()]
            if found:
                (image / name).symlink_to(found[0])
        (image / "runtime_py").symlink_to(Path(__file__).parents[1] / "runtime_py")
        return subprocess.run(
            [sys.executable, "-S", "-P", "-c", program, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(image)},
        )

    return serve


def test_torch_numpy_and_the_kernels_are_all_that_serving_needs_and_the_first_call_is_warm(
    serve: Callable[..., subprocess.CompletedProcess[str]], built_artifact: Path, artifact: Artifact
) -> None:
    program = """
import importlib.util, json, sys, time
assert not any(map(importlib.util.find_spec, ["torchrec", "pydantic", "typer", "safetensors", "export"]))
import torch
from runtime_py import load_artifact
torch.set_num_threads(1)
artifact = load_artifact(sys.argv[1])
request = json.loads(sys.argv[2])
seconds = []
for _ in range(5):
    start = time.thread_time()
    values = artifact(request).values
    seconds.append(time.thread_time() - start)
print(json.dumps({"values": values.tolist(), "seconds": seconds}))
"""
    result = serve(program, built_artifact, json.dumps(BATCH), packages="fbgemm_gpu")
    assert result.returncode == 0, result.stderr
    output = json.loads(result.stdout)
    assert torch.equal(torch.tensor(output["values"]), artifact(BATCH).values)
    # Time on a core, since the machine is shared. Without a warm-up the first call takes 30 ms, later ones 0.1.
    first, *later = output["seconds"]
    assert first < 0.005 + 10 * sorted(later)[len(later) // 2], output["seconds"]


def test_without_fbgemm_the_error_says_what_to_install(
    serve: Callable[..., subprocess.CompletedProcess[str]], built_artifact: Path
) -> None:
    program = """
import sys
from runtime_py import GraphError, load_artifact, verify_artifact
print(verify_artifact(sys.argv[1]).artifact_id)
try:
    load_artifact(sys.argv[1])
except GraphError as error:
    print(error)
"""
    result = serve(program, built_artifact)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(built_artifact)
    libraries = ", ".join(manifest.graphs[0].operator_libraries)
    assert result.stdout.splitlines() == [
        manifest.artifact_id,
        f"{GRAPH} needs FBGEMM's operators ({libraries}), and no fbgemm_gpu is installed; install fbgemm-gpu-cpu or "
        f"fbgemm-gpu; it was built with torch {manifest.graphs[0].torch} and FBGEMM {manifest.graphs[0].fbgemm_gpu}, "
        f"this is torch {torch.__version__}",
    ]


# --- What it costs ---------------------------------------------------------------------------------------------------


def test_a_graph_holds_no_rows(many: Artifact, built_artifact: Path) -> None:
    file = many.manifest.file[GRAPH]
    assert many.manifest.weights_bytes > 2_000_000
    assert file.bytes < 64_000
    assert (built_artifact / GRAPH).stat().st_size < 64_000


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """An artifact of one table of 5 GiB: a hole, but for two rows. Its rows' digests are not right."""
    from export.lookup import make_lookup
    from export.torchscript import write_torchscript

    rows, dim = 5 * 2**30 // 128, 64
    digest = Digest("sha256-rows-1048576", "a" * 64)
    tables = [Table("huge", rows, dim, "fp16", 128, 0, digest)]
    features = [Feature("huge", "huge", "sum", False)]
    header = encode_header(tables)
    folder = tmp_path / "huge"
    for name in ("weights", "graphs"):
        (folder / name).mkdir(parents=True)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 5 * 2**30)
        for row in (2**32 // 128, rows - 1):  # the first row beyond 4 GiB, and the last one
            file.seek(len(header) + row * 128)
            file.write(np.full(dim, row % 1000, np.float16).tobytes())
    write_torchscript(make_lookup(tables, features), folder / GRAPH)
    graph = (folder / GRAPH).read_bytes()
    manifest = Manifest(
        format_version=1,
        artifact_id="",
        tables=tables,
        features=features,
        outputs=[Output("huge", dim)],
        surgery=None,
        weighted=False,
        weights_offset_bytes=len(header),
        weights_bytes=5 * 2**30,
        vocabularies=[],
        graphs=[
            Graph(
                "torchscript",
                "cpu",
                GRAPH,
                ["fbgemm_gpu_tbe_inference", "fbgemm_gpu_sparse_async_cumsum"],
                torch.__version__,
                "1",
            )
        ],
        files=[
            File(WEIGHTS, len(header) + 5 * 2**30, Digest("sha256-tables", "b" * 64)),
            File(GRAPH, len(graph), sha256(graph)),
        ],
        accuracy=[
            TableAccuracy(
                *(
                    "huge",
                    "fp16",
                    rows,
                    rows,
                    0,
                    0,
                    16.0,
                    0.0,
                    0.0,
                    0.0,
                    None,
                    None,
                    None,
                    None,
                    None,
                    0,
                    0,
                    0,
                    None,
                    None,
                )
            )
        ],
        choices=[],
        parity=ParitySummary(0, 0, "", 0.0, 0.0),
        provenance=Provenance([], {}, {}, ""),
        manifest_digest=Digest("", ""),
    )
    manifest = replace(manifest, artifact_id=compute_artifact_id(manifest))
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return folder


def read_bytes_so_far() -> int:
    """What this process has asked to read of any file, cached or not."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_a_table_beyond_4_gib_is_loaded_without_being_read_and_all_its_rows_are_found(huge: Path) -> None:
    before = read_bytes_so_far()
    artifact = load_artifact(huge, verify="sizes")
    assert read_bytes_so_far() - before < 1_000_000

    rows = artifact.manifest.tables[0].num_embeddings
    beyond = 2**32 // 128
    found = artifact({"huge": [[0], [beyond - 1], [beyond], [beyond, rows - 1]]}).values
    expected = [0, 0, beyond % 1000, beyond % 1000 + (rows - 1) % 1000]
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float32).view(4, 1).expand(4, 64))
    with pytest.raises(InvalidInputError, match=f"id {rows} is outside"):
        artifact({"huge": [[rows]]})


def test_one_mapping_serves_both_ways_of_treating_ids(artifact_copy: Path) -> None:
    strict = load_artifact(artifact_copy)
    lenient = strict.with_invalid_ids("zero")
    request = {feature.name: [[0, 10**9]] for feature in strict.manifest.features}
    alone = {feature.name: [[0]] for feature in strict.manifest.features}
    with pytest.raises(InvalidInputError):
        strict(request)
    means = {feature.name for feature in strict.manifest.features if feature.pooling == "mean"}
    for key, values in lenient(request).to_dict().items():
        assert torch.equal(values * (2 if key in means else 1), strict(alone)[key])
    with pytest.raises(ValueError, match="invalid_ids must be 'error', 'zero' or 'row:<k>' with a row k, got 'row'"):
        strict.with_invalid_ids("row")
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert sum(str(artifact_copy / "weights") in line for line in maps) == 1


def test_pages_that_are_released_are_mapped_again_when_they_are_needed(artifact_copy: Path) -> None:
    def resident() -> int:
        text = Path("/proc/self/smaps").read_text()
        ours = text[text.index(str(artifact_copy / "weights")) :]
        return int(re.search(r"Rss:\s+(\d+) kB", ours)[1])

    artifact = load_artifact(artifact_copy)
    request = {feature.name: [[0]] for feature in artifact.manifest.features}
    before = artifact(request).values
    assert resident() > 0
    artifact.release_pages()
    assert resident() == 0
    assert torch.equal(artifact(request).values, before)
    assert resident() > 0


FORK_AFTER_A_LOAD = """
import os, signal, sys
import numpy as np
import torch
from runtime_py import load_artifact

assert torch.get_num_threads() > 1
artifact = load_artifact(sys.argv[1])
features = len(artifact.manifest.features)
values = torch.from_numpy(np.zeros(features * 20_000, np.int64))  # torch would start threads for them
lengths = torch.from_numpy(np.full(features * 4_000, 5, np.int32))
child = os.fork()
if not child:
    signal.alarm(20)  # where it waits for threads that only its parent has
    artifact.lookup(values, lengths)
    artifact.graph(values, lengths)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("kind", ["plain", "with a vocabulary", "with a surgery"])
def test_a_worker_may_be_forked_after_the_load(
    request: pytest.FixtureRequest, built_artifact: Path, vocabulary_artifact: Path, tmp_path: Path, kind: str
) -> None:
    folder = {"plain": built_artifact, "with a vocabulary": vocabulary_artifact}.get(kind)
    if folder is None:
        tables = [{"name": "a", "num_embeddings": 500, "embedding_dim": 32, "data_type": "fp32"}]
        module = NormalizeAndProject(keys=["a"], in_features=32, out_features=16)
        torch.save(state_dict(make_rows(tables)) | surgery_state(module), tmp_path / "s.pt")
        surgery = {"module": "export.surgery:NormalizeAndProject"}
        surgery["kwargs"] = {"keys": ["a"], "in_features": 32, "out_features": 16}
        config = write_config(tmp_path / "r.yaml", tmp_path / "s.pt", tables, surgery=surgery)
        folder = build_artifact(config, tmp_path / "artifact", workers=1).artifact
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", FORK_AFTER_A_LOAD, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_file_that_is_cut_between_its_check_and_its_mapping_is_refused(
    artifact_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read behind its end would be to be killed."""
    weights = artifact_copy / WEIGHTS
    size = weights.stat().st_size
    monkeypatch.setattr(runtime_artifact, "_load_operators", lambda graph: os.truncate(weights, 5000))
    text = (
        f"{weights}: is 5000 bytes, expected {size}: it changed while it was loaded; put another version in its place"
    )
    with pytest.raises(WeightFileError, match=f"^{re.escape(text)}"):
        load_artifact(artifact_copy)


def test_a_device_of_torch_is_a_device(built_artifact: Path) -> None:
    assert load_artifact(built_artifact, device=torch.device("cpu")).backend == "torchscript"
    with pytest.raises(UnsupportedError, match=r"^the artifact has no graph 'torchscript' for device 'tpu'; it has: "):
        load_artifact(built_artifact, device="tpu")
