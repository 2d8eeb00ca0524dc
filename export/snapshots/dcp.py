"""torch.distributed.checkpoint folders: `.metadata`, written last, and `__<rank>_<n>.distcp` files.

`.metadata` is a pickle, and pickles run code: it is read by an unpickler that knows the classes of the format and no
others. Each shard in a `.distcp` file is a whole torch.save file, whose values are found as in any other.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from export.errors import SnapshotError
from export.snapshots.rows import Blob, StoredTensor
from export.snapshots.torch_files import FileSlice, check_contiguous, load_layout, values_offset
from runtime_py.digests import sha256

__all__ = ["METADATA", "DcpIndex"]

METADATA = ".metadata"

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of the format")


class DcpIndex:
    """The tensors of one DCP folder."""

    format = "dcp"

    def __init__(self, path: Path) -> None:
        """Reads `.metadata`.

        Raises:
            SnapshotError: it is damaged, or names what is not part of the format.
        """
        self._path = path
        self._metadata = self._read_metadata()
        self.tensors = {
            name: StoredTensor(name, tuple(entry.size), entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def _read_metadata(self) -> Metadata:
        file = self._path / METADATA
        try:
            data = file.read_bytes()
        except OSError as error:
            raise SnapshotError(
                f"{file}: cannot be read: {error.strerror}; the snapshot was never completed"
            ) from error
        self.digest = sha256(data)
        try:
            metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        # Damaged pickles raise nearly anything; whatever it is, the file is not the metadata of a checkpoint.
        except Exception as error:
            raise SnapshotError(f"{file}: is damaged: {str(error) or type(error).__name__}") from error
        if not isinstance(metadata, Metadata):
            raise SnapshotError(f"{file}: is damaged: expected Metadata, got {type(metadata).__name__}")
        return metadata

    def locate(self, name: str) -> list[Blob]:
        """The blobs of a tensor: one for each shard."""
        entry = self._metadata.state_dict_metadata[name]
        places = {
            tuple(index.offset or ()): info
            for index, info in (self._metadata.storage_data or {}).items()
            if index.fqn == name
        }
        blobs = []
        for chunk in getattr(entry, "chunks", ()):
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            place = places.get(offsets)
            if place is None:
                raise SnapshotError(f"{self._path}: '{name}': the shard at {offsets} is in no file")
            if 0 not in sizes:
                blobs.append(self._locate_shard(name, offsets, sizes, place))
        return blobs

    def _locate_shard(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], place: Any) -> Blob:
        if Path(place.relative_path).name != place.relative_path:
            raise SnapshotError(f"{self._path}: '{name}': '{place.relative_path}' leaves the folder")
        if getattr(place, "transform_descriptors", None):
            raise SnapshotError(
                f"{self._path}: '{name}' was written through {place.transform_descriptors}; save it plainly"
            )
        path = self._path / place.relative_path
        try:
            with path.open("rb") as file:
                tensor = load_layout(path, FileSlice(file, place.offset, place.length))
        except OSError as error:
            raise SnapshotError(f"{path}: holds rows of '{name}', cannot be read: {error.strerror}") from error
        expected = self.tensors[name].dtype
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != sizes or tensor.dtype != expected:
            got = f"{list(tensor.shape)} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise SnapshotError(
                f"{path}: the shard of '{name}' at {offsets} is {got}, expected {list(sizes)} {expected}"
            )
        check_contiguous(path, name, tensor)
        return Blob(path, place.offset + values_offset(tensor), *offsets, *sizes)
