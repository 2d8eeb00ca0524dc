"""Lookups of entity ids: found through the vocabularies, unknown ones refused or replaced, rows beside them."""

import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ENTITIES, FEATURES
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from runtime_py import Artifact, InvalidInputError, Jagged, VocabularyFileError, load_artifact, lookups, team

UNKNOWN = 2**62 + 1
ROWS: dict[str, list[list[int]]] = {"tag": [[6, 0], []], "age": [[], [0]]}
ENTITY_ROWS = {"user": [[0, 249, 3], []], "item": [[1], [0, 0]], "last_item": [[], [40]]}


@pytest.fixture(scope="module")
def artifact(vocabulary_artifact: Path) -> Artifact:
    return load_artifact(vocabulary_artifact)


@pytest.fixture(scope="module")
def golden() -> Artifact:
    return load_artifact(Path(__file__).parents[1] / "artifacts" / "golden" / "format-1")


def table_of(feature: str) -> str:
    return "item" if feature == "last_item" else feature


def entities(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """The entities of rows."""
    return {name: [[ENTITIES[table_of(name)][row] for row in bag] for bag in bags] for name, bags in rows.items()}


def refused(call: Callable[[], object], text: str) -> None:
    with pytest.raises(InvalidInputError, match="^" + re.escape(text)):
        call()


def test_entities_are_looked_up_as_their_rows_are(artifact: Artifact) -> None:
    pooled = artifact.lookup_entities(entities(ENTITY_ROWS), rows=ROWS)
    assert torch.equal(pooled.values, artifact({**ENTITY_ROWS, **ROWS}).values)
    assert pooled.unknown_ids == pooled.invalid_ids == {}


@pytest.mark.parametrize("keys", [["user", "item", "last_item"], ["last_item", "user", "item"]])
def test_entities_may_come_in_a_keyed_jagged_tensor(artifact: Artifact, keys: list[str]) -> None:
    given = entities(ENTITY_ROWS)
    features = KeyedJaggedTensor(
        keys=keys,
        values=torch.tensor([i for key in keys for bag in given[key] for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for key in keys for bag in given[key]]),
    )
    pooled = artifact.lookup_entities(features, rows=ROWS)
    assert torch.equal(pooled.values, artifact({**ENTITY_ROWS, **ROWS}).values)


def test_all_features_may_be_rows_beside_an_empty_keyed_jagged_tensor(artifact: Artifact) -> None:
    every = {**ENTITY_ROWS, **ROWS}
    pooled = artifact.lookup_entities(KeyedJaggedTensor.empty(), rows=every)
    assert torch.equal(pooled.values, artifact(every).values)


def test_a_keyed_jagged_tensor_needs_weights_only_for_keys_of_its_own(golden: Artifact) -> None:
    """Of the golden artifact: `user` has a vocabulary, `seen` is weighted."""
    names = [feature.name for feature in golden.manifest.features]
    rows: dict[str, Any] = {name: [[0]] for name in names if name not in ("user", "seen")}
    rows["seen"] = Jagged([2], [1], [0.5])
    features = KeyedJaggedTensor(keys=["user"], values=torch.tensor([1000]), lengths=torch.tensor([1]))
    expected = golden({**rows, "user": [[1]]}).values
    assert torch.equal(golden.lookup_entities(features, rows=rows).values, expected)
    refused(lambda: golden(keyed_rows(names)), "KeyedJaggedTensor: features ['seen'] take per-sample weights")


def keyed_rows(names: list[str]) -> KeyedJaggedTensor:
    zeros = torch.zeros(len(names), dtype=torch.int64)
    return KeyedJaggedTensor(keys=names, values=zeros, lengths=torch.ones(len(names), dtype=torch.int32))


@given(data=st.data(), batch=st.integers(0, 4))
@settings(deadline=None, max_examples=40)
def test_any_entities_are_looked_up_as_their_rows_are(artifact: Artifact, data: st.DataObject, batch: int) -> None:
    def bags(rows: int) -> list[list[int]]:
        return data.draw(st.lists(st.lists(st.integers(0, rows - 1), max_size=9), min_size=batch, max_size=batch))

    of_entities = {name: bags(len(ENTITIES[table_of(name)])) for name in ("user", "item", "last_item")}
    of_rows = {"tag": bags(7), "age": bags(1)}
    pooled = artifact.lookup_entities(entities(of_entities), rows=of_rows)
    assert torch.equal(pooled.values, artifact({**of_entities, **of_rows}).values)


def test_a_feature_with_a_vocabulary_may_be_given_as_rows(artifact: Artifact) -> None:
    given = entities({"user": ENTITY_ROWS["user"]})
    rows = {**ROWS, "item": ENTITY_ROWS["item"], "last_item": ENTITY_ROWS["last_item"]}
    pooled = artifact.lookup_entities(given, rows=rows)
    assert torch.equal(pooled.values, artifact({**ENTITY_ROWS, **ROWS}).values)


def test_a_feature_whose_table_has_no_vocabulary_is_refused_with_what_to_do(artifact: Artifact) -> None:
    text = "feature 'tag': table 'tag' has no vocabulary, so that its ids are rows: give them as rows={'tag': …}"
    refused(lambda: artifact.lookup_entities({**entities(ENTITY_ROWS), "tag": [[0], [0]]}, rows=ROWS), text)
    refused(lambda: artifact.lookup_entities({name: [[0]] for name in FEATURES if name != "age"}), text)


def test_a_feature_that_is_given_in_both_ways_is_refused(artifact: Artifact) -> None:
    text = "feature 'user' is given twice, as entities and as rows"
    refused(lambda: artifact.lookup_entities(entities(ENTITY_ROWS), rows={**ROWS, "user": [[0], [0]]}), text)


def test_what_is_missing_or_no_mapping_is_refused(artifact: Artifact) -> None:
    refused(lambda: artifact.lookup_entities(entities(ENTITY_ROWS)), "missing feature 'tag'")
    refused(lambda: artifact.lookup_entities(entities(ENTITY_ROWS), rows={"tag": ROWS["tag"]}), "missing feature 'age'")
    refused(lambda: artifact.lookup_entities({}, rows=[3]), "rows: expected a mapping by feature name, got list")
    refused(lambda: artifact.lookup_entities({"usr": [[1]]}, rows=ROWS), "unknown feature 'usr'; did you mean 'user'?")
    extra = {**entities(ENTITY_ROWS), "usr": [["?"]]}
    pooled = artifact.lookup_entities(extra, rows=ROWS, extra_features="ignore")
    assert torch.equal(pooled.values, artifact({**ENTITY_ROWS, **ROWS}).values)


@pytest.mark.parametrize("unknown", [UNKNOWN, -1, 2**63 - 1, -(2**63)])
def test_an_unknown_entity_is_refused_with_its_place_and_the_vocabulary(artifact: Artifact, unknown: int) -> None:
    given = entities(ENTITY_ROWS)
    given["user"] = [given["user"][0], [7, unknown, unknown]]
    known = ENTITIES["user"]
    assert unknown not in known
    given["user"][1][0] = known[0]
    refused(
        lambda: artifact.lookup_entities(given, rows=ROWS),
        f"feature 'user', bag 1, position 1: entity {unknown} is not in the vocabulary of table 'user', "
        "which has 250 entities (and 1 more)",
    )


@pytest.mark.parametrize("policy", ["zero", "row:2"])
def test_unknown_entities_are_replaced_and_counted_on_request(vocabulary_artifact: Path, policy: str) -> None:
    artifact = load_artifact(vocabulary_artifact)
    values = torch.tensor([UNKNOWN, ENTITIES["user"][5], UNKNOWN])
    before = values.clone()
    given: dict[str, Any] = {"user": Jagged(values, [2, 1]), "item": [[UNKNOWN], []], "last_item": [[], []]}
    pooled = artifact.lookup_entities(given, rows=ROWS, unknown_ids=policy)
    if policy == "zero":
        expected = {"user": [[5], []], "item": [[], []], "last_item": [[], []]}
    else:
        expected = {"user": [[2, 5], [2]], "item": [[2], []], "last_item": [[], []]}
    assert torch.equal(pooled.values, artifact({**expected, **ROWS}).values)
    assert pooled.unknown_ids == {"user": 2, "item": 1}
    assert artifact.unknown_id_counts == {"user": 2, "item": 1, "last_item": 0, "tag": 0, "age": 0}
    assert artifact.invalid_id_counts == dict.fromkeys(FEATURES, 0)
    assert torch.equal(values, before)


def test_rows_beside_entities_are_checked_under_their_own_policy(artifact: Artifact) -> None:
    given = {**entities(ENTITY_ROWS), "user": [[UNKNOWN], []]}
    rows = {**ROWS, "tag": [[7], [0]]}
    refused(
        lambda: artifact.lookup_entities(given, rows=rows, unknown_ids="zero"),
        "feature 'tag', bag 0, position 0: id 7 is outside [0, 6]",
    )
    zeroing = artifact.with_invalid_ids("zero")
    pooled = zeroing.lookup_entities(given, rows=rows, unknown_ids="zero")
    assert pooled.invalid_ids == {"tag": 1}
    assert pooled.unknown_ids == {"user": 1}
    assert torch.equal(pooled["user"], torch.zeros(2, 8))


@pytest.mark.parametrize("policy", ["ignore", "row:41", "row:x", 0])
def test_another_policy_is_refused(artifact: Artifact, policy: Any) -> None:
    text = (
        "unknown_ids is 'row:41', and table 'item' has rows" if policy == "row:41" else "unknown_ids must be 'error', "
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        artifact.lookup_entities(entities(ENTITY_ROWS), rows=ROWS, unknown_ids=policy)


def test_an_artifact_without_vocabularies_has_rows_only(built_artifact: Path) -> None:
    artifact = load_artifact(built_artifact)
    refused(lambda: artifact.lookup_entities({"user": [[0]]}), "feature 'user': table 'user' has no vocabulary")


def test_a_large_request_of_entities_is_split_and_written_into_the_callers_buffer(
    vocabulary_artifact: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "SPLIT_IDS", 1)
    monkeypatch.setattr(lookups, "SPLIT_BYTES", 1)
    monkeypatch.setattr(team, "PIECE_IDS", 2)
    given = {**entities(ENTITY_ROWS), "last_item": [[UNKNOWN], [ENTITIES["item"][40]]]}
    expected = artifact({**ENTITY_ROWS, **ROWS}).values
    out = torch.empty_like(expected)
    pooled = load_artifact(vocabulary_artifact, threads=2).lookup_entities(
        given, rows=ROWS, unknown_ids="zero", out=out
    )
    assert pooled.values is out
    assert torch.equal(out, expected)


def test_a_row_that_the_table_does_not_have_is_the_files_fault(vocabulary_artifact: Path, tmp_path: Path) -> None:
    """With verify="sizes" no digest is compared."""
    folder = Path(shutil.copytree(vocabulary_artifact, tmp_path / "artifact"))
    path = folder / "vocab/user.safetensors"
    data = bytearray(path.read_bytes())
    start = data.index(struct.pack("<qq", ENTITIES["user"][3], 3))
    for row in (300, -2):
        data[start + 8 : start + 16] = struct.pack("<q", row)
        path.write_bytes(data)
        for policy in ("error", "zero"):
            damaged = load_artifact(folder, verify="sizes", invalid_ids=policy)
            text = rf"^vocabulary of table 'user': gives row {row}, outside \[0, 299\]; the file is damaged: restore it or "
            with pytest.raises(VocabularyFileError, match=text):
                damaged.lookup_entities(entities(ENTITY_ROWS), rows=ROWS)
