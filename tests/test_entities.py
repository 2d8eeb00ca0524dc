"""Reading entities from parquet: what is read, from which files, and one clear refusal for everything else."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from support import write_entities
from upath import UPath

from export.config import VocabularyConfig
from export.entities import Entities
from export.errors import VocabularyError


def entities(path: Path | str, rows: int = 100, **names: str) -> Entities:
    return Entities("user", rows, VocabularyConfig(uri=str(path), **names))


def read(path: Path | str, rows: int = 100, **names: str) -> list[tuple[int, int]]:
    """Every (id, row), after a check of what the batches promise."""
    pairs: list[tuple[int, int]] = []
    for batch in entities(path, rows, **names).batches():
        assert batch.ids.dtype == batch.indices.dtype == np.int64
        pairs += zip(batch.ids.tolist(), batch.indices.tolist(), strict=True)
    return pairs


def refusal(path: Path | str, rows: int = 100, **names: str) -> str:
    with pytest.raises(VocabularyError) as caught:
        read(path, rows, **names)
    return str(caught.value)


# --- Files -----------------------------------------------------------------------------------------------------------


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, ids in {"b": [3], "a": [1, 2], "c": []}.items():
        write_entities(tmp_path / f"{name}.parquet", np.array(ids, np.int64))
    assert read(tmp_path) == [(1, 0), (2, 1), (3, 0)]


def test_hidden_files_and_those_that_spark_adds_are_no_part_of_a_vocabulary(tmp_path: Path) -> None:
    write_entities(tmp_path / "part-0.snappy.parquet", [5])
    for name in ("_SUCCESS", "_metadata", "_common_metadata", ".part-0.parquet.crc"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "_temporary").mkdir()
    assert [path.name for path in entities(tmp_path).files] == ["part-0.snappy.parquet"]


def test_a_vocabulary_may_be_one_file_of_any_name_and_its_columns_too(tmp_path: Path) -> None:
    write_entities(tmp_path / "ids", [5, 7], [9, 8], entity_id="user.id", index="größe")
    assert read(tmp_path / "ids", entity_id="user.id", index="größe") == [(5, 9), (7, 8)]


def test_a_vocabulary_is_read_through_fsspec_where_it_is_a_url(tmp_path: Path) -> None:
    local = write_entities(tmp_path / "a.parquet", [5, 7])
    folder = UPath("memory://test_entities/vocabulary")
    folder.mkdir(parents=True)
    (folder / "a.parquet").write_bytes(local.read_bytes())
    (folder / "_SUCCESS").write_bytes(b"")
    assert read("memory://test_entities/vocabulary") == [(5, 0), (7, 1)]
    assert read("memory://test_entities/vocabulary/a.parquet") == [(5, 0), (7, 1)]
    (folder / "notes.txt").write_bytes(b"")
    assert "'notes.txt' is no file *.parquet" in refusal("memory://test_entities/vocabulary")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket `bucket` of an S3 server on this machine, as `s3fs` sees it."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    if not store.exists("bucket"):  # the server's memory is the process's
        store.mkdir("bucket")
    yield store
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_vocabulary_is_read_from_s3_even_if_its_folder_is_an_object_too(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = write_entities(tmp_path / "a.parquet", [5, 7])
    for name, data in {"a.parquet": local.read_bytes(), "_SUCCESS": b"", "": b""}.items():
        bucket.pipe_file(f"bucket/users/{name}", data)
    assert read("s3://bucket/users") == read("s3://bucket/users/") == [(5, 0), (7, 1)]
    assert refusal("s3://bucket/nobody") == "table 'user': vocabulary s3://bucket/nobody: no such file or folder"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    bucket.clear_instance_cache()
    assert refusal("s3://bucket/users").startswith(
        "table 'user': vocabulary s3://bucket/users: cannot be read: EndpointConnectionError: Could not connect"
    )


def test_a_file_that_was_added_after_an_earlier_look_is_seen(bucket: Any, tmp_path: Path) -> None:
    other = type(bucket)(skip_instance_cache=True)  # another process, as far as listings go
    other.put(str(write_entities(tmp_path / "a.parquet", [5])), "bucket/added/a.parquet")
    assert read("s3://bucket/added") == [(5, 0)]
    other.put(str(write_entities(tmp_path / "b.parquet", [6], [1])), "bucket/added/b.parquet")
    assert read("s3://bucket/added") == [(5, 0), (6, 1)]


def test_a_bucket_that_is_not_there_and_an_object_that_is_no_parquet_are_refused(bucket: Any) -> None:
    text = "table 'user': vocabulary s3://nobody-has-this/users: no such file or folder"
    assert refusal("s3://nobody-has-this/users").startswith(text)
    bucket.pipe_file("bucket/damaged/a.parquet", b"entity_id,index")
    assert refusal("s3://bucket/damaged").startswith("table 'user': s3://bucket/damaged/a.parquet: cannot be read: ")


def test_a_folder_with_something_else_in_it_is_refused_since_it_may_belong_to_the_vocabulary(tmp_path: Path) -> None:
    write_entities(tmp_path / "a.parquet", [5])
    (tmp_path / "region=eu").mkdir()
    text = f"table 'user': vocabulary {tmp_path}: 'region=eu' is no file *.parquet; move it away, or name the folder"
    assert refusal(tmp_path).startswith(text)


def test_what_holds_no_parquet_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"table 'user': vocabulary {tmp_path}/none: no such file or folder"
    (tmp_path / "_SUCCESS").touch()
    assert refusal(tmp_path) == f"table 'user': vocabulary {tmp_path}: the folder has no file *.parquet"
    assert "cannot be opened: " in refusal("nosuchprotocol://bucket/vocabulary")
    text = "table 'user': vocabulary /dev/null: cannot be read: Not a directory"
    assert refusal("/dev/null") == refusal("file:///dev/null").replace("file://", "") == text


def test_a_file_that_is_no_parquet_or_is_damaged_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("entity_id,index\n5,0\n")
    assert re.match(rf"table 'user': {path}: cannot be read: .*[Pp]arquet", refusal(tmp_path))
    ids = np.random.default_rng(0).integers(0, 2**60, 10_000)
    parquet.write_table(pa.table({"entity_id": ids, "index": np.arange(10_000)}), path, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert re.match(rf"table 'user': {path}: cannot be read: .*CRC", refusal(tmp_path, 10_000))
    path.write_bytes(data[: len(data) // 2])
    assert refusal(tmp_path, 10_000).startswith(f"table 'user': {path}: cannot be read: ")


# --- Columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_integers_of_every_width_are_read(tmp_path: Path, kind: str) -> None:
    largest = min(np.iinfo(kind).max, 2**63 - 1)
    lowest = int(np.iinfo(kind).min)
    write_entities(tmp_path / "a.parquet", np.array([largest, lowest, 7], kind), np.array([0, 99, 1], kind))
    assert read(tmp_path) == [(largest, 0), (lowest, 99), (7, 1)]


def test_other_columns_are_not_read(tmp_path: Path) -> None:
    table = pa.table({"name": ["x"], "index": [3], "entity_id": [5], "entity_id_2": [1.5]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path) == [(5, 3)]


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        (["u1", "u2"], "string"),
        ([b"u1"], "binary"),
        ([1.0], "double"),
        ([True], "bool"),
        ([[1]], "list<element: int64>"),
        (pa.array([5], pa.timestamp("us")), "timestamp[us]"),
        (pa.array([5], pa.decimal128(20)), "decimal128(20, 0)"),
    ],
)
def test_ids_of_another_type_are_refused_with_advice(tmp_path: Path, ids: Any, kind: str) -> None:
    write_entities(tmp_path / "a.parquet", ids)
    assert refusal(tmp_path) == (
        f"table 'user': {tmp_path}/a.parquet: column 'entity_id' is {kind}, expected integers of at most 64 bits; "
        "this version takes integer ids: hash others where rows are assigned"
    )


def test_rows_of_another_type_are_refused(tmp_path: Path) -> None:
    write_entities(tmp_path / "a.parquet", [5], [0.0])
    text = f"table 'user': {tmp_path}/a.parquet: column 'index' is double, expected integers of at most 64 bits"
    assert refusal(tmp_path) == text


def test_a_missing_column_is_refused_with_those_that_there_are_in_every_file(tmp_path: Path) -> None:
    write_entities(tmp_path / "a.parquet", [5])
    write_entities(tmp_path / "b.parquet", [6], entity_id="id")
    assert refusal(tmp_path) == (
        f"table 'user': {tmp_path}/b.parquet: no column 'entity_id', it has: id, index; "
        "name the right one in vocab: {entity_id: …}"
    )
    assert "a.parquet: no column 'row', it has: entity_id, index; name" in refusal(tmp_path, index="row")
    twice = pa.Table.from_arrays([pa.array([5])] * 3, names=["entity_id", "entity_id", "index"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    assert "a.parquet: two columns 'entity_id', it has: entity_id, entity_id, index" in refusal(tmp_path)


# --- Values ----------------------------------------------------------------------------------------------------------

LATE = 70_000  # beyond the first batch, so that a row number is one of the file


def late(value: Any, filler: list[int]) -> list[Any]:
    return [*filler[:LATE], value]


@pytest.mark.parametrize(
    ("ids", "rows", "problem"),
    [
        ([None], [0], "entity_id is null; remove the row, or give it a value"),
        ([5], [None], "index is null; remove the row, or give it a value"),
        (
            [-1],
            [0],
            "entity_id is -1, which marks an empty slot and cannot be an id; give that entity another one",
        ),
        ([5], [LATE + 1], f"index is {LATE + 1}, outside [0, {LATE + 1}), the table's rows"),
        ([5], [-1], f"index is -1, outside [0, {LATE + 1}), the table's rows"),
        ([5], [2**63 - 1], f"index is {2**63 - 1}, outside [0, {LATE + 1}), the table's rows"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_file_and_row(
    tmp_path: Path, ids: list[Any], rows: list[Any], problem: str
) -> None:
    filler = list(range(LATE))
    write_entities(tmp_path / "a.parquet", [1], [0])
    write_entities(tmp_path / "b.parquet", late(ids[0], filler), late(rows[0], filler))
    assert refusal(tmp_path, LATE + 1) == f"table 'user': {tmp_path}/b.parquet, row {LATE}: {problem}"


def test_unsigned_values_beyond_int64_are_refused_and_not_wrapped(tmp_path: Path) -> None:
    write_entities(tmp_path / "a.parquet", np.array([2**63 - 1, 2**63], np.uint64))
    text = f"a.parquet, row 1: entity_id is {2**63}, which is beyond int64; ids are signed 64-bit"
    assert refusal(tmp_path).endswith(text)
    write_entities(tmp_path / "a.parquet", [5], np.array([2**64 - 1], np.uint64))
    assert refusal(tmp_path).endswith(f"a.parquet, row 0: index is {2**64 - 1}, outside [0, 100), the table's rows")
