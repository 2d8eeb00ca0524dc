"""torch.save files: a state dict, or nested dictionaries with state dicts in them."""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from export.errors import SnapshotError
from export.snapshots.rows import Blob, StoredTensor
from export.snapshots.torch_files import check_contiguous, load_layout, values_offset
from runtime_py.digests import Digest

__all__ = ["StateDictIndex"]


class StateDictIndex:
    """The tensors of one torch.save file; nested keys are joined with dots."""

    format = "state_dict"

    def __init__(self, path: Path) -> None:
        """Reads the file's structure, and none of its values.

        Raises:
            SnapshotError: see `load_layout`.
        """
        self._path = path
        try:
            with path.open("rb") as file:
                layout = load_layout(path, file)
        except OSError as error:
            raise SnapshotError(f"{path}: cannot be read: {error.strerror}") from error
        self._tensors = dict(_flatten(layout, ""))
        self.tensors = {
            name: StoredTensor(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()
        }
        self.digest = _directory_digest(path)

    def locate(self, name: str) -> list[Blob]:
        """The one blob of a tensor."""
        tensor = self._tensors[name]
        check_contiguous(self._path, name, tensor)
        rows, columns = tensor.shape
        return [Blob(self._path, values_offset(tensor), 0, 0, rows, columns)]


def _flatten(node: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(node, torch.Tensor):
        yield prefix, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _directory_digest(path: Path) -> Digest:
    """Of the names, sizes and CRC-32s of the file's records: its content, without reading it."""
    with zipfile.ZipFile(path) as archive:
        lines = [f"{info.filename} {info.file_size} {info.CRC}\n" for info in archive.infolist()]
    return Digest("sha256-zip-directory", hashlib.sha256("".join(lines).encode()).hexdigest())
