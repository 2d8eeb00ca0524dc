"""Running checked requests: in pieces on several threads as in one, with any graph, into a buffer of the caller's."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FEATURES, TABLES, make_rows, state_dict, write_config
from torch.utils._python_dispatch import TorchDispatchMode

from runtime_py import Artifact, InvalidInputError, load_artifact, lookups, team
from runtime_py.checks import RequestChecker
from runtime_py.lookups import Lookups
from runtime_py.team import Team

SIZES = [300, 41, 41, 7, 1]
WIDTH = 34


@pytest.fixture(scope="module")
def one(built_artifact: Path) -> Artifact:
    return load_artifact(built_artifact)


@pytest.fixture(scope="module")
def three(built_artifact: Path) -> Artifact:
    return load_artifact(built_artifact, threads=3)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    """On one thread and on three, with a weighted, a mean and an unweighted feature."""
    from export import build_artifact

    tables = [table | {"weighted": table["name"] in ("user", "age")} for table in TABLES]
    folder = tmp_path_factory.mktemp("weighted")
    torch.save(state_dict(make_rows(tables)), folder / "snapshot.pt")
    config = write_config(folder / "release.yaml", folder / "snapshot.pt", tables)
    artifact = build_artifact(config, folder / "artifact", workers=2).artifact
    return [load_artifact(artifact, threads=threads) for threads in (1, 3)]


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is split, into pieces of some ids."""
    monkeypatch.setattr(lookups, "SPLIT_IDS", 1)
    monkeypatch.setattr(lookups, "SPLIT_BYTES", 1)
    monkeypatch.setattr(team, "PIECE_IDS", 5)


def draw(seed: int, bags: int, longest: int, outside: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A request with lengths of very different sizes, and weights for it."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, (5, bags)) * rng.integers(0, 2, (5, bags))
    lengths[rng.integers(0, 5)] = 0  # a feature without ids
    ids = [
        rng.integers(0, size + (3 if outside else 0), count) for size, count in zip(SIZES, lengths.sum(1), strict=True)
    ]
    values = np.concatenate(ids)
    return (
        torch.from_numpy(values),
        torch.from_numpy(lengths.reshape(-1).astype(np.int32)),
        torch.from_numpy(rng.normal(size=values.size).astype(np.float32)),
    )


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InvalidInputError) as caught:
        call()
    return str(caught.value)


# --- In pieces -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("seed", range(20))
def test_pieces_give_what_the_whole_gives_to_the_last_bit(one: Artifact, three: Artifact, seed: int) -> None:
    values, lengths, _ = draw(seed, 1 + seed % 7 * 3, 9)
    assert torch.equal(three.lookup(values, lengths), one.lookup(values, lengths))


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("seed", range(10))
def test_pieces_of_a_weighted_request_take_their_weights_along(weighted: list[Artifact], seed: int) -> None:
    request = draw(seed, 1 + seed * 2, 9)
    whole, pieces = (artifact.lookup(*request) for artifact in weighted)
    assert torch.equal(pieces, whole)


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("policy", ["error", "zero", "row:0"])
@pytest.mark.parametrize("seed", range(5))
def test_pieces_treat_ids_outside_as_the_whole_does(one: Artifact, three: Artifact, policy: str, seed: int) -> None:
    values, lengths, _ = draw(100 + seed, 12, 9, outside=True)
    before = values.clone()
    whole, pieces = (artifact.with_invalid_ids(policy) for artifact in (one, three))
    if policy == "error":
        text = refusal(lambda: whole.lookup(values, lengths))
        assert text == refusal(lambda: pieces.lookup(values, lengths))
    else:
        assert torch.equal(pieces.lookup(values, lengths), whole.lookup(values, lengths))
        assert pieces.invalid_id_counts == whole.invalid_id_counts
        assert sum(whole.invalid_id_counts.values()) > 0
    assert torch.equal(values, before)


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("buffer", ["none", "of the mode", "usual"])
def test_pieces_are_looked_up_under_the_inference_mode_of_their_caller(
    one: Artifact, three: Artifact, buffer: str
) -> None:
    usual = torch.empty(64, WIDTH)
    for seed in range(20):
        values, lengths, _ = draw(seed, 64, 6)
        with torch.inference_mode():
            out = {"none": None, "of the mode": torch.empty(64, WIDTH), "usual": usual}[buffer]
            pooled = three.lookup(values, lengths, out=out)
        assert pooled.is_inference() == (buffer != "usual")
        assert torch.equal(pooled, one.lookup(values, lengths))
        assert not three.lookup(values, lengths).is_inference()


