"""What differs between files on disk and objects behind a URL: sizes, listings, reads by range.

A location is a `pathlib.Path` or, for any URL that fsspec has a driver for, a `UPath`, which joins and prints as a path
does. Whatever a driver raises becomes an OSError with a `strerror`, so that a reader reports one kind of failure.
"""

import errno
import io
import os
import re
import threading
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.cached import (  # type: ignore[import-untyped]
    SimpleCacheFileSystem,
    WholeFileCacheFileSystem,
)
from upath import UPath

from export.errors import SnapshotError

__all__ = [
    "Location",
    "RemoteFile",
    "SeekableReader",
    "drop_copies",
    "find_files",
    "fingerprints",
    "is_file",
    "is_plain_name",
    "join",
    "list_folder",
    "map_files",
    "open_location",
    "open_seekable",
    "read_range",
    "read_whole",
    "redact",
    "redact_all",
    "size",
]

Location = Path | UPath
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_THREADS = 32
# A torch.save file has a header beside every storage: small blocks, as nearly all of a block around one is values.
_BLOCK_BYTES = 16 << 10
# What drivers call the version of a file. Not its access time, which reading changes.
_VERSION_KEYS = (
    *("size", "ETag", "etag", "VersionId", "generation", "sha", "blob_id", "LastModified", "last_modified"),
    *("Last-Modified", "mtime", "modificationTime", "last_write_time", "modify", "created", "CRC", "date_time"),
)
_STAGING = threading.Lock()


def open_location(uri: str) -> Location:
    """The place that a path or a URL names, whether or not anything is there.

    Raises:
        SnapshotError: the URL's protocol is unknown, or its driver is not installed or cannot start.
    """
    if "://" not in uri:
        return Path(uri)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it has no class of its own for this filesystem
            location = UPath(uri)
        location.fs.invalidate_cache()  # an earlier build of this process may have listed the folder
    except ImportError as error:
        raise SnapshotError(f"{uri}: the driver for this URL is not installed: {_describe(error)}") from error
    # A driver that cannot start raises nearly anything; see `_ask`.
    except Exception as error:
        raise SnapshotError(f"{uri}: cannot be opened: {_describe(error)}") from error
    return Path(location.path) if location.protocol in ("file", "local") else location


def drop_copies() -> None:
    """Forgets what simplecache:: and filecache:: have staged, and removes what lies in temporary folders.

    An earlier build of the process may have staged a file that was written again since.
    """
    for kind in (SimpleCacheFileSystem, WholeFileCacheFileSystem):
        kind.clear_instance_cache()


def redact(uri: str) -> str:
    """A URL as it may be published: without user, password and query, where keys and signatures are."""
    return re.sub(r"[?#].*", "", re.sub(r"(?<=://)[^/]*@", "", uri)) if "://" in uri else uri


def redact_all(text: str) -> str:
    """A text with every URL in it as it may be published."""
    return re.sub(r"[A-Za-z0-9+.:-]*://\S+", lambda found: redact(found.group()), text)


def is_plain_name(name: str) -> bool:
    """Whether a name that a file gave is that of something within its folder."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def join(folder: Location, name: str) -> Location:
    """`folder / name`, also for a chain that ends in http://, which UPath 0.3 cannot join."""
    try:
        return folder / name
    except TypeError:
        return UPath(f"{folder}/{name}")


def is_file(location: Location) -> bool:
    """Whether a file is there; False also where nothing is. Raises OSError where that cannot be found out."""
    if isinstance(location, Path):
        return location.is_file()
    try:
        info = _ask(location, "info")
    except FileNotFoundError:
        return False
    return bool(info["type"] == "file") and info.get("mimetype") != "text/html"  # a web server's page of a folder


