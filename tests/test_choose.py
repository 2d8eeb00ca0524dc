"""The choice of precisions: the fewest bytes within budgets, and the least error within a byte budget."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import make_rows, state_dict, write_config
from test_access import write_counts
from test_accuracy import accuracy_of

from export import build_artifact, load_config
from export.choose import Candidate, choose_precisions
from export.config import Precision, ReleaseConfig
from export.errors import GateError
from export.plan import Clock, preview_release
from export.progress import NoProgress

STORED = [Precision.FP32, Precision.FP16, Precision.INT8, Precision.INT4, Precision.INT2]


def release(names, **auto):
    tables = [{"name": name, "num_embeddings": 100, "embedding_dim": 8, "data_type": "fp32"} for name in names]
    serving = {"precision": "auto", "auto": auto}
    return ReleaseConfig.model_validate(
        {"large_embeddings": {"tables": tables}, "snapshot": {"uri": "s"}, "serving": serving}
    )


def candidate(precision, size, error, problems=()):
    return Candidate(precision, size, accuracy_of(), list(problems), error, 0.0)


def candidates(*sizes_and_errors):
    return [candidate(STORED[number], size, error) for number, (size, error) in enumerate(sizes_and_errors)]


def test_with_figures_a_table_gets_the_fewest_bytes_that_keep_to_them():
    config = release(["a", "b"], max_relative_l2=0.1)
    too_far = ["table 'a': relative_l2 is 0.3, above its budget max_relative_l2: 0.1 (int4); choose"]
    found = {
        "a": [candidate(Precision.FP16, 200, 1e-8), candidate(Precision.INT4, 60, 0.09, too_far)],
        "b": [candidate(Precision.FP16, 200, 1e-8), candidate(Precision.INT8, 120, 1e-4)],
    }
    a, b = choose_precisions(config, found, 0, {})
    assert (a.table, a.serving_precision) == ("a", "fp16")
    assert a.reason == (
        "the fewest bytes that keep to its budgets: fp16 has rows with a relative L2 error of 0.0001; "
        "int4: relative_l2 is 0.3, above its budget max_relative_l2: 0.1"
    )
    assert (b.table, b.serving_precision) == ("b", "int8")
    assert b.reason.endswith("and nothing is narrower")


def test_a_table_that_no_precision_suits_is_refused_with_the_problem_of_each():
    found = {"a": [candidate(value, 1, 0.0, [f"table 'a': {value} is too far"]) for value in STORED[1:3]]}
    with pytest.raises(GateError) as caught:
        choose_precisions(release(["a"], min_cosine=0.9), found, 0, {})
    assert str(caught.value) == (
        "table 'a': no precision of serving.auto.precisions keeps to its budgets: fp16 is too far; int8 is too far"
    )


def test_a_byte_budget_that_cannot_be_met_says_by_how_much():
    config = release(["a", "b"], max_bytes=1000)
    found = {name: candidates((800, 0.0), (400, 1e-8), (300, 1e-4)) for name in ("a", "b")}
    with pytest.raises(GateError) as caught:
        choose_precisions(config, found, 500, {"a": 1.0, "b": 1.0})
    assert str(caught.value).startswith(
        "serving.auto.max_bytes is 1,000: the artifact needs at least 1,100 bytes (600 for rows of tables left to auto, "
        "500 for all else), 100 more; raise it"
    )
    assert [c.serving_precision for c in choose_precisions(config, found, 400, {"a": 1.0, "b": 1.0})] == [
        "int8",
        "int8",
    ]


def test_bytes_go_where_accesses_make_errors_cost_most():
    config = release(["a", "b"], max_bytes=1000)
    found = {name: candidates((800, 0.0), (400, 1e-3), (200, 2e-3)) for name in ("a", "b")}
    chosen = {}
    for a, b in ((9.0, 1.0), (1.0, 9.0), (1.0, 1.0)):
        picked = choose_precisions(config, found, 0, {"a": a, "b": b})
        chosen[a, b] = [choice.serving_precision for choice in picked]
    assert chosen == {(9, 1): ["fp32", "int8"], (1, 9): ["int8", "fp32"], (1, 1): ["fp16", "fp16"]}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_choice_within_the_byte_budget_has_a_smaller_total_error(data):
    names = [str(number) for number in range(data.draw(st.integers(1, 5)))]
    found, accesses = {}, {}
    for name in names:
        rows = data.draw(st.integers(1, 10**9))
        scale = data.draw(st.floats(0.1, 10))
        sizes = [rows * size for size in (64, 32, 20, 12, 8)]
        errors = [0.0, *(scale * error for error in (1e-7, 2e-5, 8e-3, 0.2))]
        found[name] = candidates(*zip(sizes, errors, strict=True))
        accesses[name] = data.draw(st.floats(0.01, 1e6))
    least = sum(min(entry.bytes for entry in kept) for kept in found.values())
    most = sum(max(entry.bytes for entry in kept) for kept in found.values())
    room = data.draw(st.integers(least, most + 5))
    chosen = choose_precisions(release(names, max_bytes=room), found, 0, accesses)
    picked = [next(e for e in found[c.table] if e.precision.value == c.serving_precision) for c in chosen]
    total = sum(accesses[name] * entry.relative_square for name, entry in zip(names, picked, strict=True))
    assert sum(entry.bytes for entry in picked) <= room
    best = min(
        sum(accesses[name] * entry.relative_square for name, entry in zip(names, choice, strict=True))
        for choice in itertools.product(*found.values())
        if sum(entry.bytes for entry in choice) <= room
    )
    worst = max(accesses[name] * entry.relative_square for name in names for entry in found[name])
    assert total <= best + 1e-9 * worst


# --- On real rows ----------------------------------------------------------------------------------------------------

TABLES = [
    {"name": "wide", "num_embeddings": 900, "embedding_dim": 64, "data_type": "fp32"},
    {"name": "narrow", "num_embeddings": 5000, "embedding_dim": 8, "data_type": "fp16", "pooling": "mean"},
    {"name": "odd", "num_embeddings": 70, "embedding_dim": 3, "data_type": "fp32"},
    {"name": "exact", "num_embeddings": 30, "embedding_dim": 4, "data_type": "fp32", "serving_precision": "fp32"},
]


@pytest.fixture
def configured(tmp_path):
    rows = make_rows(TABLES, seed=6)
    rows["wide"][5, 5] = 7e4  # fp16 cannot hold it, int8 can
    torch.save(state_dict(rows), tmp_path / "s.pt")

    def configure(tables=TABLES, **auto):
        path = tmp_path / "release.yaml"
        return write_config(path, tmp_path / "s.pt", tables, serving={"precision": "auto", "auto": auto})

    return configure


def test_a_build_chooses_what_the_plan_shows_and_measures_the_same(configured, tmp_path):
    config = configured(max_relative_l2=0.02)
    preview = preview_release(load_config(config), 2, 1, Clock(NoProgress()))
    result = build_artifact(config, tmp_path / "artifact", workers=2)
    again = build_artifact(config, tmp_path / "again", workers=1)
    assert result.manifest.choices == again.manifest.choices == preview.choices
    assert result.manifest.artifact_id == again.manifest.artifact_id
    for figures in result.manifest.accuracy:
        assert figures.serving_precision == preview.precisions[figures.table]
        shown = next(e for e in preview.candidates[figures.table] if e.precision.value == figures.serving_precision)
        assert shown.accuracy == figures
        assert shown.bytes == figures.bytes_after
    assert {figures.table: figures.serving_precision for figures in result.manifest.accuracy} == {
        "wide": "int8",
        "narrow": "int8",
        "odd": "fp16",
        "exact": "fp32",
    }
    stored = {entry.precision: entry for entry in preview.candidates["wide"]}
    assert stored[Precision.FP16].problems == ["table 'wide': has values that fp16 cannot store"]
    assert stored[Precision.INT8].accuracy.outlier_rows == 1


def test_a_byte_budget_is_kept_by_the_whole_artifact(configured, tmp_path):
    config = configured(max_bytes="500 kB")
    result = build_artifact(config, tmp_path / "artifact", workers=2)
    files = [path for path in result.artifact.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 500_000
    assert len({choice.serving_precision for choice in result.manifest.choices}) > 1
    with pytest.raises(GateError, match=r"serving.auto.max_bytes is 300,000: the artifact needs at least [\d,]+ bytes"):
        build_artifact(configured(max_bytes=300_000), tmp_path / "other", workers=2)
    assert not (tmp_path / "other").exists()


def test_access_counts_decide_which_rows_errors_count(tmp_path):
    rows = torch.randn(400, 16, generator=torch.Generator().manual_seed(2))
    rows[:200] = rows[:200].abs().round()  # with the two below, integers of 0 to 15: exact in int4
    rows[:200, 0], rows[:200, 1] = 0.0, 15.0
    torch.save(state_dict({"t": rows}), tmp_path / "s.pt")
    squares = []
    for name, counts in (("even", np.repeat([1000, 1], 200)), ("rough", np.repeat([1, 1000], 200))):
        counted = write_counts(tmp_path / name / "c.parquet", np.arange(400), counts).parent
        tables = [
            {
                "name": "t",
                "num_embeddings": 400,
                "embedding_dim": 16,
                "data_type": "fp32",
                "access_counts": str(counted),
            }
        ]
        serving = {"precision": "auto", "auto": {"max_bytes": "5 MB"}}
        config = load_config(write_config(tmp_path / "r.yaml", tmp_path / "s.pt", tables, serving=serving))
        preview = preview_release(config, 1, 1, Clock(NoProgress()))
        int4 = next(entry for entry in preview.candidates["t"] if entry.precision is Precision.INT4)
        squares.append(math.sqrt(int4.relative_square))
    assert int4.accuracy.lookup_relative_l2 == pytest.approx(squares[1], rel=0.5)  # nearly all of the rough rows
    assert squares[0] < squares[1] / 3