def large(three: Artifact) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and lengths of 400,000 ids."""
    return torch.zeros(400_000, dtype=torch.int64), torch.full((5 * 8000,), 10, dtype=torch.int32)


def test_a_large_request_is_looked_up_by_the_team_and_a_small_one_is_not(
    three: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    look_up = Team.look_up

    def record(self: Team, values: torch.Tensor, *arguments: Any, **options: Any) -> int | None:
        found.append(values.numel())
        return look_up(self, values, *arguments, **options)

    monkeypatch.setattr(Team, "look_up", record)
    for bags, length in ((1, 1), (100, 16), (100, 80)):  # the last one has 40,000 ids, of 0.9 MB of rows
        values = torch.zeros(5 * bags * length, dtype=torch.int64)
        three.lookup(values, torch.full((5 * bags,), length, dtype=torch.int32))
    assert found == []
    three.lookup(*large(three))
    assert found == [400_000]


def test_a_large_request_that_changes_while_it_is_looked_up_is_refused_or_answered(
    one: Artifact, three: Artifact
) -> None:
    """What is looked up are copies that were checked: no row is read that is not there."""
    values, lengths = large(three)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            values[::1000] = 2**40
            values[::1000] = 0

    disturber = threading.Thread(target=disturb)
    disturber.start()
    expected = one.lookup(torch.zeros_like(values), lengths)
    refusals = []
    for _ in range(100):
        try:
            assert torch.equal(three.lookup(values, lengths), expected)
        except InvalidInputError as error:
            refusals.append(str(error))
    stop.set()
    disturber.join()
    assert all("is outside [0, " in refusal or "changed" in refusal for refusal in refusals)


class _Recorder(TorchDispatchMode):
    """Keeps what operators are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_watches_the_operators_of_its_thread_sees_the_whole_lookup(one: Artifact, three: Artifact) -> None:
    """A helper's are not seen, and what is handed to it is gone after the call."""
    request = large(three)
    with _Recorder() as alone:
        expected = one.lookup(*request)
    with _Recorder() as split:
        pooled = three.lookup(*request)
    assert torch.equal(pooled, expected)
    assert split.operators == alone.operators
    assert any("lookup_function" in operator for operator in split.operators)
    with pytest.raises(RuntimeError, match="not part of the active trace"):
        torch.jit.trace(lambda added: three.lookup(*request) + added, torch.zeros(1))
    values, lengths = request
    text = refusal(lambda: torch.func.vmap(lambda ids: one.lookup(ids, lengths))(values[None]))
    assert text == refusal(lambda: torch.func.vmap(lambda ids: three.lookup(ids, lengths))(values[None]))


# --- Graphs that make all checks themselves --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_graph_without_a_method_for_checked_requests_gives_the_same(
    one: Artifact, three: Artifact, seed: int, tiny_pieces: None
) -> None:
    """As of an artifact that an older version built, and of AOTInductor."""
    checker = RequestChecker(one.manifest, "zero")
    values, lengths, _ = draw(seed, 12, 9, outside=True)
    expected = one.with_invalid_ids("zero").lookup(values, lengths)
    for threads in (None, three._lookups.team):
        plain = Lookups(one.manifest, lambda *inputs: one.graph(*inputs), checker, threads)
        pooled, counts = plain.look_up(values, lengths, None, None)
        assert torch.equal(pooled, expected)
        assert sum(counts.values()) > 0


def test_a_checked_request_is_not_checked_again_by_the_graph(one: Artifact) -> None:
    """The graph alone would do the same work a second time."""
    assert one._lookups._lookup_checked is not None


# --- Into a buffer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "columns", "every other row"])
@pytest.mark.parametrize("threads", [1, 3])
def test_results_go_into_the_callers_buffer(
    one: Artifact, three: Artifact, threads: int, layout: str, tiny_pieces: None
) -> None:
    values, lengths, _ = draw(1, 8, 9)
    expected = one.lookup(values, lengths)
    out = {
        "rows": torch.full((8, WIDTH), float("nan")),
        "columns": torch.full((WIDTH, 8), float("nan")).t(),
        "every other row": torch.full((16, WIDTH), float("nan"))[::2],
    }[layout]
    artifact = one if threads == 1 else three
    assert artifact.lookup(values, lengths, out=out) is out
    assert torch.equal(out, expected)
    features = {name: [[0]] for name in FEATURES}
    assert artifact(features, out=out[:1]).values.data_ptr() == out.data_ptr()
    assert torch.equal(out[:1], one(features).values)


@pytest.mark.parametrize("strides", [(0, 1), (1, 1), (WIDTH, 1), (7, 1)])
def test_the_stride_of_a_single_bag_does_not_matter(one: Artifact, strides: tuple[int, int]) -> None:
    request = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int32)
    out = torch.zeros(WIDTH).as_strided((1, WIDTH), strides)
    assert torch.equal(one.lookup(*request, out=out), one.lookup(*request))


@given(rows=st.integers(0, 4), row=st.integers(0, 80), column=st.integers(0, 4))
@settings(deadline=None, max_examples=300)
def test_a_buffer_whose_elements_share_memory_is_refused(one: Artifact, rows: int, row: int, column: int) -> None:
    out = torch.zeros(4 * 80 + WIDTH * 4).as_strided((rows, WIDTH), (row, column))
    places = {bag * row + place * column for bag in range(rows) for place in range(WIDTH)}
    request = torch.zeros(5 * rows, dtype=torch.int64), torch.ones(5 * rows, dtype=torch.int32)
    if len(places) < rows * WIDTH:
        text = f"out: expected elements with memory of their own, got strides [{row}, {column}]"
        assert refusal(lambda: one.lookup(*request, out=out)) == text
    elif row >= WIDTH * column or rows * row <= column:  # rows or columns, one after the other
        assert torch.equal(one.lookup(*request, out=out), one.lookup(*request))


