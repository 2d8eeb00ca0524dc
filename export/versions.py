"""Publishing to a root: a folder of versions, and a pointer that says which one servers take (`runtime_py.pointer`).

An artifact is copied beside the other versions, every byte of the copy is verified, and one rename makes it a version. The
pointer is replaced by another rename, under a lock that publishers hold for moments only: an operator who rolls back
never waits for somebody's copy. Everything reaches the disk before the rename that shows it. A publisher that is killed
leaves the pointer as it was, or moved; what it had copied is removed by the next one.
"""

import errno
import fcntl
import filecmp
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from export.errors import PublishError
from export.publish import fsync, publish, refuse_inside_artifact, remove_empty, staged, writing
from runtime_py.compatibility import find_differences
from runtime_py.digests import ZEROED, Digest
from runtime_py.documents import FORMAT_VERSION
from runtime_py.errors import ArtifactError, MissingFileError
from runtime_py.manifest import MANIFEST, Manifest
from runtime_py.manifest_reader import read_manifest
from runtime_py.pointer import POINTER, VERSIONS, Pointer, hold_version, is_version, read_pointer
from runtime_py.verify import verify_artifact

__all__ = ["Move", "publish_version", "roll_back"]

_LOCK = ".lock"
_STAGING = "version"  # staging containers are named after it: `.version.staging-…`
_DELETED = ".deleted-"
_SHORT = 12
_TRIES = 3  # others would have to publish and delete just between two steps of each
_NO_RANGE_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Move:
    """What a command has done: `version` is current now, and was before where `moved` is False.

    `in_use` are versions that were to be deleted, and are not, since a server has them mapped; `kept` are those that cannot
    be locked or taken away, with the reason.
    """

    root: Path
    version: str
    artifact_id: str
    sequence: int
    moved: bool
    copied: bool
    history: list[str]
    deleted: list[str]
    in_use: list[str]
    kept: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return vars(self) | {"root": str(self.root)}


def publish_version(
    artifact: Path, root: Path, keep: int | None = None, *, allow_signature_change: bool = False
) -> Move:
    """Makes an artifact the current version of a root, which is created where there is none.

    Args:
        artifact: its folder, which stays as it is; what is published is a copy.
        root: the folder of `current.json` and the versions.
        keep: how many versions stay, the current one and those that were current last, at least 2; None: all.
        allow_signature_change: whether callers of the version that is current may be failed (`find_differences`).

    Raises:
        ArtifactError: the artifact, or the version that has its name already, is damaged.
        PublishError: servers that follow the root would refuse the artifact, the root cannot be written or is inside the
            artifact, its disk is full, or others have published and deleted in between.
    """
    manifest = verify_artifact(artifact, "sizes")  # its rows are compared in the copy
    refuse_inside_artifact(root, "--to")
    if not allow_signature_change:
        _check_callers(root, manifest)
    for tries_left in reversed(range(_TRIES)):
        try:
            move = _publish(artifact, manifest, root, keep, allow_signature_change)
            break
        except MissingFileError:  # a version of this id was there, and others have published and deleted it meanwhile
            if not tries_left:
                raise
    versions = root / VERSIONS
    with suppress(OSError):  # those of a publisher that was killed as well; what is left, the next one removes
        for hidden in versions.glob(f"{_DELETED}*"):
            shutil.rmtree(hidden, ignore_errors=True)
    return move


def _publish(artifact: Path, manifest: Manifest, root: Path, keep: int | None, allow_signature_change: bool) -> Move:
    """Copies the artifact, or takes the version that is there, and makes it current."""
    versions = root / VERSIONS
    with writing(versions / _STAGING), _folders(root):
        name = _name_version(versions, manifest)
        copied = not (versions / name).exists()
        if copied:
            with staged(versions / _STAGING) as staging:
                _copy_artifact(artifact, manifest, staging.folder, versions)
                with _locked(root):
                    if not allow_signature_change:
                        _check_callers(root, manifest)  # the pointer may have moved meanwhile
                    name = _name_version(versions, manifest)  # another one of this id may have been faster
                    copied = not (versions / name).exists()
                    if copied:
                        publish(staging.folder, versions / name)
                    move = _make_current(root, name, copied, keep)
        else:
            with closing(_Hold(versions / name)):
                with _published_before(versions / name):
                    there = verify_artifact(versions / name)
                if _served_files(there) != _served_files(
                    manifest
                ):  # deleted, and another one published, before the hold
                    raise PublishError(f"{versions / name}: was replaced meanwhile; publish again")
                with _locked(root):
                    if not allow_signature_change:
                        _check_callers(root, manifest)
                    move = _make_current(root, name, copied, keep)
    return move


