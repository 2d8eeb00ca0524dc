"""What a precision costs on the demo's task: the script's figures against plain numpy, and what it refuses."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import write_config
from torch.distributed import checkpoint

from export import build_artifact, load_config
from export.config import Precision
from runtime_py import load_artifact

SCRIPTS = Path(__file__).parents[1] / "scripts"
ADAGRAD = {"adagrad": {"lr": 0.1, "eps": 1e-7}}
SGD = {"sgd": {"lr": 0.1}}
TABLES = [
    {"name": "user", "num_embeddings": 400, "embedding_dim": 8, "data_type": "fp32", "optimizer": ADAGRAD},
    {"name": "item", "num_embeddings": 200, "embedding_dim": 4, "data_type": "fp16", "optimizer": SGD},
    {
        "name": "tag",
        "num_embeddings": 60,
        "embedding_dim": 16,
        "data_type": "fp32",
        "optimizer": ADAGRAD,
        "feature_names": ["tag", "last_tag"],
        "pooling": "mean",
    },
]
FEATURES = ["user", "item", "tag", "last_tag"]
HELD_OUT, QUERIES, CANDIDATES = 1000, 40, 30
SIZES = ["--held-out", HELD_OUT, "--queries", QUERIES, "--candidates", CANDIDATES]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("evaluate_precisions")
    finally:
        sys.path.remove(str(SCRIPTS))


def run(name, *arguments):
    command = [sys.executable, SCRIPTS / name, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def build(folder, name, snapshot, tables, precision):
    """An artifact in the folder `name`, with no budget."""
    budgets = {precision: {"max_relative_l2": 10.0}}
    serving = {"precision": precision}
    config = write_config(folder / f"{name}.yaml", snapshot, tables, serving=serving, parity={"budgets": budgets})
    return build_artifact(config, folder / name, workers=1).artifact


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Snapshots of two steps, and their configuration."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = write_config(folder / "release.yaml", "snapshots", TABLES, serving={"precision": "fp16"})
    made = run(
        "make_snapshot.py", "--config", config, "--output", folder / "snapshots", "--steps", 60, "--save-every", 40
    )
    assert made.returncode == 0, made.stderr
    return SimpleNamespace(folder=folder, config=config, snapshots=folder / "snapshots")


@pytest.fixture(scope="module")
def evaluated(trained):
    """The report on two precisions and two artifacts, of which one has its columns in another order."""
    narrow = build(trained.folder, "narrow", trained.snapshots, TABLES, "int4")
    reverse = build(trained.folder, "reverse", trained.snapshots, TABLES[::-1], "fp32")
    output = trained.folder / "reports" / "evaluation.json"
    more = ["--output", output, "--precisions", "fp32", "int2", "--artifact", narrow, "--artifact", reverse]
    done = run("evaluate_precisions.py", "--config", trained.config, *more, *SIZES)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    values = {row["name"]: row["values"] for row in report["rows"]}
    return SimpleNamespace(report=report, values=values, stdout=done.stdout, narrow=narrow)


@pytest.fixture(scope="module")
def held_out(script, trained):
    data = script.ClickData(load_config(trained.config).large_embeddings, 0)
    return data.batch("held_out", 0, HELD_OUT)


@pytest.fixture(scope="module")
def head(trained):
    """The trained head as numpy's: first weights and biases, then the second ones."""
    width = 8 + 4 + 16 + 16
    state = {
        "model.head.0.weight": torch.empty(64, width),
        "model.head.0.bias": torch.empty(64),
        "model.head.2.weight": torch.empty(1, 64),
        "model.head.2.bias": torch.empty(1),
    }
    checkpoint.load(state, checkpoint_id=trained.snapshots / "60", no_dist=True)
    return [tensor.double().numpy() for tensor in state.values()]


def head_reference(head, columns):
    """The dense head in numpy: float64 [B, columns] to logits [B]."""
    first, first_bias, second, second_bias = head
    return (np.maximum(columns @ first.T + first_bias, 0.0) @ second.T + second_bias)[:, 0]


def log_loss_reference(logits, clicks):
    """From the definition, one impression after the other."""
    losses = []
    for logit, click in zip(logits, clicks, strict=True):
        probability = 1.0 / (1.0 + math.exp(-logit))
        losses.append(-math.log(probability if click else 1.0 - probability))
    return sum(losses) / len(losses)


def bags_of(batch):
    """The batch as lists of ids by feature."""
    return {
        name: [bag.tolist() for bag in torch.split(jagged.values(), jagged.lengths().tolist())]
        for name, jagged in batch.features.to_dict().items()
    }


def columns_of(artifact, request):
    pooled = artifact(request)
    return torch.cat([pooled[feature] for feature in FEATURES], dim=1).double().numpy()


