"""What becomes of ids outside their table, and that a request is left as it is."""

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FEATURES, TABLES

from runtime_py import Artifact, InvalidInputError, load_artifact
from runtime_py.checks import count_ids, describe, parse_policy
from runtime_py.manifest_reader import read_manifest

SIZES = {"user": 300, "item": 41, "last_item": 41, "tag": 7, "age": 1}
OUTSIDE: dict[str, list[list[int]]] = {
    "user": [[300, 1], [-1], [2]],
    "item": [[40], [], [41, 41]],
    "last_item": [[], [], []],
    "tag": [[6], [7, 0], []],
    "age": [[0], [0], [-(2**63)]],
}
COUNTS = {"user": 2, "item": 2, "tag": 1, "age": 1}


@pytest.fixture(scope="module")
def artifact(built_artifact: Path) -> Artifact:
    return load_artifact(built_artifact)


def replaced(bags: Mapping[str, Sequence[Sequence[int]]], row: int) -> dict[str, list[list[int]]]:
    """The bags with `row` for each id outside."""
    return {
        name: [[i if 0 <= i < SIZES[name] else row for i in bag] for bag in feature] for name, feature in bags.items()
    }


# --- Policies --------------------------------------------------------------------------------------------------------


def test_a_row_takes_the_place_of_ids_outside_and_they_are_counted_by_feature(artifact: Artifact) -> None:
    default = artifact.with_invalid_ids("row:0")
    pooled = default(OUTSIDE)
    assert torch.equal(pooled.values, artifact(replaced(OUTSIDE, 0)).values)
    assert pooled.invalid_ids == COUNTS
    assert pooled.unknown_ids == {}
    assert default.invalid_id_counts == {**dict.fromkeys(FEATURES, 0), **COUNTS}
    assert artifact.invalid_id_counts == dict.fromkeys(FEATURES, 0)


def test_zero_vectors_are_counted_by_feature_too(artifact: Artifact) -> None:
    zeroing = artifact.with_invalid_ids("zero")
    assert zeroing(OUTSIDE).invalid_ids == COUNTS
    assert zeroing({name: [[0]] for name in FEATURES}).invalid_ids == {}
    values = torch.tensor([300, 41, 0, 0, 0])
    zeroing.lookup(values, torch.ones(5, dtype=torch.int32))
    assert zeroing.invalid_id_counts == {"user": 3, "item": 3, "last_item": 0, "tag": 1, "age": 1}
    assert values.tolist() == [300, 41, 0, 0, 0]


@given(data=st.data(), batch=st.integers(1, 4), policy=st.sampled_from(["zero", "row:0"]))
@settings(deadline=None, max_examples=60)
def test_counts_are_those_of_a_plain_loop(artifact: Artifact, data: st.DataObject, batch: int, policy: str) -> None:
    ids = st.lists(st.integers(-2, 305), max_size=5)
    bags = {name: data.draw(st.lists(ids, min_size=batch, max_size=batch), name) for name in FEATURES}
    outside = {name: sum(not 0 <= i < SIZES[name] for bag in bags[name] for i in bag) for name in FEATURES}
    assert artifact.with_invalid_ids(policy)(bags).invalid_ids == {name: n for name, n in outside.items() if n}


def test_a_row_that_a_table_does_not_have_is_refused(artifact: Artifact) -> None:
    with pytest.raises(ValueError, match=re.escape("invalid_ids is 'row:1', and table 'age' has rows [0, 0]")):
        artifact.with_invalid_ids("row:1")


def test_a_policy_is_parsed_into_the_row_that_is_looked_up(built_artifact: Path) -> None:
    tables = [table for table in read_manifest(built_artifact).tables if table.name != "age"]
    assert [parse_policy("x", policy, tables) for policy in ("error", "zero", "row:0", "row:6")] == [None, -1, 0, 6]
    with pytest.raises(ValueError, match="x is 'row:7', and table 'tag' has rows"):
        parse_policy("x", "row:7", tables)


def test_the_counts_of_an_answer_are_its_own(artifact: Artifact) -> None:
    request = {name: [[0]] for name in FEATURES}
    counts: Any = artifact(request).invalid_ids
    with pytest.raises(TypeError):
        counts["user"] = 99
    assert artifact.with_invalid_ids("zero")(request).invalid_ids == {}


def test_counts_of_many_threads_add_up(artifact: Artifact) -> None:
    zeroing = artifact.with_invalid_ids("zero")

    def serve() -> None:
        for _ in range(200):
            zeroing(OUTSIDE)

    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert zeroing.invalid_id_counts == {**dict.fromkeys(FEATURES, 0), **{name: 1600 * n for name, n in COUNTS.items()}}


