"""The model that is exported: torchrec's collection as upstream names it, on `meta` until it is filled."""

from typing import Any

import pytest
import references
import torch
import torchrec
from support import FEATURES, TABLES, make_rows
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from export.config import LargeEmbeddingsConfig
from export.large_embeddings import LargeEmbeddings, torchrec_tables

ONE_TABLE = [{"name": "user", "num_embeddings": 5, "embedding_dim": 4, "data_type": "fp32"}]


def config_of(tables: list[dict[str, Any]]) -> LargeEmbeddingsConfig:
    return LargeEmbeddingsConfig.model_validate({"tables": tables})


def batch_of(tables: list[dict[str, Any]], bags: int = 5, seed: int = 0, weighted: bool = False) -> KeyedJaggedTensor:
    """`bags` bags of 0 to 3 ids for every feature."""
    generator = torch.Generator().manual_seed(seed)
    keys, values, lengths = [], [], []
    for table in tables:
        for feature in table.get("feature_names", [table["name"]]):
            length = torch.randint(0, 4, (bags,), generator=generator)
            keys.append(feature)
            lengths.append(length)
            values.append(torch.randint(0, table["num_embeddings"], (int(length.sum()),), generator=generator))
    count = sum(len(ids) for ids in values)
    weights = torch.randn(count, generator=generator) if weighted else None
    return KeyedJaggedTensor(keys, torch.cat(values), weights, torch.cat(lengths))


def torchrec_collection(rows: dict[str, torch.Tensor]) -> torchrec.EmbeddingBagCollection:
    """The collection of `TABLES` written out by hand, with its rows."""

    def table(name: str, shape: tuple[int, int], dtype: DataType, **options: Any) -> torchrec.EmbeddingBagConfig:
        return torchrec.EmbeddingBagConfig(
            name=name, num_embeddings=shape[0], embedding_dim=shape[1], data_type=dtype, **options
        )

    collection = torchrec.EmbeddingBagCollection(
        tables=[
            table("user", (300, 8), DataType.FP32, feature_names=["user"]),
            table("item", (41, 3), DataType.FP16, feature_names=["item", "last_item"]),
            table("tag", (7, 16), DataType.FP32, feature_names=["tag"], pooling=torchrec.PoolingType.MEAN),
            table("age", (1, 4), DataType.FP32, feature_names=["age"]),
        ]
    )
    with torch.no_grad():
        for name, tensor in rows.items():
            collection.embedding_bags[name].weight.copy_(tensor)
    return collection


def test_the_outputs_have_the_names_the_order_and_the_values_of_torchrecs() -> None:
    rows = make_rows(TABLES)
    model = LargeEmbeddings(config_of(TABLES))
    model.fill(rows)
    batch = batch_of(TABLES)
    got, expected = model(batch), torchrec_collection(rows)(batch)
    assert isinstance(got, KeyedTensor)
    assert got.keys() == expected.keys() == FEATURES
    assert got.length_per_key() == expected.length_per_key() == [8, 3, 3, 16, 4]
    assert got.values().dtype == torch.float32
    assert torch.equal(got.values(), expected.values())


def test_the_outputs_are_those_of_plain_loops() -> None:
    tables = [table for table in TABLES if table["data_type"] == "fp32"]
    rows = make_rows(tables)
    model = LargeEmbeddings(config_of(tables))
    model.fill(rows)
    batch = batch_of(tables)
    bags = {key: [ids.tolist() for ids in batch[key].to_dense()] for key in batch.keys()}  # noqa: SIM118
    features = [
        {"name": table["name"], "table": table["name"], "pooling": table.get("pooling", "sum")} for table in tables
    ]
    expected = references.pooled_batch(features, {name: tensor.numpy() for name, tensor in rows.items()}, bags)
    torch.testing.assert_close(model(batch).values(), torch.from_numpy(expected))


def test_per_sample_weights_scale_the_rows_of_a_weighted_collection() -> None:
    tables = [{**table, "weighted": True} for table in ONE_TABLE]
    rows = make_rows(tables)
    model = LargeEmbeddings(config_of(tables))
    model.fill(rows)
    batch = batch_of(tables, weighted=True)
    pooled = model(batch).values()
    ids, weights = batch["user"].to_dense(), batch["user"].to_dense_weights()
    for bag in range(5):
        by_hand = references.pooled_bag(rows["user"].numpy(), ids[bag].tolist(), "sum", weights[bag].tolist())
        torch.testing.assert_close(pooled[bag], torch.from_numpy(by_hand))


