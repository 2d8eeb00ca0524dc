"""The compiled passes over a jagged request, compared with plain loops."""

import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py import _jagged
from runtime_py.jagged import Limits, add_lengths

INT64 = (-(2**63), 2**63 - 1)


def sums(lengths: list[int]) -> torch.Tensor:
    """Offsets of bags, by a plain loop."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(ends)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[list[list[int]]], list[int]]:
    """By feature bags of ids, most of them inside, and the last row of each feature's table."""
    features, bags = draw(st.integers(1, 5)), draw(st.integers(0, 7))
    last = draw(st.lists(st.sampled_from([0, 1, 5, 2**31, 2**63 - 2]), min_size=features, max_size=features))

    def ids(row: int) -> st.SearchStrategy[int]:
        return st.one_of(
            st.integers(0, row), st.integers(0, row), st.sampled_from([0, row, -1, row + 1]), st.integers(*INT64)
        )

    request = [
        draw(st.lists(st.lists(ids(row), max_size=6), min_size=bags, max_size=bags), label=f"feature {number}")
        for number, row in enumerate(last)
    ]
    return request, last


def flatten(request: list[list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    values = [i for feature in request for bag in feature for i in bag]
    lengths = [len(bag) for feature in request for bag in feature]
    return torch.tensor(values, dtype=torch.int64), sums(lengths)


def inside(request: list[list[list[int]]], last: list[int]) -> bool:
    return all(0 <= i <= row for feature, row in zip(request, last, strict=True) for bag in feature for i in bag)


# --- Lengths ---------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**31 - 1)), max_size=50))
@settings(deadline=None)
def test_lengths_are_added_up(lengths: list[int]) -> None:
    offsets = torch.full((len(lengths) + 1,), -7)
    assert add_lengths(torch.tensor(lengths, dtype=torch.int32), offsets) == sum(lengths)
    assert torch.equal(offsets, sums(lengths))


@given(lengths=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50), at=st.integers(0))
@settings(deadline=None)
def test_a_negative_length_is_found_wherever_it_is_and_whatever_the_sum(lengths: list[int], at: int) -> None:
    lengths[at % len(lengths)] = -1 - abs(lengths[0]) // 2
    offsets = torch.empty(len(lengths) + 1, dtype=torch.int64)
    assert add_lengths(torch.tensor(lengths, dtype=torch.int32), offsets) == -1


# --- Ids -------------------------------------------------------------------------------------------------------------


@given(drawn=requests())
@settings(deadline=None, max_examples=400)
def test_ids_are_copied_and_compared_with_their_own_table(drawn: tuple[list[list[list[int]]], list[int]]) -> None:
    request, last = drawn
    values, offsets = flatten(request)
    ids = torch.full_like(values, 77)
    assert Limits(torch.tensor(last)).copy_ids(values, offsets, ids) == inside(request, last)
    assert torch.equal(ids, values)
    assert Limits(torch.tensor(last)).has(values, offsets) == inside(request, last)


@pytest.mark.parametrize("count", [*range(1, 20), 5000, 65_535, 65_536, 200_000])
@pytest.mark.parametrize("wrong", [-1, 1000, 2**62, -(2**63), 2**63 - 1])
def test_one_id_outside_is_found_at_every_place(count: int, wrong: int) -> None:
    values = torch.full((count,), 999)
    offsets, limits, ids = torch.tensor([0, count]), Limits(torch.tensor([999])), torch.empty(count, dtype=torch.int64)
    assert limits.copy_ids(values, offsets, ids)
    for place in {*range(min(count, 24)), count // 2, *range(max(0, count - 24), count)}:
        values[place] = wrong
        assert not limits.copy_ids(values, offsets, ids)
        assert ids[place] == wrong
        values[place] = 999


def test_ids_that_change_under_the_check_are_copied_as_they_were_checked() -> None:
    values = torch.zeros(65_536, dtype=torch.int64)  # enough for other threads to run meanwhile
    offsets, limits, ids = torch.tensor([0, values.numel()]), Limits(torch.tensor([9])), torch.empty_like(values)
    last, copied = values[-8:].numpy(), ids[-8:].numpy()
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            last.fill(10)
            last.fill(9)

    other, before = threading.Thread(target=change), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    other.start()
    try:
        for _ in range(20_000):
            assert limits.copy_ids(values, offsets, ids) == (int(copied.max()) <= 9)
    finally:
        ended.set()
        other.join()
        sys.setswitchinterval(before)


@pytest.mark.parametrize("shift", range(8))
def test_ids_may_lie_anywhere(shift: int) -> None:
    memory, room = bytearray(8 * 30 + 8), torch.zeros(8 * 30 + 8, dtype=torch.uint8)
    values = torch.frombuffer(memory, dtype=torch.int64, offset=shift, count=30)
    values.copy_(torch.arange(30))
    ids = torch.frombuffer(room.numpy(), dtype=torch.int64, offset=7 - shift, count=30)
    assert Limits(torch.tensor([29])).copy_ids(values, torch.tensor([0, 30]), ids)
    assert ids.tolist() == list(range(30))
    assert not Limits(torch.tensor([28])).copy_ids(values, torch.tensor([0, 30]), ids)


def test_a_copy_ends_where_the_ids_end() -> None:
    room = torch.full((1030,), 5)
    Limits(torch.tensor([0])).copy_ids(torch.zeros(1000, dtype=torch.int64), torch.tensor([0, 1000]), room[10:1010])
    assert room[:10].tolist() == room[1010:1020].tolist() == [5] * 10
    assert not room[10:1010].any()


def test_more_or_fewer_ids_than_the_offsets_say_are_refused_before_any_is_written() -> None:
    ids = torch.full((9,), 5)
    for count in (7, 9):
        with pytest.raises(ValueError, match="values changed their number while they were checked"):
            Limits(torch.tensor([0])).copy_ids(torch.zeros(8, dtype=torch.int64), torch.tensor([0, 8]), ids[:count])
    assert ids.tolist() == [5] * 9


# --- The compiled module ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["add_lengths", "copy_ids"])
def test_a_wrong_number_or_type_of_arguments_is_refused(name: str) -> None:
    function = getattr(_jagged, name)
    with pytest.raises(TypeError, match=r"expected \d+ arguments, got 1"):
        function(1)
    count = {"add_lengths": 3, "copy_ids": 7}[name]
    with pytest.raises(TypeError, match="'str' object cannot be interpreted as an integer"):
        function(*["x"] * count)
    with pytest.raises(OverflowError):
        function(*[2**64] * count)


@pytest.mark.parametrize("name", ["_jagged", "_team"])
def test_a_checkout_that_was_not_compiled_says_what_to_do(name: str) -> None:
    program = f"import sys; sys.modules['runtime_py.{name}'] = None; import runtime_py"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    error = child.stderr.splitlines()[-1]
    assert error.startswith("ImportError: runtime_py's compiled part cannot be imported (")
    assert error.endswith("); install the project with pip, which compiles it")
