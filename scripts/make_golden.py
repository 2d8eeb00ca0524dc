#!/usr/bin/env python
"""Writes artifacts/golden/format-1, the tiny artifact that every later reader must load. Run once a format version.

Its rows are multiples of 1/4, exact in fp16, int8 and int4, so that a test can say by hand what a lookup gives:
value(table, row, column) = (100 * table + 10 * row + column) / 4. In int2 three steps span a row. The table `user` has a
vocabulary with one hole.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import torch
from pyarrow import parquet

from export import build_artifact

TABLES = [
    {"name": "user", "num_embeddings": 5, "embedding_dim": 4, "data_type": "fp32", "vocab": "user.parquet"},
    {"name": "item", "num_embeddings": 3, "embedding_dim": 2, "data_type": "fp32", "serving_precision": "fp32"},
    {"name": "tag", "num_embeddings": 4, "embedding_dim": 3, "data_type": "fp32", "pooling": "mean"},
    {"name": "seen", "num_embeddings": 4, "embedding_dim": 8, "data_type": "fp32", "weighted": True},
    {"name": "place", "num_embeddings": 2, "embedding_dim": 256, "data_type": "fp32", "serving_precision": "int8"},
    {"name": "color", "num_embeddings": 3, "embedding_dim": 16, "data_type": "fp32", "serving_precision": "int4"},
    {"name": "shape", "num_embeddings": 2, "embedding_dim": 8, "data_type": "fp32", "serving_precision": "int2"},
]
USERS = {"entity_id": [2**63 - 1, -(2**63), 1000, 0], "index": [4, 3, 1, 0]}
GOLDEN = Path(__file__).parents[1] / "artifacts" / "golden" / "format-1"


def rows(number: int, table: dict[str, object]) -> torch.Tensor:
    row = torch.arange(int(str(table["num_embeddings"])))[:, None]
    column = torch.arange(int(str(table["embedding_dim"])))[None, :]
    return (100 * number + 10 * row + column) / 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--overwrite", action="store_true", help="replace the committed artifact")
    if parser.parse_args().overwrite:
        shutil.rmtree(GOLDEN, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = {f"ebc.embedding_bags.{table['name']}.weight": rows(i, table) for i, table in enumerate(TABLES)}
        torch.save(state, folder / "snapshot.pt")
        parquet.write_table(pa.table(USERS), folder / "user.parquet")
        config = folder / "release.yaml"
        config.write_text(json.dumps({"large_embeddings": {"tables": TABLES}, "snapshot": {"uri": "snapshot.pt"}}))
        print(build_artifact(config, GOLDEN, workers=1).manifest.artifact_id)


if __name__ == "__main__":
    main()
