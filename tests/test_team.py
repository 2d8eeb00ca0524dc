"""The threads that share a request: every bag as the graph gives it, whatever its place, and threads that come and go."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TABLES, make_rows, state_dict, write_config

from runtime_py import Artifact, GraphError, _team, load_artifact, team
from runtime_py.team import OVERLAP, WRONG, Team

SIZES = [300, 41, 41, 7, 1]
WIDTH = 34
LENGTHS = [10] * (5 * 800)  # each piece takes long enough for helpers to wake up


@pytest.fixture(scope="module")
def plain(built_artifact: Path) -> Artifact:
    return load_artifact(built_artifact)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two features with weights, one pooled by mean, and two more."""
    from export import build_artifact

    tables = [table | {"weighted": table["name"] in ("user", "age")} for table in TABLES]
    folder = tmp_path_factory.mktemp("weighted")
    torch.save(state_dict(make_rows(tables)), folder / "snapshot.pt")
    config = write_config(folder / "release.yaml", folder / "snapshot.pt", tables)
    return load_artifact(build_artifact(config, folder / "artifact", workers=2).artifact)


@pytest.fixture(scope="module")
def teams(plain: Artifact, weighted: Artifact) -> dict[tuple[bool, int], Team]:
    """Of both artifacts, by number of threads."""
    return {
        (artifact is weighted, threads): make_team(artifact, threads, spin_us=500)
        for artifact in (plain, weighted)
        for threads in (1, 2, 4)
    }


