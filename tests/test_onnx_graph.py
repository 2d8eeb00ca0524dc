"""The ONNX graph in ONNX Runtime: right within its bound, safe, mapped, and the same whatever the number of threads."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fbgemm_gpu  # noqa: F401  (its operators)
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from references import BITS, dequantized_rows, pooled_bag
from support import make_rows, state_dict, write_config
from test_lookup import describe, fill

from export import build_artifact
from export.errors import GateError
from export.lookup import make_lookup
from export.onnx_graph import OPSET, write_onnx
from runtime_py import UnsupportedError, load_artifact
from runtime_py.golden import read_cases
from runtime_py.manifest import WEIGHTS, Feature, Table
from runtime_py.tensor_file import encode_header

# One table of each precision, none of whose row bytes are those of another, and a few features of each.
TABLES = describe({
    "full": (9, 3, "fp32"),
    "half": (11, 5, "fp16"),
    "eight": (7, 6, "int8"),
    "four": (6, 8, "int4"),
    "two": (10, 16, "int2"),
    "lonely": (1, 1, "fp32"),
})  # fmt: skip
PLAIN = [
    Feature("full", "full", "sum", False),
    Feature("half", "half", "mean", False),
    Feature("full again", "full", "mean", False),
    Feature("eight", "eight", "sum", False),
    Feature("eight again", "eight", "mean", False),
    Feature("four", "four", "sum", False),
    Feature("four again", "four", "mean", False),
    Feature("two", "two", "sum", False),
    Feature("two again", "two", "mean", False),
    Feature("lonely", "lonely", "sum", False),
]
WEIGHTED = [
    Feature(f"{feature.name}, weighted" if weighted else feature.name, feature.table, feature.pooling, weighted)
    for feature, weighted in zip(PLAIN * 2, [False] * len(PLAIN) + [True] * len(PLAIN), strict=True)
]
Bags = list[list[list[int]]]  # by feature, then by bag


@dataclass(frozen=True)
class Graphs:
    """The ONNX graph over a weight file, the TorchScript graph, and what the rows mean."""

    path: Path
    features: list[Feature]
    session: onnxruntime.InferenceSession
    scripted: torch.jit.ScriptModule
    rows: dict[str, np.ndarray]  # float32 [E, D]
    magnitudes: dict[str, np.ndarray]  # float64 [E, D]: of what one row adds to a sum


def open_session(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # a refused batch is an exception here, and needs no line on stderr
    return onnxruntime.InferenceSession(path, options)


def write_graph(folder: Path, tables: Sequence[Table], features: Sequence[Feature]) -> Path:
    write_onnx(tables, features, len(encode_header(tables)), folder / "model.onnx")
    return folder / "model.onnx"


def make_graphs(folder: Path, tables: list[Table], features: list[Feature]) -> Graphs:
    data, stored = fill(tables)
    (folder / WEIGHTS).parent.mkdir()
    (folder / WEIGHTS).write_bytes(encode_header(tables) + data.numpy().tobytes())
    path = write_graph(folder, tables, features)
    rows, magnitudes = {}, {}
    for table in tables:
        values = dequantized_rows(stored[table.name], table.serving_precision, table.embedding_dim)
        rows[table.name], magnitudes[table.name] = values, np.abs(values.astype(np.float64))
        if table.serving_precision in BITS:
            bias = stored[table.name][:, 2:4].copy().view(np.float16).astype(np.float64)
            magnitudes[table.name] = np.abs(values - bias) + np.abs(bias)
    scripted = torch.jit.script(make_lookup(tables, features))
    scripted.weights = data
    return Graphs(path, features, open_session(path), scripted, rows, magnitudes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return make_graphs(tmp_path_factory.mktemp("plain"), TABLES, PLAIN)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return make_graphs(tmp_path_factory.mktemp("weighted"), TABLES, WEIGHTED)


def flatten(bags: Bags, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    values = np.array([i for feature in bags for bag in feature for i in bag], np.int64)
    lengths = np.array([len(bag) for feature in bags for bag in feature], np.int32)
    return {"values": values, "lengths": lengths} | ({} if weights is None else {"per_sample_weights": weights})


def run(session: onnxruntime.InferenceSession, batch: dict[str, np.ndarray]) -> np.ndarray:
    (pooled,) = session.run(["pooled"], batch)
    return pooled


def run_scripted(graphs: Graphs, batch: dict[str, np.ndarray]) -> np.ndarray:
    return graphs.scripted(*(torch.from_numpy(part) for part in batch.values())).numpy()


def expect(graphs: Graphs, bags: Bags, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What plain loops make of the batch, and how far from it and from TorchScript the graph may be, both [B, sum(D)]."""
    batch = len(bags[0])
    values, bounds = [np.zeros((batch, 0), np.float32)], [np.zeros((batch, 0))]
    taken = 0
    for feature, of_feature in zip(graphs.features, bags, strict=True):
        rows, magnitudes = graphs.rows[feature.table], graphs.magnitudes[feature.table]
        terms = 2 if feature.table in ("eight", "four", "two") else 1
        pooled = np.zeros((batch, rows.shape[1]), np.float32)
        bound = np.zeros(pooled.shape)
        for number, bag in enumerate(of_feature):
            own = weights[taken : taken + len(bag)] if weights is not None and feature.weighted else None
            taken += len(bag)
            pooled[number] = pooled_bag(rows, bag, feature.pooling, own)
            k = (terms * (len(bag) + 1) + 2) * 2.0**-24
            for position, row_id in enumerate(bag):
                if 0 <= row_id < len(rows):
                    weight = 1.0 if own is None else abs(float(own[position]))
                    bound[number] += 2 * k / (1 - k) * weight * magnitudes[row_id]
            if feature.pooling == "mean" and bag:
                bound[number] /= len(bag)
        values.append(pooled)
        bounds.append(bound)
    return np.concatenate(values, axis=1), np.concatenate(bounds, axis=1)


