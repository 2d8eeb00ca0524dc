"""Digests, and the one place that says how each is computed.

An algorithm's name carries all its parameters, so that a digest can be checked from the manifest and this page alone:

* `sha256`: SHA-256 of all bytes.
* `sha256-zeroed`: SHA-256 of the file with the 64 hexadecimal digits of this very digest replaced by `0`.
* `sha256-rows-<n>`: a table's rows, or a vocabulary's slots, are cut into chunks of `max(1, n // row_bytes)` whole rows,
  the last one shorter; SHA-256 over the SHA-256 digests (32 raw bytes each) of all chunks in order. Chunks are
  independent, so that any number of cores and machines can compute them.
* `sha256-tables`, of the weight file and of a vocabulary: SHA-256 over the SHA-256 digest of its first bytes, up to its
  data, followed by the digest of each tensor's rows in file order (32 raw bytes each).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["ROWS", "SHA256", "TABLES", "ZEROED", "Digest", "chunk_groups", "chunk_rows", "combine", "sha256"]

SHA256 = "sha256"
ZEROED = "sha256-zeroed"
TABLES = "sha256-tables"
_CHUNK_BYTES = 1 << 20
_GROUP_CHUNKS = 64
ROWS = f"sha256-rows-{_CHUNK_BYTES}"


@dataclass(frozen=True)
class Digest:
    """A digest of one algorithm; `value` is lower-case hexadecimal."""

    algorithm: str
    value: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}"


def sha256(data: bytes | bytearray | memoryview) -> Digest:
    """The SHA-256 of all of `data`."""
    return Digest(SHA256, hashlib.sha256(data).hexdigest())


def chunk_rows(row_bytes: int) -> int:
    """How many rows one chunk of `sha256-rows` holds: as many whole rows as fit in 1 MiB, at least one."""
    return max(1, _CHUNK_BYTES // row_bytes)


def chunk_groups(num_embeddings: int, row_bytes: int) -> list[range]:
    """The first rows of a table's chunks, in order, in groups of 64: pieces of work for one thread at a time."""
    rows = chunk_rows(row_bytes)
    starts = range(0, num_embeddings, rows)
    return [starts[first : first + _GROUP_CHUNKS] for first in range(0, len(starts), _GROUP_CHUNKS)]


def combine(algorithm: str, parts: Iterable[bytes]) -> Digest:
    """The digest over raw 32-byte digests: of chunks for `ROWS`, of the header and the tables for `TABLES`."""
    outer = hashlib.sha256()
    for part in parts:
        outer.update(part)
    return Digest(algorithm, outer.hexdigest())
