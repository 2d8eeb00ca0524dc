"""The weight file: its layout, its header as any safetensors reader sees it, and the mapping that processes share."""

import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import references
import safetensors
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FEATURES

from runtime_py import DigestMismatchError, GraphError, WeightFileError, load_artifact
from runtime_py.digests import Digest
from runtime_py.manifest import Manifest, Table
from runtime_py.manifest_reader import read_manifest
from runtime_py.tensor_file import encode_header, layout_tables, tensor_bytes
from runtime_py.weights import WeightFile

WEIGHTS = "weights/tables.safetensors"
PAGE = 4096
ELEMENT_BYTES = {"fp32": 4, "fp16": 2}


def make_table(name: str, num_embeddings: int, embedding_dim: int, precision: str) -> Table:
    row_bytes = embedding_dim * ELEMENT_BYTES[precision]
    return Table(name, num_embeddings, embedding_dim, precision, row_bytes, 0, Digest("", ""))  # type: ignore[arg-type]


def alignment(table: Table) -> int:
    """The largest power of two up to 4096 that divides the row bytes, by trying each."""
    return max(2**power for power in range(13) if table.row_bytes % 2**power == 0)


NAMES = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
TABLES = st.lists(
    st.builds(
        make_table,
        NAMES,
        st.integers(1, 50),
        st.one_of(st.integers(1, 70), st.sampled_from([128, 1024, 1536, 2048, 4096, 6144, 8192])),
        st.sampled_from(["fp32", "fp16"]),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda table: table.name,
)


# --- The layout ------------------------------------------------------------------------------------------------------


@given(TABLES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_tables_lie_without_gaps_aligned_as_their_rows_and_ordered_by_the_rule(
    tables: list[Table], shuffle: random.Random
) -> None:
    offsets = layout_tables(tables)
    by_name = {table.name: table for table in tables}
    assert offsets.keys() == by_name.keys()

    end = 0
    for name, offset in offsets.items():
        assert offset == end, "a gap, or an overlap"
        assert offset % alignment(by_name[name]) == 0, "less aligned than its own rows"
        end += by_name[name].num_embeddings * by_name[name].row_bytes

    order = [(-alignment(by_name[name]), name) for name in offsets]
    assert order == sorted(order)

    shuffled = list(tables)
    shuffle.shuffle(shuffled)
    assert list(layout_tables(shuffled).items()) == list(offsets.items())


def test_alignment_counts_up_to_one_page_and_no_further() -> None:
    """Rows of 4096 and of 8192 bytes are equals, so that their names decide."""
    tables = [make_table("b", 1, 4096, "fp16"), make_table("a", 1, 2048, "fp16"), make_table("c", 1, 3, "fp16")]
    assert layout_tables(tables) == {"a": 0, "b": 4096, "c": 4096 + 8192}


# --- The header ------------------------------------------------------------------------------------------------------


@given(TABLES, st.integers(0, 2**32))
@settings(deadline=None)
def test_the_real_safetensors_library_reads_every_table_at_its_place(tables: list[Table], seed: int) -> None:
    header = encode_header(tables)
    assert len(header) % PAGE == 0
    data = random.Random(seed).randbytes(sum(table.bytes for table in tables))
    offsets = layout_tables(tables)

    tensors = safetensors.numpy.load(header + data)

    assert tensors.keys() == offsets.keys()
    for table in tables:
        tensor = tensors[table.name]
        assert tensor.shape == (table.num_embeddings, table.embedding_dim)
        assert tensor.dtype == {"fp32": np.float32, "fp16": np.float16}[table.serving_precision]
        assert tensor.tobytes() == data[offsets[table.name] :][: table.bytes]


def test_the_header_is_a_length_compact_json_and_spaces_up_to_a_page() -> None:
    header = encode_header([make_table("größe", 2, 3, "fp16")])
    text = '{"größe":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]}}'.encode()
    assert header == (PAGE - 8).to_bytes(8, "little") + text + b" " * (PAGE - 8 - len(text))


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_header_that_just_fills_its_page_or_just_does_not_is_padded_to_whole_pages(extra: int) -> None:
    name = "n" * (PAGE - 8 - len('{"":{"dtype":"F16","shape":[1,1],"data_offsets":[0,2]}}') + extra)
    header = encode_header([make_table(name, 1, 1, "fp16")])
    assert len(header) == (2 * PAGE if extra > 0 else PAGE)
    assert list(safetensors.numpy.load(header + b"\0\0")) == [name]


def test_a_built_weight_file_holds_the_trained_rows_for_any_safetensors_reader(
    built_artifact: Path, rows: dict[str, torch.Tensor]
) -> None:
    manifest = read_manifest(built_artifact)
    with safetensors.safe_open(built_artifact / WEIGHTS, "numpy") as file:
        assert set(file.keys()) == set(rows)
        for name, trained in rows.items():
            expected = references.stored_rows(trained.numpy(), manifest.table[name].serving_precision)
            stored = file.get_tensor(name)
            assert stored.dtype == expected.dtype
            assert stored.tobytes() == expected.tobytes()


# --- Opening ---------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def test_every_bit_of_the_header_matters_even_where_json_would_not_care(artifact_copy: Path) -> None:
    seed = 7
    generator = random.Random(seed)
    path = artifact_copy / WEIGHTS
    manifest = read_manifest(artifact_copy)
    original = path.read_bytes()
    places = [(0, 0), (8, 0), (PAGE - 1, 3), *((generator.randrange(PAGE), generator.randrange(8)) for _ in range(200))]
    for position, bit in places:
        damaged = bytearray(original)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(WeightFileError, match=f"{WEIGHTS}: the header is not the one that follows from"):
            WeightFile(artifact_copy, manifest)


def test_a_header_that_means_the_same_in_another_order_is_refused(artifact_copy: Path) -> None:
    def reverse(data: bytearray) -> None:
        entries = json.loads(data[8:PAGE])
        text = json.dumps(dict(reversed(entries.items())), separators=(",", ":")).encode()
        data[8:PAGE] = text.ljust(PAGE - 8)

    manifest = read_manifest(artifact_copy)
    rewrite(artifact_copy / WEIGHTS, reverse)
    assert safetensors.safe_open(artifact_copy / WEIGHTS, "numpy")
    with pytest.raises(WeightFileError, match="the header is not the one that follows from the manifest's tables"):
        WeightFile(artifact_copy, manifest)


def test_a_weight_file_shorter_than_its_header_is_refused(artifact_copy: Path) -> None:
    manifest = read_manifest(artifact_copy)
    os.truncate(artifact_copy / WEIGHTS, 100)
    with pytest.raises(WeightFileError, match="the header is not the one"):
        WeightFile(artifact_copy, manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace(m, weights_offset_bytes=0), "the manifest says that data starts at 0, its tables say 4096"),
        (
            lambda m: replace(m, weights_bytes=m.weights_bytes + 2),
            r"the manifest says (\d+) bytes of rows, its tables have \d+",
        ),
        (
            lambda m: replace(m, tables=[replace(m.tables[0], offset_bytes=2), *m.tables[1:]]),
            r"table 'user': the manifest says offset 2, the layout rule gives 240",
        ),
        (
            lambda m: replace(m, tables=[replace(m.tables[0], name="users"), *m.tables[1:]]),
            "the header is not the one that follows from the manifest's tables",
        ),
    ],
    ids=["start of data", "bytes", "offset", "name"],
)
def test_a_manifest_that_disagrees_with_the_layout_is_refused(
    built_artifact: Path, change: Callable[[Manifest], Manifest], message: str
) -> None:
    with pytest.raises(WeightFileError, match=f"{WEIGHTS}: {message}"):
        WeightFile(built_artifact, change(read_manifest(built_artifact)))


