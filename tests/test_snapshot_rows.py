"""A table's rows out of blobs: any tiling reads back, and whatever is no tiling, or not in its file, is refused."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import SnapshotError
from export.snapshots.rows import Blob, StoredTensor, TableRows

# A rectangle of a table: first row, first column, rows, columns.
Rectangle = tuple[int, int, int, int]

PINWHEEL: list[Rectangle] = [(0, 0, 2, 4), (0, 4, 4, 2), (4, 2, 2, 4), (2, 0, 4, 2), (2, 2, 2, 2)]  # no straight cut


@st.composite
def tilings(draw: st.DrawFn, whole: Rectangle, cuts: int = 5) -> list[Rectangle]:
    """A rectangle cut in two, again and again, along rows or columns; the pieces in any order."""
    pieces = [whole]
    for _ in range(draw(st.integers(0, cuts))):
        row, column, rows, columns = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        if draw(st.booleans()):
            cut = draw(st.integers(0, rows))
            halves = [(row, column, cut, columns), (row + cut, column, rows - cut, columns)]
        else:
            cut = draw(st.integers(0, columns))
            halves = [(row, column, rows, cut), (row, column + cut, rows, columns - cut)]
        pieces += [half for half in halves if min(half[2:]) > 0]
    return draw(st.permutations(pieces))


def make_table(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A table whose values all differ."""
    return (torch.arange(rows * columns).reshape(rows, columns) + 1).to(dtype)


def store(
    folder: Path, table: torch.Tensor, tiles: list[Rectangle], gaps: list[int] | None = None, files: int = 1
) -> list[Blob]:
    """Writes every tile, after a gap of garbage, to the end of one of `files` files."""
    contents = [bytearray() for _ in range(files)]
    blobs = []
    for number, (row, column, rows, columns) in enumerate(tiles):
        content = contents[number % files]
        content += b"\xab" * (gaps[number] if gaps else 0)
        blobs.append(Blob(folder / f"{number % files}.bin", len(content), row, column, rows, columns))
        content += table[row : row + rows, column : column + columns].contiguous().numpy().tobytes()
    for number, content in enumerate(contents):
        (folder / f"{number}.bin").write_bytes(content)
    return blobs


def rows_of(table: torch.Tensor, blobs: list[Blob]) -> TableRows:
    return TableRows(StoredTensor("user", tuple(table.shape), table.dtype), blobs)


def refusal(shape: tuple[int, ...], blobs: list[Blob]) -> str:
    with pytest.raises(SnapshotError) as caught:
        TableRows(StoredTensor("user", shape, torch.float32), blobs)
    return str(caught.value)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_range_of_any_tiling_reads_back_as_it_was_written(data: st.DataObject, scratch: Path) -> None:
    rows, columns = data.draw(st.integers(1, 30), "rows"), data.draw(st.integers(1, 9), "columns")
    table = make_table(rows, columns, data.draw(st.sampled_from([torch.float32, torch.float16]), "dtype"))
    tiles = data.draw(tilings((0, 0, rows, columns)), "tiles")
    gaps = data.draw(st.lists(st.integers(0, 9), min_size=len(tiles), max_size=len(tiles)), "gaps in bytes")
    stored = rows_of(table, store(scratch, table, tiles, gaps, data.draw(st.integers(1, 3), "files")))

    start = data.draw(st.integers(0, rows), "start")
    stop = data.draw(st.integers(start, rows), "stop")
    out = torch.full((stop - start, columns), float("nan"), dtype=table.dtype)
    stored.read(start, out)
    assert torch.equal(out, table[start:stop])

    size = data.draw(st.integers(1, rows + 2), "rows of a chunk")
    chunks = [(first, chunk.clone()) for first, chunk in stored.chunks(range(0, stored.num_embeddings, size))]
    assert [first for first, _ in chunks] == list(range(0, rows, size))
    assert torch.equal(torch.cat([chunk for _, chunk in chunks]), table)


def test_a_tiling_without_a_straight_cut_reads_back(tmp_path: Path) -> None:
    table = make_table(6, 6, torch.float32)
    stored = rows_of(table, store(tmp_path, table, PINWHEEL))
    for start in range(6):
        for stop in range(start, 6):
            out = torch.full((stop - start, 6), float("nan"))
            stored.read(start, out)
            assert torch.equal(out, table[start:stop])


def test_the_rows_know_their_table(tmp_path: Path) -> None:
    table = make_table(6, 3, torch.float16)
    stored = rows_of(table, store(tmp_path, table, [(0, 0, 6, 3)]))
    assert (stored.name, stored.num_embeddings, stored.embedding_dim, stored.dtype) == ("user", 6, 3, torch.float16)
    assert stored.bytes == 36


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_tiling_with_one_tile_missing_is_refused(data: st.DataObject, scratch: Path) -> None:
    table = make_table(12, 5, torch.float32)
    tiles = data.draw(tilings((0, 0, 12, 5)), "tiles")
    _, _, rows, columns = tiles.pop(data.draw(st.integers(0, len(tiles) - 1), "missing"))
    message = refusal((12, 5), store(scratch, table, tiles))
    assert message == f"'user': the shards leave {rows * columns} values of the table out; a shard is missing"


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_tiling_with_one_tile_more_is_refused(data: st.DataObject, scratch: Path) -> None:
    table = make_table(12, 5, torch.float32)
    tiles = data.draw(tilings((0, 0, 12, 5)), "tiles")
    row, column = data.draw(st.integers(0, 11), "row"), data.draw(st.integers(0, 4), "column")
    extra = (row, column, data.draw(st.integers(1, 12 - row), "rows"), data.draw(st.integers(1, 5 - column), "columns"))
    message = refusal((12, 5), store(scratch, table, [*tiles, extra]))
    assert message.startswith(f"{scratch / '0.bin'}: 'user': shard of rows ")
    assert message.endswith(" overlaps another one")