def test_a_request_without_invalid_ids_takes_no_lock(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    class Locked:
        def __enter__(self) -> None:
            raise AssertionError("a lock on the hot path")

        def __exit__(self, *_: object) -> None: ...

    zeroing = artifact.with_invalid_ids("zero")
    monkeypatch.setattr(zeroing._invalid, "_lock", Locked())
    zeroing({name: [[0]] for name in FEATURES})
    with pytest.raises(AssertionError, match="hot path"):  # and it is the lock that counting takes
        zeroing(OUTSIDE)


@pytest.mark.parametrize("policy", ["error", "zero", "row:0"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_no_policy_changes_a_request(artifact: Artifact, policy: str, dtype: torch.dtype) -> None:
    values = torch.tensor([300, 41, -1, 7, 0], dtype=dtype)
    lengths = torch.ones(5, dtype=torch.int32)
    before = values.clone(), lengths.clone()
    loaded = artifact.with_invalid_ids(policy)
    if policy == "error":
        with pytest.raises(InvalidInputError):
            loaded.lookup(values, lengths)
    else:
        loaded.lookup(values, lengths)
    assert torch.equal(values, before[0])
    assert torch.equal(lengths, before[1])


# --- A feature without ids must not be judged by another's ----------------------------------------------------------


@pytest.mark.parametrize("first", range(5))
def test_a_feature_without_ids_is_not_judged_by_the_ids_behind_it(artifact: Artifact, first: int) -> None:
    """Its segment is empty, and the largest id "of it" is the next feature's first."""
    for kept in range(2**5):
        bags: dict[str, list[list[int]]] = {
            name: [[SIZES[name] - 1] if kept >> number & 1 and number >= first else []]
            for number, name in enumerate(FEATURES)
        }
        assert torch.isfinite(artifact(bags).values).all()


# --- Messages --------------------------------------------------------------------------------------------------------


def test_marked_ids_are_described_and_counted_by_feature() -> None:
    offsets = np.array([0, 2, 2, 3, 6])  # a: bags of 2 and 0; b: of 1 and 3
    marks = np.array([0, 1, 0, 0, 1, 1], bool)
    text = describe(["a", "b"], offsets, marks, lambda feature, position: f"<{feature} {position}>")
    assert text == "feature 'a', bag 0, position 1: <0 1>; feature 'b', bag 1, position 1: <1 4> (and 1 more)"
    assert count_ids(["a", "b"], marks, offsets[:-1:2]) == {"a": 1, "b": 2}


# --- Extra features --------------------------------------------------------------------------------------------------


def with_extra(form: str, **bags: list[list[int]]) -> Any:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    features = {**{name: [[0], [0]] for name in FEATURES}, **bags}
    if form == "mapping":
        return features
    flat = [i for feature in features.values() for bag in feature for i in bag]
    lengths = [len(bag) for feature in features.values() for bag in feature]
    return KeyedJaggedTensor(
        keys=list(features), values=torch.tensor(flat, dtype=torch.int64), lengths=torch.tensor(lengths)
    )


@pytest.mark.parametrize("form", ["mapping", "KeyedJaggedTensor"])
def test_extra_features_are_refused_or_on_request_passed_over(artifact: Artifact, form: str) -> None:
    expected = artifact(with_extra(form, user=[[5], []])).values
    request = with_extra(form, users=[[10**9], [1, 2, 3]], user=[[5], []], zzz=[[], []])
    with pytest.raises(InvalidInputError, match=r"^unknown feature 'users'; did you mean 'user'\?"):
        artifact(request)
    assert torch.equal(artifact(request, extra_features="ignore").values, expected)
    with pytest.raises(ValueError, match="extra_features must be 'error' or 'ignore', got 'drop'"):
        artifact(request, extra_features="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["mapping", "KeyedJaggedTensor"])
def test_a_missing_feature_is_an_error_also_where_extra_ones_are_passed_over(artifact: Artifact, form: str) -> None:
    features = with_extra("mapping")
    features["usr"] = features.pop("user")
    request = features
    if form == "KeyedJaggedTensor":
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        ones = torch.ones(2 * len(features), dtype=torch.int64)
        request = KeyedJaggedTensor(keys=list(features), values=ones * 0, lengths=ones)
    with pytest.raises(InvalidInputError, match=r"^missing feature 'user'; give every one of "):
        artifact(request, extra_features="ignore")


def test_the_tables_of_these_tests_are_those_of_the_artifact() -> None:
    named = {f: t["num_embeddings"] for t in TABLES for f in t.get("feature_names", [t["name"]])}
    assert named == SIZES
