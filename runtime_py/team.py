"""A few threads that stand ready, so that one request can use several cores.

FBGEMM's CPU kernel runs on the thread that calls it, whatever `torch.set_num_threads` says, and releases the interpreter
lock. Handing work over must cost microseconds: the caller works, too, and pieces are taken from one queue without a lock
of ours. Threads do not survive `fork`: a child starts its own when it first needs them.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch

__all__ = ["Team"]


class _Job:
    """The pieces of one call, done by whoever comes, and what they raised.

    A signal handler may raise anywhere in the caller. So nothing is counted that one could leave half done: a helper enters
    before it takes a piece, and leaves after the last one, each by a step that is whole.
    """

    def __init__(self, function: Callable[[Any], None], pieces: Sequence[Any]) -> None:
        self._function = function
        self._waiting = deque(pieces)
        self._errors: list[BaseException] = []
        self._entered: list[None] = []
        self._left: list[None] = []
        self._news: SimpleQueue[None] = SimpleQueue()  # a helper has left

    def work(self) -> None:
        """Does pieces until none is waiting."""
        while self._waiting:
            try:
                piece = self._waiting.popleft()
            except IndexError:  # somebody was faster
                return
            try:
                self._function(piece)
            except BaseException as error:
                self._errors.append(error)

    def help(self) -> None:
        """Does so on a helper's thread."""
        self._entered.append(None)
        self.work()
        self._left.append(None)
        self._news.put(None)

    def wait(self) -> None:
        """Waits for the pieces that helpers hold, and raises what one of all pieces raised."""
        self._wait_for_helpers()
        if self._errors:
            raise self._errors[0]

    def abandon(self) -> None:
        """Takes away the pieces that nobody has begun, and waits for those that helpers hold."""
        self._waiting.clear()
        try:
            self._wait_for_helpers()
        except BaseException:  # of a signal handler again
            self.abandon()
            raise

    def _wait_for_helpers(self) -> None:
        while len(self._left) < len(self._entered):  # so that one has yet to send its news
            self._news.get()


_Queue = SimpleQueue[_Job | None]


class Team:
    """`threads` threads, of which the caller of `run` is one. Any number of callers may use one team."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._starting = threading.Lock()
        self._start()

    def run(self, function: Callable[[Any], None], pieces: Sequence[Any]) -> None:
        """Calls `function` with every piece, in any order and on any of the threads, and returns when all are done.

        However it ends, no piece is being worked on after it: not where a signal handler raises in it, either.

        Raises:
            Exception: what `function` raised, of several the first in the order of their ends.
        """
        if self._process != os.getpid():
            with self._starting:
                if self._process != os.getpid():
                    self._start()
        job = _Job(function, pieces)
        try:
            for _ in range(min(self.threads, len(pieces)) - 1):
                self._queue.put(job)
            job.work()
            job.wait()
        except BaseException:
            job.abandon()
            raise

    def _start(self) -> None:
        self._queue: _Queue = SimpleQueue()
        weakref.finalize(self, _dismiss, self._queue, self.threads - 1).atexit = False
        failures: list[RuntimeError] = []
        starter = threading.Thread(target=_start_helpers, args=(self._queue, self.threads - 1, failures), daemon=True)
        starter.start()
        starter.join()
        if failures:
            raise failures[0]
        self._process = os.getpid()


def _start_helpers(queue: _Queue, helpers: int, failures: list[RuntimeError]) -> None:
    """On a new thread. `torch.set_num_threads` sets the thread's own number and that of all threads to come.

    A thread takes that number at its first use, so that a new one can tell what was set last, whoever did, and set it again
    when all helpers have set theirs. The number of whoever makes a team may be another one, and stays what it is.
    """
    setting = torch.get_num_threads()
    ready: list[threading.Event] = []
    try:
        for number in range(helpers):
            event = threading.Event()
            name = f"embedding lookups {number}"
            threading.Thread(target=_serve, args=(queue, event), name=name, daemon=True).start()
            ready.append(event)
    except RuntimeError as error:  # the process may have no more threads
        failures.append(error)
    for event in ready:
        event.wait()
    torch.set_num_threads(setting)


def _serve(queue: _Queue, ready: threading.Event) -> None:
    torch.set_num_threads(1)  # an operator must not open a parallel region within a piece
    torch.get_num_threads()  # the first use, or it would take what is set later
    ready.set()
    while True:
        job = queue.get()
        if job is None:
            return
        job.help()
        del job  # or its tensors would live until the next one


def _dismiss(queue: _Queue, threads: int) -> None:
    for _ in range(threads):
        queue.put(None)
