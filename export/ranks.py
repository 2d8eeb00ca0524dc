"""Several processes that build one artifact together, started by torchrun, on a file system that all of them see.

They share the rows; rank 0 does the rest. What they have to tell each other, besides the bytes that they write, goes
through the key-value store that torchrun runs anyway: a few short strings. Waiting is polling, so that a signal, the
failure of another rank, or its silence ends it.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from export.errors import ExportError, PeerError, PublishError, RowsError, SnapshotChangedError

__all__ = ["Ranks", "joined_ranks", "processes_of_this_host", "rank_of_this_process"]

_POLL_SECONDS = 0.05
_BEAT_SECONDS = 5.0
_SILENCE_SECONDS = 120.0
_FAILED = "failed"


def rank_of_this_process() -> int:
    """The rank that torchrun gave this process, 0 where there is no torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def processes_of_this_host() -> int:
    """How many processes torchrun started on this host, 1 where there is no torchrun."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


class Ranks:
    """The processes of one build: this one is `rank` of `world`."""

    def __init__(self, rank: int, world: int, store: Any) -> None:
        self.rank, self.world = rank, world
        self._store = store

    def tell(self, key: str, value: str) -> None:
        """Gives the others a short text by a name; each name once."""
        if self.world > 1:
            self._store.set(key, value)

    def wait(self, key: str, rank: int) -> str:
        """The text that rank `rank` gives by this name, as soon as it has.

        Raises:
            PeerError: another rank has failed.
            PublishError: that rank has given no sign of life for two minutes.
        """
        beats, last = -1, time.monotonic()
        while not self._store.check([key]):
            self.check()
            found = self._store.add(_beats(rank), 0)
            if found != beats:
                beats, last = found, time.monotonic()
            elif time.monotonic() - last > _SILENCE_SECONDS:
                raise PublishError(f"rank {rank} has given no sign of life for {_SILENCE_SECONDS:g} s; see its own log")
            time.sleep(_POLL_SECONDS)
        return str(self._store.get(key).decode())

    def check(self) -> None:
        """Raises a PeerError where another rank has failed."""
        if self.world > 1 and self._store.check([_FAILED]):
            rank, code, message, _ = json.loads(self._store.get(_FAILED))
            raise PeerError(f"rank {rank}: {message}", code)

    def refused(self) -> bool:
        """Whether another rank has refused the snapshot's rows, so that nothing that is finished is of use."""
        return bool(self.world > 1 and self._store.check([_FAILED]) and json.loads(self._store.get(_FAILED))[3])

    def fail(self, error: BaseException) -> None:
        """Ends the other ranks; the first failure is what they are told."""
        code = error.exit_code if isinstance(error, ExportError) else 1
        message = str(error) if isinstance(error, ExportError) else f"failed: {error!r}"
        with suppress(RuntimeError):  # the store may be gone, and with it the others
            refused = isinstance(error, RowsError | SnapshotChangedError)
            self._store.compare_set(_FAILED, "", json.dumps([self.rank, code, message, refused]))

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Lets the others know that this process is alive."""
        stop = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # the store is gone
                while not stop.wait(_BEAT_SECONDS):
                    self._store.add(_beats(self.rank), 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _beats(rank: int) -> str:
    return f"beats of {rank}"


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes that torchrun started with this one, or this one alone; where it fails, so do the others.

    Raises:
        PublishError: torchrun has restarted the processes, whose store still has what the ones before have told.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield Ranks(0, 1, None)
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))
    ranks = Ranks(rank, world, store)
    # Agents count restarts of their own; when the group changes, none does.
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" or store.add(f"joined as {rank}", 1) > 1:
        raise PublishError("torchrun has restarted the build; give it --max-restarts 0, and go on with --resume")
    with ranks.beating():
        try:
            yield ranks
        except BaseException as error:
            ranks.fail(error)
            raise
