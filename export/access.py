"""How a table is accessed: bags of rows to measure lookups on, drawn as its access counts say or uniformly.

Counts are read from parquet in a stream. Rows are drawn in two passes: one adds the counts up, the other walks along the
sum to the places that were drawn, so that memory does not grow with the table.
"""

import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from export.config import AccessCountsConfig, EmbeddingBagConfig
from export.errors import AccessCountsError
from export.parquet_columns import IntegerColumns

__all__ = ["AccessCounts", "draw_bags", "total_accesses"]

_BAGS = 256
_LONGEST = 8  # ids


class AccessCounts:
    """The counts of one table with `num_embeddings` rows, as its parquet files have them."""

    def __init__(self, table: str, num_embeddings: int, config: AccessCountsConfig) -> None:
        self._table, self._num_embeddings = table, num_embeddings
        names = {"index": config.index, "count": config.count}
        self._columns = IntegerColumns(table, "access counts", "access_counts", config.uri, names, AccessCountsError)

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows int64 [n] and their counts float64 [n], some 65,536 at a time.

        Raises:
            AccessCountsError: a file cannot be read, or a row or a count is out of range.
        """
        for batch in self._columns.batches():
            rows, counts = batch.columns["index"].astype(np.int64), batch.columns["count"]
            outside = (rows < 0) | (rows >= self._num_embeddings)
            self._columns.refuse(batch, "index", outside, f"outside [0, {self._num_embeddings}), the table's rows")
            self._columns.refuse(batch, "count", counts < 0, "expected 0 or more")
            yield rows, counts.astype(np.float64)

    def total(self) -> float:
        """The sum of all counts.

        Raises:
            AccessCountsError: it is zero, or see `batches`.
        """
        total = sum(float(counts.sum()) for _, counts in self.batches())
        if not total:
            raise AccessCountsError(
                f"table '{self._table}': no row has an access count; remove the key 'access_counts'"
            )
        return total

    def draw(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """`size` rows, int64, each drawn in proportion to its count, in random order; raises as `total`."""
        targets = np.sort(rng.random(size)) * self.total()
        drawn = np.empty(size, np.int64)
        start = position = 0
        before = 0.0
        for rows, counts in self.batches():
            ends = before + counts.cumsum()
            position = int(np.searchsorted(targets, ends[-1] if len(ends) else before))
            drawn[start:position] = rows[np.searchsorted(ends, targets[start:position], side="right")]
            start, before = position, float(ends[-1]) if len(ends) else before
        drawn[start:] = drawn[start - 1]  # a target that rounding put at the very end
        return rng.permutation(drawn)

    @contextmanager
    def by_row(self) -> Iterator[np.ndarray]:
        """The count of every row, float64 [E], in a temporary file that is mapped and gone at the end.

        Raises:
            AccessCountsError: see `batches`; or there is no room for the file.
        """
        with tempfile.TemporaryFile() as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self._num_embeddings * 8)
            except OSError as error:
                raise AccessCountsError(
                    f"table '{self._table}': the access counts take {self._num_embeddings * 8:,} bytes in "
                    f"{tempfile.gettempdir()}: {error.strerror}"
                ) from error
            counts_of_row = np.memmap(file, np.float64, "r+", shape=(self._num_embeddings,))
            for rows, counts in self.batches():
                np.add.at(counts_of_row, rows, counts)
            yield counts_of_row


def draw_bags(table: EmbeddingBagConfig, seed: int) -> list[np.ndarray]:
    """256 bags of 1 to 8 ids, int64, drawn as the table's access counts say, or else any row as likely as any other.

    Raises:
        AccessCountsError: the counts cannot be read, or do not fit the table.
    """
    rng = np.random.default_rng((seed, zlib.crc32(table.name.encode())))
    lengths = rng.integers(1, _LONGEST + 1, _BAGS)
    size = int(lengths.sum())
    if table.access_counts is None:
        ids = rng.integers(0, table.num_embeddings, size)
    else:
        ids = AccessCounts(table.name, table.num_embeddings, table.access_counts).draw(size, rng)
    return np.split(ids, lengths.cumsum()[:-1])


def total_accesses(table: EmbeddingBagConfig) -> float:
    """How often the table was accessed, by its counts, 0 where it has none; raises as `draw_bags`."""
    if table.access_counts is None:
        return 0.0
    return AccessCounts(table.name, table.num_embeddings, table.access_counts).total()