# --- The whole script ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fp32_is_the_model_in_any_order_of_columns_and_int2_is_not(evaluated):
    values = evaluated.values
    assert list(values) == ["float32 model", "fp32", "int2", "narrow", "reverse"]
    assert values["fp32"] == pytest.approx(values["float32 model"], abs=1e-6)
    assert values["reverse"] == pytest.approx(values["float32 model"], abs=1e-6)
    assert abs(values["int2"]["log loss"] - values["float32 model"]["log loss"]) > 1e-5
    assert abs(values["narrow"]["log loss"] - values["float32 model"]["log loss"]) > 1e-6
    assert values["float32 model"]["recall@10"] > 10 / CANDIDATES


@pytest.mark.slow
def test_the_log_loss_is_that_of_plain_numpy_which_sees_columns_out_of_order_and_a_damaged_head(
    evaluated, head, held_out
):
    columns = columns_of(load_artifact(evaluated.narrow), bags_of(held_out))
    clicks = held_out.clicks.numpy()
    reported = evaluated.values["narrow"]
    loss = log_loss_reference(head_reference(head, columns), clicks)
    assert reported["log loss"] == pytest.approx(loss, abs=1e-6)
    rate = clicks.mean(dtype=np.float64)
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert reported["normalised entropy"] == pytest.approx(loss / entropy, abs=1e-6)

    out_of_order = np.concatenate([columns[:, :12], columns[:, 28:], columns[:, 12:28]], axis=1)
    damaged = [-head[0], *head[1:]]
    for logits in (head_reference(head, out_of_order), head_reference(damaged, columns)):
        assert abs(log_loss_reference(logits, clicks) - loss) > 1e-4


@pytest.mark.slow
def test_recall_is_that_of_scoring_every_candidate_in_its_impression(script, trained, evaluated, head, held_out):
    config = load_config(trained.config).large_embeddings
    queries = script.draw_queries(config, held_out, "item", QUERIES, CANDIDATES, 0)
    artifact, bags = load_artifact(evaluated.narrow), bags_of(held_out)
    found = 0
    for impression, candidates in zip(queries.impressions, queries.candidates, strict=True):
        request = {name: [bags[name][impression]] * CANDIDATES for name in FEATURES}
        request["item"] = [[candidate] for candidate in candidates]
        true, *others = head_reference(head, columns_of(artifact, request))
        found += sum(other >= true for other in others) < 10
    assert evaluated.values["narrow"]["recall@10"] == pytest.approx(found / QUERIES)


@pytest.mark.slow
def test_the_report_says_what_was_measured_and_which_table_kept_a_wider_type(evaluated):
    report = evaluated.report
    assert list(report) == ["task", "metrics", "rows"]
    assert [(metric["name"], metric["better"], metric["unit"]) for metric in report["metrics"]] == [
        ("log loss", "lower", "nats"),
        ("normalised entropy", "lower", ""),
        ("recall@10", "higher", ""),
    ]
    sizes = {row["name"]: row["bytes"] for row in report["rows"]}
    user, item, tag = 400, 200, 60
    assert sizes["float32 model"] == user * 8 * 4 + item * 4 * 2 + tag * 16 * 4
    assert sizes["fp32"] == user * 8 * 4 + item * 4 * 4 + tag * 16 * 4
    assert sizes["int2"] == user * (4 + 2) + item * (4 + 2) + tag * (4 + 4)  # item: int4
    kept = "In int2, table 'item' keeps int4: its 4 values a row are no multiple of 8."
    assert kept in report["task"]
    assert kept in evaluated.stdout
    assert "step 60" in report["task"]
    lines = evaluated.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == list(sizes)


@pytest.mark.slow
def test_what_it_refuses_is_one_line(script, trained, tmp_path, monkeypatch, subtests):
    monkeypatch.setattr(script, "_say", lambda line: None)
    step_40 = build(tmp_path, "earlier", trained.snapshots / "40", TABLES, "fp16")
    two_tables = build(tmp_path, "two", trained.snapshots, TABLES[:2], "fp16")
    nowhere = write_config(tmp_path / "nowhere.yaml", tmp_path / "none", TABLES)
    wider = [TABLES[0], {**TABLES[1], "embedding_dim": 8}, TABLES[2]]
    other = write_config(tmp_path / "other.yaml", trained.snapshots, wider)
    cases = [
        (nowhere, [], f"{tmp_path / 'none'}: no such file or folder"),
        (other, [], "has [200, 4] under 'model.embeddings.ebc.embedding_bags.item.weight', expected [200, 8]"),
        (write_config(tmp_path / "two.yaml", trained.snapshots, TABLES[:2]), [], "'model.head.0.weight'"),
        (trained.config, ["--seed", 1], "predicts no better than the click rate"),
        (trained.config, ["--queries", 900], "--queries asks for 900; ask for fewer"),
        (trained.config, ["--candidates", 201], "table 'item': 200 rows are too few for --candidates 201"),
        (trained.config, ["--retrieval-feature", "itm"], "no table has the feature 'itm'; features: user, item, tag"),
        (trained.config, ["--artifact", step_40], "was built from another snapshot"),
        (trained.config, ["--artifact", two_tables], "has the features user [8], item [4], the configuration has"),
        (trained.config, ["--artifact", tmp_path / "none"], f"{tmp_path / 'none'}: no such folder"),
    ]
    for config, more, text in cases:
        with subtests.test(text):
            arguments = ["--config", config, "--output", tmp_path / "out.json", "--precisions", *SIZES, *more]
            with pytest.raises(SystemExit) as caught:
                script.main(list(map(str, arguments)))
            assert str(caught.value.code).startswith("error: ")  # a text: Python prints it and exits with 1
            assert text in caught.value.code
            assert "\n" not in caught.value.code
    assert not (tmp_path / "out.json").exists()