def test_an_overlap_that_makes_up_for_a_hole_is_refused(tmp_path: Path) -> None:
    table = make_table(4, 2, torch.float32)
    blobs = store(
        tmp_path, table, [(0, 0, 2, 2), (1, 0, 2, 2)]
    )  # as many values as the table; row 1 twice, row 3 never
    message = refusal((4, 2), blobs)
    assert message == f"{tmp_path / '0.bin'}: 'user': shard of rows 1-2, columns 0-1 overlaps another one"


@pytest.mark.parametrize(
    ("rectangle", "where"),
    [
        ((2, 0, 3, 2), "rows 2-4, columns 0-1"),
        ((0, 1, 4, 2), "rows 0-3, columns 1-2"),
        ((9, 0, 1, 2), "rows 9-9, columns 0-1"),
        ((-1, 0, 4, 2), ""),
        ((0, -1, 4, 2), ""),
        ((0, 0, 0, 2), ""),
        ((0, 0, 4, 0), ""),
    ],
    ids=["below", "right", "beyond", "above", "left", "no row", "no column"],
)
def test_a_shard_outside_the_table_is_refused_with_its_place(tmp_path: Path, rectangle: Rectangle, where: str) -> None:
    path = tmp_path / "0.bin"
    path.write_bytes(bytes(4096))
    row, column, rows, columns = rectangle
    message = refusal((4, 2), [Blob(path, 0, row, column, rows, columns)])
    assert message.startswith(f"{path}: 'user': shard of {where}")
    assert message.endswith(" is outside the table [4, 2]")


def test_no_shard_at_all_is_a_missing_shard() -> None:
    assert "leave 8 values of the table out" in refusal((4, 2), [])


def test_a_missing_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    table = make_table(4, 2, torch.float32)
    blobs = store(tmp_path, table, [(0, 0, 2, 2), (2, 0, 2, 2)], files=2)
    (tmp_path / "1.bin").unlink()
    message = refusal((4, 2), blobs)
    assert message == f"{tmp_path / '1.bin'}: holds rows of 'user', cannot be read: No such file or directory"


def test_a_truncated_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    table = make_table(4, 2, torch.float32)
    blobs = store(tmp_path, table, [(0, 0, 2, 2), (2, 0, 2, 2)], gaps=[3, 5])
    path = tmp_path / "0.bin"
    assert path.stat().st_size == 40
    path.write_bytes(path.read_bytes()[:39])
    assert refusal((4, 2), blobs) == f"{path}: 'user' ends at byte 40, the file has 39; it was truncated"


def test_a_file_that_shrinks_after_it_was_checked_is_refused_when_it_is_read(tmp_path: Path) -> None:
    table = make_table(4, 2, torch.float32)
    stored = rows_of(table, store(tmp_path, table, [(0, 0, 4, 2)]))
    path = tmp_path / "0.bin"
    path.write_bytes(path.read_bytes()[:20])
    out = torch.empty(2, 2)
    stored.read(0, out)
    assert torch.equal(out, table[:2])  # rows 0 and 1 are still there
    with pytest.raises(SnapshotError) as caught:
        stored.read(2, out)
    assert str(caught.value) == f"{path}: ends within the rows of 'user'; it was truncated"
    with pytest.raises(SnapshotError, match="it was truncated"):
        list(stored.chunks(range(0, stored.num_embeddings, 3)))


def test_a_file_that_goes_away_after_it_was_checked_is_refused_when_it_is_read(tmp_path: Path) -> None:
    table = make_table(4, 2, torch.float32)
    stored = rows_of(table, store(tmp_path, table, [(0, 0, 4, 2)]))
    (tmp_path / "0.bin").unlink()
    with pytest.raises(SnapshotError) as caught:
        stored.read(0, torch.empty(4, 2))
    assert str(caught.value) == f"{tmp_path / '0.bin'}: cannot be read: No such file or directory"


def test_the_chunks_share_one_buffer(tmp_path: Path) -> None:
    table = make_table(7, 2, torch.float32)
    stored = rows_of(table, store(tmp_path, table, [(0, 0, 7, 2)]))
    assert len({chunk.data_ptr() for _, chunk in stored.chunks(range(0, stored.num_embeddings, 3))}) == 1


@pytest.mark.parametrize("second", [0, 8, 15])
def test_two_shards_with_a_byte_in_common_are_refused(tmp_path: Path, second: int) -> None:
    (tmp_path / "0.bin").write_bytes(bytes(100))
    blobs = [Blob(tmp_path / "0.bin", start, row, 0, 1, 4) for row, start in ((0, 0), (1, second))]
    assert (
        refusal((2, 4), blobs) == f"{tmp_path / '0.bin'}: two shards of 'user' have byte {second}; the index is damaged"
    )
    rows_of(torch.zeros(2, 4), [blobs[0], Blob(tmp_path / "0.bin", 16, 1, 0, 1, 4)])
