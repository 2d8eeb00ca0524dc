"""The plain-op module and its TorchScript form: right answers, and safe whatever they are given."""

import subprocess
import sys
from pathlib import Path

import fbgemm_gpu  # noqa: F401  (its operators)
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import pooled_batch, stored_rows

from export.lookup import Lookup, WeightedLookup, make_lookup
from export.torchscript import write_torchscript
from runtime_py.digests import ROWS, Digest
from runtime_py.manifest import ROW_FORMATS, Feature, Table
from runtime_py.tensor_file import layout_tables


def describe(shapes: dict[str, tuple[int, int, str]]) -> list[Table]:
    """Manifest tables from name to (rows, dim, precision)."""
    digest = Digest(ROWS, "0" * 64)
    tables = [
        Table(name, rows, dim, precision, ROW_FORMATS[precision].row_bytes(dim), 0, digest)
        for name, (rows, dim, precision) in shapes.items()
    ]
    offsets = layout_tables(tables)
    return [
        Table(t.name, t.num_embeddings, t.embedding_dim, t.serving_precision, t.row_bytes, offsets[t.name], digest)
        for t in tables
    ]


def fill(tables: list[Table], seed: int = 0) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """The weight data, and each table's stored rows."""
    rng = np.random.default_rng(seed)
    rows = {
        t.name: stored_rows(
            rng.normal(size=(t.num_embeddings, t.embedding_dim)).astype(np.float32), t.serving_precision
        )
        for t in tables
    }
    data = b"".join(rows[name].tobytes() for name in layout_tables(tables))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8), rows


TABLES = describe({"a": (10, 4, "fp16"), "b": (5, 3, "fp32"), "c": (7, 300, "fp16")})
FEATURES = [
    Feature("a", "a", "sum", False),
    Feature("b", "b", "mean", False),
    Feature("a2", "a", "sum", False),
    Feature("c", "c", "mean", False),
]
AS_DICTS = [{"name": f.name, "table": f.table, "pooling": f.pooling} for f in FEATURES]


@pytest.fixture(scope="module")
def lookups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.nn.Module]:
    """The same lookup eager, scripted, and scripted, saved and loaded, with weights attached."""
    module = make_lookup(TABLES, FEATURES)
    path = tmp_path_factory.mktemp("graph") / "lookup.pt"
    write_torchscript(module, path)
    result = {"eager": module, "scripted": torch.jit.script(module), "loaded": torch.jit.load(path)}
    result["as on a GPU"] = torch.jit.load(path)
    result["as on a GPU"].raises = False
    for lookup in result.values():
        lookup.weights = fill(TABLES)[0]
    return result


