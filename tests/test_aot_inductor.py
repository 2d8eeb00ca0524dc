"""The AOTInductor graph: the same answers as TorchScript over the same mapping, and refusals before anything is opened."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import make_rows, run_export, state_dict, write_config
from test_triton import FakeServer

from export import build_artifact
from export.aot_inductor import _unpack
from export.errors import ConfigError, ExportError
from export.triton import write_repository
from runtime_py import DigestMismatchError, GraphError, UnsupportedError, aot_inductor, load_artifact, verify_artifact
from runtime_py.aot_inductor import load_aot_inductor
from runtime_py.golden import read_cases
from runtime_py.manifest import AOT_INDUCTOR_FILES
from runtime_py.manifest_reader import read_manifest
from runtime_py.team import Team

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the graph with"),
]

TABLES = [
    {"name": "a", "num_embeddings": 500, "embedding_dim": 64, "data_type": "fp32", "serving_precision": "int8"},
    {
        "name": "b",
        "num_embeddings": 30,
        "embedding_dim": 8,
        "data_type": "fp16",
        "serving_precision": "int4",
        "pooling": "mean",
        "feature_names": ["b", "last_b"],
    },
    {"name": "c", "num_embeddings": 9, "embedding_dim": 16, "data_type": "fp32", "serving_precision": "int2"},
    {"name": "d", "num_embeddings": 40, "embedding_dim": 3, "data_type": "fp32", "weighted": True},
    {"name": "e", "num_embeddings": 1, "embedding_dim": 5, "data_type": "fp32", "serving_precision": "fp32"},
]
LIBRARY = f"graphs/lookup.cpu/{AOT_INDUCTOR_FILES[0]}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    torch.save(state_dict(make_rows(TABLES, seed=2)), folder / "s.pt")
    serving = {"graphs": ["torchscript", "aot_inductor"]}
    return build_artifact(
        write_config(folder / "r.yaml", folder / "s.pt", TABLES, serving=serving), folder / "artifact", workers=1
    )


def test_both_graphs_went_through_the_gate_and_take_less_than_4_mb(built):
    manifest = built.manifest
    assert [(graph.backend, graph.isa) for graph in manifest.graphs] == [
        ("torchscript", None),
        ("aot_inductor", "x86-64-v3"),
    ]
    cases = json.loads((built.artifact / "reports/parity.json").read_text())["cases"]
    assert {case["graph"] for case in cases} == {"torchscript for cpu", "aot_inductor for cpu"}
    assert sum(file.bytes for file in manifest.files) - manifest.weights_bytes < 4_000_000
    listed = [file.path for file in manifest.files if file.path.startswith("graphs/lookup.cpu/")]
    assert listed == [f"graphs/lookup.cpu/{name}" for name in AOT_INDUCTOR_FILES]
    assert "aot_inductor for cpu (x86-64-v3), " in run_export("inspect", built.artifact).stdout


def test_a_large_request_is_shared_by_threads_and_answered_as_by_the_graph(built, monkeypatch):
    """Small ones are the graph's. 40,000 ids of rows of five precisions, weighted, one table pooled by mean."""
    alone, shared = (load_artifact(built.artifact, backend="aot_inductor", threads=threads) for threads in (1, 2))
    counts = []
    look_up = Team.look_up

    def record(self, values, *arguments, **options):
        counts.append(values.numel())
        return look_up(self, values, *arguments, **options)

    monkeypatch.setattr(Team, "look_up", record)
    features = built.manifest.features
    for bags in (10, 2000):
        generator = torch.Generator().manual_seed(bags)
        rows = torch.tensor([built.manifest.table[feature.table].num_embeddings for feature in features])
        values = (torch.rand(len(features), 5 * bags, generator=generator) * rows[:, None]).to(torch.int64).flatten()
        lengths = torch.full((len(features) * bags,), 5, dtype=torch.int32)
        weights = torch.randn(values.numel(), generator=generator)
        assert torch.equal(shared.lookup(values, lengths, weights), alone.lookup(values, lengths, weights))
    assert counts == [60_000]


