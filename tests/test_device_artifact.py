"""What a GPU will run, on a CPU: padded rows, the graph that never raises, checks of requests, fixed shapes.

Only CUDA itself is missing here (streams, events, page-locked and shared memory, its kernels): see test_cuda.py.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_support import CPU, describe, load_on_cpu
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, construct_cache_state
from hypothesis import given, settings
from hypothesis import strategies as st
from support import make_rows, state_dict, write_config
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from export.lookup import make_lookup
from runtime_py import Artifact, GraphError, InvalidInputError, Jagged, UnsupportedError, load_artifact
from runtime_py.device_artifact import DeviceArtifact
from runtime_py.device_graph import attach_cache, attach_device_rows
from runtime_py.device_inputs import inspect_request, is_plain
from runtime_py.device_layout import LOCATIONS, CacheLayout, DeviceLayout, plan_layout
from runtime_py.device_stream import pack
from runtime_py.inputs import Request

DIMS = {"fp32": [1, 3, 4, 33], "fp16": [1, 5, 8, 65], "int8": [2, 10, 66], "int4": [4, 12, 100]}
ROWS = 50
CACHED_FEATURES = {"f0": "y", "f1": "tiny", "f2": "x", "f3": "y"}


def make_tables(weighted: bool) -> list[dict[str, Any]]:
    tables = []
    for precision, dims in DIMS.items():
        for number, dim in enumerate(dims):
            table = {"name": f"{precision}_{dim}", "num_embeddings": ROWS, "embedding_dim": dim, "data_type": "fp32"}
            kind: dict[str, Any] = (
                {"pooling": "mean"} if number % 2 else {"feature_names": [f"{precision}_{dim}", f"{dim}_2"]}
            )
            if number == 0:
                kind = {"weighted": True} if weighted else {}
            tables.append(table | kind | {"serving_precision": precision})
    tables[1] |= {"feature_names": ["fp32_3", "fp32_3_again"]}
    return tables


@pytest.fixture(scope="module", params=[False, True], ids=["unweighted", "weighted"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from export import build_artifact

    tables = make_tables(request.param)
    folder = tmp_path_factory.mktemp("device")
    torch.save(state_dict(make_rows(tables)), folder / "snapshot.pt")
    config = write_config(folder / "release.yaml", folder / "snapshot.pt", tables, parity={"batches": 1})
    return build_artifact(config, folder / "artifact", workers=1).artifact


@pytest.fixture(scope="module")
def here(folder: Path) -> Artifact:
    return load_artifact(folder)


@pytest.fixture(scope="module")
def there(folder: Path) -> DeviceArtifact:
    return load_on_cpu(folder)


def draw(artifact: Artifact, seed: int, batch: int, low: int = 0, high: int = ROWS) -> Request:
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy(rng.integers(0, 5, len(artifact.manifest.features) * batch).astype(np.int32))
    count = int(lengths.sum())
    weights = torch.from_numpy(rng.normal(size=count).astype(np.float32)) if artifact.manifest.weighted else None
    return Request(torch.from_numpy(rng.integers(low, high, count)), lengths, weights)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.view(torch.int32), right.view(torch.int32))


def refusal(artifact: Any, request: Request) -> str:
    with pytest.raises(InvalidInputError) as caught:
        artifact(*request) if not isinstance(artifact, Artifact) else artifact.lookup(*request)
    return str(caught.value)


# --- Answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 2, 17])
def test_padded_rows_answer_bit_for_bit_as_canonical_ones(here: Artifact, there: DeviceArtifact, batch: int) -> None:
    for seed in range(5):
        request = draw(here, seed, batch)
        assert same_bits(there.lookup(*request), here.lookup(*request))


def test_ids_outside_their_table_give_zero_where_they_may(here: Artifact, there: DeviceArtifact) -> None:
    request = draw(here, 1, 9, -20, ROWS + 20)
    expected = here.with_invalid_ids("zero").lookup(*request)
    lenient = there.with_invalid_ids("zero")
    assert same_bits(lenient.lookup(*request), expected)
    assert same_bits(lenient.lookup(*pack(request, CPU)), expected)
    assert refusal(there, request) == refusal(here, request)


def test_a_request_by_name_and_a_keyed_jagged_tensor_answer_alike(here: Artifact, there: DeviceArtifact) -> None:
    request = draw(here, 2, 4)
    keys = [feature.name for feature in here.manifest.features]
    counts = request.lengths.view(len(keys), -1).sum(1).tolist()
    parts = request.values.split(counts)
    weights = None if request.per_sample_weights is None else request.per_sample_weights.split(counts)
    expected = here.lookup(*request)
    ordered = KeyedJaggedTensor(keys, request.values, lengths=request.lengths, weights=request.per_sample_weights)
    reverse = KeyedJaggedTensor(
        keys[::-1],
        torch.cat(parts[::-1]),
        lengths=request.lengths.view(len(keys), -1).flip(0).reshape(-1),
        weights=None if weights is None else torch.cat(weights[::-1]),
    )
    if not any(feature.weighted for feature in here.manifest.features):
        lengths = request.lengths.view(len(keys), -1)
        by_name = {name: Jagged(part, length) for name, part, length in zip(keys, parts, lengths, strict=True)}
        assert same_bits(there(by_name).values, expected)
    for features in (ordered, reverse):
        pooled = there(features)
        assert same_bits(pooled.values, expected)
        assert pooled.keys() == keys


@pytest.mark.parametrize("case", ["inverse indices", "a batch size for each key"])
def test_a_keyed_jagged_tensor_that_needs_more_than_its_bags_is_refused(
    here: Artifact, there: DeviceArtifact, case: str
) -> None:
    keys = [feature.name for feature in here.manifest.features]
    count = 2 * len(keys)
    ids, lengths = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.int32)
    more: dict[str, Any] = {"inverse_indices": (keys, torch.zeros(len(keys), 4, dtype=torch.int64))}
    if case != "inverse indices":
        more = {"stride_per_key_per_rank": [[3], [1], *[[2]] * (len(keys) - 2)]}
    weights = torch.ones(count) if here.manifest.weighted else None
    features = KeyedJaggedTensor(keys, ids, lengths=lengths, weights=weights, **more)
    texts = []
    for artifact in (here, there):
        with pytest.raises(InvalidInputError, match=case.split()[-1]) as caught:
            artifact(features)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_and_lengths_may_be_int32_or_int64_and_strided(here: Artifact, there: DeviceArtifact, dtype: Any) -> None:
    values, lengths, weights = draw(here, 3, 6)
    expected = here.lookup(values, lengths, weights)
    for layout in (lambda part: part, lambda part: torch.stack([part, part + 1], 1)[:, 0]):
        request = (layout(values.to(dtype)), layout(lengths.to(dtype)), None if weights is None else layout(weights))
        before = [None if part is None else part.clone() for part in request]
        assert same_bits(there.lookup(*request), expected)
        assert all(old is new or torch.equal(old, new) for old, new in zip(before, request, strict=True))


# --- Bad requests --------------------------------------------------------------------------------------------------------


def bad_requests(artifact: Artifact) -> dict[str, Request]:
    features = len(artifact.manifest.features)

    def make(values: list[int], lengths: list[int], dtype: torch.dtype = torch.int64) -> Request:
        weights = torch.ones(len(values)) if artifact.manifest.weighted else None
        padded = [*lengths, *[0] * (features - len(lengths))]
        return Request(torch.tensor(values, dtype=torch.int64), torch.tensor(padded, dtype=dtype), weights)

    return {
        "too large": make([0, ROWS], [2]),
        "negative": make([1, -1, 2], [1, 2]),
        "many": make([-(2**63), 2**63 - 1, 0, ROWS], [1, 3]),
        "too many lengths": make([1, 2], [3]),
        "too few lengths": make([1, 2, 3], [1]),
        "negative length": make([1, 2], [3, -1]),
        "lengths that overflow": make([1, 2], [2**63 - 1, 2**63 - 1, 4]),
        "a length beyond int32": make([1, 2], [2**31, 2]),
        "no ids, lengths": make([], [1]),
        "ids, no lengths": make([1], []),
        "not divisible": Request(torch.tensor([1]), torch.ones(features + 1, dtype=torch.int32), None),
        "no batch": Request(torch.tensor([1]), torch.empty(0, dtype=torch.int32), None),
        "floats": Request(torch.tensor([1.0]), torch.ones(features, dtype=torch.int32), None),
        "two dimensions": Request(torch.tensor([[1]]), torch.ones(features, dtype=torch.int32), None),
        "weights that are not asked for, or too many": make([1], [1])._replace(per_sample_weights=torch.ones(2)),
        "no tensor": Request([1], [1], None),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize(
    "name", list(bad_requests(load_artifact(Path(__file__).parents[1] / "artifacts/golden/format-1")))
)
def test_a_bad_request_is_refused_in_the_words_of_the_cpu(here: Artifact, there: DeviceArtifact, name: str) -> None:
    request = bad_requests(here)[name]
    expected = refusal(here, request)
    assert refusal(there, request) == expected
    good = draw(here, 0, 3)
    assert same_bits(there.lookup(*good), here.lookup(*good))  # and the next one is answered


anything = st.one_of(st.integers(-2, ROWS + 2), st.integers(-(2**63), 2**63 - 1))


@given(
    data=st.data(), values=st.lists(anything, max_size=8), bags=st.integers(1, 3), dtype=st.sampled_from(["i4", "i8"])
)
@settings(max_examples=150, deadline=None)
def test_the_numbers_that_tell_a_bad_request_are_right_and_never_raise(data, values, bags, dtype) -> None:
    rows = torch.tensor([ROWS, 1, 7])
    some = st.one_of(st.integers(-2, 6), st.integers(np.iinfo(dtype).min, np.iinfo(dtype).max))
    lengths = np.array(data.draw(st.lists(some, min_size=3 * bags, max_size=3 * bags)), dtype)
    numbers = inspect_request(torch.tensor(values, dtype=torch.int64), torch.from_numpy(lengths), rows).tolist()
    assert numbers[:2] == [lengths.min(), lengths.max()]
    if lengths.min() >= 0 and lengths.max() < 2**31:
        counts = lengths.astype(object).reshape(3, bags).sum(1)
        assert numbers[2] == counts.sum()
        limits = [limit for limit, count in zip(rows.tolist(), counts, strict=True) for _ in range(min(count, 10))]
        assert numbers[3] == sum(not 0 <= value < limit for value, limit in zip(values, limits, strict=False))


@given(
    values=st.lists(anything, max_size=6), lengths=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=18, max_size=18)
)
@settings(max_examples=60, deadline=None)
def test_the_graph_of_a_gpu_never_raises_and_reads_nothing_outside(there, values, lengths) -> None:
    """An error there would end the process's use of the device; here a wild read would be a crash."""
    features = len(there.manifest.features)
    weights = torch.ones(len(values)) if there.manifest.weighted else None
    padded = torch.tensor([*lengths, *[1] * features][:features], dtype=torch.int32)
    pooled = there.run_on_device(Request(torch.tensor(values, dtype=torch.int64), padded, weights))
    assert pooled.shape == (1, sum(output.dim for output in there.manifest.outputs))


