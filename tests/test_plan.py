"""`python -m export plan`: what it shows, that it writes nothing, and its exit codes."""

import json
import os

import pytest
import torch
from support import make_rows, run_export, state_dict, write_config, write_entities

from export import load_config
from export.config import Precision
from export.plan import Clock, preview_release
from export.progress import NoProgress

TABLES = [
    {"name": "user", "num_embeddings": 3000, "embedding_dim": 16, "data_type": "fp32"},
    {"name": "item", "num_embeddings": 500, "embedding_dim": 10, "data_type": "fp16", "serving_precision": "int8"},
]


@pytest.fixture
def configure(tmp_path):
    rows = make_rows(TABLES, seed=6)
    rows["user"][7] = 0.0
    torch.save(state_dict(rows), tmp_path / "s.pt")

    def write(tables=TABLES, **serving):
        return write_config(tmp_path / "release.yaml", tmp_path / "s.pt", tables, serving=serving)

    return write


def test_every_table_is_shown_at_every_precision_and_nothing_is_written(configure, tmp_path):
    config = configure(precision="auto", auto={"max_relative_l2": 0.1})
    done = run_export("plan", "--config", config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    shown = [next(word for word in line.split() if word in list(Precision)) for line in lines[1:9]]
    assert shown == ["fp32", "fp16", "int8", "int4", "int2", "fp32", "fp16", "int8"]
    assert [number for number, line in enumerate(lines) if " -> " in line] == [4, 8]
    assert "relative_l2 is 0.3" in lines[5]
    assert "choice     user: int4: the fewest bytes that keep to its budgets" in done.stdout
    assert "measured   every row" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["release.yaml", "s.pt"]
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == ["snapshot", "measure"]


def test_json_has_figures_choices_bytes_and_time(configure):
    config = configure(precision="auto", auto={"max_relative_l2": 0.1})
    plan = json.loads(run_export("plan", "--config", config, "--json", "--workers", "1").stdout)
    user, item = plan["tables"]
    assert user["serving_precision"] == "int4"
    assert [entry["bytes"] for entry in user["candidates"]] == [3000 * row for row in (64, 32, 20, 12, 8)]
    assert [entry["precision"] for entry in item["candidates"]] == ["fp32", "fp16", "int8"]
    assert user["candidates"][4]["problems"]
    assert user["candidates"][2]["accuracy"]["rows_measured"] == 3000
    assert plan["choices"] == [{"table": "user", "serving_precision": "int4", "reason": plan["choices"][0]["reason"]}]
    assert plan["artifact_bytes"] > 3000 * 12 + 500 * 14
    assert plan["build_seconds"] > 0
    assert plan["refusal"] is None


def test_a_choice_that_cannot_be_made_is_shown_and_exits_3(configure):
    config = configure(precision="auto", auto={"max_bytes": 1000})
    done = run_export("plan", "--config", config)
    assert done.returncode == 3
    assert "user" in done.stdout
    assert "->" not in done.stdout.split("item")[0]
    assert "error: serving.auto.max_bytes is 1,000: the artifact needs at least" in done.stderr
    assert json.loads(run_export("plan", "--config", config, "--json").stdout)["refusal"].startswith(
        "serving.auto.max_bytes"
    )


def test_a_sample_says_so(configure):
    done = run_export("plan", "--config", configure(), "--sample", "3")
    assert done.returncode == 0, done.stderr
    assert "measured   one chunk of rows of 3" in done.stdout
    assert run_export("plan", "--config", configure(), "--sample", "0").returncode == 2


def test_what_a_vocabulary_takes_counts_in_the_bytes_of_the_artifact(configure, tmp_path):
    def artifact_bytes(tables):
        return preview_release(load_config(configure(tables)), 1, 1, Clock(NoProgress())).artifact_bytes

    without = artifact_bytes(TABLES)
    write_entities(tmp_path / "v" / "a.parquet", range(100))
    write_entities(tmp_path / "v" / "b.parquet", range(100, 250), range(100, 250))
    assert artifact_bytes([TABLES[0] | {"vocab": str(tmp_path / "v")}, TABLES[1]]) == without + 4096 + 2 * 250 * 16


def test_a_snapshot_that_does_not_fit_is_refused_as_a_build_does(configure):
    done = run_export("plan", "--config", configure([TABLES[0] | {"num_embeddings": 3001}]))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: table 'user': " in done.stderr


def test_a_fixed_precision_is_planned_beside_the_others(configure):
    preview = preview_release(load_config(configure()), 1, 1, Clock(NoProgress()))
    assert preview.precisions == {"user": Precision.FP16, "item": Precision.INT8}
    assert preview.choices == []


def test_tables_of_a_fixed_precision_count_once_in_the_bytes_of_the_artifact(configure, tmp_path):
    def artifact_bytes(count):
        rows = {"user": torch.randn(3000, 16), "item": torch.randn(count, 10).half()}
        rows["item"][0, 0] = 6e4
        torch.save(state_dict(rows), tmp_path / "s.pt")
        tables = [TABLES[0], TABLES[1] | {"num_embeddings": count}]
        return preview_release(load_config(configure(tables)), 1, 1, Clock(NoProgress())).artifact_bytes

    assert artifact_bytes(700) - artifact_bytes(500) == 200 * 14


def test_a_report_is_never_written_into_the_artifact(built_artifact, tmp_path):
    weights = built_artifact / "weights/tables.safetensors"
    before = weights.read_bytes()
    done = run_export("report", built_artifact, "--output", weights)
    assert done.returncode == 1
    assert "is inside the artifact, which never changes; name a file outside of it" in done.stderr
    assert weights.read_bytes() == before
    done = run_export("report", built_artifact, "--output", tmp_path / "absent" / "r.html")
    assert done.returncode == 1
    assert f"{tmp_path}/absent/r.html: cannot be written: No such file or directory" in done.stderr
    assert run_export("report", built_artifact, "--output", tmp_path / "r.html").returncode == 0
    assert (tmp_path / "r.html").read_bytes() == (built_artifact / "reports/report.html").read_bytes()


def test_a_plan_that_a_build_would_refuse_exits_with_3(tmp_path, dcp_snapshot):
    budget = {"table_budgets": {"user": {"max_relative_l2": 1e-9}}}
    config = write_config(tmp_path / "release.yaml", dcp_snapshot, parity=budget)
    done = run_export("plan", "--config", config)
    assert done.returncode == 3
    assert "relative_l2 is " in done.stderr
    assert "above its budget max_relative_l2: 1e-09" in done.stderr
    assert "user" in done.stdout
    assert run_export("build", "--config", config, "--output", tmp_path / "artifact").returncode == 3