def test_an_artifact_that_is_dropped_leaves_neither_its_mapping_nor_a_file_open(built):
    """torch never lets go of constants that it does not manage: it must be given what owns nothing."""
    loaded = load_artifact(built.artifact, backend="aot_inductor")
    weights = f"{built.artifact}/weights/tables.safetensors"
    assert weights in Path("/proc/self/maps").read_text()
    files = len(os.listdir("/proc/self/fd"))
    del loaded
    assert weights not in Path("/proc/self/maps").read_text()
    assert len(os.listdir("/proc/self/fd")) == files - 1


def test_it_answers_the_golden_cases_bit_for_bit_on_many_threads(built):
    loaded = load_artifact(built.artifact, backend="aot_inductor", invalid_ids="zero")
    cases = read_cases(built.artifact, built.manifest)

    def replay(_):
        for case in cases.values():
            pooled = loaded.lookup(*case.request)
            assert torch.equal(pooled.view(torch.int32), case.pooled.view(torch.int32))
        return len(cases)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(replay, range(200))) == {7}


@pytest.mark.parametrize("bags", [0, 1, 2, 500])
def test_any_number_of_bags_and_ids_is_answered_as_by_torchscript(built, bags):
    artifacts = [load_artifact(built.artifact, backend=backend) for backend in ("torchscript", "aot_inductor")]
    rows = {table["name"]: table["num_embeddings"] for table in TABLES}
    generator = torch.Generator().manual_seed(bags)
    features = artifacts[0].manifest.features
    lengths = torch.randint(0, 4, (len(features) * bags,), generator=generator, dtype=torch.int32)
    counts = lengths.view(len(features), -1).sum(1).tolist()
    values = torch.cat(
        [torch.randint(0, rows[f.table], (n,), generator=generator) for f, n in zip(features, counts, strict=True)]
    )
    weights = torch.randn(len(values), generator=generator)
    first, second = (artifact.lookup(values, lengths, weights) for artifact in artifacts)
    assert torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.fixture(scope="module")
def pooled_otherwise(tmp_path_factory):
    """Two artifacts whose compiled graphs, and nothing else, differ: sums, and means."""
    folder, artifacts = tmp_path_factory.mktemp("poolings"), {}
    table = {"name": "a", "num_embeddings": 9, "embedding_dim": 4, "data_type": "fp32"}
    torch.save(state_dict(make_rows([table])), folder / "s.pt")
    for pooling in ("sum", "mean"):
        serving = {"graphs": ["torchscript", "aot_inductor"]}
        tables = [table | {"pooling": pooling}]
        config = write_config(
            folder / f"{pooling}.yaml", folder / "s.pt", tables, serving=serving, parity={"batches": 1}
        )
        artifacts[pooling] = build_artifact(config, folder / pooling, workers=1).artifact
    return artifacts


@pytest.mark.parametrize("how", ["a link that moves on", "a folder that is replaced"])
def test_what_took_the_place_of_an_artifact_is_what_answers(pooled_otherwise, tmp_path, how):
    """The dynamic linker knows libraries by their path, and would give the first one again."""
    current = tmp_path / "current"
    request = torch.tensor([1, 2, 3]), torch.tensor([3], dtype=torch.int32)
    for pooling in ("sum", "mean", "sum"):
        if how == "a link that moves on":
            current.unlink(missing_ok=True)
            current.symlink_to(pooled_otherwise[pooling])
        else:
            if current.exists():
                shutil.rmtree(current)
            shutil.copytree(pooled_otherwise[pooling], current)
        compiled, scripted = (
            load_artifact(current, backend=backend).lookup(*request) for backend in ("aot_inductor", "torchscript")
        )
        assert torch.equal(compiled, scripted), pooling


