"""safetensors snapshots: one file, a folder of them with Hugging Face's index file, or the parts that DCP wrote."""

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from export.errors import SnapshotError
from export.snapshots.dcp_sharding_info import SHARDING_INFO, check_counts, read_offsets
from export.snapshots.rows import Blob, StoredTensor, rectangle
from export.storage import (
    Location,
    find_files,
    is_file,
    is_plain_name,
    join,
    map_files,
    open_seekable,
    read_whole,
)
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
_ENDING = ".safetensors"
_INDEX = f"{_ENDING}.index.json"
_SHARDED = "sharded"  # where DCP leaves the parts that it consolidated


def is_safetensors(path: Location) -> bool:
    """Whether `path` is a safetensors file, or a folder with the files of one snapshot and not with one a step."""
    if is_file(path):
        name = path.name if isinstance(path, Path) else path.name.partition("?")[0]  # a signature may follow
        return name.endswith(_ENDING)
    files = find_files(path, _ENDING)
    steps = all(file.name.removesuffix(_ENDING).isdecimal() for file in files)
    return bool(files) and (not steps or bool(find_files(path, _INDEX)))


@dataclass(frozen=True)
class _Part:
    """A rectangle of a tensor, and where its values are; of most tensors the only one."""

    file: Location
    offset_bytes: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class _Header(NamedTuple):
    """The header of a file, where the data begin, and how many bytes of them there are."""

    text: bytes
    data_start: int
    data_bytes: int


class SafetensorsIndex:
    """The tensors of one or more safetensors files; where there is an index, of the files that it names."""

    format = "safetensors"

    def __init__(self, path: Location) -> None:
        """Reads the headers.

        Raises:
            SnapshotError: a header is damaged, a file is missing, or several files have no index and are not DCP's.
        """
        self.tensors: dict[str, StoredTensor] = {}
        self._parts: dict[str, list[_Part]] = {}
        self._bare: list[Location] = []  # files without sharding information
        try:
            files = _files(path)
            consolidated = None not in files.values() and is_safetensors(join(path, _SHARDED))
        except OSError as error:
            raise SnapshotError(f"{path}: cannot be read: {error.strerror}") from error
        headers = hashlib.sha256()
        for (file, names), read in zip(files.items(), map_files(_read_header, list(files), [path]), strict=True):
            headers.update(read.text)
            self._add_file(file, names, read)
        if len(files) > 1 and None in files.values():
            self._check_bare(path, len(files))
        self._check_complete(path)
        if consolidated:
            _check_consolidated(path)
        self.digest = Digest("sha256-safetensors-headers", headers.hexdigest())

    def _add_file(self, file: Location, names: set[str] | None, header: _Header) -> None:
        entries = _parse_header(file, header.text)
        metadata = entries.pop("__metadata__", None)
        _check_tiling(file, entries, header.data_bytes)
        offsets = read_offsets(file, metadata, entries)
        if offsets is None:
            self._bare.append(file)
        for name, entry in entries.items():
            if names is None or name in names:
                start = (0,) * len(entry["shape"]) if offsets is None else offsets[name]
                self._add(file, name, entry, header.data_start, start, inferred=offsets is not None and names is None)
        for name in names or ():
            if name not in self._parts:
                raise SnapshotError(f"{file}: has no tensor '{name}', which the index expects in it")

    def _add(
        self, file: Location, name: str, entry: Any, data_start: int, offsets: tuple[int, ...], *, inferred: bool
    ) -> None:
        sizes: tuple[int, ...] = tuple(entry["shape"])
        start, end = entry["data_offsets"]
        dtype = _TYPES.get(entry["dtype"], torch.uint8)
        expected = dtype.itemsize * math.prod(sizes)
        if entry["dtype"] in _TYPES and end - start != expected:
            raise SnapshotError(
                f"{file}: '{name}' has {end - start} bytes, expected {expected} for {sizes} {entry['dtype']}"
            )
        shape = tuple(offset + size for offset, size in zip(offsets, sizes, strict=True))
        known = self.tensors.get(name)
        if known is not None:
            if known.dtype != dtype or len(known.shape) != len(shape):
                raise SnapshotError(
                    f"{file}: '{name}' is {dtype} of {len(shape)} dimensions, in {self._parts[name][0].file.name} "
                    f"{known.dtype} of {len(known.shape)}; they are no parts of one tensor"
                )
            shape = tuple(map(max, shape, known.shape))
        self.tensors[name] = StoredTensor(name, shape, dtype, inferred)
        self._parts.setdefault(name, []).append(_Part(file, data_start + start, offsets, sizes))

    def _check_bare(self, path: Location, count: int) -> None:
        """Without an index, only parts that say where they belong can stand beside each other."""
        if len(self._bare) == count:
            raise SnapshotError(f"{path}: {count} safetensors files and 0 index files (*{_INDEX}), expected one")
        if self._bare:
            names = ", ".join(file.name for file in self._bare)
            raise SnapshotError(
                f"{path}: other files have {SHARDING_INFO}, not {names}; leave one snapshot in the folder"
            )

    def _check_complete(self, path: Location) -> None:
        """What is missing between the parts shows here; what is missing after the last only beside the configuration."""
        for name, parts in self._parts.items():
            size = math.prod(self.tensors[name].shape)
            held = sum(math.prod(part.sizes) for part in parts)
            if held < size:
                raise SnapshotError(
                    f"{path}: holds {held} of the {size} values of '{name}'; a shard file is missing, or a process had "
                    "several parts of it, of which torch's safetensors writer keeps one"
                )

    def locate(self, name: str) -> list[Blob]:
        """The blobs of a tensor: one for each part that is not empty."""
        blobs = []
        for part in self._parts[name]:
            place = rectangle(part.offsets, part.sizes, self.tensors[name].shape)
            if place is None:
                raise SnapshotError(f"{part.file}: '{name}': the part at {part.offsets} is no rectangle of the tensor")
            if 0 not in part.sizes:
                blobs.append(Blob(part.file, part.offset_bytes, *place))
        return blobs


