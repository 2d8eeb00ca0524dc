"""The journal: what was appended is read back, and nothing else is."""

from pathlib import Path

import pytest
import torch

from export.accuracy import ErrorSums
from export.journal import Journal, PieceResult, has_pieces, read_journals, set_aside_journals

PLAN = "a" * 64


def result(number: int, rows: int = 2) -> PieceResult:
    trained = torch.randn(rows, 3, generator=torch.Generator().manual_seed(number))
    sums = ErrorSums(0.1 + number, 1 / 3, 1e-300, 2.0, -0.0)
    return PieceResult(bytes([number]) * 64, bytes([number]) * 32, sums, trained, trained.half(), {"read": 0.1})


def write(folder: Path, rank: int = 0, fingerprint: str = PLAN, **results: PieceResult) -> None:
    with Journal(folder, rank, fingerprint) as journal:
        for key, value in results.items():
            journal.append(key, value)
        journal.sync()


def same(left: PieceResult, right: PieceResult) -> bool:
    return (
        (left.digests, left.checksums, left.sums, left.seconds)
        == (right.digests, right.checksums, right.sums, right.seconds)
        and torch.equal(left.trained, right.trained)
        and torch.equal(left.stored, right.stored)
        and left.stored.dtype == right.stored.dtype
    )


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_result_comes_back_bit_for_bit(tmp_path, rows):
    write(tmp_path, one=result(1, rows))
    found = read_journals(tmp_path, PLAN)
    assert found.keys() == {"one"}
    assert same(found["one"], result(1, rows))


def test_the_journals_of_all_ranks_count_and_those_of_the_latest_build_most(tmp_path):
    for build in range(12):
        write(tmp_path, 3, one=result(build), **{f"of {build}": result(2)})
        write(tmp_path, 1, three=result(3))
        set_aside_journals(tmp_path)
    write(tmp_path, 0, one=result(40))  # by another rank, whose name comes first
    found = read_journals(tmp_path, PLAN)
    assert found.keys() == {"one", "three", *(f"of {build}" for build in range(12))}
    assert same(found["one"], result(40))
    set_aside_journals(tmp_path)
    assert same(read_journals(tmp_path, PLAN)["one"], result(40))
    assert has_pieces(tmp_path, PLAN)
    assert not has_pieces(tmp_path, "b" * 64)


def test_another_plan_finds_nothing(tmp_path):
    write(tmp_path, one=result(1))
    assert read_journals(tmp_path, "b" * 64) == {}
    assert read_journals(tmp_path / "absent", PLAN) == {}


def test_a_line_cut_short_anywhere_does_not_count_and_does_not_spoil_the_next(tmp_path):
    write(tmp_path, one=result(1))
    path = tmp_path / "journal-0.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        set_aside_journals(tmp_path)
        write(tmp_path, two=result(2))
        assert read_journals(tmp_path, PLAN).keys() == {"two"}, length
        for old in tmp_path.iterdir():
            old.unlink()


def test_a_flipped_bit_anywhere_makes_the_line_not_count(tmp_path):
    write(tmp_path, one=result(1))
    path = tmp_path / "journal-0.jsonl"
    whole = path.read_bytes().strip()
    for position in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[position] ^= 4
        path.write_bytes(bytes(changed) + b"\n")
        assert read_journals(tmp_path, PLAN) == {}, position