def flatten(bags: dict[str, list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    values = [i for f in FEATURES for bag in bags[f.name] for i in bag]
    lengths = [len(bag) for f in FEATURES for bag in bags[f.name]]
    return torch.tensor(values, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int32)


anything = st.one_of(st.integers(-2, 11), st.integers(-(2**63), 2**63 - 1))


@given(data=st.data(), batch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_any_ids_give_what_the_plain_loops_give(lookups, data, batch):
    bags = {
        f.name: data.draw(st.lists(st.lists(anything, max_size=6), min_size=batch, max_size=batch), f.name)
        for f in FEATURES
    }
    expected = pooled_batch(AS_DICTS, fill(TABLES)[1], bags)
    values, lengths = flatten(bags)
    before = values.clone(), lengths.clone()
    for name, lookup in lookups.items():
        got = lookup(values, lengths).numpy()
        assert got.shape == (batch, 4 + 3 + 4 + 300), name
        np.testing.assert_array_equal(got, expected, err_msg=name)
    assert torch.equal(values, before[0])
    assert torch.equal(lengths, before[1])


@given(data=st.data(), batch=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_request_that_was_checked_gives_the_same_without_the_graphs_own_checks(lookups, data, batch):
    rows = {t.name: t.num_embeddings for t in TABLES}
    bags = {
        f.name: data.draw(
            st.lists(st.lists(st.integers(-1, rows[f.table] - 1), max_size=6), min_size=batch, max_size=batch), f.name
        )
        for f in FEATURES
    }
    values, lengths = flatten(bags)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for name, lookup in lookups.items():
        assert torch.equal(lookup.lookup_checked(values, offsets), lookup(values, lengths)), name


@pytest.mark.parametrize("kind", ["eager", "scripted", "loaded"])
@pytest.mark.parametrize(
    ("values", "lengths"),
    [
        ([1, 2, 3, 4], [3, -1, 1, 1, 0, 0, 0, 0]),
        ([1, 2, 3, 4], [10**6, 2 - 10**6, 1, 1, 0, 0, 0, 0]),
        ([1, 2, 3, 4], [3, 3, 1, 1, 0, 0, 0, 0]),
        ([1, 2, 3, 4], [1, 0, 0, 0, 0, 0, 0, 0]),
        ([1, 2], [2**31 - 1, 2**31 - 1, 2, 2, 0, 0, 0, 0]),
        ([1, 2, 3], [1, 1, 1]),
    ],
    ids=["negative", "huge and negative", "too many", "too few", "overflow", "not divisible"],
)
def test_lengths_that_do_not_fit_the_values_raise(lookups, kind, values, lengths):
    with pytest.raises(RuntimeError, match=r"size|invalid"):
        lookups[kind](torch.tensor(values), torch.tensor(lengths, dtype=torch.int32))


def test_the_saved_graph_holds_no_weight_byte_whatever_the_tables(tmp_path):
    sizes = []
    for rows in (10, 10**9):
        path = tmp_path / f"{rows}.pt"
        tables = describe({f"t{i}": (rows, 64, "fp16") for i in range(100)})
        write_torchscript(make_lookup(tables, [Feature(t.name, t.name, "sum", False) for t in tables]), path)
        sizes.append(path.stat().st_size)
    assert max(sizes) < 64 * 1024
    assert abs(sizes[0] - sizes[1]) < 1024  # more digits, no more


def test_weights_of_an_unweighted_feature_are_not_read_and_those_of_a_weighted_one_are():
    features = [Feature("a", "a", "sum", False), Feature("c", "c", "sum", True)]
    module = make_lookup(TABLES, features)
    assert isinstance(module, WeightedLookup)
    module.weights, rows = fill(TABLES)
    values, lengths = torch.tensor([1, 2, 3, 4]), torch.tensor([2, 2], dtype=torch.int32)
    weights = torch.tensor([float("nan"), float("inf"), 2.0, 0.5])
    for lookup in (module, torch.jit.script(module)):
        pooled = lookup(values, lengths, weights).numpy()
        np.testing.assert_array_equal(pooled[0, :4], rows["a"][1].astype(np.float32) + rows["a"][2].astype(np.float32))
        expected = rows["c"][3].astype(np.float64) * 2.0 + rows["c"][4].astype(np.float64) * 0.5
        np.testing.assert_allclose(pooled[0, 4:], expected, rtol=1e-6)
        checked = lookup.lookup_checked(values, torch.tensor([0, 2, 4]), weights)
        np.testing.assert_array_equal(checked.numpy(), pooled)
    assert type(make_lookup(TABLES, FEATURES)) is Lookup


@pytest.mark.parametrize(
    "layout",
    [
        lambda tensor: torch.stack([tensor, tensor + 1], 1)[:, 0],
        lambda tensor: torch.stack([tensor + 1, tensor], 1)[:, 1],
    ],
    ids=["first of two columns", "second of two columns"],
)
def test_the_memory_layout_of_a_request_does_not_matter(layout):
    """FBGEMM reads weights as if they lay side by side: strides, and it would read past them."""
    features = [Feature("a", "a", "sum", True), Feature("c", "c", "sum", True)]
    module = make_lookup(TABLES, features)
    module.weights, _ = fill(TABLES)
    request = torch.tensor([1, 2, 3, 4]), torch.tensor([2, 2], dtype=torch.int32), torch.tensor([0.5, 2.0, -1.0, 3.0])
    expected = module(*request)
    for lookup in (module, torch.jit.script(module)):
        assert torch.equal(lookup(*map(layout, request)), expected)
    one = torch.tensor([0.5]).expand(4)
    assert torch.equal(module(*request[:2], one), module(*request[:2], torch.full((4,), 0.5)))


@pytest.mark.parametrize("kinds", ["weighted", "mixed"])
@pytest.mark.parametrize("raises", [True, False], ids=["on a CPU", "as on a GPU"])
def test_another_number_of_weights_than_ids_raises(kinds, raises):
    """Behind fewer weights FBGEMM would read whatever lies there."""
    features = [Feature("a", "a", "sum", kinds == "weighted"), Feature("c", "c", "sum", True)]
    module = make_lookup(TABLES, features)
    module.weights, _ = fill(TABLES)
    scripted = torch.jit.script(module)
    values, lengths = torch.tensor([1, 2, 3, 4]), torch.tensor([2, 2], dtype=torch.int32)
    for lookup in (module, scripted):
        lookup.raises = raises
        for weights in (torch.ones(8)[:3], torch.ones(5), torch.ones(0), torch.ones(4, 0)):
            with pytest.raises((ValueError, torch.jit.Error), match=f"{weights.numel()} weights for 4 values"):
                lookup(values, lengths, weights)
        assert lookup(values, lengths, torch.ones(4)).shape == (1, 304)


_GUARDED = """
import ctypes, mmap, sys
import numpy as np, torch
sys.path[:0] = {path!r}
import fbgemm_gpu
from test_lookup import FEATURES, TABLES, fill, make_lookup
data, _ = fill(TABLES)
size = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
memory = mmap.mmap(-1, size + mmap.PAGESIZE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
start = size - len(data)  # the last row ends where the forbidden page begins
weights = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=len(data))
weights.copy_(data)
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
lookup = make_lookup(TABLES, FEATURES)
lookup.weights = weights
last = [t.num_embeddings for t in TABLES]
ids = torch.tensor([10, 9, 5, 4, 10, 9, 7, 6, 8, 2**62])
lengths = torch.tensor([1, 1, 1, 1, 1, 1, 2, 2], dtype=torch.int32)
print(lookup(ids, lengths).shape, flush=True)
if sys.argv[1] == "touch":
    memory[size]
"""


@pytest.mark.parametrize("mode", ["lookup", "touch"])
def test_no_id_reads_past_the_rows(mode):
    """The page behind the rows is forbidden: a read past them would kill the process, as `touch` shows."""
    script = _GUARDED.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, check=False)
    assert "torch.Size([2, 311])" in done.stdout, done.stderr
    assert done.returncode == (0 if mode == "lookup" else -11)
