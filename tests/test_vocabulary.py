"""The builder's vocabularies: the bytes follow from the mapping alone, and a mapping that is none is refused."""

import json
import os
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import find_row, hash_entity, vocabulary_slots
from support import ENTITIES, run_export, state_dict, write_config, write_entities
from upath import UPath

import export.vocabulary
from export.config import EmbeddingBagConfig
from export.errors import ExportError, GateError, VocabularyError
from export.vocabulary import WrittenVocabulary, vocabulary_path, write_vocabulary
from runtime_py import load_artifact, verify_artifact
from runtime_py.vocabulary import Vocabulary, VocabularyFile

EXTREMES = [-(2**63), 2**63 - 1, 0, 1, -2, 2**32, -(2**32) - 1]


def write(folder: Path, rows: int, name: str = "user", **vocab: Any) -> WrittenVocabulary:
    """The vocabulary of the parquet files in `folder`/in, written into `folder`/out."""
    config = {"uri": str(folder / "in"), **vocab}
    table = EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=1, data_type="fp32", vocab=config)
    assert table.vocab is not None
    for part in ("out", "scratch"):
        (folder / part).mkdir(exist_ok=True)
    written = write_vocabulary(table, table.vocab, folder / "out", folder / "scratch", 2)
    assert os.listdir(folder / "scratch") == []
    return written


def refusal(folder: Path, rows: int, **vocab: Any) -> str:
    with pytest.raises(VocabularyError) as caught:
        write(folder, rows, **vocab)
    assert os.listdir(folder / "scratch") == []
    return str(caught.value)


def slots(folder: Path, name: str = "user") -> np.ndarray:
    """The hash table, as safetensors reads it."""
    return safetensors.numpy.load_file(folder / "out" / vocabulary_path(name))[name]


def split(folder: Path, pairs: Sequence[tuple[int, int]], ends: Sequence[int]) -> None:
    """Parquet files of (id, row), cut at `ends`."""
    for number, (start, end) in enumerate(zip([0, *ends], [*ends, len(pairs)], strict=True)):
        ids, rows = (np.array([pair[i] for pair in pairs[start:end]], np.int64) for i in (0, 1))
        write_entities(folder / "in" / f"{number:03}.parquet", ids, rows)


# --- The bytes -------------------------------------------------------------------------------------------------------

MAPPINGS = st.dictionaries(
    st.integers(0, 99),
    st.one_of(st.sampled_from(EXTREMES), st.integers(-20, 20), st.integers(-(2**63), 2**63 - 1)).filter(
        lambda entity: entity != -1
    ),
    min_size=1,
    max_size=60,
).map(lambda entity_of_row: {entity: row for row, entity in entity_of_row.items()})


