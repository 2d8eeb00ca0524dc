"""Questions 2 and 3: the gate passes what is right, and names what is wrong."""

import time

import numpy as np
import pytest
import torch
from support import TABLES, make_rows, write_config

from export.accuracy import ProbeRows, dequantize
from export.config import Precision
from export.config_file import load_config
from export.errors import GateError
from export.parity import _bound_rows, check_parity, make_cases, make_slots, probe_ids
from export.quantize import convert_rows, new_rows
from runtime_py import Artifact


def tables_config(tmp_path, tables=TABLES):
    return load_config(write_config(tmp_path / "parity.yaml", "unused", tables)).large_embeddings


def probe(config, cases, rows, precisions):
    types = {Precision.FP32: torch.float32, Precision.FP16: torch.float16}
    ids = probe_ids(config, cases)
    return {
        name: ProbeRows(ids[name], rows[name][ids[name]].float(), rows[name][ids[name]].to(types[precisions[name]]))
        for name in rows
    }


PRECISIONS = {"user": Precision.FP16, "item": Precision.FP16, "tag": Precision.FP16, "age": Precision.FP32}


def check(artifact, config, rows, probes_of=None, seed=5):
    cases = make_cases(config, seed, 3)
    probes = probe(config, cases, probes_of or rows, PRECISIONS)
    return check_parity(artifact, config, PRECISIONS, cases, probes, seed)


def test_a_right_artifact_passes_and_the_report_says_by_how_much(built_artifact, rows, tmp_path):
    summary, results, golden = check(built_artifact, tables_config(tmp_path), rows)
    assert 0 < summary.quantization_max_share_of_bound <= 1
    assert 0 < summary.quantization_max_error < 0.05
    assert summary.cases == len(results)
    names = [case["name"] for case in results]
    assert names[:6] == ["no bags", "empty bags", "one bag", "first and last row", "duplicate ids", "ids out of range"]
    assert len(names) == 9
    assert list(golden) == [f"{number:02} {name}" for number, name in enumerate(names[:7])]


def test_one_other_stored_row_fails_question_two_by_name(built_artifact, rows, tmp_path):
    other = {name: tensor.clone() for name, tensor in rows.items()}
    other["item"][40, 2] += 0.5  # the last row, which a case looks up
    with pytest.raises(GateError, match=r"case '.*': feature 'item' \(table 'item'\), bag \d+, column 2: .*quantized"):
        check(built_artifact, tables_config(tmp_path), rows, other)


def test_another_order_of_the_tables_fails(built_artifact, rows, tmp_path):
    config = tables_config(tmp_path)
    swapped = config.model_copy(update={"tables": config.tables[::-1]})
    with pytest.raises(Exception, match=r"parity case|feature|split"):
        check(built_artifact, swapped, rows)


def test_rows_too_far_from_training_fail_question_three_by_name(built_artifact, rows, tmp_path):
    """Stored rows agree with the artifact, the trained ones are off by more than fp16 can explain."""
    config = tables_config(tmp_path)
    cases = make_cases(config, 5, 3)
    probes = probe(config, cases, rows, PRECISIONS)
    trained = probes["user"].trained * 1.01
    probes["user"] = ProbeRows(probes["user"].ids, trained, probes["user"].stored)
    with pytest.raises(
        GateError, match=r"feature 'user' \(table 'user'\), bag \d+, column \d+: the artifact is .* from"
    ):
        check_parity(built_artifact, config, PRECISIONS, cases, probes, 5)


def test_weighted_and_mean_tables_pass_in_every_precision(rebuild, tmp_path):
    tables = [
        {"name": "w", "num_embeddings": 50, "embedding_dim": 5, "data_type": "fp32", "weighted": True},
        {"name": "u", "num_embeddings": 20, "embedding_dim": 64, "data_type": "fp32", "pooling": "mean"},
        {"name": "x", "num_embeddings": 20, "embedding_dim": 1, "data_type": "fp16", "serving_precision": "fp32"},
    ]
    artifact = rebuild(tables, make_rows(tables), parity={"seed": 11, "batches": 4})
    assert (artifact / "reports" / "parity.json").is_file()


def test_cases_are_adversarial_and_seeded(tmp_path):
    config = tables_config(tmp_path)
    cases = {case.name: case for case in make_cases(config, 1, 2)}
    rows = [slot.table.num_embeddings for slot in make_slots(config)]
    assert [[bag.tolist() for bag in bags] for bags in cases["first and last row"].bags] == [
        [[0], [count - 1], [0, count - 1], []] for count in rows
    ]
    for bags, count in zip(cases["ids out of range"].bags, rows, strict=True):
        flat = np.concatenate(bags)
        assert {-1, count, -(2**63), 2**63 - 1} <= set(flat.tolist())
    again = {case.name: case for case in make_cases(config, 1, 2)}
    other = {case.name: case for case in make_cases(config, 2, 2)}
    assert str(cases["random 1"]) == str(again["random 1"])
    assert str(cases["random 1"]) != str(other["random 1"])


def test_probe_ids_are_the_valid_ones_in_ascending_order(tmp_path):
    config = tables_config(tmp_path)
    ids = probe_ids(config, make_cases(config, 0, 8))
    for table in config.tables:
        assert np.array_equal(ids[table.name], np.unique(ids[table.name]))
        assert ids[table.name].min() == 0
        assert ids[table.name].max() == table.num_embeddings - 1


def test_a_hundred_features_are_checked_in_seconds(rebuild):
    """The gate's time is linear in the features; it was quadratic, 9 s here."""
    tables = [{"name": f"t{i}", "num_embeddings": 20, "embedding_dim": 4, "data_type": "fp32"} for i in range(100)]
    start = time.process_time()
    rebuild(tables, make_rows(tables))
    assert time.process_time() - start < 8


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4, Precision.INT2])
def test_the_bound_of_a_quantized_row_is_half_a_step_and_little_more(precision):
    trained = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    stored = new_rows(200, 16, precision)
    convert_rows(trained, stored, precision)
    values = dequantize(stored, 16, precision)
    _, bound = _bound_rows(trained, stored, precision)
    error = (values - trained).abs().double().numpy()
    scale = stored[:, :4].contiguous().view(torch.float16)[:, :1].double().numpy()
    assert (error <= bound).all()
    inside = (bound < 0.51 * scale).mean()
    assert inside > 0.8  # the others are at an end of their row, which was rounded
    assert (error / bound).max() > 0.99


def test_a_graph_whose_own_checks_give_another_answer_than_the_loader_fails(
    built_artifact, rows, tmp_path, monkeypatch
):
    """Other readers call the graph alone; the loader calls its method for requests that were checked."""

    def graph(self):
        return lambda *inputs: self._lookups.graph(*inputs) + 1.0

    monkeypatch.setattr(Artifact, "graph", property(graph))
    with pytest.raises(GateError, match="the graph's own checks give another answer than the loader's"):
        check(built_artifact, tables_config(tmp_path), rows)