def test_tables_come_in_configuration_order_with_their_features_pooling_and_types() -> None:
    tables = torchrec_tables(config_of(TABLES))
    assert [table.name for table in tables] == ["user", "item", "tag", "age"]
    assert [table.feature_names for table in tables] == [["user"], ["item", "last_item"], ["tag"], ["age"]]
    assert [(table.num_embeddings, table.embedding_dim) for table in tables] == [(300, 8), (41, 3), (7, 16), (1, 4)]
    assert [table.data_type for table in tables] == [DataType.FP32, DataType.FP16, DataType.FP32, DataType.FP32]
    assert [table.pooling.name for table in tables] == ["SUM", "SUM", "MEAN", "SUM"]


def test_the_cut_point_is_on_the_path_of_every_output() -> None:
    class Double(torch.nn.Module):
        def forward(self, pooled: KeyedTensor) -> KeyedTensor:
            return KeyedTensor(pooled.keys(), pooled.length_per_key(), pooled.values() * 2)

    model = LargeEmbeddings(config_of(TABLES))
    model.fill(make_rows(TABLES))
    batch = batch_of(TABLES)
    before = model(batch).values()
    assert isinstance(model.surgery_cut_point, torch.nn.Identity)
    model.surgery_cut_point = Double()
    assert before.abs().sum() > 0
    assert torch.equal(model(batch).values(), before * 2)


def test_parameters_are_on_meta_under_upstreams_names_until_they_are_filled() -> None:
    model = LargeEmbeddings(config_of(TABLES))
    shapes = {name: (tuple(tensor.shape), tensor.dtype, tensor.is_meta) for name, tensor in model.named_parameters()}
    assert shapes == {
        "ebc.embedding_bags.user.weight": ((300, 8), torch.float32, True),
        "ebc.embedding_bags.item.weight": ((41, 3), torch.float16, True),
        "ebc.embedding_bags.tag.weight": ((7, 16), torch.float32, True),
        "ebc.embedding_bags.age.weight": ((1, 4), torch.float32, True),
    }
    model.fill(make_rows(TABLES))
    assert not any(tensor.is_meta for tensor in model.parameters())


def test_filling_copies_nothing() -> None:
    rows = make_rows(TABLES)
    model = LargeEmbeddings(config_of(TABLES))
    model.fill(rows)
    filled = model.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in rows.items()} == {
        name: filled[f"ebc.embedding_bags.{name}.weight"].data_ptr() for name in rows
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tag": None}, r'Missing key\(s\) in state_dict: "ebc\.embedding_bags\.tag\.weight"'),
        ({"tags": torch.zeros(7, 16)}, r'Unexpected key\(s\) in state_dict: "ebc\.embedding_bags\.tags\.weight"'),
        ({"tag": torch.zeros(8, 16)}, r"size mismatch for ebc\.embedding_bags\.tag\.weight.*\[8, 16\].*\[7, 16\]"),
        ({"tag": torch.zeros(16, 7)}, r"size mismatch for ebc\.embedding_bags\.tag\.weight.*\[16, 7\].*\[7, 16\]"),
        ({"tag": torch.zeros(7 * 16)}, r"size mismatch for ebc\.embedding_bags\.tag\.weight.*\[112\].*\[7, 16\]"),
    ],
    ids=["missing", "unknown", "more rows", "transposed", "flat"],
)
def test_rows_that_do_not_fit_the_tables_are_refused_by_name(change: dict[str, Any], problem: str) -> None:
    rows = {name: tensor for name, tensor in {**make_rows(TABLES), **change}.items() if tensor is not None}
    with pytest.raises(RuntimeError, match=problem):
        LargeEmbeddings(config_of(TABLES)).fill(rows)


def test_fp16_rows_are_pooled_to_float32() -> None:
    tables = [{"name": "item", "num_embeddings": 3, "embedding_dim": 2, "data_type": "fp16"}]
    rows = make_rows(tables)
    model = LargeEmbeddings(config_of(tables))
    model.fill(rows)
    pooled = model(KeyedJaggedTensor(["item"], torch.tensor([2, 0]), None, torch.tensor([1, 1]))).values()
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, rows["item"][[2, 0]].float())
