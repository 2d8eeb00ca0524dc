"""safetensors snapshots: one file, or a folder of them with the index file that Hugging Face tools write."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch

from export.errors import SnapshotError
from export.snapshots.rows import Blob, StoredTensor
from runtime_py.digests import Digest

__all__ = ["SafetensorsIndex", "is_safetensors"]

_PREFIX = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # others are never rows
_INDEX = ".safetensors.index.json"


def is_safetensors(path: Path) -> bool:
    """Whether `path` is a safetensors file or a folder with safetensors files."""
    return path.suffix == ".safetensors" if path.is_file() else any(path.glob("*.safetensors"))


class SafetensorsIndex:
    """The tensors of one or more safetensors files."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        """Reads the headers.

        Raises:
            SnapshotError: a header is damaged, a file is missing, or several files have no index.
        """
        self.tensors: dict[str, StoredTensor] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        headers = hashlib.sha256()
        for file, names in _files(path).items():
            header, data_start = _read_header(file)
            headers.update(header)
            entries = _parse_header(file, header)
            _check_tiling(file, entries, file.stat().st_size - data_start)
            for name, entry in entries.items():
                if names is None or name in names:
                    self._add(file, name, entry, data_start)
            for name in names or ():
                if name not in self._places:
                    raise SnapshotError(f"{file}: has no tensor '{name}', which the index expects in it")
        self.digest = Digest("sha256-safetensors-headers", headers.hexdigest())

    def _add(self, file: Path, name: str, entry: Any, data_start: int) -> None:
        shape: tuple[int, ...] = tuple(entry["shape"])
        start, end = entry["data_offsets"]
        dtype = _TYPES.get(entry["dtype"], torch.uint8)
        expected = dtype.itemsize
        for size in shape:
            expected *= size
        if entry["dtype"] in _TYPES and end - start != expected:
            raise SnapshotError(
                f"{file}: '{name}' has {end - start} bytes, expected {expected} for {shape} {entry['dtype']}"
            )
        self.tensors[name] = StoredTensor(name, shape, dtype)
        self._places[name] = (file, data_start + start)

    def locate(self, name: str) -> list[Blob]:
        """The one blob of a tensor."""
        file, offset = self._places[name]
        rows, columns = self.tensors[name].shape
        return [Blob(file, offset, 0, 0, rows, columns)]


def _files(path: Path) -> dict[Path, set[str] | None]:
    """The files to read, each with the tensors that the index expects in it (None: all)."""
    if path.is_file():
        return {path: None}
    indexes = sorted(path.glob(f"*{_INDEX}"))
    if len(indexes) == 1:
        return _read_index(indexes[0])
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise SnapshotError(
            f"{path}: {len(files)} safetensors files and {len(indexes)} index files (*{_INDEX}), expected one"
        )
    return {files[0]: None}


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{index}: is no safetensors index: {error}") from error
    files: dict[Path, set[str] | None] = {}
    for name, file in items:
        if Path(file).name != file:
            raise SnapshotError(f"{index}: '{file}' leaves the folder")
        names = files.setdefault(index.parent / file, set())
        if names is not None:
            names.add(name)
    return files


def _read_header(file: Path) -> tuple[bytes, int]:
    try:
        with file.open("rb") as stream:
            prefix = stream.read(_PREFIX.size)
            length = _PREFIX.unpack(prefix)[0] if len(prefix) == _PREFIX.size else _MAX_HEADER_BYTES + 1
            header = stream.read(length) if length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise SnapshotError(f"{file}: cannot be read: {error.strerror}") from error
    if len(header) != length:
        raise SnapshotError(f"{file}: is no safetensors file, or was truncated within its header")
    return header, _PREFIX.size + length


def _parse_header(file: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{file}: the safetensors header is damaged: {error}") from error
    if not isinstance(entries, dict):
        raise SnapshotError(f"{file}: the safetensors header is damaged: expected an object")
    entries.pop("__metadata__", None)
    return entries


def _check_tiling(file: Path, entries: dict[str, Any], data_bytes: int) -> None:
    """Every entry is well formed, and their data fill the file without hole or overlap, as the format demands."""
    ends = {}
    for name, entry in entries.items():
        try:
            start, end = entry["data_offsets"]
            integers = [start, end, *entry["shape"]]
            sound = all(type(number) is int and number >= 0 for number in integers) and isinstance(entry["dtype"], str)
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise SnapshotError(f"{file}: the header's entry for '{name}' is damaged: {entry!r:.120}")
        if end > start:
            ends[start, end] = name
    position = 0
    for (start, end), name in sorted(ends.items()):
        if start != position:
            raise SnapshotError(f"{file}: '{name}' starts at byte {start} of the data, expected {position}")
        position = end
    if position > data_bytes:
        raise SnapshotError(f"{file}: has {data_bytes} bytes of data, its header says {position}; it was truncated")
