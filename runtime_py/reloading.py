"""An artifact that follows a pointer: a new version is loaded beside the old one, proves itself, and takes its place.

The candidate is compared with its manifest byte for byte, must fit the callers of the version that serves, and answers its
golden cases before it gets a request. Otherwise it is refused, once, and the old one keeps serving until the pointer
changes again; only what may pass by itself (no memory, no file descriptor, a file server that is away) is tried again, at
longer and longer intervals. The swap is one assignment: a request takes the version that it finds, and no lock. What is in
flight ends on the old version, which the refreshing thread then unmaps.
"""

import dataclasses
import errno
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from runtime_py.artifact import Artifact, load_artifact
from runtime_py.compatibility import check_compatible
from runtime_py.errors import ArtifactError, PointerError, UnsupportedError
from runtime_py.golden import read_cases, replay_cases
from runtime_py.manifest import Manifest
from runtime_py.manifest_reader import read_manifest
from runtime_py.pointer import VERSIONS, Pointer, hold_version, read_pointer
from runtime_py.pooled import Pooled

__all__ = ["Refusal", "ReloadStatus", "ReloadingArtifact"]

_LOGGER = logging.getLogger(__name__)
_DRAIN_S = 1.0  # requests take milliseconds; who holds a version for longer unmaps it himself
_DRAIN_STEP_S = 0.002
_MOST_LOOKS = 60  # between two attempts at what may pass by itself
_SHUTDOWN = "interpreter shutdown"  # of Python's errors from then on, which come before it runs what sets `_stop`
_PASSING = (
    errno.EAGAIN,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOLCK,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
)

_Stamp = tuple[int, int, int] | None


@dataclass(frozen=True)
class Refusal:
    """What was refused: the `version`, None where the pointer itself is no good, why, and when (seconds since 1970)."""

    version: str | None
    error: str
    at: float


@dataclass(frozen=True)
class ReloadStatus:
    """For monitoring. Times are seconds since 1970.

    `sequence` is that of the pointer which named what serves. `refusal` is set while the pointer names something else than
    what serves: alert on it. `watching` says whether a thread looks at the pointer: after a fork, no in the child.
    """

    version: str
    artifact_id: str
    sequence: int
    serving_since: float
    checked_at: float
    swaps: int
    refusals: int
    refusal: Refusal | None
    watching: bool


@dataclass(frozen=True)
class _Serving:
    """What serves; `invalid` and `unknown` are the counts of the versions before it."""

    artifact: Artifact
    pointer: Pointer
    since: float
    invalid: Mapping[str, int]
    unknown: Mapping[str, int]