def _check_consolidated(path: Location) -> None:
    """DCP fills what the parts leave out with zeros, without a word: only the parts show it."""
    try:
        SafetensorsIndex(join(path, _SHARDED))
    except SnapshotError as error:
        raise SnapshotError(
            f"{path}: was consolidated from parts that are not whole, and has zeros there: {error}"
        ) from error


def _files(path: Location) -> dict[Location, set[str] | None]:
    """The files to read, each with the tensors that the index expects in it (None: all)."""
    if is_file(path):
        return {path: None}
    indexes = find_files(path, _INDEX)
    if len(indexes) == 1:
        return _read_index(path, indexes[0])
    files = find_files(path, ".safetensors")
    if indexes or not files:
        raise SnapshotError(
            f"{path}: {len(files)} safetensors files and {len(indexes)} index files (*{_INDEX}), expected one"
        )
    check_counts(path, [file.name for file in files])
    return dict.fromkeys(files)


def _read_index(folder: Location, index: Location) -> dict[Location, set[str] | None]:
    try:
        weight_map = json.loads(read_whole(index).decode())["weight_map"]
        items = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{index}: is no safetensors index: {error}") from error
    files: dict[Location, set[str] | None] = {}
    for name, file in items:
        if not is_plain_name(file):
            raise SnapshotError(f"{index}: '{file}' leaves the folder")
        names = files.setdefault(join(folder, file), set())
        if names is not None:
            names.add(name)
    return files


def _read_header(file: Location) -> _Header:
    try:
        with open_seekable(file) as stream:
            file_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            prefix = stream.read(_PREFIX.size)
            length = _PREFIX.unpack(prefix)[0] if len(prefix) == _PREFIX.size else _MAX_HEADER_BYTES + 1
            header = stream.read(length) if length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise SnapshotError(f"{file}: cannot be read: {error.strerror}") from error
    if len(header) != length:
        if prefix.startswith(b"PK\x03\x04"):
            raise SnapshotError(
                f"{file}: begins with a torch.save file: DCP's safetensors writer puts values that are no tensors there; "
                "save tensors only"
            )
        raise SnapshotError(f"{file}: is no safetensors file, or was truncated within its header")
    return _Header(header, _PREFIX.size + length, file_bytes - _PREFIX.size - length)


def _parse_header(file: Location, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{file}: the safetensors header is damaged: {error}") from error
    if not isinstance(entries, dict):
        raise SnapshotError(f"{file}: the safetensors header is damaged: expected an object")
    return entries


def _check_tiling(file: Location, entries: dict[str, Any], data_bytes: int) -> None:
    """Every entry is well formed, and their data fill the file without hole or overlap, as the format demands."""
    ends = {}
    for name, entry in entries.items():
        try:
            start, end = entry["data_offsets"]
            integers = [start, end, *entry["shape"]]
            sound = all(type(number) is int and 0 <= number < 2**63 for number in integers) and isinstance(
                entry["dtype"], str
            )
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
    if position != data_bytes:
        what = "was truncated" if position > data_bytes else "has bytes beyond its tensors, which the format forbids"
        raise SnapshotError(f"{file}: has {data_bytes} bytes of data, its header says {position}; it {what}")