def test_a_weight_file_that_is_a_link_is_not_followed(artifact_copy: Path) -> None:
    path = artifact_copy / WEIGHTS
    path.rename(artifact_copy / "elsewhere")
    path.symlink_to(artifact_copy / "elsewhere")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        WeightFile(artifact_copy, read_manifest(artifact_copy))


# --- Reading ---------------------------------------------------------------------------------------------------------


def test_rows_are_read_from_any_row_on(built_artifact: Path, rows: dict[str, torch.Tensor]) -> None:
    manifest = read_manifest(built_artifact)
    with WeightFile(built_artifact, manifest) as weights:
        for name, trained in rows.items():
            stored = torch.from_numpy(references.stored_rows(trained.numpy(), manifest.table[name].serving_precision))
            for start in {0, len(stored) // 2, len(stored) - 1}:
                out = torch.empty_like(stored[start:])
                weights.read_rows(manifest.table[name], start, tensor_bytes(out))
                assert torch.equal(out, stored[start:])


def test_a_file_that_is_truncated_while_it_is_read_is_noticed(artifact_copy: Path) -> None:
    manifest = read_manifest(artifact_copy)
    with WeightFile(artifact_copy, manifest) as weights:
        os.truncate(artifact_copy / WEIGHTS, (artifact_copy / WEIGHTS).stat().st_size - 1)
        with pytest.raises(WeightFileError, match=f"{WEIGHTS}: table 'item': the file ends within the rows"):
            weights.verify_digests(1)


def test_tensor_bytes_are_the_tensor_itself() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.float16)
    view = tensor_bytes(tensor)
    assert view.nbytes == 12
    view[:] = bytes(range(12))
    assert tensor.numpy().tobytes() == bytes(range(12))


# --- Mapping ---------------------------------------------------------------------------------------------------------


def mappings(path: Path) -> list[dict[str, str]]:
    """This process's mappings of a file, as /proc/self/smaps describes them: permissions under "", sizes in kB."""
    found: list[dict[str, str]] = []
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"[0-9a-f]+-[0-9a-f]+ (\S+) [0-9a-f]+ \S+ \d+ *(.*)", line)
        if head:
            ours = head[2].removesuffix(" (deleted)") == str(path)
            if ours:
                found.append({"": head[1]})
        elif ours:
            key, _, value = line.partition(":")
            found[-1][key] = value.removesuffix("kB").strip()
    return found


