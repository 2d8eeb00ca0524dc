"""The threads that stand ready: every piece is done once, failures arrive, and a fork has threads of its own."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from runtime_py.team import Team


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("pieces", [0, 1, 3, 100])
def test_every_piece_is_done_once(threads: int, pieces: int) -> None:
    done: list[int] = []
    Team(threads).run(done.append, range(pieces))
    assert sorted(done) == list(range(pieces))


def test_a_failure_of_a_piece_reaches_the_caller_when_all_pieces_have_ended() -> None:
    team = Team(3)
    done: list[int] = []

    def work(piece: int) -> None:
        if piece == 5:
            raise KeyError(piece)
        time.sleep(0.01)
        done.append(piece)

    with pytest.raises(KeyError, match="5"):
        team.run(work, range(12))
    assert len(done) == 11
    team.run(done.append, range(12, 20))  # and the team goes on
    assert len(done) == 19


@pytest.fixture
def alarm() -> Iterator[Callable[..., None]]:
    """Starts a timer whose handler raises TimeoutError in the main thread, perhaps again and again."""

    def handle(*_: object) -> None:
        raise TimeoutError

    gc.collect()
    gc.disable()  # a handler must not raise in a finalizer, either
    before = signal.signal(signal.SIGALRM, handle)
    yield lambda *seconds: signal.setitimer(signal.ITIMER_REAL, *seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    gc.enable()


@pytest.mark.parametrize("again", [0.0, 0.05], ids=["once", "again and again"])
def test_no_piece_is_worked_on_after_a_signal_handler_has_raised(alarm: Callable[..., None], again: float) -> None:
    """A caller that was told of a timeout uses its memory for something else."""
    team = Team(3)
    begun, ended = [], []
    both = threading.Barrier(3)

    def work(piece: int) -> None:
        begun.append(piece)
        both.wait(timeout=20)  # two helpers hold a piece each
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        ended.append(piece)

    alarm(0.1, again)
    with pytest.raises(TimeoutError):
        team.run(work, range(3))
    alarm(0)
    assert sorted(ended) == sorted(begun) == [0, 1, 2]
    done: list[int] = []
    team.run(done.append, range(5))  # and the team goes on
    assert sorted(done) == list(range(5))


def test_a_signal_handler_that_raises_at_any_moment_leaves_no_piece_behind(alarm: Callable[..., None]) -> None:
    team = Team(2)
    late = 0
    for turn in range(300):
        at_work: list[int] = []

        def work(piece: int, at_work: list[int] = at_work) -> None:
            at_work.append(piece)
            time.sleep(0.0001)
            at_work.remove(piece)

        try:
            alarm(1e-5 + turn * 4e-6)
            team.run(work, range(8))
            alarm(0)
        except TimeoutError:
            late += 1
            held = list(at_work)  # what the handler cut off in the caller itself stays noted: one piece at most
            time.sleep(0.0003)
            assert at_work == held
            assert len(held) <= 1
    assert late > 20


def test_many_callers_share_one_team() -> None:
    team = Team(3)
    sums = [0] * 8

    def call(caller: int) -> None:
        for _ in range(100):
            done: list[int] = []
            team.run(done.append, range(10))
            sums[caller] += sum(done)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sums == [4500] * 8


def test_operators_in_a_piece_have_one_thread_and_others_keep_theirs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        team = Team(2)
        counts: dict[str, int] = {}
        both = threading.Barrier(2)

        def work(_: int) -> None:
            both.wait(timeout=20)
            counts[threading.current_thread().name] = torch.get_num_threads()

        team.run(work, range(2))
        later = threading.Thread(target=lambda: counts.setdefault("later", torch.get_num_threads()))
        later.start()
        later.join()
        assert counts == {"embedding lookups 0": 1, threading.current_thread().name: 2, "later": 2}
    finally:
        torch.set_num_threads(before)


def test_a_team_keeps_what_was_set_last_for_threads_to_come_whoever_makes_it() -> None:
    """As where a version is loaded on a thread that began before the server set its number."""
    before = torch.get_num_threads()
    begun, go = threading.Event(), threading.Event()
    counts: dict[str, int] = {}

    def make() -> None:
        torch.get_num_threads()
        begun.set()
        go.wait(timeout=20)
        Team(3)
        counts["maker"] = torch.get_num_threads()

    torch.set_num_threads(4)
    try:
        maker = threading.Thread(target=make)
        maker.start()
        begun.wait(timeout=20)
        torch.set_num_threads(2)
        go.set()
        maker.join()
        later = threading.Thread(target=lambda: counts.setdefault("later", torch.get_num_threads()))
        later.start()
        later.join()
        assert counts == {"maker": 4, "later": 2}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_process_that_may_have_no_more_threads_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "embedding lookups 1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Team(3)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_fork_starts_threads_of_its_own() -> None:
    team = Team(2)
    both = threading.Barrier(2)
    team.run(lambda _: both.wait(timeout=20) and None, range(2))
    child = os.fork()
    if child == 0:
        together = threading.Barrier(2)
        try:
            team.run(lambda _: together.wait(timeout=20) and None, range(2))  # needs two threads at once
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_end_with_their_team() -> None:
    def helpers() -> int:
        return sum(thread.name.startswith("embedding lookups") for thread in threading.enumerate())

    gc.collect()
    time.sleep(0.1)
    before = helpers()
    team = Team(4)
    assert helpers() == before + 3
    del team
    deadline = time.monotonic() + 10
    while helpers() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert helpers() <= before