def make_team(artifact: Artifact, threads: int, spin_us: int = 100, weights: torch.Tensor | None = None) -> Team:
    """One whose caller has no head start: its rows are so small that a helper would come too late."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "_AHEAD_BYTES", 0)
        rows: torch.Tensor = artifact.graph.weights if weights is None else weights  # type: ignore[attr-defined]
        return Team(artifact.manifest, rows, threads, spin_us)


def draw_values(lengths: list[int], seed: int = 0) -> torch.Tensor:
    """Ids inside, of lengths of five features; the last row is not rare."""
    generator = torch.Generator().manual_seed(seed)
    bags = len(lengths) // 5
    last = torch.tensor(SIZES).repeat_interleave(bags).repeat_interleave(torch.tensor(lengths, dtype=torch.int64)) - 1
    return torch.minimum((torch.rand(last.numel(), generator=generator) * (last + 2)).to(torch.int64), last)


def look_up(found: Team, values: torch.Tensor, lengths: list[int], **options: Any) -> tuple[int, torch.Tensor]:
    pooled = torch.full((len(lengths) // 5, WIDTH), float("nan"))
    weights = options.pop("weights", None)
    return found.look_up(values, weights, pooled, lengths=torch.tensor(lengths, dtype=torch.int32), **options), pooled


# --- What comes out --------------------------------------------------------------------------------------------------


@given(
    lengths=st.integers(0, 9).flatmap(
        lambda bags: st.lists(st.integers(0, 12) | st.just(0), min_size=5 * bags, max_size=5 * bags)
    ),
    threads=st.sampled_from([1, 2, 4]),
    piece_ids=st.sampled_from([1, 2, 7, 30, 16384]),
    seed=st.integers(0, 99),
    with_weights=st.booleans(),
)
@settings(deadline=None, max_examples=500)
def test_every_bag_is_what_the_graph_gives_to_the_last_bit(
    plain: Artifact,
    weighted: Artifact,
    teams: dict[tuple[bool, int], Team],
    lengths: list[int],
    threads: int,
    piece_ids: int,
    seed: int,
    with_weights: bool,
) -> None:
    values = draw_values(lengths, seed)
    weights = torch.linspace(-2, 2, values.numel()) if with_weights else None
    expected = (weighted if with_weights else plain).lookup(values, torch.tensor(lengths, dtype=torch.int32), weights)
    before = values.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "PIECE_IDS", piece_ids)
        helped, pooled = look_up(teams[with_weights, threads], values, lengths, weights=weights)
    assert 0 <= helped <= (0 if threads == 1 else len(lengths) + 1)
    assert torch.equal(pooled.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(values, before)


def test_nothing_is_written_beside_the_answer(teams: dict[tuple[bool, int], Team]) -> None:
    lengths = LENGTHS[: 5 * 100]
    room = torch.full((102, WIDTH), 7.0)
    helped = teams[False, 4].look_up(
        draw_values(lengths), None, room[1:101], lengths=torch.tensor(lengths, dtype=torch.int32)
    )
    assert helped >= 0
    assert room[0].tolist() == room[101].tolist() == [7.0] * WIDTH
    assert not (room[1:101] == 7.0).any()


@pytest.mark.parametrize("wrong", [-1, "last + 1", 2**62, -(2**63)])
@pytest.mark.parametrize("threads", [1, 4])
def test_one_id_outside_its_table_is_found_wherever_it_is(
    teams: dict[tuple[bool, int], Team], threads: int, wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team, "PIECE_IDS", 300)
    lengths = [40] * (5 * 13)
    values = draw_values(lengths)
    for place in range(0, values.numel(), 97):
        kept = int(values[place])
        values[place] = SIZES[place // (40 * 13)] if wrong == "last + 1" else wrong  # type: ignore[call-overload]
        assert look_up(teams[False, threads], values, lengths)[0] == WRONG
        values[place] = kept
    assert look_up(teams[False, threads], values, lengths)[0] >= 0


def test_ids_that_were_checked_are_not_checked_again(plain: Artifact, teams: dict[tuple[bool, int], Team]) -> None:
    """-1 stands for an id that was replaced."""
    lengths = [3] * (5 * 20)
    values = draw_values(lengths)
    values[::7] = -1
    offsets = torch.arange(0, 301, 3)
    pooled = torch.empty(20, WIDTH)
    assert teams[False, 2].look_up(values, None, pooled, offsets=offsets) >= 0
    expected = plain.with_invalid_ids("zero").lookup(values, torch.tensor(lengths, dtype=torch.int32))
    assert torch.equal(pooled, expected)


@pytest.mark.parametrize(
    "lengths",
    [[3] * 9 + [2], [3] * 9 + [4], [3] * 9 + [-3], [6, -3] + [3] * 9 + [0] * 4, [3] * 8 + [6], [2**31 - 1] * 10],
    ids=["too few", "too many", "negative", "negative, the sum right", "not by features", "huge"],
)
def test_lengths_that_are_wrong_are_refused_before_anything_is_read(
    teams: dict[tuple[bool, int], Team], lengths: list[int]
) -> None:
    values = torch.zeros(30, dtype=torch.int64)
    pooled = torch.full((3, WIDTH), 5.0)
    given_lengths = torch.tensor(lengths, dtype=torch.int32)
    assert teams[False, 2].look_up(values, None, pooled, lengths=given_lengths) == WRONG
    assert (pooled == 5.0).all()


def test_a_tensor_without_memory_is_refused(teams: dict[tuple[bool, int], Team]) -> None:
    values, lengths = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int32)
    weights, pooled = torch.ones(5), torch.empty(1, WIDTH)
    for place in range(4):
        request: list[Any] = [values, lengths, weights, pooled]
        request[place] = _WithoutMemory(request[place])
        found = teams[True, 2]
        assert found.look_up(request[0], request[2], request[3], lengths=request[1]) == WRONG


@pytest.mark.parametrize("part", ["values", "lengths", "weights"])
def test_an_answer_over_its_request_is_not_begun(teams: dict[tuple[bool, int], Team], part: str) -> None:
    """A piece must not change what another reads."""
    size = 5 * WIDTH
    memory = torch.zeros(3 * size)
    request = {"values": torch.zeros(50, dtype=torch.int64), "lengths": torch.full((25,), 2, dtype=torch.int32)}
    request["weights"] = torch.ones(50)
    floats = request[part].numel() * request[part].element_size() // 4
    over = memory[size : size + floats].view(request[part].dtype)
    over.copy_(request[part])
    request[part] = over
    for start in (0, 1, size - 1, size, size + floats - 1, size + floats, size + floats + 1):
        pooled = memory[start : start + size].view(5, WIDTH)
        before = memory.clone()
        done = teams[True, 2].look_up(request["values"], request["weights"], pooled, lengths=request["lengths"])
        assert (done == OVERLAP) == (0 < start < size + floats)
        assert done != OVERLAP or torch.equal(memory, before)
    offsets = torch.arange(0, 51, 2)
    pooled = memory[size - 1 : 2 * size - 1].view(5, WIDTH)
    done = teams[True, 2].look_up(request["values"], request["weights"], pooled, offsets=offsets)
    assert (done == OVERLAP) == (part != "lengths")  # which are not read


class _WithoutMemory:
    """As a tensor of torch.func's transforms."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def data_ptr(self) -> int:
        return 0

    def numel(self) -> int:
        return self._tensor.numel()