@pytest.fixture
def written_back(artifact_copy: Path) -> Path:
    """A copy that nothing else maps, on the disk: the kernel counts a page that is not yet there as dirty."""
    fd = os.open(artifact_copy / WEIGHTS, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return artifact_copy


@pytest.fixture
def mapped(built_artifact: Path) -> Iterator[torch.Tensor]:
    with WeightFile(built_artifact, read_manifest(built_artifact)) as weights:
        yield weights.map()


def test_the_mapping_is_the_data_of_the_file(built_artifact: Path, mapped: torch.Tensor) -> None:
    assert mapped.dtype is torch.uint8
    assert mapped.numpy().tobytes() == (built_artifact / WEIGHTS).read_bytes()[PAGE:]
    assert mapped.data_ptr() % PAGE == 0


def test_two_loads_in_one_process_share_pages_that_nobody_can_write(written_back: Path) -> None:
    artifacts = [load_artifact(written_back) for _ in range(2)]
    request = {name: [[0]] for name in FEATURES}
    first, second = (artifact(request).values for artifact in artifacts)
    assert torch.equal(first, second)

    found = mappings(written_back / WEIGHTS)
    assert len(found) == 2
    for mapping in found:
        assert mapping[""] == "r--s"
        assert mapping["Anonymous"] == "0"
        assert mapping["Private_Dirty"] == "0"


def test_two_processes_share_pages_and_a_write_is_a_segmentation_fault(written_back: Path) -> None:
    """As documented: the rows cannot be changed by accident, in this process or for another."""
    program = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from runtime_py.manifest_reader import read_manifest
from runtime_py.weights import WeightFile
folder = Path(sys.argv[1])
weights = WeightFile(folder, read_manifest(folder)).map()
print(int(weights.sum()), flush=True)
sys.stdin.readline()
weights[0] = 1
"""
    with WeightFile(written_back, read_manifest(written_back)) as weights:
        mapped = weights.map()
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(written_back)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert int(child.stdout.readline()) == int(mapped.sum())  # both have touched every page
            for mapping in mappings(written_back / WEIGHTS):
                assert mapping[""] == "r--s"
                assert mapping["Anonymous"] == "0"
                assert mapping["Private_Dirty"] == "0"
                shared_kb = int(mapping["Shared_Clean"]) + int(mapping["Shared_Dirty"])
                assert shared_kb * 1024 >= mapped.numel()
            child.stdin.write("\n")
            child.stdin.close()
            assert child.wait() == -signal.SIGSEGV
        weights.verify_digests(1)


def test_the_mapping_outlives_close_and_the_file(artifact_copy: Path) -> None:
    expected = (artifact_copy / WEIGHTS).read_bytes()[PAGE:]
    with WeightFile(artifact_copy, read_manifest(artifact_copy)) as weights:
        mapped = weights.map()
    weights.close()  # a second time, to no effect
    (artifact_copy / WEIGHTS).unlink()
    gc.collect()
    assert mapped.numpy().tobytes() == expected


def test_what_was_opened_is_what_is_mapped_whatever_happens_to_the_path(artifact_copy: Path) -> None:
    path = artifact_copy / WEIGHTS
    expected = path.read_bytes()
    with WeightFile(artifact_copy, read_manifest(artifact_copy)) as weights:
        (artifact_copy / "other").write_bytes(b"x" * len(expected))
        (artifact_copy / "other").rename(path)
        weights.verify_digests(1)
        assert weights.map().numpy().tobytes() == expected[PAGE:]


def test_dropping_an_artifact_unmaps_its_rows(artifact_copy: Path) -> None:
    """A server that swaps artifacts must not gather mappings or open files."""
    load_artifact(artifact_copy)
    gc.collect()
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        artifact = load_artifact(artifact_copy)
        assert len(mappings(artifact_copy / WEIGHTS)) == 1
        del artifact
        gc.collect()
        assert not mappings(artifact_copy / WEIGHTS)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_refused_artifact_leaves_no_file_open(artifact_copy: Path) -> None:
    def refused(expected: type[Exception]) -> None:
        with pytest.raises(expected):
            load_artifact(artifact_copy)

    refused_header = artifact_copy / WEIGHTS
    original = refused_header.read_bytes()
    manifest = read_manifest(artifact_copy)
    library = replace(manifest.graphs[0], operator_libraries=["no_such_library"])
    no_library = replace(manifest, graphs=[library]).to_bytes()
    for _ in range(2):
        open_files = len(os.listdir("/proc/self/fd"))
        refused_header.write_bytes(b"\0" + original[1:])
        refused(WeightFileError)
        refused_header.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        refused(DigestMismatchError)
        refused_header.write_bytes(original)
        (artifact_copy / "manifest.json").write_bytes(no_library)
        refused(GraphError)
        (artifact_copy / "manifest.json").write_bytes(manifest.to_bytes())
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == open_files