def check(graphs: Graphs, bags: Bags, weights: np.ndarray | None = None) -> None:
    batch = flatten(bags, weights)
    before = {name: part.copy() for name, part in batch.items()}
    got = run(graphs.session, batch)
    expected, bound = expect(graphs, bags, weights)
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert (np.abs(got.astype(np.float64) - expected) <= bound).all()
    assert (np.abs(got.astype(np.float64) - run_scripted(graphs, batch)) <= bound).all()
    for name, part in batch.items():
        np.testing.assert_array_equal(part, before[name])


# --- Values ----------------------------------------------------------------------------------------------------------

anything = st.one_of(st.integers(-2, 11), st.integers(-(2**63), 2**63 - 1))


def draw_bags(data: st.DataObject, features: list[Feature], batch: int) -> Bags:
    bag = st.lists(anything, max_size=9)
    return [data.draw(st.lists(bag, min_size=batch, max_size=batch), feature.name) for feature in features]


@given(data=st.data(), batch=st.integers(0, 4))
@settings(max_examples=40)
def test_any_ids_give_what_plain_loops_and_torchscript_give(plain, data, batch):
    check(plain, draw_bags(data, PLAIN, batch))


@given(data=st.data(), batch=st.integers(0, 3), seed=st.integers(0, 9))
@settings(max_examples=25)
def test_so_they_do_with_weights(weighted, data, batch, seed):
    bags = draw_bags(data, WEIGHTED, batch)
    count = sum(len(bag) for feature in bags for bag in feature)
    check(weighted, bags, np.random.default_rng(seed).normal(size=count).astype(np.float32))


LENGTHS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 31, 64, 127, 128, 129, 200, 255, 256, 257, 384, 511, 700]


