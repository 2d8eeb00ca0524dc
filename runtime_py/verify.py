"""Is this folder, byte for byte, the artifact that was published?

Nothing is loaded and no operator is needed, so that the question can be asked anywhere. The checks run from cheap to
dear: manifest, the set of files, sizes, the headers of the weight file and the vocabularies, digests.
"""

import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from runtime_py.digests import sha256
from runtime_py.errors import ArtifactError, DigestMismatchError, ExtraFileError, MissingFileError, SizeMismatchError
from runtime_py.manifest import MANIFEST, Manifest
from runtime_py.manifest_reader import read_manifest
from runtime_py.vocabulary import VocabularyFile
from runtime_py.weights import WeightFile

__all__ = ["Verified", "Verify", "verify_artifact"]

Verify = Literal["full", "sizes"]
_MAX_THREADS = 8


@dataclass(frozen=True)
class Verified:
    """What verification has read: the manifest, the open files that are mapped, and the bytes of every small file.

    A loader goes on from these, never from the paths, so that it runs what was verified. `vocabularies` are by table.
    """

    manifest: Manifest
    weights: WeightFile
    vocabularies: Mapping[str, VocabularyFile]
    contents: dict[str, bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the weight file and the vocabularies; mappings made before stay valid."""
        for file in (self.weights, *self.vocabularies.values()):
            file.close()


def verify_artifact(path: str | os.PathLike[str], verify: Verify = "full", threads: int | None = None) -> Manifest:
    """Checks an artifact against its manifest, and returns the manifest.

    Args:
        path: the artifact's folder.
        verify: "full" compares every digest; "sizes" compares every digest but those of the rows and the
            vocabularies, of which only size and header are compared (a terabyte cannot be read at every start of a worker).
        threads: cores that compute the rows' digests; by default all, at most 8.

    Raises:
        ArtifactError: the first kind that applies of `ManifestError`, `ExtraFileError`, `MissingFileError`,
            `SizeMismatchError`, `DigestMismatchError`, `WeightFileError`, `VocabularyFileError`; the message names
            every file of that kind.
    """
    with open_verified(Path(path), verify, threads) as verified:
        return verified.manifest


def open_verified(artifact: Path, verify: Verify, threads: int | None = None) -> Verified:
    """As `verify_artifact`, and hands over what it has read; the caller closes it."""
    if verify not in ("full", "sizes"):
        raise ValueError(f"verify must be 'full' or 'sizes', got {verify!r}")
    if not artifact.is_dir():
        what = "is no folder" if artifact.exists() else "no such folder"
        raise MissingFileError(f"{artifact}: {what}; give the folder that 'export build' wrote")
    manifest = read_manifest(artifact)
    try:
        _check_files(artifact, manifest)
        small = [file.path for file in manifest.files if file.path not in manifest.mapped]
        contents = {path: _read_file(artifact, path) for path in small}
        _check_contents(artifact, manifest, contents)
        with ExitStack() as opened:
            weights = opened.enter_context(WeightFile(artifact, manifest))
            vocabularies = {
                stored.table: opened.enter_context(VocabularyFile(artifact, stored)) for stored in manifest.vocabularies
            }
            if verify == "full":
                cores = threads or min(_MAX_THREADS, os.cpu_count() or 1)
                weights.verify_digests(cores)
                for vocabulary in vocabularies.values():
                    vocabulary.verify_digests(manifest.file[vocabulary.stored.path].digest, cores)
            opened.pop_all()  # from here on they are the caller's to close
    except OSError as error:
        raise ArtifactError(f"{error.filename or artifact}: cannot be read: {error.strerror}") from error
    return Verified(manifest, weights, vocabularies, contents)


def _check_files(artifact: Path, manifest: Manifest) -> None:
    expected = {file.path: file.bytes for file in manifest.files}
    folders = {str(parent) for path in expected for parent in Path(path).parents}
    found: dict[str, int] = {}
    extra: list[str] = []
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(artifact / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode) and name in folders:
                    waiting.append(name)
                elif stat.S_ISREG(status.st_mode) and name in expected:
                    found[name] = status.st_size
                elif name != MANIFEST:
                    extra.append(name)
    if extra:
        what = "not in the manifest, or no regular file"
        raise ExtraFileError(
            f"{artifact}: {what}: {', '.join(sorted(extra))}; an artifact is never changed after its build"
        )
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise MissingFileError(f"{artifact}: missing: {', '.join(missing)}; restore the files or build again")
    wrong = [
        f"{name} is {found[name]} bytes, expected {expected[name]}"
        for name in sorted(found)
        if found[name] != expected[name]
    ]
    if wrong:
        raise SizeMismatchError(f"{artifact}: {'; '.join(wrong)}; restore the files or build again")


def _read_file(artifact: Path, name: str) -> bytes:
    fd = os.open(artifact / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(fd, "rb") as file:
        return file.read()


def _check_contents(artifact: Path, manifest: Manifest, contents: dict[str, bytes]) -> None:
    wrong = []
    for name, data in contents.items():
        digest = sha256(data)
        if digest != manifest.file[name].digest:
            wrong.append(f"{name}: digest {digest}, expected {manifest.file[name].digest}")
    if wrong:
        raise DigestMismatchError(f"{artifact}: {'; '.join(wrong)}; restore the files or build again")
