"""Where torch.save puts a tensor's values in its file, found without reading them.

`torch.load` under `FakeTensorMode` runs the restricted unpickler (`weights_only=True`), allocates nothing, and leaves
the file offset of every storage on the fake tensors (`_checkpoint_offset`, torch 2.6 and later).
"""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from export.errors import SnapshotError

__all__ = ["FileSlice", "check_contiguous", "load_layout", "values_offset"]


class FileSlice(io.RawIOBase):
    """`length` bytes of a file from `offset` on, as a file of its own: a DCP file is many torch.save files in a row."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._fd, self._offset, self._length, self._position = file.fileno(), offset, length, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position within the slice."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves within the slice."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads at the position, never past the slice."""
        count = max(0, min(len(buffer), self._length - self._position))
        done = os.preadv(self._fd, [memoryview(buffer)[:count]], self._offset + self._position) if count else 0
        self._position += done
        return done


def load_layout(path: Path, file: Any) -> Any:
    """The object that torch.save wrote, with fake tensors: shapes, types and file offsets, no values.

    Raises:
        SnapshotError: not a torch.save file in its zip form, of another byte order, or with an object in it that is
            not plain data.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            orders = [name for name in archive.namelist() if name.endswith("/byteorder")]
            if any(archive.read(name) != b"little" for name in orders):
                raise SnapshotError(
                    f"{path}: was written on a big-endian machine; save it again on a little-endian one"
                )
        file.seek(0)
        with FakeTensorMode():
            return torch.load(file, weights_only=True, map_location="cpu")
    except (zipfile.BadZipFile, EOFError) as error:
        raise SnapshotError(f"{path}: is no torch.save file, or was truncated: {error}") from error
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line), "")
        raise SnapshotError(
            f"{path}: holds more than tensors and plain data, which is never unpickled; save only the state dict. {reason}"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise SnapshotError(f"{path}: is damaged: {str(error).splitlines()[0]}") from error


def values_offset(tensor: torch.Tensor) -> int:
    """The offset of the first value of a fake tensor, in the file that it was loaded from, in bytes."""
    storage: Any = tensor.untyped_storage()
    return int(storage._checkpoint_offset) + int(tensor.storage_offset()) * tensor.dtype.itemsize


def check_contiguous(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor whose values are not stored row-major and side by side."""
    if not tensor.is_contiguous():
        raise SnapshotError(f"{path}: '{name}' is stored with strides {tensor.stride()}; save a contiguous tensor")