@pytest.mark.parametrize("with_weights", [False, True])
def test_every_digit_of_a_length_and_more_than_one_chunk(plain, weighted, with_weights):
    graphs = weighted if with_weights else plain
    rng = np.random.default_rng(0)
    bags = [[rng.integers(-1, 12, length).tolist() for length in rng.permutation(LENGTHS)] for _ in graphs.features]
    count = sum(LENGTHS) * len(bags)
    check(graphs, bags, rng.normal(size=count).astype(np.float32) if with_weights else None)


@pytest.mark.parametrize("ids", [[], [2], [0, 8, 0, 3]], ids=["no ids", "one id", "some ids"])
def test_one_bag_and_none(plain, ids):
    check(plain, [[ids] for _ in PLAIN])
    assert run(plain.session, flatten([[] for _ in PLAIN])).shape == (0, 72)


def test_only_one_feature_has_ids(plain):
    for chosen in range(len(PLAIN)):
        check(plain, [[[0, 1], []] if number == chosen else [[], []] for number in range(len(PLAIN))])


def test_sums_of_plain_rows_are_bit_equal_to_torchscript_for_at_most_five_ids(tmp_path):
    tables = describe({"full": (500, 64, "fp32"), "half": (500, 33, "fp16")})
    graphs = make_graphs(tmp_path, tables, [Feature(table.name, table.name, "sum", False) for table in tables])
    rng = np.random.default_rng(0)
    bags = [[rng.integers(-1, 501, length).tolist() for length in [0, 1, 2, 3, 4, 5] * 20] for _ in tables]
    batch = flatten(bags)
    np.testing.assert_array_equal(run(graphs.session, batch).view(np.int32), run_scripted(graphs, batch).view(np.int32))


def test_every_scale_and_bias_is_decoded_exactly(tmp_path):
    """All 63,488 finite binary16 numbers, as scale (of the code 1) and as bias (of the code 0)."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    stored = np.zeros((2 * len(halves), 6), np.uint8)
    stored[: len(halves), :2] = halves.view(np.uint8).reshape(-1, 2)
    stored[: len(halves), 4:] = 1
    stored[len(halves) :, 2:4] = halves.view(np.uint8).reshape(-1, 2)
    tables = describe({"eight": (len(stored), 2, "int8")})
    (tmp_path / WEIGHTS).parent.mkdir()
    (tmp_path / WEIGHTS).write_bytes(encode_header(tables) + stored.tobytes())
    session = open_session(write_graph(tmp_path, tables, [Feature("eight", "eight", "sum", False)]))
    pooled = run(session, flatten([[[row] for row in range(len(stored))]]))
    expected = np.concatenate([halves, halves]).astype(np.float32)
    np.testing.assert_array_equal(pooled, np.stack([expected, expected], axis=1))


def test_weights_of_an_unweighted_feature_and_of_an_id_outside_are_not_read(tmp_path):
    features = [Feature("full", "full", "sum", False), Feature("half", "half", "sum", True)]
    graphs = make_graphs(tmp_path, TABLES, features)
    weights = np.array([np.nan, np.inf, 2.0, np.nan, 0.5], np.float32)
    check(graphs, [[[1, 2]], [[3, -7, 4]]], weights)


def test_a_weight_that_is_no_number_stays_in_its_bag(weighted):
    bags = [[[0] * 8, [0] * 8] for _ in WEIGHTED]
    weights = np.ones(16 * len(WEIGHTED), np.float32)
    weights[-8:] = np.nan  # the last bag of the last feature, which has one column
    pooled = run(weighted.session, flatten(bags, weights))
    assert np.isnan(pooled[1, -1])
    assert np.isfinite(pooled).sum() == pooled.size - 1


def test_no_index_of_a_scatternd_occurs_twice(weighted):
    """What its reduction does with such is not sure to be right: see the module. Its indices are read out of the graph."""
    model = onnx.load(weighted.path, load_external_data=False)
    indices = sorted({node.input[1] for node in model.graph.node if node.op_type == "ScatterND"})
    assert len(indices) > len(WEIGHTED)
    for name in indices:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["m", 1]))
    path = weighted.path.with_name("indices.onnx")
    path.write_bytes(model.SerializeToString())
    bags = [[[0] * length for length in LENGTHS] for _ in WEIGHTED]
    weights = np.ones(sum(LENGTHS) * len(WEIGHTED), np.float32)
    used = 0
    for name, values in zip(indices, open_session(path).run(indices, flatten(bags, weights)), strict=True):
        assert len(np.unique(values)) == len(values), name
        used += len(values)
    assert used == len(WEIGHTED) * sum((length % 128).bit_count() for length in LENGTHS)


def test_many_threads_lose_no_addition(tmp_path):
    """As ScatterND's reduction does in ONNX Runtime where ids share a bag, for which it is not used."""
    tables = describe({"full": (100, 64, "fp32"), "eight": (100, 64, "int8")})
    graphs = make_graphs(tmp_path, tables, [Feature(table.name, table.name, "sum", False) for table in tables])
    rng = np.random.default_rng(0)
    lengths = np.array([3000, 20, 127, 2000, 7, 90] + [5, 12] * 500)
    lengths = np.concatenate([lengths, lengths[::-1]])
    ids = rng.integers(0, 100, lengths.sum())
    bags = [
        np.split(part, np.cumsum(of_feature)[:-1])
        for part, of_feature in zip(np.split(ids, 2), np.split(lengths, 2), strict=True)
    ]
    session = open_session(graphs.path, threads=4)
    batch = {"values": ids, "lengths": lengths.astype(np.int32)}
    first = run(session, batch)
    for number, table in enumerate(tables):
        exact = np.stack([graphs.rows[table.name][bag].astype(np.float64).sum(0) for bag in bags[number]])
        sums = np.stack([graphs.magnitudes[table.name][bag].sum(0) for bag in bags[number]])
        gamma = (np.split(lengths, 2)[number][:, None] + 3) * 2.0**-23
        assert (np.abs(first[:, 64 * number : 64 * (number + 1)] - exact) <= gamma * sums).all()
    for _ in range(10):
        np.testing.assert_array_equal(run(session, batch).view(np.int32), first.view(np.int32))


