"""A root: a folder of published versions, and the pointer that says which of them is current.

    ROOT/current.json             the pointer; replaced as a whole, never changed in place
    ROOT/versions/<version>/      artifacts, each complete and never changed

`export.versions` writes it; every server reads it. A version is named, never a path: a pointer cannot lead elsewhere.
"""

import dataclasses
import fcntl
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime_py.digests import ZEROED, Digest
from runtime_py.documents import decode_document, encode_document
from runtime_py.errors import ManifestError, MissingFileError, PointerError
from runtime_py.manifest import MANIFEST

__all__ = ["POINTER", "VERSIONS", "Pointer", "hold_version", "is_version", "read_pointer"]

POINTER = "current.json"
VERSIONS = "versions"
_VERSION = re.compile(r"([0-9a-f]{64})(-[0-9a-f]{12})?")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Pointer:
    """`current.json` of format version 1.

    `version` is the current one's name, `artifact_id` and `manifest_digest` are those in its manifest. `sequence` grows by
    one with every move, `history` names the versions that were current before, the latest first.
    """

    format_version: int
    sequence: int
    version: str
    artifact_id: str
    manifest_digest: Digest
    history: list[str]
    published_at: str
    pointer_digest: Digest

    def to_bytes(self) -> bytes:
        """The bytes of current.json, with a fresh digest."""
        return encode_document(dataclasses.replace(self, pointer_digest=Digest(ZEROED, "0" * 64)))


def is_version(name: str) -> bool:
    """Whether a folder's name is that of a version: its artifact id, or that and 12 more digits."""
    return _VERSION.fullmatch(name) is not None


def read_pointer(path: Path) -> Pointer:
    """Reads and checks a pointer.

    Raises:
        PointerError: it cannot be read, is damaged, or contradicts itself.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PointerError(
            f"{path}: cannot be read: {error.strerror}; give the {POINTER} that 'export publish' wrote"
        ) from error
    try:
        pointer: Pointer = decode_document(Pointer, data)
        _check(pointer)
    except ManifestError as error:
        raise PointerError(f"{path}: {error}; restore it, or remove it and publish again") from error
    return pointer


def _check(pointer: Pointer) -> None:
    if pointer.sequence < 1:
        raise ManifestError(f"sequence: expected at least 1, got {pointer.sequence}")
    for name in (pointer.version, *pointer.history):
        if not is_version(name):
            raise ManifestError(f"{name!r} is no version: expected the 64 hexadecimal digits of an artifact id")
    if not pointer.version.startswith(pointer.artifact_id) or not _HEX.fullmatch(pointer.artifact_id):
        raise ManifestError(f"artifact_id is {pointer.artifact_id!r}, and the version is {pointer.version}")
    if pointer.version in pointer.history or len(set(pointer.history)) != len(pointer.history):
        raise ManifestError("history names a version twice")
    if not _HEX.fullmatch(pointer.manifest_digest.value):
        raise ManifestError(f"manifest_digest: expected 64 hexadecimal digits, got {pointer.manifest_digest.value!r}")


def hold_version(folder: Path) -> int:
    """Keeps `publish --keep` from deleting a version: a file descriptor that does so until it is closed.

    A shared lock on its manifest. Where the file system has no locks, nothing is kept.

    Raises:
        MissingFileError: there is no such version, or it is being deleted.
    """
    if folder.is_symlink():
        raise MissingFileError(f"{folder}: is a symbolic link; a version is a folder that 'export publish' wrote")
    while True:
        fd = _lock_manifest(folder)
        try:
            if os.path.samestat(os.fstat(fd), (folder / MANIFEST).lstat()):
                return fd
        except OSError as error:
            os.close(fd)
            raise _missing(folder, error) from error
        os.close(fd)  # it was deleted before it was locked, and another of its name has been published since


def _lock_manifest(folder: Path) -> int:
    try:
        fd = os.open(folder / MANIFEST, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise _missing(folder, error) from error
    try:
        with suppress(OSError):
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise MissingFileError(f"{folder}: is being deleted; roll back to another version") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _missing(folder: Path, error: OSError) -> MissingFileError:
    return MissingFileError(
        f"{folder}: no such version: {MANIFEST}: {error.strerror}; roll back to one that is there, or publish again"
    )
