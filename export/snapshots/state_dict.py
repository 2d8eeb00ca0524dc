"""torch.save files: a state dict, or nested dictionaries with state dicts in them."""

import hashlib
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from export.errors import SnapshotError
from export.snapshots.rows import Blob, StoredTensor
from export.snapshots.torch_files import TorchFile
from export.storage import Location, open_seekable
from runtime_py.digests import Digest
from runtime_py.manifest import table_shape

__all__ = ["StateDictIndex"]


class StateDictIndex:
    """The tensors of one torch.save file; nested keys are joined with dots."""

    format = "state_dict"

    def __init__(self, path: Location) -> None:
        """Reads the file's structure, and none of its values.

        Raises:
            SnapshotError: see `TorchFile`; two tensors have the same joined name; or it is nested without end.
        """
        self._path = path
        try:
            with open_seekable(path) as file:
                self._file = TorchFile(path, file)
                self.digest = _directory_digest(file)
        except OSError as error:
            raise SnapshotError(f"{path}: cannot be read: {error.strerror}") from error
        self._tensors: dict[str, torch.Tensor] = {}
        try:
            self._collect(self._file.content, "", ())
        except RecursionError as error:
            raise SnapshotError(f"{path}: is nested too deeply for a state dict") from error
        self.tensors = {
            name: StoredTensor(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()
        }

    def locate(self, name: str) -> list[Blob]:
        """The one blob of a tensor, as a table."""
        tensor = self._tensors[name]
        rows, columns = table_shape(tensor.shape)
        return [Blob(self._path, self._file.values_offset(name, tensor), 0, 0, rows, columns)]

    def _collect(self, node: Any, name: str, parents: tuple[int, ...]) -> None:
        if isinstance(node, torch.Tensor):
            if name in self._tensors:
                raise SnapshotError(f"{self._path}: two tensors are named '{name}'")
            self._tensors[name] = node
        elif isinstance(node, Mapping):
            if id(node) in parents:
                raise SnapshotError(f"{self._path}: '{name}' is a dictionary that holds itself")
            for key, value in node.items():
                self._collect(value, f"{name}.{key}" if name else str(key), (*parents, id(node)))


def _directory_digest(file: Any) -> Digest:
    """Of the names, sizes and CRC-32s of the file's records: its content, without reading it."""
    with zipfile.ZipFile(file) as archive:
        lines = [f"{info.filename} {info.file_size} {info.CRC}\n" for info in archive.infolist()]
    return Digest("sha256-zip-directory", hashlib.sha256("".join(lines).encode()).hexdigest())
