"""Where torch.save puts a tensor's values in its file, found without reading them.

`torch.load` under `FakeTensorMode` runs the restricted unpickler (`weights_only=True`), allocates nothing, and leaves
the file offset of every storage on the fake tensors (`_checkpoint_offset`, torch 2.6 and later).
"""

import pickle
import re
import struct
import threading
import zipfile
from pathlib import PurePosixPath
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from export.errors import SnapshotError
from export.storage import Location, RemoteFile, SeekableReader

__all__ = ["FileSlice", "TorchFile"]

# The end of a zip record's local header: lengths of its name and of its extra field (APPNOTE.TXT, 4.3.7).
_LOCAL_HEADER = struct.Struct("<26xHH")
_FAKE_MODE = threading.Lock()  # entering it sets flags of the whole process


class FileSlice(SeekableReader):
    """`length` bytes of a file from `offset` on, as a file of its own: a DCP file is many torch.save files in a row."""

    def __init__(self, file: Any, offset: int, length: int) -> None:
        super().__init__(length)
        self._file, self._offset = file, offset

    def _read_at(self, position: int, out: memoryview) -> int:
        self._file.seek(self._offset + position)
        return int(self._file.readinto(out))


class TorchFile:
    """A file that torch.save wrote: its object with fake tensors, and where each tensor's values are."""

    def __init__(self, path: Location, file: Any) -> None:
        """Reads the structure of `file`, which `path` names in errors.

        Raises:
            SnapshotError: not a torch.save file in its zip form, of another byte order, compressed, or with an object
                in it that is not plain data.
        """
        self._path = path
        self._records = self._read_records(file)
        file.seek(0)
        try:
            with _FAKE_MODE, FakeTensorMode():
                self.content: Any = torch.load(file, weights_only=True, map_location="cpu")
        except SnapshotError:
            raise
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f" (it names {named.group(1)})" if named else ""
            raise SnapshotError(
                f"{path}: holds more than tensors and plain data, which is never unpickled; save only the state dict{what}"
            ) from error
        except NotImplementedError as error:  # torch's own quantized tensors have no fake form
            raise SnapshotError(
                f"{path}: holds a tensor that is not made of plain numbers, such as one that torch has quantized; save only "
                "the state dict of the trained model"
            ) from error
        # A damaged pickle raises nearly anything; whatever it is, the file is no state dict.
        except Exception as error:
            raise SnapshotError(
                f"{path}: is damaged: {(str(error) or type(error).__name__).splitlines()[0]}"
            ) from error

    def _read_records(self, file: Any) -> dict[int, int]:
        """The size of every record by the offset of its first byte."""
        path = self._path
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                if any(PurePosixPath(info.filename).name == "constants.pkl" for info in infos):
                    raise SnapshotError(f"{path}: is a TorchScript archive; save the state dict of the trained model")
                if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                    raise SnapshotError(f"{path}: has compressed records, which torch.save never writes; save it again")
                orders = [info for info in infos if info.filename.endswith("/byteorder")]
                if any(archive.read(info) != b"little" for info in orders):
                    raise SnapshotError(
                        f"{path}: was written on a big-endian machine; save it again on a little-endian one"
                    )
            if isinstance(file, RemoteFile):
                file.prefetch([info.header_offset for info in infos])
            records = {}
            for info in infos:
                file.seek(info.header_offset)
                name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                records[info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes] = info.file_size
            return records
        except (zipfile.BadZipFile, EOFError, struct.error) as error:
            raise SnapshotError(
                f"{path}: is no torch.save file, or was truncated: {error} (its zip form is read)"
            ) from error
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise SnapshotError(f"{path}: is damaged: {str(error).splitlines()[0]}") from error

    def values_offset(self, name: str, tensor: torch.Tensor) -> int:
        """The offset in the file of the first value of a tensor of `content`, in bytes.

        Raises:
            SnapshotError: its values are not stored row-major, side by side and as they are, or are not all there.
        """
        if tensor.layout is not torch.strided or not tensor.is_contiguous():
            how = f"with strides {tensor.stride()}" if tensor.layout is torch.strided else f"as {tensor.layout}"
            raise SnapshotError(f"{self._path}: '{name}' is stored {how}; save a contiguous tensor")
        storage: Any = tensor.untyped_storage()
        start = storage._checkpoint_offset
        if start is None or tensor.is_neg():
            how = "without values" if start is None else "with a negation to be done"
            raise SnapshotError(f"{self._path}: '{name}' is stored {how}; save a plain tensor")
        offset = tensor.storage_offset() * tensor.dtype.itemsize
        if self._records.get(start, 0) < offset + tensor.numel() * tensor.dtype.itemsize:
            raise SnapshotError(f"{self._path}: '{name}' is longer than what the file holds of it; the file is damaged")
        return int(start) + int(offset)