@pytest.mark.usefixtures("tiny_pieces")
def test_a_buffer_over_lengths_is_not_written_before_a_wrong_id_is_found(one: Artifact, three: Artifact) -> None:
    values, lengths, _ = draw(3, 400, 8)
    values[-1] = 10**6
    answers = []
    for artifact in (one, three):
        replacing = artifact.with_invalid_ids("zero")
        out = torch.zeros(400, WIDTH)
        over = out.view(-1)[: lengths.numel()].view(torch.int32)
        over.copy_(lengths)
        answers.append(replacing.lookup(values, over, out=out).clone())
        assert sum(replacing.invalid_id_counts.values()) == 1
        over.copy_(lengths)
        assert "is outside [0, " in refusal(
            lambda found=artifact, given=over, to=out: found.lookup(values, given, out=to)
        )
    assert torch.equal(*answers)


@pytest.mark.usefixtures("tiny_pieces")
def test_autograd_sees_that_a_buffer_was_written(three: Artifact) -> None:
    values, lengths, _ = draw(3, 400, 8)
    out, factor = torch.zeros(400, WIDTH), torch.ones(WIDTH, requires_grad=True)
    before = (out * factor).sum()
    three.lookup(values, lengths, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


@pytest.mark.usefixtures("tiny_pieces")
def test_what_is_wrong_with_a_request_is_said_before_what_is_wrong_with_a_buffer(
    one: Artifact, three: Artifact
) -> None:
    values, lengths, _ = draw(3, 12, 8)
    wrong = values.clone()
    wrong[0] = -5
    longer = lengths.clone()
    longer[0] += 1
    for request in ((wrong, lengths), (values, longer), (values, lengths)):
        texts = {
            refusal(lambda found=found, given=request: found.lookup(*given, out=torch.zeros(1, 1)))
            for found in (one, three)
        }
        assert len(texts) == 1


@pytest.mark.parametrize("part", ["values", "lengths", "weights"])
@pytest.mark.parametrize("made_by", ["torch", "numpy"])
def test_a_buffer_may_lie_over_the_request_that_it_answers(weighted: list[Artifact], part: str, made_by: str) -> None:
    """A piece that is done must not change what the next one reads."""
    request = dict(zip(("values", "lengths", "weights"), draw(3, 400, 8), strict=True))
    expected = weighted[0].lookup(*request.values())
    given = request[part]
    memory = np.zeros(expected.numel() + 2 * given.numel(), np.float32)
    start = 400 * WIDTH // 2 // 2 * 2  # in the midst of the answer
    for artifact in weighted:
        if made_by == "torch":
            base = torch.from_numpy(memory)
            over = base[start : start + given.numel() * given.element_size() // 4].view(given.dtype)
            out = base[: expected.numel()].view(400, WIDTH)
        else:  # two storages over one memory
            over = torch.from_numpy(memory[start : start + given.numel() * given.element_size() // 4]).view(given.dtype)
            out = torch.from_numpy(memory[: expected.numel()]).view(400, WIDTH)
        over.copy_(given)
        assert artifact.lookup(*(request | {part: over}).values(), out=out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (torch.zeros(2, WIDTH), f"out: expected shape [1, {WIDTH}], got [2, {WIDTH}]"),
        (torch.zeros(WIDTH), f"out: expected shape [1, {WIDTH}], got [{WIDTH}]"),
        (
            torch.zeros(1, WIDTH, dtype=torch.float64),
            "out: expected a float32 tensor on the CPU, got torch.float64 on cpu",
        ),
        (torch.zeros(1, WIDTH, device="meta"), "out: expected a float32 tensor on the CPU, got torch.float32 on meta"),
        (np.zeros((1, WIDTH), np.float32), "out: expected a float32 tensor on the CPU, got ndarray"),
        (torch.zeros(1, WIDTH, requires_grad=True), "out: expected a dense tensor without a gradient"),
        (torch.zeros(1, WIDTH).to_sparse(), "out: expected a dense tensor without a gradient"),
        (torch._neg_view(torch.zeros(1, WIDTH)), "out: expected a dense tensor without a gradient"),
        (torch.zeros(1, 1).expand(1, WIDTH), "out: expected elements with memory of their own, got strides [1, 0]"),
    ],
    ids=["rows", "dimensions", "type", "device", "array", "gradient", "sparse", "negative", "expanded"],
)
@pytest.mark.parametrize("split", [False, True])
def test_a_buffer_that_does_not_fit_is_refused(
    three: Artifact, out: Any, text: str, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if split:
        monkeypatch.setattr(lookups, "SPLIT_IDS", 1)
        monkeypatch.setattr(lookups, "SPLIT_BYTES", 1)
    request: Sequence[torch.Tensor] = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int32)
    assert refusal(lambda: three.lookup(*request, out=out)) == text