def roll_back(root: Path, to: str | None = None, *, allow_signature_change: bool = False) -> Move:
    """Makes an earlier version current again: the one before, or the one whose name, or the start of it, is `to`.

    Raises:
        ArtifactError: that version is damaged; the pointer stays.
        PublishError: there is no such version, servers that follow the root would refuse it and
            `allow_signature_change` is not given, somebody else has moved the pointer since the one before was looked up, or
            the root cannot be written.
    """
    names = _list_versions(root)
    before = None
    if to is None:
        before = read_pointer(root / POINTER)
        name = _previous(root, before, names)
    else:
        name = _find_version(root, names, to)
    with writing(root / POINTER), closing(_Hold(root / VERSIONS / name)):
        manifest = verify_artifact(root / VERSIONS / name)
        with _locked(root):
            if not allow_signature_change:
                _check_callers(root, manifest)
            if before is not None and read_pointer(root / POINTER) != before:
                raise PublishError(f"{root / POINTER}: was moved meanwhile; look what is current, and run again")
            pointer, moved = _move(root, name, back=True)
    return Move(root, name, pointer.artifact_id, pointer.sequence, moved, False, pointer.history, [], [], {})


def _check_callers(root: Path, manifest: Manifest) -> None:
    """Compares an artifact with the version that is current, as the servers do that follow the root."""
    if not os.path.lexists(root / POINTER):
        return
    current = read_pointer(root / POINTER).version
    try:
        problems = find_differences(read_manifest(root / VERSIONS / current), manifest)
    except ArtifactError:  # it is damaged, and what is current from now on mends that
        return
    if problems:
        raise PublishError(
            f"{root}: servers that follow it would refuse this artifact, as their callers count on version {current}: "
            f"{'; '.join(problems)}; publish it to another root, or give --allow-signature-change"
        )


@contextmanager
def _folders(root: Path) -> Iterator[None]:
    """Makes the folders of a root; where nothing is published, those that were missing go again."""
    versions = root / VERSIONS
    missing = [folder for folder in (versions, *versions.parents) if not folder.exists()]
    try:
        if missing:
            versions.mkdir(parents=True, exist_ok=True)
            for folder in missing:
                fsync(folder.parent)
        yield
    except BaseException:
        remove_empty(missing)
        raise


class _Hold:
    """Keeps a version from being deleted, until it is closed."""

    def __init__(self, version: Path) -> None:
        self._fd = hold_version(version)

    def close(self) -> None:
        os.close(self._fd)


# --- Versions --------------------------------------------------------------------------------------------------------


def _name_version(versions: Path, manifest: Manifest) -> str:
    """The artifact id, unless a version of this id runs other files: a graph that was built anew has another name."""
    name = manifest.artifact_id
    if not (versions / name).exists():
        return name
    with _published_before(versions / name):
        there = read_manifest(versions / name)
    if _served_files(there) == _served_files(manifest):
        return name
    return f"{name}-{manifest.manifest_digest.value[:_SHORT]}"


def _served_files(manifest: Manifest) -> dict[str, Digest]:
    return {file.path: file.digest for file in manifest.files if not file.path.startswith("reports/")}


def _list_versions(root: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(root / VERSIONS) if is_version(name))
    except OSError as error:
        raise PublishError(
            f"{root / VERSIONS}: cannot be read: {error.strerror}; give the folder that 'export publish' has written to"
        ) from error


def _previous(root: Path, pointer: Pointer, names: list[str]) -> str:
    earlier = [name for name in pointer.history if name in names]
    if not earlier:
        raise PublishError(f"{root}: nothing was current before {pointer.version}; name one of: {', '.join(names)}")
    return earlier[0]


def _find_version(root: Path, names: list[str], to: str) -> str:
    found = [name for name in names if to and name.startswith(to)]
    if to in found:
        return to
    if len(found) != 1:
        what = "several versions start with" if found else "no version starts with"
        raise PublishError(f"{root}: {what} '{to}'; there are: {', '.join(found or names) or 'none'}")
    return found[0]


@contextmanager
def _published_before(version: Path) -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        raise PublishError(
            f"{error}; it was published before, and has been damaged since: delete {version}, and publish again"
        ) from error


