"""Small real models and snapshots, and the command line, as the tests use them."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch.distributed import checkpoint

TABLES: list[dict[str, Any]] = [
    {"name": "user", "num_embeddings": 300, "embedding_dim": 8, "data_type": "fp32"},
    {
        "name": "item",
        "num_embeddings": 41,
        "embedding_dim": 3,
        "data_type": "fp16",
        "feature_names": ["item", "last_item"],
    },
    {"name": "tag", "num_embeddings": 7, "embedding_dim": 16, "data_type": "fp32", "pooling": "mean"},
    {"name": "age", "num_embeddings": 1, "embedding_dim": 4, "data_type": "fp32", "serving_precision": "fp32"},
]
# For a surgery: 39 columns of embeddings, some rows quantized, one table pooled by mean, one with weights.
SPLICED: list[dict[str, Any]] = [
    TABLES[0] | {"serving_precision": "int8"},
    *TABLES[1:],
    {"name": "seen", "num_embeddings": 40, "embedding_dim": 5, "data_type": "fp32", "weighted": True},
]
# Entity ids by row: `user` has holes at its end, `item` has none.
ENTITIES: dict[str, list[int]] = {
    "user": [(-1) ** row * (2**40 + 7 * row) for row in range(250)],
    "item": [-(2**63), 2**63 - 1, 0, -2, 1, *range(100, 136)],
}
FEATURES = ["user", "item", "last_item", "tag", "age"]
PREFIX = "model.embeddings.ebc"
TYPES = {"fp32": torch.float32, "fp16": torch.float16}


def make_rows(tables: list[dict[str, Any]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Trained rows by table name, normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        table["name"]: torch.randn(table["num_embeddings"], table["embedding_dim"], generator=generator).to(
            TYPES[table["data_type"]]
        )
        for table in tables
    }


def state_dict(rows: Mapping[str, torch.Tensor], prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    """Rows under the names that training gives them."""
    return {f"{prefix}.embedding_bags.{name}.weight": tensor for name, tensor in rows.items()}


def surgery_state(module: torch.nn.Module, prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    """A surgery's state under the names that training gives it."""
    parent = prefix.rpartition(".")[0]
    return {
        f"{parent}.surgery_cut_point.{name}": tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }


def make_head() -> torch.nn.Module:
    """`surgeries.Head` over `SPLICED`, trained: every tensor of its state is random."""
    from surgeries import Head

    generator = torch.Generator().manual_seed(9)
    head = Head(39)
    for name, tensor in head.state_dict().items():
        if tensor.dtype is torch.bool:
            tensor.copy_(torch.arange(len(tensor)) % 3 > 0)
        elif tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1 if "var" in name else
                         torch.randn(tensor.shape, generator=generator) / 2)  # fmt: skip
        else:
            tensor.fill_(12_345)
    return head.eval()


def write_dcp(folder: Path, rows: Mapping[str, torch.Tensor]) -> Path:
    """A DCP snapshot with some optimizer state beside the rows."""
    optimizer = {"state": {name: {"sum": torch.zeros(tensor.shape[0])} for name, tensor in rows.items()}, "lr": 0.1}
    checkpoint.save(
        {**state_dict(rows), "optimizer": optimizer, "step": 7},
        storage_writer=checkpoint.FileSystemWriter(folder),
        no_dist=True,
    )
    return folder


def write_config(path: Path, snapshot: Path | str, tables: list[dict[str, Any]] = TABLES, **sections: Any) -> Path:
    """A release configuration; JSON is YAML."""
    document = {"large_embeddings": {"tables": tables}, "snapshot": {"uri": str(snapshot)}, **sections}
    path.write_text(json.dumps(document, indent=1))
    return path


def write_entities(path: Path, ids: Sequence[Any], rows: Sequence[Any] | None = None, **names: str) -> Path:
    """A parquet file with the columns `entity_id` and `index` (or as `names` calls them); rows count from 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.arange(len(ids)) if rows is None else rows
    columns = {names.get("entity_id", "entity_id"): pa.array(ids), names.get("index", "index"): pa.array(rows)}
    parquet.write_table(pa.table(columns), path)
    return path


def write_counts(path: Path, rows: Sequence[Any], counts: Sequence[Any], **names: str) -> Path:
    """A parquet file with the columns `index` and `count` (or as `names` calls them)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {names.get("index", "index"): pa.array(rows), names.get("count", "count"): pa.array(counts)}
    parquet.write_table(pa.table(columns), path)
    return path


def with_vocabularies(folder: Path) -> list[dict[str, Any]]:
    """`TABLES` with the vocabularies of `ENTITIES`, whose parquet files it writes into `folder`."""
    for table, ids in ENTITIES.items():
        write_entities(folder / table / "part-0.parquet", np.array(ids, np.int64))
    return [table | ({"vocab": str(folder / table["name"])} if table["name"] in ENTITIES else {}) for table in TABLES]


def run_export(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m export …` as a user runs it."""
    command = [sys.executable, "-m", "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)