def list_folder(folder: Location) -> dict[str, bool]:
    """The names in a folder, in order, and whether each is a file. Raises OSError."""
    if isinstance(folder, Path):
        return {path.name: path.is_file() for path in sorted(folder.iterdir())}
    names = {}
    for entry in _ask(folder, "ls", detail=True):
        path = str(entry["name"]).strip("/")
        if path != folder.path.strip("/"):  # object stores may list the folder as an object in itself
            names[path.rpartition("/")[2]] = entry["type"] == "file"
    return dict(sorted(names.items()))


def find_files(folder: Location, ending: str) -> list[Location]:
    """The files of a folder whose names end so, in order; none where there is no folder. Raises OSError."""
    if isinstance(folder, Path):
        return [*sorted(folder.glob(f"*{ending}"))]
    try:
        names = list_folder(folder)
    except FileNotFoundError:
        return []
    return [join(folder, name) for name, file in names.items() if file and name.endswith(ending)]


def size(location: Location) -> int:
    """The length of a file, in bytes. Raises OSError."""
    if isinstance(location, Path):
        return location.stat().st_size
    info = _ask(location, "info")
    length = info["size"]
    if length is None:
        raise OSError(errno.EIO, "the server does not say how long it is", str(location))
    if length > _BLOCK_BYTES and info.get("partial") is False:  # over HTTP; it would send all of it for any part
        raise OSError(errno.EIO, "the server does not serve ranges; put simplecache:: before the URL", str(location))
    return int(length)


def read_whole(location: Location) -> bytes:
    """All bytes of a small file. Raises OSError."""
    nearest = _nearest(location)
    return nearest.read_bytes() if isinstance(nearest, Path) else bytes(_ask(nearest, "cat_file"))


def read_range(location: Location, position: int, out: memoryview) -> int:
    """Fills `out` with the bytes from `position` on, and returns how many there were. Threads may call it at once.

    A remote range is one request. Raises OSError.
    """
    nearest = _nearest(location)
    if isinstance(nearest, Path):
        return _read_local_range(nearest, position, out)
    if not len(out):
        return 0
    data = _ask(nearest, "cat_file", start=position, end=position + len(out))
    if len(data) > len(out):
        message = f"the server sent {len(data)} bytes for a range of {len(out)}; put simplecache:: before the URL"
        raise OSError(errno.EIO, message, str(location))
    out[: len(data)] = data
    return len(data)


def _read_local_range(path: Path, position: int, out: memoryview) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        filled = 0
        while filled < len(out):
            count = os.preadv(fd, [out[filled:]], position + filled)
            if count == 0:
                break
            filled += count
        return filled
    finally:
        os.close(fd)


def fingerprints(locations: Sequence[Location]) -> list[tuple[object, ...]]:
    """What says of each file that it is still the same one: other values after it was written again. Raises OSError."""
    for location in locations:
        if isinstance(location, UPath):
            _ask(location, "invalidate_cache")
    return map_files(_fingerprint, locations, locations)


def _fingerprint(location: Location) -> tuple[object, ...]:
    if isinstance(location, Path):
        stat = location.stat()
        # Also the time that nobody sets back. No inode: mounts of object stores number files anew.
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    info = _ask(location, "info")
    return tuple((key, str(info[key])) for key in _VERSION_KEYS if key in info)


def map_files(
    function: Callable[[_Item], _Result], items: Sequence[_Item], locations: Sequence[Location]
) -> list[_Result]:
    """`function` of each item in order; at once, in threads, where any of the locations that it reads is remote."""
    if len(items) < 2 or all(isinstance(location, Path) for location in locations):
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(_THREADS, len(items))) as pool:
        return list(pool.map(function, items))


