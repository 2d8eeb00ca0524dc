"""Publishing: an artifact appears under its name whole, or not at all.

It is staged in a hidden folder beside the target, on the same file system, so that one rename publishes it. Every file
and folder reaches the disk before the rename. A build that is killed leaves only its staging folder, which the next
build into the same place removes: the folder is locked by the process that fills it, so a live build is left alone.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export.errors import PublishError

__all__ = ["publish", "staged", "write_file"]


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A locked, empty staging folder for `target`, removed at the end unless it was published.

    Raises:
        PublishError: the target exists, or its folder cannot be written; also for an OSError of the body, which
            here means the staging folder's disk.
    """
    _refuse_existing(target)
    prefix = f".{target.name}.staging-"
    fd = -1
    made: list[Path] = []
    staging: Path | None = None
    try:
        made = [folder for folder in target.parents if not os.path.exists(folder)]  # innermost first
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent):  # or a build that begins just now takes ours, not yet locked, for abandoned
            _remove_abandoned(target.parent, prefix)
            staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            fd = _open_folder(staging)
            fcntl.flock(fd, fcntl.LOCK_EX)
        staging.chmod(0o755)
        yield staging
    except OSError as error:
        raise _describe(error, target) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if fd >= 0:
            os.close(fd)
        if not os.path.lexists(target):
            _remove_empty(made)


def publish(staging: Path, target: Path) -> None:
    """Makes everything in `staging` durable, and renames it to `target`.

    Raises:
        PublishError: the target has come to exist meanwhile.
    """
    for folder, _, files in os.walk(staging):
        for name in files:
            _fsync(Path(folder, name))
        _fsync(Path(folder))
    _refuse_existing(target)
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise _existing(target) from error
        raise
    _fsync(target.parent)


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file, with the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise _existing(target)


def _existing(target: Path) -> PublishError:
    return PublishError(f"{target}: exists already; an artifact is never changed, choose another --output")


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it was never made, or somebody else uses it meanwhile
            folder.rmdir()


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)  # and so unlocked


def _remove_abandoned(folder: Path, prefix: str) -> None:
    for path in [path for path in folder.iterdir() if path.name.startswith(prefix)]:
        try:
            fd = _open_folder(path)
        except OSError:
            continue  # gone, or not ours to judge
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue  # another build fills it
        finally:
            os.close(fd)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _describe(error: OSError, target: Path) -> PublishError:
    where = error.filename or target.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(target.parent).free
        return PublishError(f"{where}: the disk is full ({free:,} bytes free); free some space and build again")
    return PublishError(f"{where}: cannot be written: {error.strerror or error}")