class ReloadingArtifact:
    """Serves the version that a pointer names, and changes to another one without a failed request.

    Any number of threads may call it. Make it in the process that serves: no thread survives a fork.
    """

    def __init__(
        self,
        pointer: str | os.PathLike[str],
        *,
        interval_s: float | None = 5.0,
        allow_signature_change: bool = False,
        **options: Any,
    ) -> None:
        """Loads the current version.

        Args:
            pointer: the `current.json` that `python -m export publish` writes.
            interval_s: seconds between two looks at the pointer; None: only `refresh` looks.
            allow_signature_change: take a version with other features, outputs or fewer rows, too.
            options: as of `load_artifact`, on a CPU. With verify="sizes", give prefault=True, so that no request waits for
                the disk.

        Raises:
            ArtifactError: there is no current version, or it is refused.
            UnsupportedError: `device` is no CPU.
        """
        if interval_s is not None and not 0 < interval_s <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"interval_s must be greater than 0 and at most {threading.TIMEOUT_MAX:.0f}, or None, got {interval_s!r}"
            )
        if str(options.get("device", "cpu")) != "cpu":
            # Golden cases are compared bit for bit, which is what graphs on a CPU answer.
            raise UnsupportedError(
                f"device '{options['device']}': a ReloadingArtifact serves from a CPU; on a GPU, load_artifact the version "
                f"that {pointer} names, and start the server anew for the next"
            )
        self._path, self._process = Path(pointer).absolute(), os.getpid()  # a server may change its folder
        self._allow_change, self._options = allow_signature_change, options
        self._loading = threading.Lock()  # of loads, never of requests
        self._refresher: int | None = None  # the thread that holds it
        self._swaps = self._refusals = 0
        self._refusal: Refusal | None = None
        self._wait_looks = self._waited_looks = 0  # for another attempt; 0: there is none
        self._seen = _stamp(self._path)
        self._checked_at = time.time()
        found = read_pointer(self._path)
        self._serving = _Serving(self._load(found, None), found, time.time(), {}, {})
        _LOGGER.info("%s: serving version %s", self._path, found.version)
        self._stop = threading.Event()
        weakref.finalize(self, self._stop.set)
        self._thread: threading.Thread | None = None
        if interval_s is not None:
            arguments = (weakref.ref(self), self._stop, interval_s)
            self._thread = threading.Thread(target=_watch, args=arguments, name="refresh", daemon=True)
            self._thread.start()

    # --- Requests ---------------------------------------------------------------------------------------------------

    @property
    def current(self) -> Artifact:
        """The version that serves, an artifact as any other.

        Take it once for a request that needs more than one call: entities and lookups are then of one version.
        """
        return self._serving.artifact

    def __call__(self, features: Any, **options: Any) -> Pooled:
        """As of `Artifact`; the answer's `artifact_id` says who gave it."""
        return self._serving.artifact(features, **options)

    def lookup(
        self,
        values: torch.Tensor,
        lengths: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """As of `Artifact`; to know which version answers, ask `current`, and that one's `manifest.artifact_id`."""
        return self._serving.artifact.lookup(values, lengths, per_sample_weights, **options)

    def lookup_entities(self, features: Any, **options: Any) -> Pooled:
        """As of `Artifact`; vocabulary and rows are of one version."""
        return self._serving.artifact.lookup_entities(features, **options)

    @property
    def invalid_id_counts(self) -> dict[str, int]:
        """As of `Artifact`, of all versions that have served; what was in flight during a swap may be missing."""
        serving = self._serving
        return _add(serving.invalid, serving.artifact.invalid_id_counts)

    @property
    def unknown_id_counts(self) -> dict[str, int]:
        """As `invalid_id_counts`, of entities that no vocabulary has."""
        serving = self._serving
        return _add(serving.unknown, serving.artifact.unknown_id_counts)

    # --- Refreshing -------------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Looks at the pointer now, and follows it; says whether another version serves since.

        A version that was refused before is tried again.

        Raises:
            ArtifactError: why the version was refused; the old one keeps serving.
            UnsupportedError: this process was forked from the one that made it, whose thread may have held the lock; or a
                signal handler asks for it that has interrupted it.
        """
        if os.getpid() != self._process:
            raise UnsupportedError(
                f"{self._path}: a ReloadingArtifact made in process {self._process} does not refresh in its fork "
                f"{os.getpid()}; make one in each worker, after the fork"
            )
        if self._refresher == threading.get_ident():
            raise UnsupportedError(
                f"{self._path}: a refresh is under way in this thread, which a signal handler has interrupted; set an event "
                "there, and refresh elsewhere"
            )
        with self._loading:
            self._refresher = threading.get_ident()
            try:
                return self._follow()
            finally:
                self._refresher = None

    def _follow(self) -> bool:
        self._seen, self._checked_at = _stamp(self._path), time.time()  # before it is read: it may change meanwhile
        pointer = None
        try:
            pointer = read_pointer(self._path)
            serving = self._serving.pointer
            if (pointer.version, pointer.manifest_digest) == (serving.version, serving.manifest_digest):
                self._serving = dataclasses.replace(self._serving, pointer=pointer)
                self._refusal, self._wait_looks = None, 0
                return False
            candidate = self._load(pointer, self._serving.artifact.manifest)
        except Exception as error:
            if threading.current_thread() is self._thread and (self._stop.is_set() or _SHUTDOWN in str(error)):
                raise  # the process ends, which is not the version's fault
            self._wait_looks = min(max(2 * self._wait_looks, 1), _MOST_LOOKS) if _may_pass(error) else 0
            self._waited_looks = 0
            self._refuse(None if pointer is None else pointer.version, error)
            raise
        old = self._serving
        invalid = _add(old.invalid, old.artifact.invalid_id_counts)
        unknown = _add(old.unknown, old.artifact.unknown_id_counts)
        del old
        self._swap(_Serving(candidate, pointer, time.time(), invalid, unknown))
        return True

    def status(self) -> ReloadStatus:
        """What serves, since when, and what was refused."""
        serving = self._serving
        return ReloadStatus(
            version=serving.pointer.version,
            artifact_id=serving.pointer.artifact_id,
            sequence=serving.pointer.sequence,
            serving_since=serving.since,
            checked_at=self._checked_at,
            swaps=self._swaps,
            refusals=self._refusals,
            refusal=self._refusal,
            watching=self._thread is not None and self._thread.is_alive(),
        )

    def close(self) -> None:
        """Stops watching, after a load that is under way; what serves can be called as before."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, pointer: Pointer, serving: Manifest | None) -> Artifact:
        folder = self._path.parent / VERSIONS / pointer.version
        held = hold_version(folder)
        try:
            manifest = read_manifest(folder)  # what can be refused from it alone costs no reading of rows
            if (manifest.manifest_digest, manifest.artifact_id) != (pointer.manifest_digest, pointer.artifact_id):
                raise PointerError(f"{folder}: is not the version that {self._path} names: its manifest is another")
            if serving is not None and not self._allow_change:
                check_compatible(serving, manifest)
            artifact = load_artifact(folder, **self._options)
            if artifact.manifest.manifest_digest != pointer.manifest_digest:
                raise PointerError(
                    f"{folder}: changed while it was loaded; a version is never changed, publish another"
                )
            replay_cases(artifact, read_cases(folder, artifact.manifest))
        except BaseException:
            os.close(held)
            raise
        weakref.finalize(artifact._mapping, os.close, held)  # while anything has the rows mapped
        return artifact

    def _swap(self, new: _Serving) -> None:
        old = self._serving.artifact
        self._serving = new
        self._refusal, self._wait_looks = None, 0
        _LOGGER.info("%s: serving version %s, pointer %d", self._path, new.pointer.version, new.pointer.sequence)
        self._swaps += 1  # last: who sees it sees the rest
        # To unmap many pages takes long, which no request should have to wait for: it is done here, by the last reference.
        end = time.monotonic() + _DRAIN_S
        while sys.getrefcount(old) > 2 and time.monotonic() < end:  # `old`, and the argument
            time.sleep(_DRAIN_STEP_S)

    def _refuse(self, version: str | None, error: Exception) -> None:
        text = str(error) if isinstance(error, ArtifactError) else f"{type(error).__name__}: {error}"
        self._refusal = Refusal(version, text, time.time())
        defect = None if isinstance(error, ArtifactError) else error
        _LOGGER.error(
            "%s: refused %s, %s keeps serving: %s",
            self._path,
            version or "the pointer",
            self._serving.pointer.version,
            text,
            exc_info=defect,
        )
        self._refusals += 1  # last: who sees it sees the rest

    def _look(self) -> None:
        """One look of the watching thread, which no error ends."""
        self._checked_at = time.time()
        if _stamp(self._path) != self._seen:
            self._wait_looks = 0
        else:
            self._waited_looks += 1
            if not self._wait_looks or self._waited_looks < self._wait_looks:
                return
        with suppress(Exception):  # `refresh` has logged and counted it
            self.refresh()


def _watch(reference: "weakref.ref[ReloadingArtifact]", stop: threading.Event, interval_s: float) -> None:
    while not stop.wait(interval_s):
        reloading = reference()  # not held while waiting: an artifact that nobody uses goes
        if reloading is None:
            return
        reloading._look()
        del reloading


def _add(before: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, int]:
    """The sums by feature, of every feature that either has."""
    return {name: before.get(name, 0) + counts.get(name, 0) for name in {**before, **counts}}


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error says nothing of the version, and the same load may succeed later."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _PASSING):
            return True
        error = error.__cause__
    return False


def _stamp(path: Path) -> _Stamp:
    """What changes when a pointer is replaced or touched; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