def _copy_artifact(artifact: Path, manifest: Manifest, folder: Path, versions: Path) -> None:
    """Copies what the manifest lists, and verifies the copy.

    Not hard links to the artifact, which somebody may still write to. But a graph that another version has, byte for byte,
    is a link to that one: torch never unloads a compiled graph, and loads one and the same file once.
    """
    graphs = {path for graph in manifest.graphs for path in graph.files}
    earlier = [versions / name for name in _list_versions(versions.parent)]
    for path in [MANIFEST, *(file.path for file in manifest.files)]:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (path in graphs and _link_same(artifact / path, [version / path for version in earlier], target)):
            _copy_file(artifact / path, target)
    try:
        copy = verify_artifact(folder)
    except ArtifactError:
        verify_artifact(artifact)  # most likely: then it is the one to name
        raise
    if copy.manifest_digest != manifest.manifest_digest:
        raise PublishError(f"{artifact}: changed while it was published; an artifact is never changed after its build")


def _link_same(source: Path, earlier: list[Path], target: Path) -> bool:
    for path in earlier:
        with suppress(OSError):  # it is gone, or the file system has no links
            if filecmp.cmp(source, path, shallow=False):
                os.link(path, target, follow_symlinks=False)
                return True
    return False


def _copy_file(source: Path, target: Path) -> None:
    """Copies a file, and makes the copy durable; on file systems that can, both share their blocks."""
    with open(source, "rb") as read, open(target, "xb") as write:
        try:
            while os.copy_file_range(read.fileno(), write.fileno(), 1 << 30):
                pass
        except OSError as error:
            if error.errno not in _NO_RANGE_COPY:
                raise
            for file in (read, write):
                file.seek(0)
            write.truncate()
            shutil.copyfileobj(read, write, 1 << 20)
            write.flush()
        os.fsync(write.fileno())


def _make_current(root: Path, name: str, copied: bool, keep: int | None) -> Move:
    """Points to a version that was verified, and hides all but the `keep` that were current last. The caller holds the lock.

    What happens to old versions is told, and raises nothing: the pointer has moved.
    """
    names = _list_versions(root)
    pointer, moved = _move(root, name, back=False)
    move = Move(root, name, pointer.artifact_id, pointer.sequence, moved, copied, pointer.history, [], [], {})
    needed = [pointer.version, *pointer.history][: max(keep, 2)] if keep is not None else names
    for other in names:
        if other not in needed:
            try:
                (move.deleted if _hide(root / VERSIONS / other) else move.in_use).append(other)
            except OSError as error:
                move.kept[other] = error.strerror or str(error)
    return move


def _hide(version: Path) -> bool:
    """Takes a version away under a hidden name, from where it can be deleted at leisure; not while a server holds it."""
    try:
        fd = os.open(version / MANIFEST, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)  # NFS locks what one can write
    except FileNotFoundError:
        fd = os.open(version, os.O_RDONLY | os.O_CLOEXEC)  # no version that a server could hold
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        version.rename(version.with_name(f"{_DELETED}{version.name}-{time.time_ns()}"))
        return True
    finally:
        os.close(fd)


# --- Pointer ---------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    fd = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)  # and so unlocked


def _move(root: Path, name: str, back: bool) -> tuple[Pointer, bool]:
    """Points to a version that was verified; says whether the pointer was another before. The caller holds the lock.

    A way `back` takes what was current after `name` out of the history: to roll back twice goes back two versions.
    """
    manifest = read_manifest(root / VERSIONS / name)
    before = read_pointer(root / POINTER) if os.path.lexists(root / POINTER) else None
    if before is not None and (before.version, before.manifest_digest) == (name, manifest.manifest_digest):
        return before, False
    history = [] if before is None else [before.version, *before.history]
    if back and name in history:
        history = history[history.index(name) + 1 :]
    there = _list_versions(root)
    pointer = Pointer(
        format_version=FORMAT_VERSION,
        sequence=1 if before is None else before.sequence + 1,
        version=name,
        artifact_id=manifest.artifact_id,
        manifest_digest=manifest.manifest_digest,
        history=[version for version in history if version in there and version != name],
        published_at=datetime.now(UTC).isoformat(timespec="seconds"),
        pointer_digest=Digest(ZEROED, "0" * 64),
    )
    fresh = root / f".{POINTER}.new"  # one that a killed publisher has left is written over
    fresh.write_bytes(pointer.to_bytes())
    fsync(fresh)
    fresh.replace(root / POINTER)
    fsync(root)
    return pointer, True
