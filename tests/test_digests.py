"""Digests, computed again from nothing but their description in `artifacts/FORMAT.md`."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import make_rows

from runtime_py import DigestMismatchError
from runtime_py.digests import Digest, chunk_groups, chunk_rows, combine, sha256
from runtime_py.manifest import Feature, File, Graph, Manifest, Output, ParitySummary, Provenance, Table
from runtime_py.tensor_file import encode_header, layout_tables
from runtime_py.weights import WeightFile

MIB = 1 << 20
WEIGHTS = "weights/tables.safetensors"


def rows_digest(data: bytes, row_bytes: int) -> str:
    """`sha256-rows-1048576` of a table's rows."""
    size = max(1, MIB // row_bytes) * row_bytes
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    return hashlib.sha256(b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)).hexdigest()


def tables_digest(header: bytes, tables: list[str]) -> str:
    """`sha256-tables` of a weight file, from its header and the digests of its tables in file order."""
    parts = [hashlib.sha256(header).digest(), *(bytes.fromhex(value) for value in tables)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def check_every_digest(artifact: Path) -> None:
    text = (artifact / "manifest.json").read_text()
    manifest: dict[str, Any] = json.loads(text)
    value = manifest["manifest_digest"]["value"]
    assert manifest["manifest_digest"]["algorithm"] == "sha256-zeroed"
    assert hashlib.sha256(text.replace(value, "0" * 64).encode()).hexdigest() == value

    weights = (artifact / WEIGHTS).read_bytes()
    start = manifest["weights_offset_bytes"]
    for table in manifest["tables"]:
        first = start + table["offset_bytes"]
        data = weights[first : first + table["num_embeddings"] * table["row_bytes"]]
        expected = {"algorithm": "sha256-rows-1048576", "value": rows_digest(data, table["row_bytes"])}
        assert table["digest"] == expected, table["name"]

    in_file_order = sorted(manifest["tables"], key=lambda table: table["offset_bytes"])
    whole = tables_digest(weights[:start], [table["digest"]["value"] for table in in_file_order])
    large = {WEIGHTS: whole}
    for vocabulary in manifest["vocabularies"]:
        data = (artifact / vocabulary["path"]).read_bytes()
        start = len(data) - 16 * vocabulary["capacity"]
        expected = {"algorithm": "sha256-rows-1048576", "value": rows_digest(data[start:], 16)}
        assert vocabulary["digest"] == expected, vocabulary["table"]
        large[vocabulary["path"]] = tables_digest(data[:start], [vocabulary["digest"]["value"]])
    for file in manifest["files"]:
        plain = hashlib.sha256((artifact / file["path"]).read_bytes()).hexdigest()
        expected = ("sha256-tables", large[file["path"]]) if file["path"] in large else ("sha256", plain)
        assert (file["digest"]["algorithm"], file["digest"]["value"]) == expected, file["path"]


def test_sha256_is_over_all_bytes_whatever_holds_them() -> None:
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    for data in (b"abc", bytearray(b"abc"), memoryview(b"abc")):
        assert sha256(data) == Digest("sha256", expected)


def test_a_digest_is_written_with_its_algorithm_first() -> None:
    assert str(Digest("sha256-tables", "ab")) == "sha256-tables:ab"


@given(st.integers(1, 1 << 24))
@example(MIB)
@example(MIB + 1)
@example(MIB // 2 + 1)
def test_a_chunk_is_as_many_whole_rows_as_fit_in_one_mib_and_at_least_one(row_bytes: int) -> None:
    rows = chunk_rows(row_bytes)
    assert rows >= 1
    assert (rows + 1) * row_bytes > MIB
    assert rows == 1 or rows * row_bytes <= MIB


@given(st.integers(1, 1 << 20), st.integers(1 << 10, 1 << 21))
@example(num_embeddings=64, row_bytes=MIB)
@example(num_embeddings=65, row_bytes=MIB)
def test_groups_hold_every_chunk_once_in_order(num_embeddings: int, row_bytes: int) -> None:
    groups = chunk_groups(num_embeddings, row_bytes)
    assert all(groups)
    starts = [start for group in groups for start in group]
    assert starts == list(range(0, num_embeddings, max(1, MIB // row_bytes)))


@given(st.sampled_from(["sha256-rows-1048576", "sha256-tables"]), st.lists(st.binary(min_size=32, max_size=32)))
def test_parts_are_combined_in_order_under_the_given_algorithm(algorithm: str, parts: list[bytes]) -> None:
    expected = Digest(algorithm, hashlib.sha256(b"".join(parts)).hexdigest())
    assert combine(algorithm, parts) == expected
    assert combine(algorithm, iter(parts)) == expected


# --- The reader against the description ------------------------------------------------------------------------------


def write_weights(folder: Path, shapes: list[tuple[int, int, str]], seed: int) -> tuple[Manifest, bytes]:
    """A weight file of random bytes with a manifest whose digests come from the description."""
    tables = []
    for i, (count, dim, precision) in enumerate(shapes):
        row_bytes = dim * {"fp32": 4, "fp16": 2}[precision]
        tables.append(Table(f"table{i}", count, dim, precision, row_bytes, 0, Digest("", "")))  # type: ignore[arg-type]
    offsets = layout_tables(tables)
    header = encode_header(tables)
    data = random.Random(seed).randbytes(sum(table.bytes for table in tables))
    finished = []
    for table in tables:
        start = offsets[table.name]
        digest = Digest("sha256-rows-1048576", rows_digest(data[start : start + table.bytes], table.row_bytes))
        finished.append(
            Table(
                table.name,
                table.num_embeddings,
                table.embedding_dim,
                table.serving_precision,
                table.row_bytes,
                start,
                digest,
            )
        )
    by_name = {table.name: table.digest.value for table in finished}
    whole = Digest("sha256-tables", tables_digest(header, [by_name[name] for name in offsets]))
    path = folder / WEIGHTS
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header + data)
    manifest = Manifest(
        format_version=1,
        artifact_id="",
        tables=finished,
        features=[Feature(table.name, table.name, "sum", False) for table in finished],
        outputs=[Output(table.name, table.embedding_dim) for table in finished],
        surgery=None,
        weighted=False,
        weights_offset_bytes=len(header),
        weights_bytes=len(data),
        vocabularies=[],
        graphs=[Graph("torchscript", "cpu", "graph", [], "", "")],
        files=[File(WEIGHTS, len(header) + len(data), whole)],
        accuracy=[],
        choices=[],
        parity=ParitySummary(0, 0, "", 0.0, 0.0),
        provenance=Provenance([], {}, {}, ""),
        manifest_digest=Digest("", ""),
    )
    return manifest, data


@st.composite
def table_shapes(draw: st.DrawFn) -> tuple[int, int, str]:
    """A table of at most some MiB: tiny rows around the edges of chunks, and rows around and beyond 1 MiB."""
    precision = draw(st.sampled_from(["fp32", "fp16"]))
    element_bytes = {"fp32": 4, "fp16": 2}[precision]
    dim = draw(
        st.one_of(
            st.integers(1, 300),
            st.integers(MIB // element_bytes - 3, MIB // element_bytes + 3),
            st.integers(MIB // element_bytes // 2 - 2, MIB // element_bytes // 2 + 2),
            st.integers(MIB // element_bytes, 2 * MIB // element_bytes),
        )
    )
    in_chunk = max(1, MIB // (dim * element_bytes))
    chunks = draw(st.integers(0, 2))
    count = max(1, chunks * in_chunk + draw(st.integers(-2, 2)))
    return count, dim, precision


@given(
    shapes=st.lists(table_shapes(), min_size=1, max_size=2),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    position=st.floats(0, 1, exclude_max=True),
)
@example(shapes=[(3, MIB // 4 + 1, "fp32")], threads=2, seed=0, position=0.999999)  # rows of 1 MiB and 4 bytes
@example(shapes=[(2, MIB // 2, "fp16"), (1, 1, "fp16")], threads=1, seed=0, position=0.5)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_reader_agrees_with_the_description_on_any_number_of_threads_and_notices_any_byte(
    tmp_path: Path, shapes: list[tuple[int, int, str]], threads: int, seed: int, position: float
) -> None:
    manifest, data = write_weights(tmp_path, shapes, seed)
    with WeightFile(tmp_path, manifest) as weights:
        weights.verify_digests(threads)
        at = int(position * len(data))
        with (tmp_path / WEIGHTS).open("r+b") as file:
            file.seek(manifest.weights_offset_bytes + at)
            file.write(bytes([data[at] ^ 1]))
        hit = next(table for table in manifest.tables if table.offset_bytes <= at < table.offset_bytes + table.bytes)
        with pytest.raises(DigestMismatchError, match=f"the rows of table '{hit.name}' are not those"):
            weights.verify_digests(threads)


def test_the_reader_agrees_with_the_description_on_a_table_of_many_chunks(tmp_path: Path) -> None:
    manifest, _ = write_weights(tmp_path, [(67, MIB // 4 + 1, "fp32")], 0)
    with WeightFile(tmp_path, manifest) as weights:
        weights.verify_digests(2)


def test_the_reader_refuses_a_weight_file_digest_that_its_tables_do_not_give(tmp_path: Path) -> None:
    manifest, _ = write_weights(tmp_path, [(10, 4, "fp32")], 0)
    manifest.files[0] = File(WEIGHTS, manifest.files[0].bytes, Digest("sha256-tables", "0" * 64))
    with (
        WeightFile(tmp_path, manifest) as weights,
        pytest.raises(DigestMismatchError, match=rf"{WEIGHTS}: digest sha256-tables:\w+, expected sha256-tables:0000"),
    ):
        weights.verify_digests(1)


# --- The builder against the description -----------------------------------------------------------------------------


def test_every_digest_of_a_built_artifact_follows_from_the_description(
    built_artifact: Path, vocabulary_artifact: Path
) -> None:
    check_every_digest(built_artifact)
    check_every_digest(vocabulary_artifact)


def test_the_builder_agrees_with_the_description_on_many_chunks_and_on_rows_beyond_one_mib(
    rebuild: Callable[..., Path],
) -> None:
    tables = [
        {"name": "long", "num_embeddings": 100_003, "embedding_dim": 7, "data_type": "fp16"},
        {"name": "wide", "num_embeddings": 3, "embedding_dim": MIB // 4 + 1, "data_type": "fp32"},
    ]
    artifact = rebuild(tables, make_rows(tables), serving={"precision": "fp32"}, parity={"batches": 1})
    check_every_digest(artifact)