def test_a_graph_of_another_pooling_is_refused(pooled_otherwise, tmp_path):
    """Its author has sealed it, so that no digest tells."""
    for pooling, other in (("sum", "mean"), ("mean", "sum")):
        manifest = read_manifest(pooled_otherwise[pooling])
        graph = next(graph for graph in manifest.graphs if graph.backend == "aot_inductor")
        weights = torch.zeros(manifest.weights_bytes, dtype=torch.uint8)
        with pytest.raises(GraphError, match=f"^{graph.path} was built for other rows: its constants are "):
            load_aot_inductor(manifest, graph, pooled_otherwise[other], weights)
        load_aot_inductor(manifest, graph, pooled_otherwise[pooling], weights)


def test_threads_whose_requests_are_no_contiguous_memory_do_not_wait_for_one_another(built):
    """A temporary tensor that is freed inside a compiled graph gives the interpreter's lock away: a deadlock."""
    done = subprocess.run(
        [sys.executable, "-c", STRIDED, built.artifact], capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "2000\n"), done.stderr


STRIDED = """
import sys, threading
import torch
from runtime_py import load_artifact

torch.set_num_threads(1)
artifact = load_artifact(sys.argv[1], backend="aot_inductor")
features = len(artifact.manifest.features)
values = torch.zeros(2 * features * 100, dtype=torch.int64)
lengths = torch.full((features,), 100, dtype=torch.int32)
weights = torch.ones(features * 100)
done = []

def ask():
    for _ in range(500):
        artifact.graph(values[::2], lengths, weights)
        done.append(None)

threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join(60)
print(len(done), flush=True)
"""


def test_lengths_that_change_after_their_check_are_not_read_again(built):
    loaded, scripted = (load_artifact(built.artifact, backend=backend) for backend in ("aot_inductor", "torchscript"))
    features = len(built.manifest.features)
    values, lengths = torch.zeros(2 * features, dtype=torch.int64), torch.full((features,), 2, dtype=torch.int32)
    weights = torch.ones(2 * features)
    expected = scripted.lookup(values, lengths, weights)
    measure = loaded._lookups.checker.measure

    def measure_and_change(*request):
        measured = measure(*request)
        lengths.fill_(100)
        return measured

    loaded._lookups.checker.measure = measure_and_change
    assert torch.equal(loaded.lookup(values, lengths, weights), expected)
    assert lengths[0] == 100


def test_another_number_of_weights_than_ids_is_refused_before_compiled_code_reads_them(built):
    graph = load_artifact(built.artifact, backend="aot_inductor").graph
    features = len(built.manifest.features)
    request = torch.zeros(features, dtype=torch.int64), torch.ones(features, dtype=torch.int32)
    for count in (0, features - 1, features + 1):
        with pytest.raises(ValueError, match=f"per_sample_weights: {count} weights for {features} values"):
            graph(*request, torch.ones(count))
    assert graph(*request, torch.ones(features)).shape[0] == 1


def test_a_server_maps_the_rows_once_writes_no_temporary_file_and_imports_no_compiler(built, tmp_path):
    program = """
import os, sys, tempfile
before = set(os.listdir(tempfile.gettempdir()))
from runtime_py import load_artifact
artifacts = [load_artifact(sys.argv[1], backend=name) for name in ("aot_inductor",)]
print(len(set(os.listdir(tempfile.gettempdir())) - before))
print(sum("tables.safetensors" in line for line in open("/proc/self/maps")))
print(any(name.startswith(("torch._inductor.codecache", "torch._dynamo", "fbgemm_gpu")) for name in sys.modules))
"""
    command = [sys.executable, "-c", program, built.artifact]
    own = {**os.environ, "TMPDIR": str(tmp_path)}  # other processes write to the common one
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    assert done.stdout.split() == ["0", "1", "False"]


def test_in_a_model_repository_for_triton_it_gives_the_golden_answers_bit_for_bit(built, tmp_path, monkeypatch):
    [model] = write_repository(built.artifact, tmp_path / "models", graphs=["aot_inductor"])
    server = FakeServer(monkeypatch, tmp_path / "models" / model.name, parameters={"invalid_ids": "zero"})
    for case in read_cases(built.artifact, built.manifest).values():
        [response] = server.ask(case.request)
        pooled = torch.from_numpy(response.output_tensors[0].array)
        assert torch.equal(pooled.view(torch.int32), case.pooled.view(torch.int32))


