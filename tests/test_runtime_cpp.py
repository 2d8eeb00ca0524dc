"""The C++ loader: it answers as the Python loader does, bit for bit, and refuses what that refuses, in its words.

Everything goes through `runtime_cpp/example/serve.cpp`, which is built once. The Python loader is the oracle: where a test
damages an artifact or a request, both must say the same line.
"""

import fcntl
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import make_rows, state_dict, write_config, write_entities

from runtime_py import ArtifactError, InvalidInputError, load_artifact, verify_artifact
from runtime_py.manifest import compute_artifact_id
from runtime_py.manifest_reader import read_manifest

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[1] / "runtime_cpp"
OPERATORS = Path(importlib.util.find_spec("fbgemm_gpu").submodule_search_locations[0])
ZEROS = "0" * 64
WEIGHTS = "weights/tables.safetensors"
GOLDEN = "golden/cases.safetensors"
GRAPH = "graphs/lookup.torchscript.pt"
USERS = "vocab/user.safetensors"

# Every precision, both poolings, weights, a table of two features, a vocabulary, a name that is escaped in the header.
TABLES = [
    {
        "name": "user",
        "num_embeddings": 50,
        "embedding_dim": 16,
        "data_type": "fp32",
        "serving_precision": "int8",
        "weighted": True,
    },
    {
        "name": "item",
        "num_embeddings": 41,
        "embedding_dim": 8,
        "data_type": "fp32",
        "serving_precision": "int4",
        "feature_names": ["item", "last_item"],
        "pooling": "mean",
    },
    {"name": "tag", "num_embeddings": 33, "embedding_dim": 16, "data_type": "fp32", "serving_precision": "int2"},
    {"name": 'größe "\\"', "num_embeddings": 9, "embedding_dim": 3, "data_type": "fp16", "pooling": "mean"},
    {"name": "age", "num_embeddings": 1, "embedding_dim": 4, "data_type": "fp32", "serving_precision": "fp32"},
]
FEATURES = 6


def missing_tool():
    """Why the example cannot be built here; empty where it can."""
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            return f"no {tool}"
    for header, package in (("nlohmann/json.hpp", "nlohmann-json3-dev"), ("openssl/evp.h", "libssl-dev")):
        probe = ["g++", "-x", "c++", "-fsyntax-only", "-"]
        if subprocess.run(probe, input=f"#include <{header}>", capture_output=True, text=True, check=False).returncode:
            return f"no {header} (Debian: {package})"
    return ""


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder for what is compiled once for all workers of xdist."""
    reason = missing_tool()
    if reason:
        pytest.skip(reason)
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def build(shared):
    """The folder of the built example, and what the compiler said."""
    folder = shared / "runtime_cpp"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        log = folder / "log"
        if not log.exists():
            configure = [
                *("cmake", "-S", SOURCE, "-B", folder, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"),
                "-DCMAKE_CXX_FLAGS_RELEASE=-O1",  # half the time that -O3 takes
            ]
            output = ""
            for command in (configure, ["cmake", "--build", folder]):
                done = subprocess.run(
                    [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
                )
                assert done.returncode == 0, done.stdout
                output = done.stdout
            log.write_text(output)
    return folder, log.read_text()


@pytest.fixture(scope="session")
def loader(shared):
    """Runs tests/loader.cpp, built as the README builds a server without CMake."""
    program = shared / "loader"
    home = Path(torch.__file__).parent
    with program.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            command = [
                *("g++", "-std=c++20", "-O0", "-I", SOURCE / "include", "-isystem", home / "include"),
                *("-isystem", home / "include/torch/csrc/api/include", Path(__file__).parent / "loader.cpp"),
                *("-L", home / "lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"),
                *("-lcrypto", "-ldl", "-lpthread", f"-Wl,-rpath,{home}/lib", "-o", program),
            ]
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

    def run(*arguments):
        command = [program, OPERATORS, *arguments]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def serve(build):
    """Runs the example on an artifact, as a user does."""

    def run(artifact, *arguments, operators=OPERATORS):
        command = [build[0] / "serve", artifact, "--operators", operators, *arguments]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def every_kind(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every kind")
    write_entities(folder / "entities/part-0.parquet", np.arange(100, 140))
    tables = [TABLES[0] | {"vocab": str(folder / "entities")}, *TABLES[1:]]
    torch.save(state_dict(make_rows(TABLES)), folder / "s.pt")
    from export import build_artifact

    serving = {"precision": "fp16", "graphs": ["torchscript", "aot_inductor"]}
    return build_artifact(
        write_config(folder / "r.yaml", folder / "s.pt", tables, serving=serving), folder / "artifact", workers=1
    ).artifact


@pytest.fixture
def copy(every_kind, tmp_path):
    """An artifact to damage."""
    return Path(shutil.copytree(every_kind, tmp_path / "artifact"))


def refused(done):
    """The one line of an error."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").removesuffix("\n")


