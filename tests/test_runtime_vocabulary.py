"""The loader's vocabularies: entity ids to rows, from pages that every process shares."""

import gc
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ENTITIES

from runtime_py import Artifact, GraphError, InvalidInputError, Vocabulary, VocabularyFileError, load_artifact
from runtime_py.digests import Digest
from runtime_py.manifest import StoredVocabulary
from runtime_py.manifest_reader import read_manifest
from runtime_py.tensor_file import encode_header
from runtime_py.vocabulary import VocabularyFile

USERS = "vocab/user.safetensors"


@pytest.fixture(scope="module")
def artifact(vocabulary_artifact: Path) -> Artifact:
    return load_artifact(vocabulary_artifact)


@pytest.fixture(scope="module")
def users(artifact: Artifact) -> Vocabulary:
    return artifact.vocabularies["user"]


def test_known_ids_give_their_rows_and_unknown_ones_minus_one(artifact: Artifact) -> None:
    for table, entities in ENTITIES.items():
        vocabulary = artifact.vocabularies[table]
        assert len(vocabulary) == len(entities)
        rows = vocabulary.rows(torch.tensor([*entities, -1, 17, 2**62, entities[3]]))
        assert rows.dtype is torch.int64
        assert rows.tolist() == [*range(len(entities)), -1, -1, -1, 3]
    assert repr(artifact.vocabularies["item"]) == "Vocabulary(table='item', entities=41)"


def test_no_ids_give_no_rows(users: Vocabulary) -> None:
    rows = users.rows(torch.empty(0, dtype=torch.int64))
    assert (rows.shape, rows.dtype) == ((0,), torch.int64)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_narrow_ids_are_widened_where_fbgemm_would_find_none(artifact: Artifact, dtype: torch.dtype) -> None:
    rows = artifact.vocabularies["item"].rows(torch.tensor([100, 0, 1, 99], dtype=dtype))
    assert rows.tolist() == [5, 2, 4, -1]


def test_ids_in_any_layout_are_read_and_left_as_they_are(users: Vocabulary) -> None:
    ids = torch.tensor(ENTITIES["user"])
    before = ids.clone()
    assert users.rows(ids[::3]).tolist() == list(range(0, 250, 3))
    assert users.rows(ids[7:8].expand(5)).tolist() == [7] * 5
    assert users.rows(ids.flip(0)).tolist() == list(range(249, -1, -1))
    assert torch.equal(ids, before)


def test_the_default_device_of_the_process_does_not_matter(vocabulary_artifact: Path) -> None:
    ids = torch.tensor(ENTITIES["user"][:3])
    with torch.device("meta"):
        vocabulary = load_artifact(vocabulary_artifact).vocabularies["user"]
        assert vocabulary.rows(ids).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        ([1.5], "ids: expected int64 or int32, got float64"),
        ([1, True], "ids: expected int64 or int32, got [1, True]"),
        (np.array([2**63], np.uint64), "ids: expected int64 or int32, got uint64"),
        ([[1]], "ids: expected one dimension, got shape [1, 1]"),
        (torch.tensor([1]).to_sparse(), "ids are [1] torch.int64 on cpu, torch.sparse_coo, expected"),
        (torch.tensor([1.0]), "ids are [1] torch.float32 on cpu, expected [N] torch.int64 on cpu"),
        (torch.tensor([True]), "ids are [1] torch.bool on cpu, expected"),
        (torch.tensor([[1]]), "ids are [1, 1] torch.int64 on cpu, expected"),
        (torch.tensor(1), "ids are [] torch.int64 on cpu, expected"),
        (torch.empty(1, dtype=torch.uint64), "ids are [1] torch.uint64 on cpu, expected"),
        (torch.empty(1, dtype=torch.int64, device="meta"), "ids are [1] torch.int64 on meta, expected"),
    ],
)
def test_what_is_no_vector_of_integers_is_refused(users: Vocabulary, ids: torch.Tensor, what: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(f"vocabulary of table 'user': {what}")):
        users.rows(ids)


@pytest.mark.parametrize("kind", [list, np.array, lambda ids: np.array(ids, ">i8"), tuple])
def test_ids_may_be_numpys_or_pythons(users: Vocabulary, kind: Callable[[list[int]], Any]) -> None:
    assert users.rows(kind([*ENTITIES["user"][:3], 17])).tolist() == [0, 1, 2, -1]
    assert users.rows([]).tolist() == []


