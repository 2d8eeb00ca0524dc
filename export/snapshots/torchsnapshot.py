"""torchsnapshot folders, format 0.1.0, as the upstream project writes them.

`.snapshot_metadata`, written last, is JSON (or YAML, its superset) that says which bytes of which file hold which part of
which tensor. The library that writes them loads a whole table to read a row; here nothing of it is needed.
"""

import json
import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from export.errors import SnapshotError
from export.snapshots.rows import Blob, StoredTensor, read_commit_mark, rectangle
from export.storage import Location, join
from runtime_py.digests import sha256

__all__ = ["SNAPSHOT_METADATA", "TorchsnapshotIndex"]

SNAPSHOT_METADATA = ".snapshot_metadata"
_VERSION = "0.1.0"
_TENSORS = ("Tensor", "ShardedTensor", "ChunkedTensor")


class TorchsnapshotIndex:
    """The tensors of one torchsnapshot folder; the parts of a logical path are joined with dots."""

    format = "torchsnapshot"

    def __init__(self, path: Location) -> None:
        """Reads `.snapshot_metadata`.

        Raises:
            SnapshotError: it is damaged, or of another version.
        """
        self._path = path
        self._file = join(path, SNAPSHOT_METADATA)
        data = read_commit_mark(self._file)
        self.digest = sha256(data)
        self.tensors: dict[str, StoredTensor] = {}
        self._parts: dict[str, list[dict[str, Any]]] = {}
        document = self._parse(data)
        try:
            if document["version"] != _VERSION:
                raise SnapshotError(f"{self._file}: version is {document['version']!r}, expected '{_VERSION}'")
            for name, parts in self._collect(document["manifest"]).items():
                self._add(name, parts)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise SnapshotError(f"{self._file}: is damaged: {type(error).__name__}: {error}") from error

    def _parse(self, data: bytes) -> Any:
        try:
            text = data.decode()
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                return YAML(typ="safe", pure=True).load(text)
        except (ValueError, YAMLError, RecursionError) as error:
            raise SnapshotError(f"{self._file}: is damaged: {str(error).splitlines()[0]}") from error

    def _collect(self, manifest: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """Tensor name to its parts over all ranks.

        A sharded tensor's entry lists the shards of one rank. Of any other tensor each rank has a whole copy, the same
        one where the tensor was replicated: the lowest rank's is taken.
        """
        kinds: dict[str, str] = {}
        paths: dict[str, tuple[str, ...]] = {}
        collected: dict[str, list[dict[str, Any]]] = {}
        for path, entry in sorted(manifest.items(), key=lambda item: int(item[0].split("/", 1)[0])):
            kind = entry["type"]
            if kind not in _TENSORS:
                if kind == "DTensor":
                    raise SnapshotError(f"{self._file}: '{path}' is a DTensor, which format {_VERSION} does not have")
                continue
            logical = tuple(unquote(part) for part in path.split("/")[1:])
            name = ".".join(logical)
            if paths.setdefault(name, logical) != logical:
                raise SnapshotError(
                    f"{self._file}: '{'/'.join(paths[name])}' and '{'/'.join(logical)}' are both '{name}'"
                )
            if kinds.setdefault(name, kind) != kind:
                raise SnapshotError(f"{self._file}: '{name}' is a {kinds[name]} of one rank and a {kind} of another")
            if kind == "ShardedTensor":
                collected.setdefault(name, []).extend(entry["shards"])
            elif name not in collected:
                whole = {"offsets": [0] * len(entry["shape"]), "sizes": entry["shape"], "tensor": entry}
                collected[name] = entry["chunks"] if kind == "ChunkedTensor" else [whole]
        return collected

    def _add(self, name: str, parts: list[dict[str, Any]]) -> None:
        types = {part["tensor"]["dtype"] for part in parts}
        dtype = getattr(torch, min(types).removeprefix("torch.")) if len(types) == 1 else None
        if not isinstance(dtype, torch.dtype):
            raise SnapshotError(f"{self._file}: '{name}' has the types {sorted(types)}, expected one of torch's")
        # No entry of a sharded tensor has its shape: it is as large as its shards reach.
        ends = [[at + size for at, size in zip(part["offsets"], part["sizes"], strict=True)] for part in parts]
        self.tensors[name] = StoredTensor(name, tuple(max(end) for end in zip(*ends, strict=True)), dtype)
        self._parts[name] = parts

    def locate(self, name: str) -> list[Blob]:
        """The blobs of a tensor: one for each shard or chunk that is not empty."""
        try:
            return list(dict.fromkeys(self._locate_parts(name)))  # ranks that hold the same shard list the same bytes
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise SnapshotError(f"{self._file}: '{name}' is damaged: {type(error).__name__}: {error}") from error

    def _locate_parts(self, name: str) -> Iterator[Blob]:
        for part in self._parts[name]:
            stored = part["tensor"]
            place = rectangle(part["offsets"], part["sizes"], self.tensors[name].shape)
            if place is None:
                raise SnapshotError(
                    f"{self._file}: '{name}': the part at {part['offsets']} is no rectangle of the tensor"
                )
            if stored["shape"] != part["sizes"]:
                raise SnapshotError(f"{self._file}: '{name}': {stored['shape']} stored for a part of {part['sizes']}")
            if stored["serializer"] != "buffer_protocol":
                serializer = stored["serializer"]
                raise SnapshotError(f"{self._file}: '{name}' was written with {serializer}, expected buffer_protocol")
            location = PurePosixPath(stored["location"])
            if location.is_absolute() or ".." in location.parts:
                raise SnapshotError(f"{self._file}: '{name}': '{location}' leaves the folder")
            size = math.prod(part["sizes"]) * self.tensors[name].dtype.itemsize
            start, end = stored.get("byte_range") or (0, size)
            if start < 0 or end - start != size:
                raise SnapshotError(f"{self._file}: '{name}': byte range {start}-{end}, expected {size} bytes")
            if size:
                yield Blob(join(self._path, str(location)), start, *place)
