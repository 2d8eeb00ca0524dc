"""Reads entities, pairs of (id, row), from parquet files in a stream.

Whatever an id or a row must not be is refused here, with its file and row number (counted from 0).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from export.config import VocabularyConfig
from export.errors import VocabularyError
from export.parquet_columns import ColumnBatch, IntegerColumns
from export.storage import Location

__all__ = ["Entities", "EntityBatch"]


@dataclass(frozen=True)
class EntityBatch:
    """Some rows of one file: `ids` and `indices`, int64 [n]; every index is a row of the table."""

    batch: ColumnBatch
    ids: np.ndarray
    indices: np.ndarray

    def place(self, position: int) -> str:
        """Where the entity at a position of this batch is, for a message."""
        return self.batch.place(position)


class Entities:
    """The entities of one table with `num_embeddings` rows, as its parquet files have them."""

    def __init__(self, table: str, num_embeddings: int, config: VocabularyConfig) -> None:
        self.table = table
        self.num_embeddings = num_embeddings
        names = {"entity_id": config.entity_id, "index": config.index}
        advice = {"entity_id": "; this version takes integer ids: hash others where rows are assigned"}
        self._columns = IntegerColumns(table, "vocabulary", "vocab", config.uri, names, VocabularyError, advice)

    @property
    def files(self) -> list[Location]:
        """The parquet files, ordered by name; raises VocabularyError where there is none, or something beside them."""
        return self._columns.files

    def count(self) -> int:
        """How many entities there are, as the files' footers say; raises VocabularyError where one cannot be read."""
        return self._columns.count()

    def batches(self) -> Iterator[EntityBatch]:
        """All entities, file after file, some 65,536 at a time; memory does not grow with them.

        Raises:
            VocabularyError: a file cannot be read, lacks a column, or has one of another type; an id or a row is null
                or out of range.
        """
        for batch in self._columns.batches():
            yield self._checked(batch)

    def _checked(self, batch: ColumnBatch) -> EntityBatch:
        refuse = self._columns.refuse
        raw_ids = batch.columns["entity_id"]
        if raw_ids.dtype == np.uint64:
            refuse(batch, "entity_id", raw_ids > 2**63 - 1, "which is beyond int64; ids are signed 64-bit")
        ids, indices = raw_ids.astype(np.int64), batch.columns["index"].astype(np.int64)
        refuse(
            batch, "entity_id", ids == -1, "which marks an empty slot and cannot be an id; give that entity another one"
        )
        outside = (indices < 0) | (indices >= self.num_embeddings)  # as int64, what is beyond it is negative
        refuse(batch, "index", outside, f"outside [0, {self.num_embeddings}), the table's rows")
        return EntityBatch(batch, ids, indices)
