"""Question 1 of parity and the accuracy figures, against numpy in float64."""

import numpy as np
import pytest
import torch
from support import make_rows, state_dict, write_config

from export.accuracy import TableAccuracy, check_budget, examine_table
from export.config import Budget, Precision, load_config
from export.errors import GateError
from export.snapshots import open_snapshot
from export.weight_file import PlannedTable
from runtime_py.verify import open_verified

TABLES = [
    {"name": "wide", "num_embeddings": 9000, "embedding_dim": 64, "data_type": "fp32"},  # several chunks
    {"name": "zero", "num_embeddings": 5, "embedding_dim": 4, "data_type": "fp32"},
    {"name": "small", "num_embeddings": 5, "embedding_dim": 4, "data_type": "fp16"},
]


@pytest.fixture
def prepared(rebuild, tmp_path):
    """Artifact, planned tables and trained rows."""
    rows = make_rows(TABLES, seed=3)
    rows["zero"].zero_()
    rows["wide"][8999, 63] = 60_000.0
    artifact = rebuild(TABLES, rows)
    config = load_config(tmp_path / "release.yaml")
    snapshot = open_snapshot(config.snapshot)
    tables = config.large_embeddings.tables
    planned = {table.name: PlannedTable(table.name, snapshot.table(table), Precision.FP16) for table in tables}
    return artifact, planned, rows


def examine(prepared, name, ids=()):
    artifact, planned, _ = prepared
    with open_verified(artifact, "sizes").weights as weights:
        return examine_table(planned[name], weights, np.array(ids, np.int64), 2)


def test_figures_equal_those_of_numpy_over_every_row(prepared):
    x = prepared[2]["wide"].numpy().astype(np.float64)
    y = x.astype(np.float16).astype(np.float64)
    accuracy, _ = examine(prepared, "wide")
    assert accuracy.rows == 9000
    assert accuracy.bytes_before == 9000 * 64 * 4
    assert accuracy.bytes_after == 9000 * 64 * 2
    assert accuracy.max_absolute_error == np.abs(y - x).max()
    assert accuracy.mean_absolute_error == pytest.approx(np.abs(y - x).mean(), rel=1e-5)
    assert accuracy.relative_l2 == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-5)
    assert accuracy.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)


def test_a_table_of_zeros_has_no_relative_error_and_an_exact_one_has_none(prepared):
    zero, _ = examine(prepared, "zero")
    assert (zero.max_absolute_error, zero.relative_l2, zero.cosine) == (0.0, None, None)
    half, _ = examine(prepared, "small")
    assert (half.max_absolute_error, half.relative_l2, half.cosine) == (0.0, 0.0, 1.0)


def test_probe_rows_are_picked_up_by_id_across_chunks(prepared):
    ids = [0, 1, 8191, 8192, 8999]
    _, probes = examine(prepared, "wide", ids)
    assert torch.equal(probes.trained, prepared[2]["wide"][ids])
    assert torch.equal(probes.stored, prepared[2]["wide"][ids].half())


def test_one_wrong_stored_value_is_named(prepared):
    artifact = prepared[0]
    path = artifact / "weights" / "tables.safetensors"
    data = bytearray(path.read_bytes())
    offset = 4096 + (8500 * 64 + 17) * 2  # 'wide' comes first: its rows are the most aligned
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(GateError, match=r"table 'wide': row 8500, column 17 is stored as .* the reference makes"):
        examine(prepared, "wide")


def test_rows_that_the_snapshot_no_longer_has_are_named(prepared, tmp_path):
    changed = {name: tensor.clone() for name, tensor in prepared[2].items()}
    changed["small"][4, 3] += 1
    torch.save(state_dict(changed), tmp_path / "other.pt")
    config = load_config(write_config(tmp_path / "other.yaml", tmp_path / "other.pt", TABLES))
    table = config.large_embeddings.tables[2]
    planned = PlannedTable("small", open_snapshot(config.snapshot).table(table), Precision.FP16)
    with pytest.raises(GateError, match="table 'small': row 4, column 3"):
        examine((prepared[0], {"small": planned}, None), "small")


def accuracy_of(**figures):
    base = {"max_absolute_error": 0.5, "mean_absolute_error": 0.1, "relative_l2": 0.01, "cosine": 0.99}
    return TableAccuracy("t", "fp16", 1, 4, 2, **(base | figures))


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (
            Budget(max_absolute_error=0.4),
            "table 't': max_absolute_error is 0.5, above its budget max_absolute_error: 0.4",
        ),
        (Budget(mean_absolute_error=0.05), "table 't': mean_absolute_error is 0.1, above"),
        (Budget(max_relative_l2=0.001), "table 't': relative_l2 is 0.01, above its budget max_relative_l2: 0.001"),
        (Budget(min_cosine=0.999), "table 't': cosine is 0.99, below its budget min_cosine: 0.999"),
    ],
)
def test_a_figure_outside_its_budget_is_one_line(budget, text):
    (line,) = check_budget(accuracy_of(), budget)
    assert line.startswith(text)


def test_figures_at_their_budget_pass_and_missing_figures_are_not_gated():
    at = Budget(max_absolute_error=0.5, mean_absolute_error=0.1, max_relative_l2=0.01, min_cosine=0.99)
    assert check_budget(accuracy_of(), at) == []
    assert check_budget(accuracy_of(relative_l2=None, cosine=None), Budget(max_relative_l2=0.0, min_cosine=1.0)) == []
