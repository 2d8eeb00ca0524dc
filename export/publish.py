"""Publishing: an artifact appears under its name whole, or not at all.

It is staged beside the target, on the same file system, in a hidden container with a lock file, and one rename publishes
it. Every file and folder reaches the disk before the rename. A build that is killed leaves only its container, which the
next build of the same target removes: its lock is then free, while that of a live build is held.
"""

import errno
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export.errors import PublishError

__all__ = ["publish", "staged", "write_file"]

_LOCK = "export.lock"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty staging folder for `target`, removed at the end unless it was published.

    Raises:
        PublishError: the target exists, or its folder cannot be written; also for an OSError of the body, which
            here means the staging folder's disk.
    """
    _refuse_existing(target)
    prefix = f".{target.name}.staging-"
    lock = -1
    made: list[Path] = []
    container: Path | None = None
    try:
        made = [folder for folder in target.parents if not os.path.exists(folder)]  # innermost first
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent):  # or a build that begins just now takes ours, not yet locked, for abandoned
            _remove_abandoned(target.parent, prefix)
            container = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            lock = os.open(container / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
        staging = container / target.name
        staging.mkdir()
        yield staging
    except OSError as error:
        raise _describe(error, target) from error
    finally:
        if container is not None:
            shutil.rmtree(container, ignore_errors=True)
        if lock >= 0:
            os.close(lock)
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
    # A signal that arrives from here on waits, so that a stopped build can say whether it has published.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        _refuse_existing(target)
        staging.rename(target)
        _fsync(target.parent)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _existing(target) from error
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)  # and so unlocked


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Removes the containers of builds that were killed: those whose lock, which only a container has, is free."""
    for path in [path for path in folder.iterdir() if path.name.startswith(prefix)]:
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # gone, or not ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue  # another build fills it
        finally:
            os.close(lock)


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