# --- Bad batches -----------------------------------------------------------------------------------------------------

ONE_MORE = [0] * (2 * len(PLAIN) - 5)


@pytest.mark.parametrize(
    ("values", "lengths"),
    [
        ([1, 2, 3, 4], [3, -1, 1, 1, 0, *ONE_MORE]),
        ([1, 2, 3, 4], [10**6, 2 - 10**6, 1, 1, 0, *ONE_MORE]),
        ([1, 2, 3, 4], [3, 3, 1, 1, 0, *ONE_MORE]),
        ([1, 2, 3, 4], [1, 0, 0, 0, 0, *ONE_MORE]),
        ([1, 2, 3, 4], [0, 0, 0, 0, 0, *ONE_MORE]),
        ([1, 2], [2**31 - 1, 2**31 - 1, 2, 2, 0, *ONE_MORE]),
        ([], [-1, 0, 0, 0, 1, *ONE_MORE]),
        ([1, 2, 3, 4], [4, -1, 0, 0, 0, *ONE_MORE]),
        ([1, 2, 3, 4], [-(2**31), 4, 0, 0, 0, *ONE_MORE]),
        ([], [0, 0, 0, 0, -1, *ONE_MORE]),
        ([1, 2, 3], [1, 1, 1]),
    ],
    ids=[
        *("negative", "huge and negative", "too many", "too few", "none", "overflow", "no ids"),
        *("negative beside the right sum", "smallest beside the right sum", "negative and nothing", "not divisible"),
    ],
)
def test_lengths_that_do_not_fit_the_values_raise(plain, values, lengths):
    batch = {"values": np.array(values, np.int64), "lengths": np.array(lengths, np.int32)}
    with pytest.raises(
        Fail, match="lengths_add_up" if len(lengths) > 3 else r"Reshape[\s\S]*requested shape:\{10,-1\}"
    ):
        run(plain.session, batch)