def refusal_of_python(artifact):
    with pytest.raises(ArtifactError) as caught:
        verify_artifact(artifact)
    return str(caught.value)


def seal(document):
    """The document as a manifest with a fresh digest."""
    document["manifest_digest"]["value"] = ZEROS
    text = json.dumps(document)
    assert text.count(ZEROS) == 1
    return text.replace(ZEROS, hashlib.sha256(text.encode()).hexdigest())


# --- Building --------------------------------------------------------------------------------------------------------


def test_our_code_compiles_without_a_warning(build):
    assert "warning:" not in build[1]


# --- Replaying -------------------------------------------------------------------------------------------------------


def test_the_golden_cases_are_replayed(serve, built_artifact):
    done = serve(built_artifact, "replay")
    assert (done.returncode, done.stdout) == (0, f"{built_artifact}: 7 golden cases bit for bit\n"), done.stderr


@pytest.mark.parametrize("backend", ["torchscript", "aot_inductor"])
@pytest.mark.parametrize("options", [[], ["--no-digests"], ["--threads", "4"]])
def test_every_precision_and_pooling_is_replayed(serve, every_kind, backend, options):
    done = serve(every_kind, "--backend", backend, *options, "replay")
    assert (done.returncode, done.stdout) == (0, f"{every_kind}: 7 golden cases bit for bit\n"), done.stderr


def test_the_committed_artifact_is_replayed(serve):
    done = serve(SOURCE.parent / "artifacts/golden/format-1", "replay")
    assert done.returncode == 0, done.stderr


def test_a_changed_answer_is_named(serve, copy):
    tensors = load_file(copy / GOLDEN)
    tensors["04 duplicate ids/pooled"].view(torch.int32)[1, 17] ^= 1
    save_file(tensors, copy / GOLDEN)
    document = json.loads((copy / "manifest.json").read_text())
    entry = next(file for file in document["files"] if file["path"] == GOLDEN)
    entry["digest"]["value"] = hashlib.sha256((copy / GOLDEN).read_bytes()).hexdigest()
    entry["bytes"] = (copy / GOLDEN).stat().st_size
    (copy / "manifest.json").write_text(seal(document))
    line = refused(serve(copy, "replay"))
    start = f"{copy}: golden case '04 duplicate ids': output 'item', bag 1: column 17 is "
    assert re.fullmatch(
        re.escape(start) + r"\S+, and was \S+ when the artifact was built; compare the versions in .*", line
    )


# --- Damage ----------------------------------------------------------------------------------------------------------


def flip(name, position):
    def damage(artifact):
        data = bytearray((artifact / name).read_bytes())
        data[position] ^= 1
        (artifact / name).write_bytes(data)

    return damage


