"""Every precision at every width: the stored bytes are those that torchrec makes, and so are the answers, bit for bit.

torchrec quantizes the float model itself here (`quantize_embeddings`), so nothing of what we stored helps it.
"""

import os
import warnings

import numpy as np
import pytest
import torch
from references import stored_rows
from safetensors.numpy import load_file
from support import make_rows, state_dict, write_config
from torchrec.inference.modules import quantize_embeddings
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from export import build_artifact
from export.config import Precision, dim_divisor
from export.errors import GateError, RowsError
from runtime_py import load_artifact

TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "int8": torch.qint8,
    "int4": torch.quint4x2,
    "int2": torch.quint2x4,
}
DIMS = [4, 8, 10, 16, 64, 100, 128, 256]
LOOSE = {"table_budgets": {}, "budgets": {name: {} for name in TYPES}}


def describe(pooling, weighted):
    """A table for every precision and width that it has, in one artifact."""
    return [
        {
            "name": f"{precision}_{dim}",
            "num_embeddings": 97,
            "embedding_dim": dim,
            "data_type": "fp32" if dim % 16 else "fp16",
            "serving_precision": precision,
            "pooling": pooling if pooling != "mixed" else ("sum", "mean")[number % 2],
            "weighted": weighted,
            "feature_names": [f"{precision}_{dim}", f"last_{precision}_{dim}"],
        }
        for precision in TYPES
        for number, dim in enumerate(DIMS)
        if dim % dim_divisor(Precision(precision)) == 0
    ]


def torchrec_module(tables, rows, weighted):
    """The float model, quantized by torchrec."""
    configs = [
        EmbeddingBagConfig(
            name=table["name"],
            num_embeddings=table["num_embeddings"],
            embedding_dim=table["embedding_dim"],
            feature_names=table["feature_names"],
            pooling=PoolingType[table["pooling"].upper()],
        )
        for table in tables
    ]
    model = torch.nn.Sequential(EmbeddingBagCollection(configs, is_weighted=weighted))
    with torch.no_grad():
        for name, bag in model[0].embedding_bags.items():
            bag.weight.copy_(rows[name])
    types = {table["name"]: TYPES[table["serving_precision"]] for table in tables}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_embeddings(
            model, dtype=torch.qint8, inplace=True, per_table_weight_dtype=types, output_dtype=torch.float32
        )[0]


def batch(tables, weighted, seed=0, bags=33):
    rng = np.random.default_rng(seed)
    keys = [feature for table in tables for feature in table["feature_names"]]
    lengths = rng.integers(0, 9, len(keys) * bags)
    values = rng.integers(0, 97, int(lengths.sum()))
    weights = torch.from_numpy(rng.normal(1, 1, len(values)).astype(np.float32)) if weighted else None
    return KeyedJaggedTensor(
        keys=keys, values=torch.from_numpy(values), lengths=torch.from_numpy(lengths.astype(np.int32)), weights=weights
    )


@pytest.mark.parametrize(("pooling", "weighted"), [("sum", False), ("mean", False), ("mixed", False), ("sum", True)])
def test_bytes_and_answers_are_torchrecs_bit_for_bit(tmp_path, pooling, weighted):
    tables = describe(pooling, weighted)
    rows = make_rows(tables, seed=12)
    torch.save(state_dict(rows), tmp_path / "s.pt")
    config = write_config(tmp_path / "r.yaml", tmp_path / "s.pt", tables, parity={"batches": 1, **LOOSE})
    artifact = build_artifact(config, tmp_path / "artifact", workers=2).artifact
    module = torchrec_module(tables, rows, weighted)
    stored = load_file(artifact / "weights/tables.safetensors")
    for table in tables:
        expected = stored_rows(rows[table["name"]].float().numpy(), table["serving_precision"])
        assert np.array_equal(stored[table["name"]].view(np.uint8), expected.view(np.uint8)), table["name"]
    features = batch(tables, weighted)
    answers, pooled = module(features).to_dict(), load_artifact(artifact)(features)
    for key, expected in answers.items():
        assert torch.equal(pooled[key].contiguous().view(torch.int32), expected.contiguous().view(torch.int32)), key
    assert set(answers) == set(pooled.keys())