@pytest.mark.parametrize("count", [0, 3, 5, 6])
def test_another_number_of_weights_than_values_raises(weighted, count):
    lengths = np.zeros(len(weighted.features), np.int32)
    lengths[0] = 4
    batch = {"values": np.zeros(4, np.int64), "lengths": lengths, "per_sample_weights": np.ones(count, np.float32)}
    with pytest.raises(Fail, match="weights_add_up"):
        run(weighted.session, batch)
    assert run(weighted.session, batch | {"per_sample_weights": np.ones(4, np.float32)}).shape[0] == 1


# --- The file --------------------------------------------------------------------------------------------------------


def test_the_checker_accepts_it_and_the_signature_is_that_of_every_graph(plain, weighted):
    for graphs in (plain, weighted):
        onnx.checker.check_model(str(graphs.path), full_check=True)
    inputs = [(value.name, value.type, value.shape) for value in weighted.session.get_inputs()]
    assert inputs == [
        ("values", "tensor(int64)", ["N"]),
        ("lengths", "tensor(int32)", ["F*B"]),
        ("per_sample_weights", "tensor(float)", ["N"]),
    ]
    assert [value.name for value in plain.session.get_inputs()] == ["values", "lengths"]
    (output,) = plain.session.get_outputs()
    assert (output.name, output.type, output.shape) == ("pooled", "tensor(float)", ["B", 72])


def test_it_has_standard_operators_only_and_no_control_flow(plain, weighted):
    for graphs in (plain, weighted):
        model = onnx.load(graphs.path, load_external_data=False)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert {"Loop", "Scan", "If"}.isdisjoint(node.op_type for node in model.graph.node)
        assert not model.functions


def test_each_table_is_one_initializer_that_points_to_its_rows_and_nothing_large_is_inside(weighted):
    model = onnx.load(weighted.path, load_external_data=False)
    data = (weighted.path.parent / WEIGHTS).read_bytes()
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert Counter(tensor.name for tensor in outside) == Counter(f"tables/{table.name}" for table in TABLES)
    rows = fill(TABLES)[1]
    for tensor in outside:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "weights/tables.safetensors"
        start, length = int(place["offset"]), int(place["length"])
        assert data[start : start + length] == rows[tensor.name.removeprefix("tables/")].tobytes()
        assert not tensor.HasField("raw_data")
    assert max(tensor.ByteSize() for tensor in model.graph.initializer) < 2048


def test_its_bytes_follow_from_the_arguments_and_hardly_grow_with_the_rows(tmp_path):
    sizes = []
    for rows in (10, 10**9):
        tables = describe({f"t{i}": (rows, 64, "int8") for i in range(20)})
        features = [Feature(table.name, table.name, "sum", False) for table in tables]
        written = []
        for order in (tables, tables[::-1], tables):
            path = write_graph(tmp_path, order, features)
            written.append(path.read_bytes())
            path.unlink()
        assert len(set(written)) == 1
        sizes.append(len(written[0]))
    assert max(sizes) < 200_000
    assert abs(sizes[0] - sizes[1]) < 1024  # more digits, no more