def test_a_batch_whose_answer_the_kernels_cannot_address_is_refused(there: DeviceArtifact) -> None:
    features = len(there.manifest.features)
    width = sum(output.dim for output in there.manifest.outputs)
    bags = -(-(2**31) // width)
    lengths = torch.zeros(1, dtype=torch.int32).expand(features * bags)
    values = torch.empty(0, dtype=torch.int64)
    text = f"lengths: {bags} bags of {width} values are more than a lookup on a GPU gives (2**31 - 1 values); split the batch"
    with pytest.raises(InvalidInputError, match=f"^{re.escape(text)}$"):
        there.check_size(lengths)
    there.check_size(lengths[: features * (bags - 1)])
    assert is_plain(Request(values, lengths, None), features, False, CPU)


def test_a_request_that_changes_meanwhile_is_refused(there: DeviceArtifact, here: Artifact) -> None:
    request = draw(here, 0, 2)
    with pytest.raises(InvalidInputError, match=r"^the request changed while it was looked up"):
        there.raise_if_bad([0, 1, 0, 0], request)


def test_an_answer_goes_into_memory_of_the_caller_if_it_fits(there: DeviceArtifact, here: Artifact) -> None:
    request = draw(here, 5, 3)
    expected = here.lookup(*request)
    out = torch.empty_like(expected)
    assert there.lookup(*request, out=out) is out
    assert same_bits(out, expected)
    for wrong in (torch.empty(2, expected.shape[1]), torch.empty_like(expected, dtype=torch.float64)):
        text = f"out: expected float32 {list(expected.shape)} on cpu, got {wrong.dtype} {list(wrong.shape)} on cpu"
        with pytest.raises(InvalidInputError, match=f"^{re.escape(text)}$"):
            there.lookup(*request, out=wrong)


def test_names_that_are_no_features_are_passed_over_if_that_is_asked(there: DeviceArtifact, here: Artifact) -> None:
    request = {
        feature.name: Jagged([1, 2], [1, 1], [0.5, 2.0] if feature.weighted else None)
        for feature in here.manifest.features
    }
    extra = request | {"nobody": [[1], [2]]}
    assert same_bits(there(extra, extra_features="ignore").values, here(request).values)
    with pytest.raises(InvalidInputError, match=r"^unknown feature 'nobody'"):
        there(extra)


def test_another_row_for_an_id_outside_is_for_a_cpu_only(there: DeviceArtifact) -> None:
    with pytest.raises(ValueError, match=r"^invalid_ids must be 'error' or 'zero' on a GPU, got 'row:0'$"):
        there.with_invalid_ids("row:0")


def test_entities_are_looked_up_on_the_host(vocabulary_artifact: Path) -> None:
    here, there = load_artifact(vocabulary_artifact), load_on_cpu(vocabulary_artifact)
    entities = {"user": [[2**40, 5], []], "item": [[0], [-2]], "last_item": [[1], [1]]}
    options = {"rows": {"tag": [[3], []], "age": [[0], [0]]}, "unknown_ids": "zero"}
    expected, got = here.lookup_entities(entities, **options), there.lookup_entities(entities, **options)
    assert same_bits(got.values, expected.values)
    assert got.unknown_ids == expected.unknown_ids == {"user": 1}
    assert there.unknown_id_counts == here.unknown_id_counts


@pytest.mark.parametrize("options", [{"threads": 2}, {"prefault": True}, {"lock_memory": True}])
def test_options_of_a_cpu_are_refused_for_a_gpu(vocabulary_artifact: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^threads, prefault and lock_memory are for a CPU, and device is 'cuda'$"):
        load_on_cpu(vocabulary_artifact, **options)


# --- Fixed shapes --------------------------------------------------------------------------------------------------------


def test_a_lookup_of_fixed_shape_answers_as_any_other(here: Artifact, there: DeviceArtifact) -> None:
    captured = there.capture(bags=6, ids=5 * 6 * len(here.manifest.features))
    answers = []
    for seed in range(4):  # more and fewer ids than before: what lies behind them is not read
        request = draw(here, seed, 6)
        answers.append((captured(*request), here.lookup(*request)))
    assert all(same_bits(got, expected) for got, expected in answers)  # the first is not overwritten by the last
    assert not same_bits(answers[0][0], answers[1][0])


def test_a_lookup_of_fixed_shape_refuses_what_is_bad_and_goes_on(here: Artifact, there: DeviceArtifact) -> None:
    captured = there.capture(bags=2, ids=200)
    good = draw(here, 2, 2)
    wrapped = [
        good._replace(lengths=good.lengths.long() + step * 2**32) for step in (1, -1, 2)
    ]  # int32 takes them for good
    outside, too_few = draw(here, 1, 2, ROWS, ROWS + 1), draw(here, 1, 2)._replace(values=torch.tensor([0]))
    for request in (outside, too_few, *wrapped):
        assert refusal(captured, request) == refusal(here, request)
    too_many = "a request of 3 bags a feature and {} ids does not fit a lookup that was captured for 2 bags and at most 200 ids"  # noqa: E501
    request = draw(here, 1, 3)
    assert refusal(captured, request) == too_many.format(request.values.numel())
    assert same_bits(captured(*good), here.lookup(*good))


def test_weights_that_require_a_gradient_are_only_read(here: Artifact, there: DeviceArtifact) -> None:
    if not here.manifest.weighted:
        return
    captured = there.capture(bags=6, ids=5 * 6 * len(here.manifest.features))
    for seed in range(2):
        request = draw(here, seed, 6)
        assert request.per_sample_weights is not None
        expected = here.lookup(*request)
        asking = request._replace(per_sample_weights=request.per_sample_weights.clone().requires_grad_())
        for pooled in (there.lookup(*asking), captured(*asking)):
            assert not pooled.requires_grad
            assert same_bits(pooled, expected)


def test_what_a_surgery_takes_is_shown_on_a_cpu_only(here: Artifact, there: DeviceArtifact) -> None:
    with pytest.raises(UnsupportedError, match=r"^pool is for a CPU, and the rows are on cpu; load the artifact there"):
        there.pool(*draw(here, 0, 2))


@pytest.mark.parametrize(("bags", "ids"), [(0, 1), (1, 0)])
def test_a_shape_of_nothing_is_a_mistake_of_the_caller(there: DeviceArtifact, bags: int, ids: int) -> None:
    with pytest.raises(ValueError, match=f"bags and ids must be 1 or more, got {bags} and {ids}"):
        there.capture(bags=bags, ids=ids)


def with_cache(there: DeviceArtifact, graph: Any = None) -> DeviceArtifact:
    cache = CacheLayout(1, 16, {}, 1)
    layout = DeviceLayout(there.layout.tables, there.layout.device_bytes, 0, cache)
    return DeviceArtifact(there.manifest, graph or there.graph, "error", {}, there._mapping, CPU, layout)


def test_a_lookup_through_a_cache_is_not_captured(there: DeviceArtifact) -> None:
    with pytest.raises(
        UnsupportedError, match=r"^a lookup through a cache of rows cannot be captured; load with placement="
    ):
        with_cache(there).capture(bags=1, ids=1)


def test_lookups_through_a_cache_follow_one_another(there: DeviceArtifact, here: Artifact) -> None:
    inside: list[bool] = []

    def graph(*inputs: torch.Tensor) -> torch.Tensor:
        inside.append(cached._order._lock.locked())
        return there.graph(*inputs)

    cached = with_cache(there, graph)
    request = draw(here, 0, 2)
    cached.lookup(*request)
    again = cached.with_invalid_ids("zero")
    assert again._order is cached._order  # they share the cache
    again.lookup(*request)
    assert inside == [True, True]
    assert not cached._order._lock.locked()


# --- The graph -----------------------------------------------------------------------------------------------------------


def test_a_graph_that_was_built_before_is_refused_by_name(there: DeviceArtifact) -> None:
    old = torch.jit.script(torch.nn.ReLU())
    text = "graphs/lookup.torchscript.pt was built before graphs could run on a GPU; build the artifact again"
    graph = there.manifest.graphs[0]
    with pytest.raises(GraphError, match=f"^{re.escape(text)}$"):
        attach_device_rows(old, there.manifest, graph, there.layout, torch.empty(0), torch.empty(0))


def test_it_says_what_it_is(there: DeviceArtifact) -> None:
    assert repr(there) == f"DeviceArtifact({there.manifest.artifact_id[:12]}, device='cpu')"


def test_the_graph_s_metadata_moves_to_the_device(folder: Path, there: DeviceArtifact) -> None:
    """To "meta", which needs no GPU: what stayed behind would be refused by FBGEMM's kernels."""
    graph = there.manifest.graphs[0]
    scripted = torch.jit.load(folder / graph.path, map_location="cpu")
    nothing = torch.empty(0, dtype=torch.uint8, device="meta")
    attach_device_rows(scripted, there.manifest, graph, there.layout, nothing, nothing)
    names = ["weights", "uvm_weights", "weights_placements", "weights_offsets", "weights_types", "dim_offsets"]
    names += ["num_embeddings", "is_mean", "is_weighted", "column_features"]
    assert {name: getattr(scripted, name).device.type for name in names} == dict.fromkeys(names, "meta")
    assert (scripted.row_alignment, scripted.raises, scripted.cached) == (16, False, False)


def test_a_cache_starts_empty_as_fbgemm_s_own_module_has_it(capfd: pytest.CaptureFixture[str]) -> None:
    manifest = describe({"x": (1000, 64, "fp16"), "tiny": (3, 4, "fp32"), "y": (500, 100, "int8")}, CACHED_FEATURES)
    layout = plan_layout(manifest, "uvm_cache", 60_000)
    lookup = torch.jit.script(make_lookup(manifest.tables, manifest.features))
    attach_cache(lookup, manifest, layout, CPU)
    assert layout.cache is not None
    names = list(layout.tables)
    state = construct_cache_state(
        [layout.tables[name].table.num_embeddings for name in names],
        [EmbeddingLocation(LOCATIONS[layout.tables[name].location]) for name in names],
        [names.index(table) for table in CACHED_FEATURES.values()],
    )
    assert lookup.cached is True
    assert lookup.cache_rows == state.total_cache_hash_size
    assert lookup.cache_starts.tolist() == state.cache_hash_size_cumsum
    assert lookup.cache_features.tolist() == state.cache_index_table_map
    assert lookup.cache_features.dtype is torch.int32
    assert lookup.cache_weights.shape == (layout.cache.sets * 32, layout.cache.row_bytes)
    assert lookup.cache_state.shape == lookup.cache_times.shape == (layout.cache.sets, 32)
    assert set(lookup.cache_state.view(-1).tolist()) == {-1}
    assert not lookup.cache_times.any()
    lookup(torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int32))
    assert (
        "uvm_caching_codegen_lookup_function shouldn't be called for CPU" in capfd.readouterr().err
    )  # the way it takes