# --- Who works -------------------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether that comes true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


@pytest.mark.parametrize("spin_us", [0, 1000])
def test_helpers_take_their_part(plain: Artifact, spin_us: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of bags of very different sizes, which are cut into pieces with about the same work."""
    monkeypatch.setattr(team, "PIECE_IDS", 250)
    helpers = make_team(plain, 3, spin_us)
    assert until(lambda: (look_up(helpers, draw_values(LENGTHS), LENGTHS)[0]) > 3)  # of 50
    skewed = [0] * 39_000 + [40] * 1000
    assert until(lambda: (look_up(helpers, draw_values(skewed), skewed)[0]) > 3)  # of 90


def test_one_thread_has_no_helpers(plain: Artifact) -> None:
    alone = make_team(plain, 1)
    assert look_up(alone, draw_values(LENGTHS), LENGTHS)[0] == 0
    assert not _team_threads(since=_team_threads())


def test_many_callers_share_one_team(plain: Artifact, teams: dict[tuple[bool, int], Team]) -> None:
    lengths = LENGTHS[: 5 * 200]
    requests = [draw_values(lengths, seed) for seed in range(8)]
    expected = [plain.lookup(values, torch.tensor(lengths, dtype=torch.int32)) for values in requests]
    wrong: list[int] = []

    def call(caller: int) -> None:
        for _ in range(50):
            helped, pooled = look_up(teams[False, 4], requests[caller], lengths)
            if helped < 0 or not torch.equal(pooled, expected[caller]):
                wrong.append(caller)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_a_helper_sleeps_when_nobody_has_asked_for_a_while(plain: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "PIECE_IDS", 1000)
    helpers = make_team(plain, 3, spin_us=1000)
    look_up(helpers, draw_values(LENGTHS), LENGTHS)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    assert until(lambda: (look_up(helpers, draw_values(LENGTHS), LENGTHS)[0]) > 0)  # and is there again


def test_a_helper_takes_subnormal_numbers_as_its_caller_does(plain: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.set_flush_denormal` is of the calling thread."""
    monkeypatch.setattr(team, "PIECE_IDS", 250)
    weights = plain.graph.weights.clone()  # type: ignore[attr-defined]
    age = plain.manifest.table["age"]
    weights[age.offset_bytes : age.offset_bytes + age.bytes].view(torch.float32).fill_(1e-40)
    helpers = make_team(plain, 3, 1000, weights)
    values = draw_values(LENGTHS)

    def zeros() -> int:
        helped = 0
        while helped < 12:  # of 50 pieces, the last 14 of which are this table's
            helped, pooled = look_up(helpers, values, LENGTHS)  # type: ignore[assignment]
        return int((pooled.view(torch.int32)[:, -4:] == 0).sum())  # by their bits: a comparison would flush them, too

    assert zeros() == 0
    torch.set_flush_denormal(True)
    try:
        assert [zeros() for _ in range(20)] == [4 * 800] * 20
    finally:
        torch.set_flush_denormal(False)
    assert zeros() == 0


# --- Threads ---------------------------------------------------------------------------------------------------------


def _team_threads(since: frozenset[str] = frozenset()) -> frozenset[str]:
    """The helpers of this process that were not there before."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text() == "lookup helper\n":
                found.add(task.name)
        except OSError:  # it has ended
            continue
    return frozenset(found) - since


def test_threads_end_with_their_team(plain: Artifact) -> None:
    before = _team_threads()
    helpers = make_team(plain, 4, spin_us=0)
    assert until(lambda: len(_team_threads(before)) == 3)
    del helpers
    assert until(lambda: not _team_threads(before))


def test_helpers_get_no_signals(plain: Artifact) -> None:
    before = _team_threads()
    helpers = make_team(plain, 2)
    assert until(lambda: len(_team_threads(before)) == 1)
    [helper] = _team_threads(before)

    def blocks(number: int) -> bool:
        status = Path(f"/proc/self/task/{helper}/status").read_text().splitlines()
        [blocked] = [int(line.split()[1], 16) for line in status if line.startswith("SigBlk:")]
        return bool(blocked >> (number - 1) & 1)

    assert until(lambda: not blocks(signal.SIGSEGV))  # a thread that starts blocks all
    assert not any(blocks(number) for number in (signal.SIGBUS, signal.SIGABRT))  # faulthandler tells of these
    assert all(blocks(number) for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGALRM, signal.SIGTERM))
    del helpers


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_fork_starts_threads_of_its_own(plain: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "PIECE_IDS", 100)
    helpers, values = make_team(plain, 2), draw_values(LENGTHS)
    expected = look_up(helpers, values, LENGTHS)[1]
    child = os.fork()
    if child == 0:
        try:
            same = torch.equal(look_up(helpers, values, LENGTHS)[1], expected)
            helped = until(lambda: (look_up(helpers, values, LENGTHS)[0]) > 0)
            del helpers
            os._exit(0 if same and helped else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(look_up(helpers, values, LENGTHS)[1], expected)


NO_ROOM = """
import resource, sys
import torch
from runtime_py import load_artifact
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
try:
    load_artifact(sys.argv[1], threads=1000)
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(sum(1 for task in __import__("pathlib").Path("/proc/self/task").glob("*/comm") if "lookup" in task.read_text()))
"""


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY, reason="memory is limited")
def test_a_process_that_may_have_no_more_threads_is_told_so(built_artifact: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(built_artifact)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["can't start 999 threads beside the caller's", "0"]


# --- Against the graph -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "feature"),
    [("weights_offsets", 1), ("is_mean", 0), ("dim_offsets", 1), *(("num_embeddings", number) for number in range(5))],
)
def test_a_team_that_would_answer_otherwise_than_the_graph_is_refused_at_the_load(
    built_artifact: Path, monkeypatch: pytest.MonkeyPatch, name: str, feature: int
) -> None:
    """Up to the last row of every table."""
    make_constants = team.make_constants

    def make_wrong(*arguments: Any) -> dict[str, torch.Tensor]:
        constants = make_constants(*arguments)
        found = constants[name]
        if name == "is_mean":
            constants[name] = found.logical_not()
        else:
            found[feature] -= {"weights_offsets": 16, "dim_offsets": 1, "num_embeddings": 1}[name]
        return constants

    monkeypatch.setattr(team, "make_constants", make_wrong)
    load_artifact(built_artifact)
    text = "several threads (give another answer than the graph|cannot look up: .* failed: .*); load .* with threads=1"
    with pytest.raises(GraphError, match=text):
        load_artifact(built_artifact, threads=2)


def test_an_operator_that_fails_is_an_error(built_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_constants = team.make_constants

    def make_wrong(*arguments: Any) -> dict[str, torch.Tensor]:
        constants = make_constants(*arguments)
        constants["weights_placements"].fill_(0)  # rows on a device
        return constants

    monkeypatch.setattr(team, "make_constants", make_wrong)
    with pytest.raises(
        GraphError, match=r"cannot look up: fbgemm::.*lookup_function failed: Expected placement != .*=1"
    ):
        load_artifact(built_artifact, threads=2)


def test_an_operator_with_other_arguments_is_not_called(plain: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_OPERATOR", "asynchronous_complete_cumsum")
    with pytest.raises(RuntimeError, match=r"fbgemm::asynchronous_complete_cumsum takes \(Tensor\), expected \(T"):
        make_team(plain, 2)


# --- The compiled module ---------------------------------------------------------------------------------------------


def test_a_wrong_number_or_type_of_arguments_is_refused(plain: Artifact) -> None:
    helpers = make_team(plain, 2)._helpers
    with pytest.raises(TypeError, match="expected 17 arguments, got 1"):
        _team.start(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="expected a team"):
        _team.run()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="expected 10 arguments, got 1"):
        _team.run(helpers, 1)  # type: ignore[call-arg]
    for number in (-1, 1024, 2**57):
        with pytest.raises(ValueError, match="expected 0 to 1023 helpers"):
            _team.start(number, *[0] * 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="PyCapsule_GetPointer called with"):
        _team.run(1, *[0] * 10)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'str' object cannot be interpreted as an integer"):
        _team.run(helpers, *["x"] * 10)  # type: ignore[arg-type]
