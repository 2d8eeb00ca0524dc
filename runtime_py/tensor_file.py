"""A safetensors file of known 2-D tensors whose data starts on a page boundary: laid out, read, checked and mapped.

The weight file and every vocabulary are one. The layout is a function of the tensors (`layout_tables`), so that the
builder that writes a file and the reader that checks it cannot disagree. Digests are read with `pread`, never through
the mapping: checking a file does not make it resident in the process.
"""

import hashlib
import json
import mmap
import os
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from runtime_py.digests import ROWS, TABLES, Digest, chunk_groups, chunk_rows, combine
from runtime_py.errors import ArtifactError, DigestMismatchError
from runtime_py.parallel import map_ordered

__all__ = ["ALIGNMENT_BYTES", "TensorFile", "TensorShape", "encode_header", "layout_tables", "tensor_bytes"]

ALIGNMENT_BYTES = 4096
_PREFIX = struct.Struct("<Q")


class TensorShape(Protocol):
    """What the layout needs to know of one tensor; `manifest.Table` and `manifest.StoredVocabulary` are such.

    `dtype` is the safetensors name, `shape` is (rows, columns), `row_bytes` what one row takes.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def row_bytes(self) -> int: ...  # noqa: D102


def layout_tables(tensors: Sequence[TensorShape]) -> dict[str, int]:
    """Tensor name to the offset of its first row from the start of the data, in bytes, in file order.

    Tensors follow one another without fillers, ordered by the largest power of two up to 4096 that divides their row
    bytes, descending, then by name: every tensor then starts at least as aligned as its own rows.
    """

    def order(tensor: TensorShape) -> tuple[int, str]:
        alignment = min(tensor.row_bytes & -tensor.row_bytes, ALIGNMENT_BYTES)
        return -alignment, tensor.name

    offsets: dict[str, int] = {}
    end = 0
    for tensor in sorted(tensors, key=order):
        offsets[tensor.name] = end
        end += tensor.shape[0] * tensor.row_bytes
    return offsets


def encode_header(tensors: Sequence[TensorShape]) -> bytes:
    """The first bytes of the file: length prefix, JSON, and spaces up to a multiple of 4096 bytes."""
    by_name = {tensor.name: tensor for tensor in tensors}
    entries = {}
    for name, offset in layout_tables(tensors).items():
        tensor = by_name[name]
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.shape[0] * tensor.row_bytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padded = -(_PREFIX.size + len(text)) % ALIGNMENT_BYTES + len(text)
    return _PREFIX.pack(padded) + text.ljust(padded)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable and without a copy."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


class TensorFile:
    """An open file that holds the tensors that it should.

    The file stays open: what was verified is what is mapped, whatever happens to the path meanwhile. A subclass says
    what its tensors are, for messages, and which error its readers expect.
    """

    error: type[ArtifactError] = ArtifactError
    follows_from = "the manifest"
    contents = "the rows of table"

    def __init__(self, path: Path, tensors: Sequence[TensorShape]) -> None:
        """Opens the file and checks its header.

        Raises:
            ArtifactError: of the kind `error`: the header is not the one that follows from `tensors`.
            OSError: the file cannot be opened, or is a link.
        """
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._offsets = layout_tables(tensors)
        self._header = encode_header(tensors)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.pread(self._fd, len(self._header), 0) != self._header:
                raise self.error(f"{path}: the header is not the one that follows from {self.follows_from}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; a mapping made before stays valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_rows(self, tensor: TensorShape, start: int, out: memoryview) -> None:
        """Fills `out` with the bytes of a tensor's rows from `start` on, a whole number of them.

        Raises:
            ArtifactError: of the kind `error`: the file ends before.
        """
        position = len(self._header) + self._offsets[tensor.name] + start * tensor.row_bytes
        filled = 0
        while filled < len(out):
            count = os.preadv(self._fd, [out[filled:]], position + filled)
            if count == 0:
                raise self.error(f"{self.path}: table '{tensor.name}': the file ends within the rows; it was truncated")
            filled += count

    def digest_header(self) -> bytes:
        """The SHA-256 digest of all bytes before the data, 32 raw bytes."""
        return hashlib.sha256(self._header).digest()

    def digest_rows(self, name: str, threads: int) -> Digest:
        """The digest `sha256-rows-1048576` of one tensor as it is in the file, computed on `threads` threads."""
        tensor = self._tensors[name]
        count, row_bytes = tensor.shape[0], tensor.row_bytes
        rows = chunk_rows(row_bytes)

        def run(starts: range) -> bytes:
            buffer = memoryview(bytearray(min(rows, count) * row_bytes))
            digests = []
            for start in starts:
                chunk = buffer[: min(rows, count - start) * row_bytes]
                self.read_rows(tensor, start, chunk)
                digests.append(hashlib.sha256(chunk).digest())
            return b"".join(digests)

        return combine(ROWS, map_ordered(run, chunk_groups(count, row_bytes), threads))

    def compare_digests(self, tensors: Mapping[str, Digest], whole: Digest, threads: int) -> None:
        """Compares every row with the digest of its tensor, and the header with that of the `whole` file.

        Raises:
            DigestMismatchError: naming the tensor, or the file, whose bytes differ.
        """
        parts = [self.digest_header()]
        for name in self._offsets:
            digest = self.digest_rows(name, threads)
            if digest != tensors[name]:
                raise DigestMismatchError(
                    f"{self.path}: {self.contents} '{name}' are not those that were published: "
                    f"digest {digest}, expected {tensors[name]}; restore the file or build again"
                )
            parts.append(bytes.fromhex(digest.value))
        computed = combine(TABLES, parts)
        if computed != whole:
            raise DigestMismatchError(
                f"{self.path}: digest {computed}, expected {whole}; restore the file or build again"
            )

    def map(self) -> torch.Tensor:
        """The data of all tensors as one uint8 tensor that shares its pages with every process that maps the file.

        The mapping is read-only: writing to the tensor is a segmentation fault. It lives as long as the tensor, or
        `mapping`, which is set here.
        """
        mapping: Any = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        expected = len(self._header) + sum(tensor.shape[0] * tensor.row_bytes for tensor in self._tensors.values())
        if len(mapping) != expected:  # to read behind the end of a file is to be killed
            raise self.error(
                f"{self.path}: is {len(mapping)} bytes, expected {expected}: it changed while it was loaded; put another "
                "version in its place by a rename, never in the file"
            )
        self.mapping = mapping
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(mapping, dtype=torch.uint8, offset=len(self._header))