class SeekableReader(io.RawIOBase):
    """A read-only file of known length, on top of `_read_at`."""

    def __init__(self, length: int) -> None:
        self._length, self._position = length, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position from the start."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves; reads nothing."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "before the start of the file")  # zipfile looks for its end this way
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads at the position, never past the end."""
        count = max(0, min(len(buffer), self._length - self._position))
        done = self._read_at(self._position, memoryview(buffer)[:count]) if count else 0
        self._position += done
        return done

    @abstractmethod
    def _read_at(self, position: int, out: memoryview) -> int:
        """Fills `out`, which lies within the file, and returns how many bytes there were."""


class RemoteFile(SeekableReader):
    """The structure of a remote file: what is asked for is fetched in small blocks, once, and kept."""

    def __init__(self, location: UPath) -> None:
        """Asks for the file's length; raises OSError."""
        super().__init__(size(location))
        self._location = location
        self._blocks: dict[int, bytes] = {}

    def prefetch(self, positions: Sequence[int]) -> None:
        """Fetches the blocks at these positions at once, instead of one after the other when they are read.

        Raises:
            SnapshotError: see `_read_at`.
        """
        blocks = sorted({position // _BLOCK_BYTES for position in positions if 0 <= position < self._length})
        missing = [block for block in blocks if block not in self._blocks]
        map_files(lambda block: self._fetch(block, block + 1), missing, [self._location])

    def _read_at(self, position: int, out: memoryview) -> int:
        """Raises SnapshotError, not OSError: zipfile takes an OSError for the end of a file that is no archive."""
        first, stop = position // _BLOCK_BYTES, -(-(position + len(out)) // _BLOCK_BYTES)
        missing = [block for block in range(first, stop) if block not in self._blocks]
        if missing:
            self._fetch(missing[0], missing[-1] + 1)
        data = b"".join(self._blocks[block] for block in range(first, stop))
        start = position - first * _BLOCK_BYTES
        out[:] = data[start : start + len(out)]
        return len(out)

    def _fetch(self, first: int, stop: int) -> None:
        start = first * _BLOCK_BYTES
        data = bytearray(min(stop * _BLOCK_BYTES, self._length) - start)
        try:
            filled = read_range(self._location, start, memoryview(data))
        except OSError as error:
            raise SnapshotError(f"{self._location}: cannot be read: {error.strerror}") from error
        if filled < len(data):
            raise SnapshotError(f"{self._location}: ends at byte {start + filled}, expected {self._length} bytes")
        for block in range(first, stop):
            at = (block - first) * _BLOCK_BYTES
            self._blocks[block] = bytes(data[at : at + _BLOCK_BYTES])


def open_seekable(location: Location) -> io.BufferedReader | RemoteFile:
    """A file to parse: `read` gives all that is asked for. Raises OSError."""
    nearest = _nearest(location)
    return nearest.open("rb") if isinstance(nearest, Path) else RemoteFile(nearest)


def _nearest(location: Location) -> Location:
    """Where a file is read: the local copy, made on first use, where the URL asks for one (simplecache::, filecache::)."""
    if isinstance(location, Path) or not getattr(type(location.fs), "local_file", False):
        return location
    # These filesystems take a copy that another thread is still writing for a complete one.
    with _STAGING, _ask(location, "open", mode="rb") as copy:
        return Path(copy.name)


def _ask(location: UPath, method: str, **options: Any) -> Any:
    """Calls a method of the driver; whatever it raises becomes an OSError."""
    try:
        return getattr(location.fs, method)(location.path, **options)
    # Every driver has errors of its own (botocore's, aiohttp's, ...), with no base class in common.
    except Exception as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and not _is_failure(error.__cause__):
            says = f" ({_describe(error.__cause__ or error)})" if error.__cause__ or " " in str(error) else ""
            raise FileNotFoundError(errno.ENOENT, f"no such file or folder{says}", str(location)) from error
        raise OSError(errno.EIO, _describe(error), str(location)) from error


def _is_failure(cause: BaseException | None) -> bool:
    """Whether FileNotFoundError stands for something else: over HTTP it does when the server cannot be reached."""
    unreachable = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return unreachable or getattr(cause, "status", 404) not in (403, 404, 410)  # many servers have 403 for 404


def _describe(error: BaseException) -> str:
    """One line that says what went wrong."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:
        error = cause
    text = str(getattr(error, "strerror", None) or error).strip()
    name = type(error).__name__
    return f"{name}: {text.splitlines()[0]}" if text else name