@given(MAPPINGS, st.randoms(use_true_random=False), st.integers(0, 3))
@settings(max_examples=40)
def test_any_mapping_in_any_order_and_partition_gives_the_bytes_of_the_reference_and_finds_every_entity(
    row_of_entity: Mapping[int, int], shuffle: random.Random, cuts: int
) -> None:
    pairs = list(row_of_entity.items())
    shuffle.shuffle(pairs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split(folder, pairs, sorted(shuffle.randrange(len(pairs) + 1) for _ in range(cuts)))
        written = write(folder, 100)
        found = slots(folder)
        expected = vocabulary_slots({row: entity for entity, row in pairs}, 2 * len(pairs))
        assert found.tobytes() == expected.tobytes()
        with VocabularyFile(folder / "out", written.stored) as file:
            vocabulary = Vocabulary(file)
    near = {entity + step for entity in row_of_entity for step in (-1, 1)} | set(EXTREMES) | {-1}
    asked = [*row_of_entity, *(entity for entity in sorted(near) if -(2**63) <= entity < 2**63)]
    rows = vocabulary.rows(torch.tensor(asked)).tolist()
    assert rows == [row_of_entity.get(entity, -1) for entity in asked]
    assert rows == [find_row(found, entity) for entity in asked]


def test_chunks_batches_files_and_order_make_no_difference_to_a_large_vocabulary(tmp_path: Path) -> None:
    """More rows than a chunk of the writer has, and more entities than a batch of the reader."""
    rng = np.random.default_rng(5)
    ids = np.unique(rng.integers(-(2**63), 2**63 - 1, 150_000))
    rows = np.sort(rng.permutation(200_000)[: len(ids)])
    written = []
    for number, parts in enumerate((1, 7)):
        order = rng.permutation(len(ids))
        for part, chosen in enumerate(np.array_split(order, parts)):
            write_entities(tmp_path / str(number) / "in" / f"{part}.parquet", ids[chosen], rows[chosen])
        written.append(write(tmp_path / str(number), 200_000))
    assert written[0].stored == written[1].stored
    assert written[0].file == written[1].file
    first, second = ((tmp_path / n / "out/vocab/user.safetensors").read_bytes() for n in "01")
    assert first == second
    assert written[0].stored.capacity == 2 * len(ids)
    assert written[0].figures.holes == 200_000 - len(ids)


def test_the_file_is_one_of_safetensors_and_starts_its_data_on_a_page(tmp_path: Path) -> None:
    write_entities(tmp_path / "in" / "a.parquet", EXTREMES)
    written = write(tmp_path, 10)
    data = (tmp_path / "out/vocab/user.safetensors").read_bytes()
    text = b'{"user":{"dtype":"I64","shape":[14,2],"data_offsets":[0,224]}}'
    assert data[:4096] == (4088).to_bytes(8, "little") + text.ljust(4088)
    assert len(data) == written.file.bytes == 4096 + 14 * 16
    assert slots(tmp_path).dtype == np.int64


@pytest.mark.parametrize(
    ("table", "path"),
    [
        ("user", "user"),
        ("a/b", "a%2Fb"),
        ("..", "%2E%2E"),
        (".hidden", "%2Ehidden"),
        ("größe 1", "gr%C3%B6%C3%9Fe%201"),
        ("100%", "100%25"),
        ("a\\b~c-d_e", "a%5Cb~c-d_e"),
    ],
)
def test_the_file_name_escapes_what_is_not_safe_in_one(table: str, path: str) -> None:
    assert vocabulary_path(table) == f"vocab/{path}.safetensors"


def test_a_table_name_that_makes_too_long_a_file_name_is_refused() -> None:
    assert len(vocabulary_path("n" * 243)) == len("vocab/") + 255
    with pytest.raises(VocabularyError, match="would be 256 bytes long, expected at most 255; rename the table"):
        vocabulary_path("n" * 244)
    with pytest.raises(VocabularyError, match="would be 732 bytes long"):
        vocabulary_path("ß" * 120)


def test_the_default_device_of_the_process_does_not_matter(tmp_path: Path) -> None:
    write_entities(tmp_path / "in" / "a.parquet", EXTREMES)
    with torch.device("meta"):
        write(tmp_path, 10)
    assert slots(tmp_path).tobytes() == vocabulary_slots(dict(enumerate(EXTREMES)), 2 * len(EXTREMES)).tobytes()


# --- What is no mapping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [0, 70_000], ids=["in one batch", "in two batches"])
def test_a_row_of_two_entities_is_refused_with_both(tmp_path: Path, between: int) -> None:
    last = between + 1
    rows = np.arange(last + 1)
    rows[last] = 0
    write_entities(tmp_path / "in" / "a.parquet", 10 + np.arange(last + 1), rows)
    place, entity, other = (last, 10 + last, 10) if between else (0, 10, 11)
    assert refusal(tmp_path, last + 1) == (
        f"table 'user': {tmp_path}/in/a.parquet, row {place}: index 0 of entity {entity} "
        f"is also that of entity {other}; every row has at most one entity"
    )


@pytest.mark.parametrize("other_row", [0, 1], ids=["with one row", "with two rows"])
@pytest.mark.parametrize("between", [0, 70_000], ids=["in one batch", "in two batches"])
def test_an_entity_that_is_given_twice_is_refused_with_both_places(
    tmp_path: Path, between: int, other_row: int
) -> None:
    filler = np.arange(between)
    write_entities(tmp_path / "in" / "a.parquet", np.array([7, *(100 + filler)]), np.array([0, *(2 + filler)]))
    write_entities(tmp_path / "in" / "b.parquet", [8, 7], [between + 5, other_row])
    assert refusal(tmp_path, between + 10) == (
        f"table 'user': entity 7 is given twice: {tmp_path}/in/a.parquet, row 0 (index 0); "
        f"{tmp_path}/in/b.parquet, row 1 (index {other_row}); every entity has one row"
    )


def test_the_same_line_twice_is_an_entity_that_is_given_twice(tmp_path: Path) -> None:
    write_entities(tmp_path / "in" / "a.parquet", [5, 7, 7], [0, 3, 3])
    assert "entity 7 is given twice" in refusal(tmp_path, 10)
    assert "a.parquet, row 1 (index 3); " in refusal(tmp_path, 10)


def test_a_vocabulary_of_nobody_is_refused(tmp_path: Path) -> None:
    split(tmp_path, [], [0])
    assert refusal(tmp_path, 10) == (
        "table 'user': the vocabulary has no entity (2 files without rows); write its files again, "
        "or remove the key 'vocab'"
    )


def test_a_table_of_one_row_can_have_a_vocabulary(tmp_path: Path) -> None:
    write_entities(tmp_path / "in" / "a.parquet", [2**63 - 1])
    assert write(tmp_path, 1).figures.coverage == 1.0


# --- Coverage --------------------------------------------------------------------------------------------------------


def test_holes_are_counted_and_gated(tmp_path: Path) -> None:
    write_entities(tmp_path / "in" / "a.parquet", [5, 6, 7], [0, 9, 4])
    with pytest.raises(
        GateError, match=re.escape("table 'user': coverage is 0.3 (3 entities for 10 rows), below min_coverage: 0.31")
    ):
        write(tmp_path, 10, min_coverage=0.31)
    assert os.listdir(tmp_path / "scratch") == []
    assert asdict(write(tmp_path, 10, min_coverage=0.3).figures) == {
        "table": "user",
        "entities": 3,
        "rows": 10,
        "holes": 7,
        "coverage": 0.3,
        "capacity": 6,
        "files": ["a.parquet"],
    }


@pytest.mark.parametrize("uri", ["memory://{}/a.parquet?X-Amz-Signature=0/1", "memory://{}/a.parquet#key"])
def test_the_report_names_a_file_without_the_secrets_of_its_url(tmp_path: Path, uri: str) -> None:
    uri = uri.format(tmp_path.name)
    UPath(uri).write_bytes(write_entities(tmp_path / "a.parquet", [5]).read_bytes())
    assert write(tmp_path, 1, uri=uri).figures.files == ["a.parquet"]


def test_the_report_names_a_file_on_disk_as_it_is(tmp_path: Path) -> None:
    write_entities(tmp_path / "in" / "a?b#c@d.parquet", [5])
    assert write(tmp_path, 1).figures.files == ["a?b#c@d.parquet"]


# --- Nothing is believed ---------------------------------------------------------------------------------------------


def test_a_table_that_was_written_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entities(tmp_path / "in" / "a.parquet", np.arange(100, 200))
    insert = export.vocabulary._insert_entities

    def damage(slot: int, value: tuple[int, int]) -> None:
        def insert_and_damage(path: Path, *arguments: Any) -> None:
            insert(path, *arguments)
            with path.open("r+b") as file:
                file.seek(4096 + 16 * slot)
                file.write(np.array(value, np.int64).tobytes())

        monkeypatch.setattr(export.vocabulary, "_insert_entities", insert_and_damage)

    expected = vocabulary_slots(dict(enumerate(range(100, 200))), 200)
    slot = int(np.flatnonzero(expected[:, 0] == 142)[0])
    damage(slot, (2**40, 42))
    assert "row 42: entity 142 is not found in what was written" in refusal(tmp_path, 100)
    (tmp_path / "out/vocab/user.safetensors").unlink()
    empty = next(slot for slot in range(200) if (expected[slot - 1 : slot + 2, 0] == -1).all())
    stranger = next(entity for entity in range(-2, -(10**6), -1) if hash_entity(entity) % 200 == empty)
    damage(empty, (stranger, 3))
    monkeypatch.setattr(export.vocabulary, "_choose_strangers", lambda _: np.array(sorted([stranger, 7, 150])))
    assert f"entity {stranger} is in none of the files, and is found in what was written" in refusal(tmp_path, 100)


def test_files_that_change_during_the_build_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entities(tmp_path / "in" / "a.parquet", [5, 6, 7])
    insert = export.vocabulary._insert_entities

    def insert_and_change(*arguments: Any) -> None:
        insert(*arguments)
        write_entities(tmp_path / "in" / "a.parquet", [5, 6])

    monkeypatch.setattr(export.vocabulary, "_insert_entities", insert_and_change)
    assert "had 3 entities, and then 2: its files have changed during the build" in refusal(tmp_path, 10)


def test_an_entity_whose_row_changes_during_the_build_is_not_said_to_be_given_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_entities(tmp_path / "in" / "a.parquet", [5, 6, 7])
    insert = export.vocabulary._insert_entities

    def insert_and_change(*arguments: Any) -> None:
        insert(*arguments)
        write_entities(tmp_path / "in" / "a.parquet", [5, 6, 7], [0, 1, 3])

    monkeypatch.setattr(export.vocabulary, "_insert_entities", insert_and_change)
    assert refusal(tmp_path, 10) == (
        "table 'user': entity 7 is no longer given as it was when its files were first read; "
        "they have changed during the build, or this is a defect: build again"
    )


# --- The whole build -------------------------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A configuration with one table of 10 rows, `a/b`, whose vocabulary is in vocab/, relative to it."""
    torch.save(state_dict({"a/b": torch.randn(10, 4)}), tmp_path / "snapshot.pt")
    write_entities(tmp_path / "vocab" / "part-0.parquet", [50, 60], [9, 0])
    write_entities(tmp_path / "vocab" / "part-1.parquet", [-70], [4])
    (tmp_path / "vocab" / "_SUCCESS").touch()
    table = {"name": "a/b", "num_embeddings": 10, "embedding_dim": 4, "data_type": "fp32", "vocab": "vocab"}
    (tmp_path / "out").mkdir()
    return write_config(tmp_path / "release.yaml", tmp_path / "snapshot.pt", [table])


def configure(config: Path, **vocab: Any) -> None:
    document = json.loads(config.read_text())
    document["large_embeddings"]["tables"][0]["vocab"] = {"uri": "vocab", **vocab}
    config.write_text(json.dumps(document))


def test_a_vocabulary_from_end_to_end_through_the_command_line(release: Path) -> None:
    out = release.parent / "out"
    done = run_export("build", "--config", release, "--output", out / "a", "--json")
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    (figures,) = built["vocabularies"]
    assert (figures["table"], figures["coverage"], figures["files"]) == (
        "a/b",
        0.3,
        ["part-0.parquet", "part-1.parquet"],
    )
    assert built["bytes"]["vocab/a%2Fb.safetensors"] == 4096 + 6 * 16
    assert built["seconds"].keys() >= {"vocabularies"}
    assert json.loads((out / "a/reports/vocabulary.json").read_text()) == {"tables": [figures]}
    line = "vocabulary a/b: 3 entities, 30 % of the rows, 4.2 kB"
    assert line in run_export("inspect", out / "a").stdout.splitlines()
    assert run_export("verify", out / "a").returncode == 0
    assert os.listdir(out) == ["a"]

    configure(release, entity_id="entity_id")
    assert line in run_export("build", "--config", release, "--output", out / "b").stdout.splitlines()
    assert verify_artifact(out / "a").artifact_id == verify_artifact(out / "b").artifact_id
    vocabulary = load_artifact(out / "a").vocabularies["a/b"]
    assert vocabulary.rows(torch.tensor([60, -70, 50, 51])).tolist() == [0, 4, 9, -1]


def test_another_partition_gives_the_same_artifact_and_another_mapping_another(release: Path) -> None:
    from export import build_artifact

    folder = release.parent
    first = build_artifact(release, folder / "out/a", workers=1)
    for path in (folder / "vocab").glob("part-*"):
        path.unlink()
    write_entities(folder / "vocab" / "x.parquet", [-70, 60, 50], [4, 0, 9])
    second = build_artifact(release, folder / "out/b", workers=2)
    assert first.manifest.artifact_id == second.manifest.artifact_id
    assert first.manifest.vocabularies == second.manifest.vocabularies
    write_entities(folder / "vocab" / "x.parquet", [-70, 60, 50], [4, 0, 8])
    assert build_artifact(release, folder / "out/c", workers=2).manifest.artifact_id != first.manifest.artifact_id


def test_a_build_with_a_vocabulary_that_is_refused_leaves_nothing(release: Path) -> None:
    from export import build_artifact

    out = release.parent / "out"
    configure(release, min_coverage=0.5)
    done = run_export("build", "--config", release, "--output", out / "a")
    assert done.returncode == 3
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line == "error: table 'a/b': coverage is 0.3 (3 entities for 10 rows), below min_coverage: 0.5"
    for vocab in ({"index": "row"}, {"uri": "nowhere"}):
        configure(release, **vocab)
        with pytest.raises(ExportError, match="table 'a/b': "):
            build_artifact(release, out / "a", workers=1)
    assert os.listdir(out) == []


def test_an_artifact_without_a_vocabulary_has_no_report_on_one(built_artifact: Path) -> None:
    manifest = verify_artifact(built_artifact)
    assert manifest.vocabularies == []
    assert not [file.path for file in manifest.files if "vocab" in file.path]


def test_every_entity_of_the_fixture_is_found(vocabulary_artifact: Path) -> None:
    artifact = load_artifact(vocabulary_artifact)
    assert list(artifact.vocabularies) == ["user", "item"]
    for table, ids in ENTITIES.items():
        assert artifact.vocabularies[table].rows(torch.tensor(ids)).tolist() == list(range(len(ids)))
