"""The choice of precisions: the fewest bytes within budgets, and the least error within a byte budget."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import make_rows, state_dict, write_config, write_counts
from test_accuracy import accuracy_of, store

from export import build_artifact, load_config
from export.accuracy import ErrorSums, Examiner
from export.choose import Candidate, choose_precisions
from export.config import Precision, ReleaseConfig
from export.errors import GateError, RowsError
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


def test_bytes_that_are_left_go_to_tables_whose_errors_are_too_small_for_the_solver():
    names = ["hot", "warm", "cold"]
    found = {name: candidates((64, 0.0), (32, 1e-7), (20, 2e-5), (12, 8e-3), (8, 0.2)) for name in names}
    for room, expected in ((1000, ["fp32"] * 3), (64 + 64 + 32, ["fp32", "fp32", "fp16"])):
        chosen = choose_precisions(release(names, max_bytes=room), found, 0, {"hot": 1e12, "warm": 1e3, "cold": 1.0})
        assert [choice.serving_precision for choice in chosen] == expected


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


def preview_of(tmp_path, rows, workers=1, sample=1, tables=None, **auto):
    """The preview of one table `t`, or of some tables, that are left to auto."""
    shapes = {name: tensor.shape for name, tensor in rows.items()}
    described = [
        {
            "name": name,
            "num_embeddings": count,
            "embedding_dim": dim,
            "data_type": "fp32",
            **(tables or {}).get(name, {}),
        }
        for name, (count, dim) in shapes.items()
    ]
    torch.save(state_dict(rows), tmp_path / "s.pt")
    serving = {"precision": "auto", "auto": auto}
    path = write_config(tmp_path / "r.yaml", tmp_path / "s.pt", described, serving=serving)
    return path, preview_release(load_config(path), workers, sample, Clock(NoProgress()))


def test_rows_of_later_blocks_and_groups_are_measured_as_a_build_measures_them(tmp_path, monkeypatch):
    monkeypatch.setattr("export.choose._GROUP_CHUNKS", 1)
    rows = torch.randn(100_000, 16, generator=torch.Generator().manual_seed(3))
    rows[90_001, 4] = 300.0
    counts = np.ones(100_000, np.int64)
    counts[90_001] = 10**9
    access = write_counts(tmp_path / "counts" / "c.parquet", np.arange(100_000), counts)
    tables = {"t": {"access_counts": str(access)}}
    path, preview = preview_of(tmp_path, {"t": rows}, 2, tables=tables, max_relative_l2=0.5, precisions=["int4"])
    [int4] = preview.candidates["t"]
    assert int4.accuracy.rows_measured == 100_000
    one = rows[90_001:90_002]
    found = ErrorSums()
    examiner = Examiner("t", Precision.INT4)
    examiner.examine(0, one, store(one, Precision.INT4))
    found.merge(examiner.sums)
    assert int4.relative_square == pytest.approx(
        found.relative_square(), rel=1e-3
    )  # nearly all accesses are of that row
    assert build_artifact(path, tmp_path / "a", workers=1).manifest.accuracy == [int4.accuracy]


def test_a_sample_is_the_same_for_the_choice_and_the_gate(tmp_path):
    rows = torch.randn(140_000, 16, generator=torch.Generator().manual_seed(3))
    rows[:32_768] = torch.randint(0, 16, (32_768, 16)).float()  # the first block, exact in int4
    rows[:32_768, 0], rows[:32_768, 1] = 0.0, 15.0
    path, preview = preview_of(tmp_path, {"t": rows}, sample=8, max_relative_l2=0.01)
    int4 = next(entry for entry in preview.candidates["t"] if entry.precision is Precision.INT4)
    assert (int4.accuracy.rows_measured, preview.precisions["t"]) == (32_768, Precision.INT4)
    result = build_artifact(path, tmp_path / "a", workers=1, sample=8)
    [figures] = result.manifest.accuracy
    assert (figures.serving_precision, figures.rows_measured, figures.relative_l2) == ("int4", 32_768, 0.0)
    whole = preview_of(tmp_path, {"t": rows}, max_relative_l2=0.01)[1]
    assert whole.precisions["t"] is Precision.INT8


def test_accesses_weigh_tables_where_all_have_counts(tmp_path):
    rows = make_rows(
        [{"name": n, "num_embeddings": 4000, "embedding_dim": 32, "data_type": "fp32"} for n in "ab"], seed=1
    )
    for hot in "ab":
        tables = {}
        for name in "ab":
            access = write_counts(
                tmp_path / f"{hot}{name}.parquet", np.arange(4000), np.full(4000, 1000 if name == hot else 1)
            )
            tables[name] = {"access_counts": str(access)}
        room = 4000 * (128 + 36) + 400_000
        _, preview = preview_of(tmp_path, rows, tables=tables, max_bytes=room, precisions=["fp32", "int8", "int4"])
        assert preview.precisions[hot] == "fp32"
        assert preview.precisions["ba"["ab".index(hot)]] != "fp32"


def test_rows_that_no_type_can_store_are_refused_by_row_as_a_build_does(tmp_path):
    rows = torch.randn(100, 8)
    rows[77, 3] = float("nan")
    with pytest.raises(RowsError, match=r"table 't': cannot be stored as fp32: row 77, column 3 is nan; in all: 1 NaN"):
        preview_of(tmp_path, {"t": rows}, max_relative_l2=0.5)


def test_a_table_of_which_nothing_would_be_stored_is_not_called_exact(tmp_path):
    rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(3)) * 1e-9
    _, preview = preview_of(tmp_path, {"t": rows}, min_cosine=0.99)
    assert preview.precisions["t"] is Precision.FP32
    int8 = next(entry for entry in preview.candidates["t"] if entry.precision is Precision.INT8)
    assert (int8.accuracy.vanished_rows, int8.relative_square) == (100, 1.0)


def test_an_artifact_that_is_larger_than_its_budget_is_not_published(configured, tmp_path, monkeypatch):
    monkeypatch.setattr("export.plan._GRAPHS_AND_REPORTS_BYTES", 0)
    monkeypatch.setattr("export.plan._REPORT_BYTES_PER_TABLE", 0)
    with pytest.raises(
        GateError, match=r"the artifact has [\d,]+ bytes, [\d,]+ more than serving.auto.max_bytes: 100,000"
    ):
        build_artifact(configured(max_bytes=100_000), tmp_path / "artifact", workers=1)
    assert not (tmp_path / "artifact").exists()
