"""Two integer columns of parquet files, read in a stream: of entities and their rows, of rows and their counts.

The only reader of parquet. Whatever is no integer, or is missing, is refused here with its file and row number (counted
from 0). Memory is some batches, whatever the files.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from export.errors import ColumnsError, SnapshotError
from export.storage import Location, is_file, join, list_folder, open_location

__all__ = ["ColumnBatch", "IntegerColumns"]

_BATCH_ROWS = 1 << 16
# Without the first two, pyarrow reads a row group's columns as a whole before it gives the first row.
_OPTIONS = {"pre_buffer": False, "buffer_size": 1 << 22, "page_checksum_verification": True}


@dataclass(frozen=True)
class ColumnBatch:
    """Some rows of one file, from row `start` on: each column by the configuration's key, integers [n] as they are stored."""

    file: str
    start: int
    columns: Mapping[str, np.ndarray]

    def place(self, position: int) -> str:
        """Where the row at a position of this batch is, for a message."""
        return f"{self.file}, row {self.start + position}"


class IntegerColumns:
    """Columns of a folder of parquet files, or of one.

    Args:
        table: the table that they are about, for messages.
        what: what they are, for messages.
        key: the configuration's key of the table that names them.
        uri: the folder or file, a path or any fsspec URL.
        names: the columns by the configuration's key, `{"entity_id": "entity_id", "index": "row"}`.
        error: what to raise.
        advice: what to do where a column has another type, by key.
    """

    def __init__(
        self,
        table: str,
        what: str,
        key: str,
        uri: str,
        names: Mapping[str, str],
        error: type[ColumnsError],
        advice: Mapping[str, str] | None = None,
    ) -> None:
        self._table, self._what, self._key, self._uri = table, what, key, uri
        self._names, self._error, self._advice = names, error, advice or {}

    @cached_property
    def files(self) -> list[Location]:
        """The parquet files, ordered by name.

        Raises:
            ColumnsError: there is none, or there is something else beside them.
        """
        where = f"table '{self._table}': {self._what} {self._uri}"
        try:
            folder = open_location(self._uri)
        except SnapshotError as error:
            raise self._error(f"table '{self._table}': {self._what} {error}") from error
        try:
            if is_file(folder):
                return [folder]
            visible = [(name, file) for name, file in list_folder(folder).items() if not name.startswith((".", "_"))]
        except FileNotFoundError as error:
            reason = "no such file or folder" if isinstance(folder, Path) else error.strerror
            raise self._error(f"{where}: {reason}") from error
        except (OSError, ValueError) as error:
            raise self._error(f"{where}: cannot be read: {_reason(error)}") from error
        for name, file in visible:
            if not file or not name.endswith(".parquet"):
                raise self._error(
                    f"{where}: '{name}' is no file *.parquet; "
                    f"move it away, or name the folder that holds only the {self._what}'s files"
                )
        if not visible:
            raise self._error(f"{where}: the folder has no file *.parquet")
        return [join(folder, name) for name, _ in visible]

    def count(self) -> int:
        """How many rows all files have, as their footers say; raises ColumnsError where one cannot be read."""
        total = 0
        for path in self.files:
            with self._open(path) as file:
                total += file.metadata.num_rows
        return total

    def batches(self) -> Iterator[ColumnBatch]:
        """All rows, file after file, some 65,536 at a time.

        Raises:
            ColumnsError: a file cannot be read, lacks a column, or has one of another type; a value is null.
        """
        for path in self.files:
            with self._open(path) as file:
                self._check_columns(str(path), file.schema_arrow)
                start = 0
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(self._names.values())):
                    columns = {key: self._numbers(str(path), start, batch, name) for key, name in self._names.items()}
                    yield ColumnBatch(str(path), start, columns)
                    start += batch.num_rows

    @contextmanager
    def _open(self, path: Location) -> Iterator[ParquetFile]:
        """An open file; whatever reading it raises becomes a ColumnsError."""
        # A store's driver has error classes of its own; of local files, others than these are defects.
        failures: tuple[type[Exception], ...] = (
            (OSError, ValueError, pa.ArrowException) if isinstance(path, Path) else (Exception,)
        )
        try:
            with path.open("rb") as stream, ParquetFile(stream, **_OPTIONS) as file:
                yield file
        except ColumnsError:
            raise
        except failures as error:
            raise self._error(f"table '{self._table}': {path}: cannot be read: {_reason(error)}") from error

    def refuse(self, batch: ColumnBatch, key: str, where: np.ndarray, problem: str) -> None:
        """Refuses the first value of a column that `where`, bool [n], marks."""
        if where.any():
            position = int(np.argmax(where))
            value = batch.columns[key][position]
            raise self._error(
                f"table '{self._table}': {batch.place(position)}: {self._names[key]} is {value}, {problem}"
            )

    def _check_columns(self, file: str, schema: pa.Schema) -> None:
        for key, name in self._names.items():
            if schema.names.count(name) != 1:
                problem = "two columns" if name in schema.names else "no column"
                raise self._error(
                    f"table '{self._table}': {file}: {problem} '{name}', it has: {', '.join(schema.names)}; "
                    f"name the right one in {self._key}: {{{key}: …}}"
                )
            kind = schema.field(name).type
            if not pa.types.is_integer(kind):
                advice = self._advice.get(key, "")
                raise self._error(
                    f"table '{self._table}': {file}: column '{name}' is {kind}, expected integers of at most 64 bits{advice}"
                )

    def _numbers(self, file: str, start: int, batch: pa.RecordBatch, name: str) -> np.ndarray:
        column = batch.column(name)
        if column.null_count:
            position = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise self._error(
                f"table '{self._table}': {file}, row {start + position}: {name} is null; remove the row, or give it a value"
            )
        numbers: np.ndarray = column.to_numpy()
        return numbers


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error).strip()
    return (text or type(error).__name__).splitlines()[0]