def test_threads_may_ask_one_vocabulary_at_once(users: Vocabulary) -> None:
    ids = torch.tensor(ENTITIES["user"]).repeat(200)
    expected = torch.arange(250).repeat(200)
    wrong: list[int] = []

    def ask(shift: int) -> None:
        for _ in range(20):
            if not torch.equal(users.rows(ids.roll(shift)), expected.roll(shift)):
                wrong.append(shift)

    threads = [threading.Thread(target=ask, args=(shift,)) for shift in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_artifacts_vocabularies_cannot_be_changed(artifact: Artifact, users: Vocabulary) -> None:
    with pytest.raises(TypeError):
        artifact.vocabularies["tag"] = users  # type: ignore[index]


def test_an_artifact_without_vocabularies_has_none(built_artifact: Path) -> None:
    assert dict(load_artifact(built_artifact).vocabularies) == {}


# --- The file --------------------------------------------------------------------------------------------------------


def mappings(path: Path) -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[1] for line in lines if line.removesuffix(" (deleted)").endswith(str(path))]


def test_the_file_is_mapped_shared_and_read_only_as_long_as_the_vocabulary_lives(
    vocabulary_artifact: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(vocabulary_artifact, tmp_path / "artifact"))
    vocabulary = load_artifact(folder).vocabularies["user"]
    gc.collect()
    assert mappings(folder / USERS) == ["r--s"]
    shutil.rmtree(folder)
    assert vocabulary.rows(torch.tensor(ENTITIES["user"])).tolist() == list(range(250))
    del vocabulary
    gc.collect()
    assert mappings(folder / USERS) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: replace(stored, capacity=stored.capacity - 1),
        lambda stored: replace(stored, table="users"),
        lambda stored: replace(stored, path="vocab/item.safetensors"),
    ],
    ids=["capacity", "table", "path"],
)
def test_a_file_of_another_vocabulary_is_refused(
    vocabulary_artifact: Path, change: Callable[[StoredVocabulary], StoredVocabulary]
) -> None:
    stored = change(read_manifest(vocabulary_artifact).vocabularies[0])
    text = f"{stored.path}: the header is not the one that follows from the manifest's vocabulary"
    with pytest.raises(VocabularyFileError, match=text):
        VocabularyFile(vocabulary_artifact, stored)


def test_an_fbgemm_that_hashes_otherwise_is_refused_and_finds_nothing_silently_never(
    vocabulary_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As releases did that hashed the low 32 bits: played by an operator that finds nothing."""
    import runtime_py.vocabulary as module

    monkeypatch.setattr(module, "_lookup", lambda ids, slots, span: torch.full_like(ids, -1))
    module._load_lookup.cache_clear()
    try:
        with pytest.raises(GraphError, match="hashes entity ids otherwise than the vocabularies do; install a newer"):
            load_artifact(vocabulary_artifact)
    finally:
        module._load_lookup.cache_clear()


def test_verifying_needs_no_fbgemm_and_looking_up_needs_it(vocabulary_artifact: Path) -> None:
    program = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "fbgemm_gpu" else find_spec(name, *rest)
from pathlib import Path
from runtime_py import GraphError, Vocabulary, verify_artifact
from runtime_py.vocabulary import VocabularyFile
folder = Path(sys.argv[1])
with VocabularyFile(folder, verify_artifact(folder).vocabularies[0]) as file:
    try:
        Vocabulary(file)
    except GraphError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(vocabulary_artifact)], capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "a vocabulary needs FBGEMM's operators (fbgemm_gpu_tbe_inference), and no fbgemm_gpu is installed; "
        "install fbgemm-gpu-cpu or fbgemm-gpu\n"
    )


def test_a_damaged_table_without_an_empty_slot_is_refused_before_a_search_without_end(
    vocabulary_artifact: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(vocabulary_artifact, tmp_path / "artifact"))
    with (copy / USERS).open("r+b") as file:
        data = bytearray(file.read())
        data[4096:] = bytes(len(data) - 4096)  # every slot holds the id 0
        file.seek(0)
        file.write(data)
    with pytest.raises(VocabularyFileError, match="no slot is empty; the file is damaged"):
        load_artifact(copy, verify="sizes")


@pytest.mark.parametrize("empty", [0, 70_000], ids=["first", "beyond the first chunk"])
def test_one_empty_slot_ends_every_search(tmp_path: Path, empty: int) -> None:
    capacity = 70_001
    stored = StoredVocabulary("user", USERS, 1, capacity, Digest("", ""))
    slots = torch.zeros(capacity, 2, dtype=torch.int64)
    slots[empty] = -1
    (tmp_path / "vocab").mkdir()
    (tmp_path / USERS).write_bytes(encode_header([stored]) + slots.numpy().tobytes())
    with VocabularyFile(tmp_path, stored) as file:
        assert Vocabulary(file).rows(torch.tensor([17, 2**62, -5])).tolist() == [-1, -1, -1]
