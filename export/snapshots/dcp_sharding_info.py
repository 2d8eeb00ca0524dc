"""Where the tensors of a safetensors file that DCP wrote belong: each may be a part of a larger one.

`HuggingFaceStorageWriter(save_distributed=True)` lets every process write files of its own, and neither an index nor a
commit mark. The header says at which offsets of the whole tensor each part begins; nothing says how large the whole is.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from export.errors import SnapshotError
from export.storage import Location

__all__ = ["SHARDING_INFO", "check_counts", "read_offsets"]

SHARDING_INFO = "DCP_SHARDING_INFO"
_VERSION, _VERSION_KEY = "1.0", "DCP_VERSION"


def read_offsets(file: Location, metadata: Any, entries: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """The first index, in every dimension, of each tensor of `entries` within the whole one; None if DCP gave none.

    Args:
        file: named in errors.
        metadata: the header's `__metadata__`.
        entries: the header's tensors, well formed.

    Raises:
        SnapshotError: the offsets are damaged, or of another version.
    """
    if not isinstance(metadata, dict) or SHARDING_INFO not in metadata:
        return None
    version = metadata.get(_VERSION_KEY, _VERSION)
    if version != _VERSION:
        raise SnapshotError(f"{file}: {_VERSION_KEY} is {version!r}, expected '{_VERSION}'")
    try:
        info = json.loads(metadata[SHARDING_INFO])
        found = {name: info[name]["saved_offsets"] for name in entries}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SnapshotError(f"{file}: {SHARDING_INFO} is damaged: {type(error).__name__}: {error}") from error
    for name, offsets in found.items():
        sound = isinstance(offsets, list) and all(type(offset) is int and 0 <= offset < 2**63 for offset in offsets)
        if not sound or len(offsets) != len(entries[name]["shape"]):
            shape = entries[name]["shape"]
            raise SnapshotError(f"{file}: '{name}' of shape {shape} has the offsets {offsets!r:.120}; it is damaged")
    return {name: tuple(offsets) for name, offsets in found.items()}


def check_counts(folder: Location, names: Iterable[str]) -> None:
    """Checks that of the files that their names count (`…00001-of-00003.safetensors`) every number is there.

    Raises:
        SnapshotError: one is missing.
    """
    numbers: dict[int, set[int]] = {}  # of all processes: one writes only the files that it has something for
    for name in names:
        before, of, count = name.removesuffix(".safetensors").rpartition("-of-")
        number = before.rpartition("-")[2]
        if of and number.isdecimal() and count.isdecimal():
            numbers.setdefault(int(count), set()).add(int(number))
    for total, found in numbers.items():
        if len(found) < total or max(found) > total:
            listed = ", ".join(map(str, sorted(found)))
            raise SnapshotError(f"{folder}: has the files {listed} of {total}, by their names; the others are missing")