def test_an_instruction_set_that_the_cpu_lacks_is_refused_before_the_library_is_opened(built, monkeypatch):
    monkeypatch.setattr(aot_inductor, "_cpu_flags", lambda: aot_inductor._FLAGS["x86-64-v3"] - {"fma", "avx2"})
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", None)  # would be called to open it
    with pytest.raises(
        UnsupportedError, match=r"graphs/lookup.cpu needs a CPU of x86-64-v3; this one lacks avx2, fma; use"
    ):
        load_artifact(built.artifact, backend="aot_inductor")
    assert load_artifact(built.artifact).manifest == built.manifest


def test_a_build_for_an_instruction_set_that_this_machine_lacks_is_one_line(tmp_path, monkeypatch):
    torch.save(state_dict(make_rows(TABLES, seed=2)), tmp_path / "s.pt")
    serving = {"graphs": ["torchscript", "aot_inductor"], "isa": "x86-64-v4"}
    config = write_config(tmp_path / "r.yaml", tmp_path / "s.pt", TABLES, serving=serving)
    monkeypatch.setattr(aot_inductor, "_cpu_flags", lambda: aot_inductor._FLAGS["x86-64-v3"])
    with pytest.raises(ConfigError, match=r"serving.isa: needs a CPU of x86-64-v4; this one lacks avx512bw"):
        build_artifact(config, tmp_path / "artifact", workers=1)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"aot_inductor needs a C\+\+ compiler to build \(not to serve\); install g\+\+"
    ):
        build_artifact(config, tmp_path / "artifact", workers=1)
    assert sorted(os.listdir(tmp_path)) == ["r.yaml", "s.pt"]


@pytest.mark.parametrize("name", AOT_INDUCTOR_FILES)
def test_a_damaged_file_of_the_package_is_refused_by_name(built, tmp_path, name):
    copy = Path(shutil.copytree(built.artifact, tmp_path / "artifact"))
    path = copy / "graphs/lookup.cpu" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatchError, match=name.rpartition("/")[2]):
        load_artifact(copy, backend="aot_inductor")


def test_a_library_that_is_none_is_one_clear_error(built, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(built.artifact, tmp_path / "artifact"))
    (copy / LIBRARY).write_bytes(bytes((copy / LIBRARY).stat().st_size))
    monkeypatch.setattr("runtime_py.verify._check_contents", lambda *_: None)
    with pytest.raises(GraphError, match=r"graphs/lookup.cpu cannot be loaded: .*it was built with torch "):
        load_artifact(copy, backend="aot_inductor")


def test_an_artifact_without_the_graph_says_what_it_has(built_artifact):
    with pytest.raises(UnsupportedError, match="no graph 'aot_inductor' for device 'cpu'; it has: torchscript for cpu"):
        load_artifact(built_artifact, backend="aot_inductor")


@pytest.mark.parametrize("name", ["/etc/lookup.wrapper.so", "a/../../b.wrapper.so", "..\\c.wrapper.so"])
def test_a_package_that_leaves_its_folder_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "l.pt2", "w") as archive:
        archive.writestr(name, b"")
    with pytest.raises(ExportError, match="torch packed a file that leaves its folder"):
        _unpack(tmp_path / "l.pt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_artifact_id_tells_kinds_of_graphs_apart_and_not_compilations(built, tmp_path):
    torch.save(state_dict(make_rows(TABLES, seed=2)), tmp_path / "s.pt")
    one = build_artifact(write_config(tmp_path / "r.yaml", tmp_path / "s.pt", TABLES), tmp_path / "one", workers=1)
    assert one.manifest.artifact_id != built.manifest.artifact_id
    assert verify_artifact(built.artifact).artifact_id == built.manifest.artifact_id
