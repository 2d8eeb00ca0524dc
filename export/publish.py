"""Publishing: an artifact appears under its name whole, or not at all.

It is staged beside the target, on the same file system, in a hidden container with a lock file, and one rename publishes
it. Every file and folder reaches the disk before the rename. A build that is killed leaves only its container, which the
next build of the same target removes, or resumes: its lock is then free, while that of a live build is held.
"""

import errno
import fcntl
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from export.errors import PublishError, RowsError, SnapshotChangedError
from runtime_py.errors import ManifestError
from runtime_py.manifest import MANIFEST
from runtime_py.manifest_reader import read_manifest

__all__ = [
    "Staging",
    "fsync",
    "publish",
    "refuse_existing",
    "refuse_inside_artifact",
    "remove_empty",
    "staged",
    "write_file",
    "writing",
]

_LOCK = "export.lock"
_FOLDER = "artifact"  # not the target's name, which may be that of another file in the container
_STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Staging:
    """Where an artifact is made: its `folder`, and the `container` around it for what is not part of it."""

    container: Path
    folder: Path


@contextmanager
def staged(
    target: Path, *, place: Path | None = None, adopt: Callable[[Path], bool] | None = None
) -> Iterator[Staging]:
    """A staging folder for `target`, removed at the end unless it was published.

    Args:
        target: the artifact's folder; it must not exist.
        place: where to stage, on the target's file system; default: beside the target.
        adopt: says whether a container is one to go on with: the first such one of builds that were killed is taken over,
            as it is, and so may be this one, which stays if the body raises; a note of the exception names it.

    Raises:
        PublishError: the target exists, or its folder cannot be written; also for an OSError of the body, which
            here means the staging folder's disk.
    """
    refuse_existing(target)
    made: list[Path] = []
    held: _Held | None = None
    keep = False
    try:
        with writing(target):
            made = [folder for folder in target.parents if not os.path.exists(folder)]  # innermost first
            target.parent.mkdir(parents=True, exist_ok=True)
            place = place or target.parent
            with _locked(place):  # or a build that begins just now takes ours, not yet locked, for abandoned
                held = _clean_up(target, place, adopt) or _make_container(target, place)
            staging = Staging(held.container, held.container / _FOLDER)
            staging.folder.mkdir(exist_ok=True)
            yield staging
    except BaseException as error:
        # The next build starts from another snapshot, or there is none to come.
        useless = isinstance(error, RowsError | SnapshotChangedError) or os.path.lexists(target)
        keep = held is not None and adopt is not None and not useless and adopt(held.container)
        if held is not None and keep:
            error.add_note(f"{held.container}: holds what is finished; go on with --resume, or remove it")
        raise
    finally:
        # torchrun stops the other processes while they still clean up after the first failure.
        with _signals_deferred():
            if held is not None:
                if not keep:
                    _remove(held.container)
                os.close(held.lock)
            if not os.path.lexists(target):
                remove_empty(made)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Makes an OSError of the body, which writes to the staging folder's disk, a PublishError."""
    try:
        yield
    except OSError as error:
        raise _describe(error, target) from error


def publish(staging: Path, target: Path) -> None:
    """Makes everything in `staging` durable, and renames it to `target`.

    Raises:
        PublishError: the target has come to exist meanwhile.
    """
    for folder, _, files in os.walk(staging):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))
    with _signals_deferred():  # so that a stopped build can say whether it has published
        try:
            refuse_existing(target)
            staging.rename(target)
            fsync(target.parent)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise _existing(target) from error
            raise


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back until the end.

    By handlers, since a mask is of one thread only: the kernel gives the signal to another, torch's for example, and Python
    then runs the handler in the main thread all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
        return
    arrived: list[int] = []
    before = {number: signal.signal(number, lambda got, _: arrived.append(got)) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for late in arrived:
            signal.raise_signal(late)


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file, with the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)


def refuse_existing(target: Path) -> None:
    """Raises a PublishError where the target exists; what a build left that was killed when it was done goes then."""
    if os.path.lexists(target):
        with suppress(OSError), _locked(target.parent):
            _clean_up(target, target.parent, None)
        raise _existing(target)


def refuse_inside_artifact(target: Path, what: str) -> None:
    """Raises a PublishError where the target is, or would be, in an artifact; `what` names it."""
    target = target.resolve()
    for folder in (target, *target.parents):
        if (folder / MANIFEST).is_file():
            with suppress(ManifestError):  # somebody else's file of that name
                read_manifest(folder)
                raise PublishError(
                    f"{what}: {target} is inside the artifact {folder}, which never changes; name another place"
                )


def _existing(target: Path) -> PublishError:
    return PublishError(f"{target}: exists already; what is published is never changed, choose another name")


def remove_empty(folders: list[Path]) -> None:
    """Removes those of the folders, innermost first, that are empty."""
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


@dataclass(frozen=True)
class _Held:
    """A container whose lock this process holds."""

    container: Path
    lock: int


def _prefix(target: Path) -> str:
    return f".{target.name}.staging-"


def _make_container(target: Path, place: Path) -> _Held:
    container = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=place))
    try:
        lock = os.open(container / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        container.rmdir()
        raise
    fcntl.flock(lock, fcntl.LOCK_EX)
    return _Held(container, lock)


def _clean_up(target: Path, place: Path, adopt: Callable[[Path], bool] | None) -> _Held | None:
    """Removes the containers of builds that were killed, whose lock is free, but the first to adopt."""
    adopted = None
    ours = re.compile(re.escape(_prefix(target)) + "[a-z0-9_]{8}")  # as mkdtemp names them: of no longer target's name
    for path in sorted(path for path in place.iterdir() if ours.fullmatch(path.name)):
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            with suppress(
                OSError
            ):  # gone, or not ours, unless it is empty: killed before it was locked, or when it was done
                path.rmdir()
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if adopted is None and adopt is not None and adopt(path):
                adopted = _Held(path, os.dup(lock))  # and so still held
            else:
                _remove(path)
        except BlockingIOError:
            continue  # another build fills it
        finally:
            os.close(lock)
    return adopted


def _remove(container: Path) -> None:
    """Deletes a container, its lock last: by that the next build knows what is left, should this one be killed meanwhile."""
    with suppress(OSError):
        for path in container.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink()
    shutil.rmtree(container, ignore_errors=True)


def fsync(path: Path) -> None:
    """Makes a file or a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _describe(error: OSError, target: Path) -> PublishError:
    where = error.filename or target.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(target.parent).free
        return PublishError(f"{where}: the disk is full ({free:,} bytes free); free some space and try again")
    if error.errno == errno.EXDEV and error.filename2:
        return PublishError(
            f"{target}: is on another file system, or mount, than {where}, where it was staged; "
            "choose a folder below the mount point"
        )
    return PublishError(f"{where}: cannot be written: {error.strerror or error}")
