"""Reads entities, pairs of (id, row), from parquet files in a stream. The only reader of parquet.

Whatever an id or a row must not be is refused here, with its file and row number (counted from 0).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from export.config import VocabularyConfig
from export.errors import SnapshotError, VocabularyError
from export.storage import Location, is_file, join, list_folder, open_location

__all__ = ["Entities", "EntityBatch"]

_BATCH_ROWS = 1 << 16
# Without the first two, pyarrow reads a row group's columns as a whole before it gives the first row.
_OPTIONS = {"pre_buffer": False, "buffer_size": 1 << 22, "page_checksum_verification": True}


@dataclass(frozen=True)
class EntityBatch:
    """Some rows of one file, from row `start` on: `ids` and `indices`, int64 [n]; every index is a row of the table."""

    file: str
    start: int
    ids: np.ndarray
    indices: np.ndarray

    def place(self, position: int) -> str:
        """Where the entity at a position of this batch is, for a message."""
        return f"{self.file}, row {self.start + position}"


class Entities:
    """The entities of one table with `num_embeddings` rows, as its parquet files have them."""

    def __init__(self, table: str, num_embeddings: int, config: VocabularyConfig) -> None:
        self.table = table
        self.num_embeddings = num_embeddings
        self._config = config

    @cached_property
    def files(self) -> list[Location]:
        """The parquet files, ordered by name.

        Raises:
            VocabularyError: there is none, or there is something else beside them.
        """
        where = f"table '{self.table}': vocabulary {self._config.uri}"
        try:
            folder = open_location(self._config.uri)
        except SnapshotError as error:
            raise VocabularyError(f"table '{self.table}': vocabulary {error}") from error
        try:
            if is_file(folder):
                return [folder]
            visible = [(name, file) for name, file in list_folder(folder).items() if not name.startswith((".", "_"))]
        except FileNotFoundError as error:
            reason = "no such file or folder" if isinstance(folder, Path) else error.strerror
            raise VocabularyError(f"{where}: {reason}") from error
        except (OSError, ValueError) as error:
            raise VocabularyError(f"{where}: cannot be read: {_reason(error)}") from error
        for name, file in visible:
            if not file or not name.endswith(".parquet"):
                raise VocabularyError(
                    f"{where}: '{name}' is no file *.parquet; "
                    "move it away, or name the folder that holds only the vocabulary's files"
                )
        if not visible:
            raise VocabularyError(f"{where}: the folder has no file *.parquet")
        return [join(folder, name) for name, _ in visible]

    def batches(self) -> Iterator[EntityBatch]:
        """All entities, file after file, some 65,536 at a time; memory does not grow with them.

        Raises:
            VocabularyError: a file cannot be read, lacks a column, or has one of another type; an id or a row is null
                or out of range.
        """
        for path in self.files:
            # A store's driver has error classes of its own; of local files, others than these are defects.
            failures: tuple[type[Exception], ...] = (
                (OSError, ValueError, pa.ArrowException) if isinstance(path, Path) else (Exception,)
            )
            try:
                with path.open("rb") as stream, ParquetFile(stream, **_OPTIONS) as file:
                    self._check_columns(str(path), file.schema_arrow)
                    columns = [self._config.entity_id, self._config.index]
                    start = 0
                    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                        yield self._checked(str(path), start, batch)
                        start += batch.num_rows
            except VocabularyError:
                raise
            except failures as error:
                raise VocabularyError(f"table '{self.table}': {path}: cannot be read: {_reason(error)}") from error

    def _check_columns(self, file: str, schema: pa.Schema) -> None:
        for key in ("entity_id", "index"):
            name = getattr(self._config, key)
            if schema.names.count(name) != 1:
                problem = "two columns" if name in schema.names else "no column"
                raise VocabularyError(
                    f"table '{self.table}': {file}: {problem} '{name}', it has: {', '.join(schema.names)}; "
                    f"name the right one in vocab: {{{key}: …}}"
                )
            kind = schema.field(name).type
            if not pa.types.is_integer(kind):
                advice = (
                    "" if key == "index" else "; this version takes integer ids: hash others where rows are assigned"
                )
                raise VocabularyError(
                    f"table '{self.table}': {file}: column '{name}' is {kind}, expected integers of at most 64 bits{advice}"
                )

    def _checked(self, file: str, start: int, batch: pa.RecordBatch) -> EntityBatch:
        raw_ids = self._numbers(file, start, batch, self._config.entity_id)
        raw_indices = self._numbers(file, start, batch, self._config.index)
        checked = EntityBatch(file, start, raw_ids.astype(np.int64), raw_indices.astype(np.int64))

        def refuse(where: np.ndarray, column: str, values: np.ndarray, problem: str) -> None:
            if where.any():
                position = int(np.argmax(where))
                raise VocabularyError(
                    f"table '{self.table}': {checked.place(position)}: {column} is {values[position]}, {problem}"
                )

        if raw_ids.dtype == np.uint64:
            refuse(raw_ids > 2**63 - 1, self._config.entity_id, raw_ids, "which is beyond int64; ids are signed 64-bit")
        refuse(
            checked.ids == -1,
            self._config.entity_id,
            checked.ids,
            "which marks an empty slot and cannot be an id; give that entity another one",
        )
        refuse(
            # As int64, what is beyond it is negative.
            (checked.indices < 0) | (checked.indices >= self.num_embeddings),
            self._config.index,
            raw_indices,
            f"outside [0, {self.num_embeddings}), the table's rows",
        )
        return checked

    def _numbers(self, file: str, start: int, batch: pa.RecordBatch, name: str) -> np.ndarray:
        column = batch.column(name)
        if column.null_count:
            position = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise VocabularyError(
                f"table '{self.table}': {file}, row {start + position}: {name} is null; "
                "remove the row, or give it a value"
            )
        numbers: np.ndarray = column.to_numpy()
        return numbers


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error).strip()
    return (text or type(error).__name__).splitlines()[0]