def test_a_table_without_a_feature_is_left_out(tmp_path):
    path = write_graph(tmp_path, TABLES, [Feature("half", "half", "sum", False)])
    names = {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert {name for name in names if name.startswith("tables/")} == {"tables/half"}


def anonymous_kib() -> int:
    return int(re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def test_a_table_of_three_gib_is_mapped_and_not_copied(tmp_path):
    rows = 3 * 2**30 // 256
    tables = describe({"large": (rows, 128, "fp16"), "small": (5, 4, "fp32")})
    header = encode_header(tables)
    (tmp_path / WEIGHTS).parent.mkdir()
    with (tmp_path / WEIGHTS).open("wb") as file:  # a hole but for its ends
        file.write(header)
        file.seek(len(header) + (rows - 1) * 256)
        file.write(np.full(128, 1.5, np.float16).tobytes())
        file.write(np.full(20, 2.5, np.float32).tobytes())
    path = write_graph(tmp_path, tables, [Feature(table.name, table.name, "sum", False) for table in tables])
    onnx.checker.check_model(str(path), full_check=True)
    before = anonymous_kib()
    session = open_session(path)
    pooled = run(session, flatten([[[0, rows - 1, rows], []], [[4], [0]]]))
    assert anonymous_kib() - before < 64 * 1024
    np.testing.assert_array_equal(pooled, [[1.5] * 128 + [2.5] * 4, [0] * 128 + [2.5] * 4])
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    ours = [text for text in mappings if str(tmp_path / WEIGHTS) in text]
    assert ours
    assert {size for text in ours for size in re.findall(r"Anonymous:\s+(\d+) kB", text)} == {"0"}


# --- In an artifact --------------------------------------------------------------------------------------------------

BUILT = [
    {"name": "a", "num_embeddings": 500, "embedding_dim": 16, "data_type": "fp32", "serving_precision": "int8"},
    {"name": "b", "num_embeddings": 30, "embedding_dim": 8, "data_type": "fp16", "pooling": "mean"},
    {"name": "c", "num_embeddings": 9, "embedding_dim": 4, "data_type": "fp32", "weighted": True},
]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    torch.save(state_dict(make_rows(BUILT, seed=2)), folder / "s.pt")
    return write_config(folder / "r.yaml", folder / "s.pt", BUILT, serving={"graphs": ["torchscript", "onnx"]})


def test_a_build_gates_the_graph_and_lists_it(release, tmp_path):
    result = build_artifact(release, tmp_path / "artifact", workers=1)
    graph = result.manifest.graphs[1]
    assert (graph.backend, graph.path, graph.opset, graph.operator_libraries) == ("onnx", "model.onnx", OPSET, [])
    cases = json.loads((result.artifact / "reports/parity.json").read_text())["cases"]
    assert {case["graph"] for case in cases} == {"torchscript for cpu", "onnx for cpu"}
    assert all(case["max_share_of_bound"] <= 1 for case in cases)
    assert result.manifest.parity.serving.endswith("; onnx within the bound of float32 sums")
    session = onnxruntime.InferenceSession(result.artifact / "model.onnx")
    for name, case in read_cases(result.artifact, result.manifest).items():
        inputs = dict(zip(("values", "lengths", "per_sample_weights"), case.request, strict=True))
        [pooled] = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        np.testing.assert_allclose(pooled, case.pooled.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)
    with pytest.raises(UnsupportedError, match=r"not for this loader: open model\.onnx with ONNX Runtime"):
        load_artifact(result.artifact, backend="onnx")


def test_a_graph_over_the_rows_of_another_table_fails_the_build(release, tmp_path, monkeypatch):
    def shifted(tables, features, offset, path):
        write_onnx(
            [dataclasses.replace(t, offset_bytes=max(t.offset_bytes - 16, 0)) for t in tables], features, offset, path
        )

    monkeypatch.setattr("export.build.write_onnx", shifted)
    with pytest.raises(
        GateError, match=r"parity case '.*': feature '.*' \(table '.*'\), bag \d+, column \d+: onnx is "
    ):
        build_artifact(release, tmp_path / "artifact", workers=1)
    assert not (tmp_path / "artifact").exists()


def test_a_graph_that_onnx_runtime_does_not_load_fails_the_build(release, tmp_path, monkeypatch):
    monkeypatch.setattr("export.build.write_onnx", lambda *arguments: arguments[-1].write_bytes(b"no model"))
    with pytest.raises(GateError, match=r"model\.onnx: ONNX Runtime cannot run it: "):
        build_artifact(release, tmp_path / "artifact", workers=1)
    assert not (tmp_path / "artifact").exists()
