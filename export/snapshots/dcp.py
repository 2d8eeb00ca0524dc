"""torch.distributed.checkpoint folders: `.metadata`, written last, and `__<rank>_<n>.distcp` files.

`.metadata` is a pickle, and pickles run code: it is read by an unpickler that knows the classes of the format and no
others. Each shard in a `.distcp` file is a whole torch.save file, whose values are found as in any other.
"""

import io
import pickle
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from export.errors import SnapshotError
from export.snapshots.rows import Blob, StoredTensor, read_commit_mark, rectangle
from export.snapshots.torch_files import FileSlice, TorchFile
from export.storage import Location, RemoteFile, is_plain_name, join, map_files, open_seekable
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
    """Knows the classes of the format and no others, and those in copies of its own: a pickle can set what it names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            found = PurePosixPath if module.startswith("pathlib") else super().find_class(module, name)
            ours = found is PurePosixPath or is_dataclass(found)
            return type(found.__name__, (found,), {}) if ours and isinstance(found, type) else found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of the format")


@dataclass(frozen=True)
class _Shard:
    """A part of a tensor: where it belongs, and which bytes of which file hold it (None: of none)."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: tuple[str, int, int] | None


class DcpIndex:
    """The tensors of one DCP folder."""

    format = "dcp"

    def __init__(self, path: Location) -> None:
        """Reads `.metadata`.

        Raises:
            SnapshotError: it is damaged, or names what is not part of the format.
        """
        self._path = path
        file = join(path, METADATA)
        data = read_commit_mark(file)
        self.digest = sha256(data)
        self.tensors: dict[str, StoredTensor] = {}
        self._shards: dict[str, list[_Shard]] = {}
        try:
            self._read_metadata(_MetadataUnpickler(io.BytesIO(data)).load())
        except SnapshotError:
            raise
        # Damaged pickles raise nearly anything; whatever it is, the file is not the metadata of a checkpoint.
        except Exception as error:
            raise SnapshotError(f"{file}: is damaged: {str(error) or type(error).__name__}") from error

    def _read_metadata(self, metadata: Any) -> None:
        if not isinstance(metadata, Metadata):
            raise SnapshotError(
                f"{join(self._path, METADATA)}: is damaged: expected Metadata, got {type(metadata).__name__}"
            )
        places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
        for index, info in (metadata.storage_data or {}).items():
            if getattr(info, "transform_descriptors", None):
                name, how = index.fqn, info.transform_descriptors
                raise SnapshotError(f"{self._path}: '{name}' was written through {how}; save it plainly")
            places[index.fqn, tuple(index.offset or ())] = (str(info.relative_path), int(info.offset), int(info.length))
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.tensors[name] = StoredTensor(name, tuple(entry.size), entry.properties.dtype)
                self._shards[name] = [
                    _Shard(tuple(chunk.offsets), tuple(chunk.sizes), places.get((name, tuple(chunk.offsets))))
                    for chunk in entry.chunks
                ]

    def locate(self, name: str) -> list[Blob]:
        """The blobs of a tensor: one for each shard that is not empty."""
        shards = [shard for shard in self._shards[name] if 0 not in shard.sizes]
        return map_files(partial(self._locate_shard, name), shards, [self._path])

    def _locate_shard(self, name: str, shard: _Shard) -> Blob:
        place = rectangle(shard.offsets, shard.sizes, self.tensors[name].shape)
        if place is None:
            raise SnapshotError(f"{self._path}: '{name}': the shard at {shard.offsets} is no rectangle of the tensor")
        if shard.place is None:
            raise SnapshotError(f"{self._path}: '{name}': the shard at {shard.offsets} is in no file")
        relative_path, offset, length = shard.place
        if not is_plain_name(relative_path):
            raise SnapshotError(f"{self._path}: '{name}': '{relative_path}' leaves the folder")
        path = join(self._path, relative_path)
        try:
            with open_seekable(path) as file:
                if isinstance(file, RemoteFile):
                    file.prefetch([offset, offset + length - 1])  # the structure is before and after the values
                saved = TorchFile(path, FileSlice(file, offset, length))
        except OSError as error:
            raise SnapshotError(f"{path}: holds rows of '{name}', cannot be read: {error.strerror}") from error
        tensor, expected = saved.content, self.tensors[name].dtype
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shard.sizes or tensor.dtype != expected:
            got = f"{list(tensor.shape)} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            wanted = f"{list(shard.sizes)} {expected}"
            raise SnapshotError(f"{path}: the shard of '{name}' at {shard.offsets} is {got}, expected {wanted}")
        return Blob(path, offset + saved.values_offset(name, tensor), *place)