DAMAGES = {
    "manifest": lambda artifact: (artifact / "manifest.json").write_bytes(
        (artifact / "manifest.json").read_bytes().replace(b'"built_at": "2', b'"built_at": "3')
    ),
    "rows": flip(WEIGHTS, 4096 + 100),
    "last row": flip(WEIGHTS, -1),
    "header of the rows": flip(WEIGHTS, 20),
    "vocabulary": flip(USERS, 4096 + 3),
    "header of the vocabulary": flip(USERS, 20),
    "graph": flip(GRAPH, 1000),
    "library": flip("graphs/lookup.cpu/data/aotinductor/model/lookup.wrapper.so", 1000),
    "golden cases": flip(GOLDEN, -1),
    "report": flip("reports/parity.json", 10),
    "two reports": lambda artifact: [
        flip(name, 10)(artifact) for name in ("reports/parity.json", "reports/accuracy.json")
    ],
    "extra file": lambda artifact: (artifact / "graphs/notes.txt").write_text("hello"),
    "extra folder": lambda artifact: (artifact / "empty").mkdir(),
    "link": lambda artifact: (
        (artifact / GRAPH).rename(artifact.parent / "graph"),
        (artifact / GRAPH).symlink_to(artifact.parent / "graph"),
    ),
    "missing file": lambda artifact: (artifact / GRAPH).unlink(),
    "missing rows": lambda artifact: (artifact / WEIGHTS).unlink(),
    "longer": lambda artifact: (artifact / WEIGHTS).write_bytes((artifact / WEIGHTS).read_bytes() + b"1"),
    "no manifest": lambda artifact: (artifact / "manifest.json").unlink(),
    "manifest is a link": lambda artifact: (
        (artifact / "manifest.json").rename(artifact.parent / "manifest"),
        (artifact / "manifest.json").symlink_to(artifact.parent / "manifest"),
    ),
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_in_the_words_of_the_python_loader(serve, copy, damage):
    DAMAGES[damage](copy)
    assert refused(serve(copy, "replay")) == refusal_of_python(copy)


@pytest.mark.parametrize("damage", ["rows", "vocabulary"])
def test_without_digests_rows_are_not_read(serve, copy, damage):
    DAMAGES[damage](copy)
    assert serve(copy, "--no-digests", "lookup", "--lengths", "0,0,0,0,0,0", "--weights", "").returncode == 0


@pytest.mark.parametrize("damage", ["header of the rows", "graph", "library", "longer"])
def test_without_digests_the_rest_is_verified(serve, copy, damage):
    DAMAGES[damage](copy)
    assert refused(serve(copy, "--no-digests", "replay")) == refusal_of_python(copy)


def put(*path):
    """Sets a field of a document."""
    *steps, last, value = path

    def edit(document):
        for step in steps:
            document = document[step]
        document[last] = value

    return edit


EDITS = {
    "version": put("format_version", 2),
    "version as text": put("parity", "seed", 3),
    "unknown field": put("threads", 8),
    "unknown field inside": put("tables", 1, "color", "red"),
    "missing field": lambda document: document.pop("weighted"),
    "missing field inside": lambda document: document["graphs"][0].pop("isa"),
    "artifact id": put("artifact_id", "1" * 64),
    "two tables of one name": put("tables", 1, "name", "user"),
    "path outside": put("files", 0, "path", "../secrets"),
    "path that is not normalised": put("files", 0, "path", "a//b"),
    "manifest lists itself": put("files", 0, "path", "manifest.json"),
    "digest algorithm": put("files", 0, "digest", "algorithm", "md5"),
    "digest value": put("files", 0, "digest", "value", "F" * 64),
    "row bytes": put("tables", 0, "row_bytes", 21),
    "no rows": put("tables", 0, "num_embeddings", 0),
    "dimension": put("tables", 0, "embedding_dim", 17),
    "control character": put("tables", 2, "name", "a\x85b"),
    "offset": lambda document: (
        put("tables", 0, "offset_bytes", 8)(document),
        put("tables", 1, "offset_bytes", 0)(document),
    ),
    "weights": put("weights_bytes", 5),
    "accuracy": lambda document: document["accuracy"].reverse(),
    "precision of a figure": put("accuracy", 0, "serving_precision", "fp32"),
    "feature without a table": put("features", 0, "table", "nobody"),
    "output": put("outputs", 0, "dim", 5),
    "weighted": put("weighted", False),
    "no graph": put("graphs", []),
    "graph that is no file": put("graphs", 0, "path", WEIGHTS),
    "library name": put("graphs", 0, "operator_libraries", ["../evil"]),
    "vocabulary of nobody": put("vocabularies", 0, "table", "nobody"),
    "vocabulary of too many": put("vocabularies", 0, "entities", 51),
    "capacity": put("vocabularies", 0, "capacity", 40),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_manifest_is_refused_in_the_words_of_the_python_loader(serve, copy, edit):
    document = json.loads((copy / "manifest.json").read_text())
    EDITS[edit](document)
    (copy / "manifest.json").write_text(seal(document))
    if edit == "version as text":  # a harmless edit: what is sealed by the test is accepted
        assert serve(copy, "replay").returncode == 0
    else:
        assert refused(serve(copy, "replay")) == refusal_of_python(copy)


TEXTS = {
    "duplicate key": (lambda text: text.replace('"weighted": true', '"weighted": true, "weighted": true'), "twice"),
    "NUL at the end": (lambda text: text + "\0", "is damaged: not UTF-8 JSON"),
    "byte order mark": (lambda text: "\ufeff" + text, "is damaged: not UTF-8 JSON"),
    "not a number": (lambda text: text.replace('"seed": 0', '"seed": NaN'), "is damaged: not UTF-8 JSON"),
    "beyond float64": (lambda text: text.replace('"seed": 0', '"seed": 1e999'), "is damaged"),
    "a boolean is no integer": (lambda text: text.replace('"seed": 0', '"seed": false'), "parity.seed: expected"),
    "an integer is no number": (
        lambda text: re.sub(r'"quantization_max_error": \S+,', '"quantization_max_error": 1,', text),
        "parity.quantization_max_error: expected",
    ),
    "an integer beyond 64 bits is no number": (
        lambda text: re.sub(r'"quantization_max_error": \S+,', f'"quantization_max_error": {2**64},', text),
        f"is damaged: {2**64} is beyond 64 bits",
    ),
    "an integer beyond 64 bits that nobody reads": (
        lambda text: text.replace('"mode": "inference"', f'"mode": {-(2**63) - 1}'),
        f"is damaged: {-(2**63) - 1} is beyond 64 bits",
    ),
    "101 levels": (
        lambda text: text.replace('"mode": "inference"', f'"mode": {"[" * 98}{"]" * 98}'),
        "is damaged: nested deeper than 100",
    ),
    "a vocabulary of 2**59 - 1 slots": (
        lambda text: re.sub(r'"capacity": \d+', f'"capacity": {2**59 - 1}', text),
        "more bytes than 64 bits can count",
    ),
    "half of a surrogate pair": (lambda text: text.replace('"seed": 0', '"seed": "\\ud800"'), "not UTF-8 JSON"),
    "deep": (lambda text: text.replace('"seed": 0', f'"seed": {"[" * 5000}{"]" * 5000}'), "is damaged"),
    "a list": (lambda text: "[]", "is damaged: expected an object"),
    "nothing": (lambda text: "", "is damaged: not UTF-8 JSON"),
}


@pytest.mark.parametrize("edit", TEXTS)
def test_what_is_no_strict_json_is_refused(serve, copy, edit):
    change, expected = TEXTS[edit]
    text = re.sub(
        r"(sha256-zeroed\",\s*\"value\": \")[0-9a-f]{64}", rf"\g<1>{ZEROS}", (copy / "manifest.json").read_text()
    )
    changed = change(text)
    assert changed != text
    (copy / "manifest.json").write_text(changed.replace(ZEROS, hashlib.sha256(changed.encode()).hexdigest()))
    assert f"{copy}/manifest.json: " in refusal_of_python(copy)
    line = refused(serve(copy, "replay"))
    assert line.startswith(f"{copy}/manifest.json: ")
    assert expected in line


def test_the_largest_numbers_and_the_deepest_nesting_are_read_as_python_reads_them(serve, copy):
    document = json.loads((copy / "manifest.json").read_text())
    deep: list = []
    for _ in range(95):
        deep = [deep]
    numbers = [2**63 - 1, -(2**63), 1e308, 5e-324, -0.0, 0, "}]-9" * 200, '\\"', deep]
    document["provenance"]["configuration"] |= {"mode": numbers}
    (copy / "manifest.json").write_text(seal(document))
    load_artifact(copy)
    done = serve(copy, "replay")
    assert done.returncode == 0, done.stderr


def test_an_isa_of_a_graph_that_is_not_compiled_is_refused(serve, copy):
    document = json.loads((copy / "manifest.json").read_text())
    document["graphs"][0]["isa"] = "x86-64-v3"
    (copy / "manifest.json").write_text(seal(document))
    assert "graph 'torchscript': isa is 'x86-64-v3'; " in refused(serve(copy, "replay"))


def test_an_instruction_set_that_nobody_knows_is_refused_before_the_library_is_opened(serve, copy):
    document = json.loads((copy / "manifest.json").read_text())
    document["graphs"][1]["isa"] = "x86-64-v9"
    (copy / "manifest.json").write_text(seal(document))
    with pytest.raises(ArtifactError) as caught:
        load_artifact(copy, backend="aot_inductor")
    assert refused(serve(copy, "--backend", "aot_inductor", "replay")) == str(caught.value)


def test_a_graph_for_other_rows_is_refused(serve, copy, built_artifact):
    shutil.copy(built_artifact / GRAPH, copy / GRAPH)
    document = json.loads((copy / "manifest.json").read_text())
    entry = next(file for file in document["files"] if file["path"] == GRAPH)
    entry["digest"]["value"] = hashlib.sha256((copy / GRAPH).read_bytes()).hexdigest()
    entry["bytes"] = (copy / GRAPH).stat().st_size
    (copy / "manifest.json").write_text(seal(document))
    with pytest.raises(ArtifactError) as caught:
        load_artifact(copy)
    assert refused(serve(copy, "replay")) == str(caught.value)


def test_another_folder_of_operators_is_refused(serve, built_artifact, tmp_path):
    line = refused(serve(built_artifact, "replay", operators=tmp_path))
    library = tmp_path / "fbgemm_gpu_tbe_inference.so"
    assert line.startswith(f"{GRAPH} needs {library}, which cannot be loaded: ")
    assert "it was built with torch " in line


def test_a_backend_that_the_artifact_lacks_is_refused(serve, built_artifact):
    line = refused(serve(built_artifact, "--backend", "aot_inductor", "replay"))
    assert line == "the artifact has no graph 'aot_inductor' for device 'cpu'; it has: torchscript for cpu"


# --- Requests --------------------------------------------------------------------------------------------------------

# values, lengths, weights; of features user (50 rows, weighted), item, last_item (41), tag (33), größe (9), age (1).
INVALID = {
    "id": ([0, 1, 2, 3, 4, 1], [1, 1, 1, 1, 1, 1], [1.0] * 6),
    "ids of two features": ([50, -1, 40, 41, 7], [0, 3, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0], [1.0] * 5),
    "smallest id": ([1, 2, -(2**63)], [1, 1, 1, 0, 0, 0], [1.0] * 3),
    "negative length": ([1, 2], [1, 1, 0, 0, 0, 0, 0, -1, 0, 0, 0, 1], [1.0] * 2),
    "long length": ([1], [0, 0, 2**31, 0, 0, 0], [1.0]),
    "sum": ([1, 2], [1, 1, 1, 0, 0, 0], [1.0] * 2),
    "features": ([1], [1, 0, 0, 0, 0], [1.0]),
    "no weights": ([1], [1, 0, 0, 0, 0, 0], None),
    "too few weights": ([1, 2], [1, 1, 0, 0, 0, 0], [1.0]),
}


def spell(numbers):
    return ",".join(map(repr, numbers))


def lookup(serve, artifact, values, lengths, weights, *options):
    more = [] if weights is None else ["--weights", spell(weights)]
    return serve(artifact, *options, "lookup", "--values", spell(values), "--lengths", spell(lengths), *more)


@pytest.mark.parametrize("case", INVALID)
def test_a_request_is_refused_in_the_words_of_the_python_loader(serve, every_kind, case):
    values, lengths, weights = INVALID[case]
    given = None if weights is None else torch.tensor(weights)
    with pytest.raises(InvalidInputError) as caught:
        load_artifact(every_kind, verify="sizes").lookup(torch.tensor(values), torch.tensor(lengths), given)
    assert refused(lookup(serve, every_kind, values, lengths, weights)) == str(caught.value)


def test_views_that_torch_negates_are_read_as_what_they_are(loader, every_kind):
    done = loader("negative", every_kind)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_took_the_place_of_an_artifact_is_what_answers(loader, every_kind, surgery_artifact, tmp_path):
    """The dynamic linker knows compiled graphs by their path, and would give the first one again."""
    artifacts = [every_kind, surgery_artifact, every_kind]
    done = loader("relink", tmp_path / "current", *artifacts)
    assert done.returncode == 0, done.stderr
    for line, artifact in zip(done.stdout.splitlines(), artifacts, strict=True):
        loaded = load_artifact(artifact, backend="aot_inductor")
        count = len(loaded.manifest.features)
        request = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.int32), torch.ones(count)
        expected = loaded.lookup(*request)[0]
        found = torch.tensor([float.fromhex(word) for word in line.split()])
        assert torch.equal(found, expected), artifact


def test_a_process_without_threads_left_says_so(serve, every_kind, tmp_path, monkeypatch):
    """As a container whose number of processes is limited."""
    source, library = tmp_path / "no_threads.c", tmp_path / "no_threads.so"
    source.write_text(
        "#include <errno.h>\n#include <pthread.h>\n"
        "int pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *), void *x)"
        "{ (void)t; (void)a; (void)f; (void)x; return EAGAIN; }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    line = refused(serve(every_kind, "replay", "--threads", "2"))
    assert line == "cannot start 2 threads: Resource temporarily unavailable; allow this process more of them"


def test_weights_that_nobody_takes_are_refused(serve, built_artifact):
    line = refused(lookup(serve, built_artifact, [1], [1, 0, 0, 0, 0], [1.0]))
    assert line == "per_sample_weights: this artifact takes no per-sample weights"


@pytest.mark.parametrize("backend", ["torchscript", "aot_inductor"])
@pytest.mark.parametrize("bags", [0, 1, 3])
def test_an_answer_is_that_of_the_python_loader_bit_for_bit(serve, every_kind, bags, backend):
    generator = torch.Generator().manual_seed(bags)
    lengths = torch.randint(0, 4, (FEATURES * bags,), generator=generator, dtype=torch.int32)
    values = torch.randint(-3, 60, (int(lengths.sum()),), generator=generator)
    weights = torch.randn(len(values), generator=generator)
    done = lookup(
        serve, every_kind, values.tolist(), lengths.tolist(), weights.tolist(), "--zero-ids", "--backend", backend
    )
    assert done.returncode == 0, done.stderr
    found = [[np.float32(word) for word in line.split()] for line in done.stdout.splitlines()]
    expected = load_artifact(every_kind, invalid_ids="zero").lookup(values, lengths, weights)
    assert expected.shape == (bags, 16 + 8 + 8 + 16 + 3 + 4)
    np.testing.assert_array_equal(
        np.array(found, np.float32).reshape(expected.shape).view(np.int32), expected.numpy().view(np.int32)
    )


# --- A surgery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torchscript", "aot_inductor"])
def test_a_surgery_is_replayed_within_the_tolerance_and_answers_as_in_python(serve, surgery_artifact, backend):
    done = serve(surgery_artifact, "--backend", backend, "replay", "--threads", "2")
    assert (done.returncode, done.stdout) == (0, f"{surgery_artifact}: 7 golden cases within their tolerance\n"), done
    values, lengths, weights = list(range(6)), [1] * 6, [1.0, 1.0, 1.0, 1.0, 1.0, -0.5]
    values[4] = 0  # a table of one row
    done = lookup(serve, surgery_artifact, values, lengths, weights, "--backend", backend)
    found = [float(word) for word in done.stdout.split()]
    request = torch.tensor(values), torch.tensor(lengths, dtype=torch.int32), torch.tensor(weights)
    [expected] = load_artifact(surgery_artifact, backend=backend).lookup(*request).tolist()
    assert found == pytest.approx(expected, abs=1e-6)


def test_an_answer_beyond_its_tolerance_is_named(serve, surgery_artifact, tmp_path):
    copy = Path(shutil.copytree(surgery_artifact, tmp_path / "artifact"))
    tensors = load_file(copy / GOLDEN)
    tensors["04 duplicate ids/pooled"][1, 1] += 3 * tensors["04 duplicate ids/tolerance"][1, 1]
    write_golden(copy, tensors)
    line = refused(serve(copy, "replay"))
    assert line.startswith(f"{copy}: golden case '04 duplicate ids': output 'output', bag 1: column 1 is ")


def test_one_value_that_is_no_number_is_as_right_as_another(serve, tmp_path):
    from export import build_artifact

    torch.save(state_dict(make_rows(TABLES)), tmp_path / "s.pt")
    config = write_config(tmp_path / "r.yaml", tmp_path / "s.pt", TABLES, surgery={"module": "surgeries:Unguarded"})
    artifact = build_artifact(config, tmp_path / "artifact", workers=1).artifact
    tensors = load_file(artifact / GOLDEN)
    pooled = next(part for name, part in sorted(tensors.items()) if name.endswith("/pooled") and part.isnan().any())
    nan = pooled.isnan()
    pooled.view(torch.int32)[nan] ^= 1 << 31 | 5
    write_golden(artifact, tensors)
    assert serve(artifact, "replay").returncode == 0
    pooled[nan] = 1.0
    write_golden(artifact, tensors)
    assert f"column {nan.nonzero()[0, 1]} is " in refused(serve(artifact, "replay"))


def write_golden(artifact, tensors):
    save_file(tensors, artifact / GOLDEN)
    document = json.loads((artifact / "manifest.json").read_text())
    entry = next(file for file in document["files"] if file["path"] == GOLDEN)
    entry["digest"]["value"] = hashlib.sha256((artifact / GOLDEN).read_bytes()).hexdigest()
    (artifact / "manifest.json").write_text(seal(document))


SURGERY_EDITS = {
    "no surgery": put("surgery", None),
    "unknown field": put("surgery", "color", "red"),
    "no module": put("surgery", "module", ""),
    "arguments": put("surgery", "kwargs", "\n"),
    "algorithm of the code": put("surgery", "code", "algorithm", "md5"),
    "digest of the code": put("surgery", "code", "value", "F" * 64),
    "no outputs": put("outputs", []),
    "output without columns": put("outputs", 0, "dim", 0),
    "output without a name": put("outputs", 0, "key", ""),
    "parameter twice": lambda document: document["surgery"]["parameters"].append(document["surgery"]["parameters"][0]),
    "parameter of no values": put("surgery", "parameters", 0, "dims", [0]),
    "parameter of too many": put("surgery", "parameters", 0, "dims", [1] * 65),
    "parameter without a name": put("surgery", "parameters", 0, "parameter", ""),
    "algorithm of a parameter": put("surgery", "parameters", 0, "digest", "algorithm", "sha256"),
    "digest of a parameter": put("surgery", "parameters", 0, "digest", "value", "z"),
    "id": put("surgery", "kwargs", "{}"),
}


@pytest.fixture
def surgery_copy(surgery_artifact, tmp_path):
    return Path(shutil.copytree(surgery_artifact, tmp_path / "artifact"))


@pytest.mark.parametrize("edit", SURGERY_EDITS)
def test_a_surgery_is_refused_in_the_words_of_the_python_loader(serve, surgery_copy, edit):
    document = json.loads((surgery_copy / "manifest.json").read_text())
    SURGERY_EDITS[edit](document)
    (surgery_copy / "manifest.json").write_text(seal(document))
    assert refused(serve(surgery_copy, "replay")) == refusal_of_python(surgery_copy)


@pytest.mark.parametrize("edit", ["offset", "digest"])
def test_a_weight_file_with_another_parameter_is_refused_in_the_words_of_the_python_loader(serve, surgery_copy, edit):
    manifest = read_manifest(surgery_copy)
    parameters = list(manifest.surgery.parameters)
    if edit == "offset":
        parameters[1] = replace(parameters[1], offset_bytes=parameters[1].offset_bytes + 4)
    else:
        parameters[1] = replace(parameters[1], digest=replace(parameters[1].digest, value="1" * 64))
    manifest = replace(manifest, surgery=replace(manifest.surgery, parameters=parameters))
    manifest = replace(manifest, artifact_id=compute_artifact_id(manifest))
    (surgery_copy / "manifest.json").write_bytes(manifest.to_bytes())
    line = refused(serve(surgery_copy, "replay"))
    assert line == refusal_of_python(surgery_copy)
    assert f"surgery.{parameters[1].parameter}'" in line


def test_a_graph_of_another_surgery_is_refused(serve, surgery_copy):
    manifest = read_manifest(surgery_copy)
    manifest = replace(manifest, outputs=[replace(manifest.outputs[0], key="other")])
    manifest = replace(manifest, artifact_id=compute_artifact_id(manifest))
    (surgery_copy / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(ArtifactError) as caught:
        load_artifact(surgery_copy)
    assert refused(serve(surgery_copy, "replay")) == str(caught.value)
    assert "its output_keys is ['output'], the manifest says ['other']" in str(caught.value)


# --- The load generator ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torchscript", "aot_inductor"])
def test_the_rows_are_mapped_once_while_it_serves(build, every_kind, backend):
    command = [build[0] / "serve", every_kind, "--operators", OPERATORS, "--backend", backend]
    command += ["load", "--threads", "2", "--seconds", "2"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr.readline().startswith("serving ")
        maps = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
        output, errors = child.communicate()
    assert child.returncode == 0, errors
    assert re.search(r"[1-9]\d* requests/s", output)
    assert re.search(r"p50 [\d.]+  p90 [\d.]+  p99 [\d.]+  p99\.9 [\d.]+  max [\d.]+", output)
    [mapping] = [line for line in maps if WEIGHTS in line]
    assert mapping.split()[1] == "r--s"  # read-only, and shared with every process that serves it


def test_the_load_generator_prints_one_json_line(serve, every_kind):
    start = time.monotonic()
    done = serve(every_kind, "load", "--threads", "2", "--seconds", "0.5", "--bags", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start >= 0.5
    assert done.stdout.count("\n") == 1
    figures = json.loads(done.stdout)
    latencies = [figures["latency_us"][name] for name in ("p50", "p90", "p99", "p99.9", "max")]
    assert latencies == sorted(latencies)
    assert latencies[0] > 0
    assert (figures["threads"], figures["bags"]) == (2, 3)
    assert figures["artifact_id"] == verify_artifact(every_kind).artifact_id
    assert figures["requests"] == pytest.approx(figures["requests_per_second"] * figures["seconds"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give an artifact and a command"),
        (["dance"], "unknown command dance"),
        (["load", "--speed"], "unknown option --speed"),
        (["load", "--threads"], "--threads needs a value"),
        (["load", "--threads", "0"], "--threads must be 1 to 1000000"),
        (["load", "--seconds", "-1"], "--seconds must be more than 0, and at most a million"),
        (["load", "--seconds", "1e12"], "--seconds must be more than 0, and at most a million"),
        (["lookup", "--values", "1,x"], "'x' is no such number"),
    ],
)
def test_a_wrong_command_line_exits_with_2(serve, built_artifact, arguments, expected):
    done = serve(built_artifact, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {expected}\nusage: serve ARTIFACT ")


def test_help_is_no_error(serve, built_artifact):
    done = serve(built_artifact, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: serve ARTIFACT ")