def test_wrong_options_are_usage_errors(script, tmp_path, capsys):
    cases = [
        (["--precisions", "int3"], "invalid choice: 'int3'"),
        (["--candidates", "10"], "--candidates must be more than 10"),
        (["--queries", "0"], "--queries and --held-out must be at least 1"),
        (["--output", str(tmp_path)], "is a folder; name a file"),
        (["--artifact", "a/fp16"], "two rows would be called 'fp16'"),
    ]
    for more, text in cases:
        with pytest.raises(SystemExit) as caught:
            script.main(["--config", "c.yaml", "--output", "out.json", *more])
        assert caught.value.code == 2
        assert text in capsys.readouterr().err


# --- Its parts -------------------------------------------------------------------------------------------------------


def test_recall_counts_ties_and_nan_against_the_true_one(script):
    logits = torch.tensor(
        [
            [3.0, 1.0, 2.0, 0.0],  # before all others
            [1.5, 1.0, 2.0, 0.0],  # second
            [1.0, 1.0, 2.0, 0.0],  # third: an equal one is before it
            [math.nan, 1.0, 2.0, 0.0],  # last
            [-1.0, 1.0, 2.0, 0.0],  # last
        ]
    )
    assert [script.recall(logits, first) for first in (1, 2, 3, 4)] == [0.2, 0.4, 0.6, 1.0]


def test_normalised_entropy_by_hand(script):
    assert script.normalised_entropy(math.log(2), 0.5) == pytest.approx(1.0)
    assert script.normalised_entropy(0.5, 0.25) == pytest.approx(0.5 / 0.5623351446188083)
    for rate in (0.0, 1.0):
        with pytest.raises(script.ConfigError, match=r"impressions .* were clicked; take more"):
            script.normalised_entropy(0.5, rate)


def test_log_loss_by_hand(script):
    logits = torch.tensor([0.0, math.log(3)])  # probabilities 1/2 and 3/4
    assert script.log_loss(logits, torch.tensor([1.0, 0.0])) == pytest.approx((math.log(2) + math.log(4)) / 2)


@pytest.mark.slow
def test_queries_are_clicked_impressions_with_one_of_their_ids_and_others_outside_the_bag(script, trained, held_out):
    config = load_config(trained.config).large_embeddings
    queries = script.draw_queries(config, held_out, "last_tag", QUERIES, 56, 0)
    bags = bags_of(held_out)["last_tag"]
    assert len(set(queries.impressions)) == QUERIES
    assert queries.candidates.shape == (QUERIES, 56)
    for impression, (true, *others) in zip(queries.impressions, queries.candidates, strict=True):
        assert held_out.clicks[impression] == 1
        assert true in bags[impression]
        assert not set(others) & set(bags[impression])
        assert len(set(others)) == 55
        assert set(others) <= set(range(60))
    again, another = (script.draw_queries(config, held_out, "last_tag", QUERIES, 56, seed) for seed in (0, 1))
    assert np.array_equal(queries.candidates, again.candidates)
    assert not np.array_equal(queries.candidates, another.candidates)


def test_a_table_gets_the_next_wider_type_that_its_dimension_allows(script, tmp_path):
    tables = [
        {"name": f"d{dim}", "num_embeddings": 1, "embedding_dim": dim, "data_type": "fp32"} for dim in (1, 2, 4, 8)
    ]
    config = load_config(write_config(tmp_path / "c.yaml", "s", tables)).large_embeddings
    assert list(script.table_precisions(config, Precision.INT2).values()) == ["fp16", "int8", "int4", "int2"]
    assert list(script.table_precisions(config, Precision.INT8).values()) == ["fp16", "int8", "int8", "int8"]
    assert set(script.table_precisions(config, Precision.FP32).values()) == {"fp32"}