def build(folder, rows, precision, **sections):
    tables = [{"name": "t", "num_embeddings": len(rows), "embedding_dim": rows.shape[1], "data_type": "fp32"}]
    torch.save(state_dict({"t": rows}), folder / "s.pt")
    serving = {"precision": precision} | sections.pop("serving", {})
    config = write_config(folder / "r.yaml", folder / "s.pt", tables, serving=serving, **sections)
    return build_artifact(config, folder / "artifact", workers=1)


@pytest.mark.parametrize("precision", ["int8", "int4", "int2"])
def test_one_row_constant_rows_and_zero_rows_are_served_right(tmp_path, precision):
    rows = torch.stack([torch.zeros(8), torch.full((8,), 1.5), torch.full((8,), -7.25)])
    artifact = load_artifact(build(tmp_path, rows, precision).artifact)
    assert torch.equal(artifact({"t": [[0], [1], [2]]}).values, rows)
    (tmp_path / "one").mkdir()
    one = load_artifact(build(tmp_path / "one", rows[1:2], precision).artifact)
    assert torch.equal(one({"t": [[0], []]}).values, torch.stack([rows[1], torch.zeros(8)]))


def test_an_outlier_row_is_reported_by_id_and_refused_where_the_budget_says_so(tmp_path):
    rows = torch.randn(100, 16, generator=torch.Generator().manual_seed(4))
    rows[41, 3] = 5e4
    result = build(tmp_path, rows, "int8", parity={"budgets": {"int8": {"max_relative_l2": 0.05}}})
    [figures] = result.manifest.accuracy
    assert figures.outlier_rows == 1
    assert '"row": 41' in (result.artifact / "reports/accuracy.json").read_text()
    (tmp_path / "gated").mkdir()
    budget = {"max_relative_l2": 0.05, "max_outlier_rows": 0}
    with pytest.raises(GateError, match=r"table 't': outlier_rows is 1, above its budget max_outlier_rows: 0"):
        build(tmp_path / "gated", rows, "int8", parity={"table_budgets": {"t": budget}})
    assert sorted(os.listdir(tmp_path / "gated")) == ["r.yaml", "s.pt"]


@pytest.mark.parametrize(
    ("precision", "budget", "said"),
    [
        ("int8", {"max_relative_l2": 1e-4}, "relative_l2 is 0.00"),
        ("int4", {"min_cosine": 0.9999}, "mean_cosine is 0.99"),
        ("int2", {"min_worst_cosine": 0.99}, "worst_cosine is 0."),
        ("int2", {"max_lookup_relative_l2": 0.01}, "lookup_relative_l2 is 0."),
    ],
)
def test_a_budget_that_is_exceeded_fails_the_build(tmp_path, precision, budget, said):
    rows = torch.randn(100, 16, generator=torch.Generator().manual_seed(4))
    with pytest.raises(GateError, match=f"table 't': {said}"):
        build(tmp_path, rows, precision, parity={"budgets": {precision: budget}})
    assert not (tmp_path / "artifact").exists()


def test_a_scale_that_overflows_is_refused_with_table_and_row(tmp_path):
    rows = torch.zeros(10, 8)
    rows[6, 2] = 3e7
    with pytest.raises(
        RowsError, match=r"table 't': cannot be stored as int8: row 6, column 2 is 30000000.0; in all: 1 too far"
    ):
        build(tmp_path, rows, "int8")
    assert not (tmp_path / "artifact").exists()


def test_figures_of_a_sample_say_so_and_every_row_is_compared(tmp_path):
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(100_000, 16, generator=generator)
    torch.save(state_dict({"t": rows}), tmp_path / "s.pt")
    tables = [{"name": "t", "num_embeddings": 100_000, "embedding_dim": 16, "data_type": "fp32"}]
    config = write_config(tmp_path / "r.yaml", tmp_path / "s.pt", tables, serving={"precision": "int8"})
    result = build_artifact(config, tmp_path / "artifact", workers=1, sample=2)
    [figures] = result.manifest.accuracy
    assert figures.rows == 100_000
    assert figures.rows_measured == 2 * 32_768  # the first and the third of four blocks
    assert len(load_file(result.artifact / "weights/tables.safetensors")["t"]) == 100_000
