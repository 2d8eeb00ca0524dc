"""What `soak_refresh.py` publishes: artifacts of one signature whose rows differ in every value, and requests to ask them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet

from export import build_artifact

REQUESTS, BAGS = 64, 8
TYPES = {"fp16": torch.float16, "fp32": torch.float32}


class Release:
    """`versions` artifacts below `folder`, and `requests.pt`, with the answers of each.

    A bag of a request holds one id or none, so that an answer is a trained row, or zeros: nothing that is tested here
    was used to compute it. A value of version v is v modulo the number of versions, and exact in fp16.
    """

    def __init__(self, folder: Path, rows: int, versions: int, graphs: list[str]) -> None:
        self.folder, self.graphs = folder, graphs
        self.tables: list[dict[str, Any]] = [
            {"name": "user", "num_embeddings": rows, "embedding_dim": 32, "data_type": "fp32"},
            {"name": "item", "num_embeddings": 500, "embedding_dim": 16, "data_type": "fp16"},
            {"name": "tag", "num_embeddings": 70, "embedding_dim": 8, "data_type": "fp32", "pooling": "mean"},
        ]
        self.tables[0]["serving_precision"] = "fp32"
        self.tables[1] |= {"feature_names": ["item", "last_item"], "vocab": str(folder / "entities.parquet")}
        entities = {"entity_id": pa.array(range(1000, 1500)), "index": pa.array(range(500))}
        parquet.write_table(pa.table(entities), folder / "entities.parquet")
        self.artifacts = [folder / f"version-{number}" for number in range(versions)]
        self.requests = self._draw_requests()
        expected = {}
        for number, artifact in enumerate(self.artifacts):
            trained = {table["name"]: _rows(table, number, versions) for table in self.tables}
            expected[self.build(artifact.name, self.tables, trained)] = self._answers(trained)
        torch.save({"requests": self.requests, "expected": expected}, folder / "requests.pt")

    def _features(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, table) for table in self.tables for name in table.get("feature_names", [table["name"]])]

    def _draw_requests(self) -> list[dict[str, list[int]]]:
        """Ids by feature, -1 for an empty bag."""
        generator = torch.Generator().manual_seed(0)

        def draw(table: dict[str, Any]) -> list[int]:
            return torch.randint(-1, table["num_embeddings"], (BAGS,), generator=generator).tolist()

        return [{name: draw(table) for name, table in self._features()} for _ in range(REQUESTS)]

    def _answers(self, trained: dict[str, torch.Tensor]) -> torch.Tensor:
        columns = []
        for name, table in self._features():
            rows = trained[table["name"]].float()
            rows = torch.cat([rows, torch.zeros(1, rows.shape[1])])  # the last one is that of -1
            columns.append(torch.stack([rows[request[name]] for request in self.requests]))
        return torch.cat(columns, dim=2)

    def build(self, name: str, tables: list[dict[str, Any]], trained: dict[str, torch.Tensor]) -> str:
        """Builds `folder`/`name`, and gives its artifact id."""
        snapshot, config = self.folder / f"{name}.pt", self.folder / f"{name}.json"
        torch.save({f"ebc.embedding_bags.{table}.weight": rows for table, rows in trained.items()}, snapshot)
        sections = {"snapshot": {"uri": str(snapshot)}, "serving": {"graphs": self.graphs}, "parity": {"batches": 1}}
        config.write_text(json.dumps({"large_embeddings": {"tables": tables}, **sections}))
        built = build_artifact(config, self.folder / name, workers=2)
        snapshot.unlink()
        return built.manifest.artifact_id

    def build_other(self, name: str, **changes: Any) -> Path:
        """An artifact whose first table is another."""
        tables = [self.tables[0] | changes, *self.tables[1:]]
        self.build(name, tables, {table["name"]: _rows(table, 0, 1) for table in tables})
        return self.folder / name


def _rows(table: dict[str, Any], number: int, versions: int) -> torch.Tensor:
    shape = table["num_embeddings"], table["embedding_dim"]
    values = torch.arange(shape[0] * shape[1]).view(shape) % 500 * versions + number + 1  # never 0, as no id gives that
    return values.to(TYPES[table["data_type"]])
