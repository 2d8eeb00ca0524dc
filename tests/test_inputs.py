"""Requests: every form that is accepted gives the same lookup, everything else is refused by name, nothing is changed."""

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FEATURES, TABLES, make_rows, state_dict, write_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from runtime_py import Artifact, InvalidInputError, Jagged, load_artifact
from runtime_py.checks import Checked

Bags = Mapping[str, Sequence[Sequence[int]]]
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

SIZES = {
    feature: table["num_embeddings"] for table in TABLES for feature in table.get("feature_names", [table["name"]])
}
BAGS: dict[str, list[list[int]]] = {
    "user": [[0, 299], [], [7, 7, 7]],
    "item": [[40], [1, 2], []],
    "last_item": [[], [], []],
    "tag": [[0, 1, 6], [3], []],
    "age": [[0], [0, 0], []],
}
# Weights of the weighted features of `WEIGHTED_TABLES`, in the order of their ids.
WEIGHTED = {"user": [0.5, -2.0, 1.0, 0.25, 3.0], "age": [1.5, 0.1, 0.7]}
WEIGHTED_TABLES: list[dict[str, Any]] = [{**table, "weighted": table["name"] in WEIGHTED} for table in TABLES]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The kernel waits for all of its threads, which takes long where other processes want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def artifact(built_artifact: Path) -> Artifact:
    return load_artifact(built_artifact)


@pytest.fixture(scope="module")
def zeroing(built_artifact: Path) -> Artifact:
    return load_artifact(built_artifact, invalid_ids="zero")


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact with two features that take weights and three that do not."""
    from export import build_artifact

    folder = tmp_path_factory.mktemp("weighted")
    torch.save(state_dict(make_rows(WEIGHTED_TABLES)), folder / "snapshot.pt")
    config = write_config(folder / "release.yaml", folder / "snapshot.pt", WEIGHTED_TABLES)
    return load_artifact(build_artifact(config, folder / "artifact", workers=2).artifact)


@pytest.fixture(scope="module")
def stored(artifact: Artifact) -> dict[str, np.ndarray]:
    """Canonical rows by table name."""
    return {
        name: references.stored_rows(trained.numpy(), artifact.manifest.table[name].serving_precision)
        for name, trained in make_rows(TABLES).items()
    }


def expected_values(artifact: Artifact, stored: Mapping[str, np.ndarray], bags: Bags) -> torch.Tensor:
    features = [vars(feature) for feature in artifact.manifest.features]
    return torch.from_numpy(references.pooled_batch(features, stored, bags))


def flatten(bags: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    return [row for bag in bags for row in bag], [len(bag) for bag in bags]


def raw(bags: Bags) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch in the raw signature, written out independently of `RequestReader`."""
    parts = [flatten(bags[name]) for name in FEATURES]
    return (
        torch.tensor([row for values, _ in parts for row in values], dtype=torch.int64),
        torch.tensor([length for _, lengths in parts for length in lengths], dtype=torch.int32),
    )


def with_bags(**features: Any) -> dict[str, Any]:
    """A valid batch of one bag a feature, but for what is given."""
    return {**{name: [[0]] for name in FEATURES}, **features}


def refused(call: Callable[[], object], text: str) -> None:
    """The call is refused with a message that begins with `text`."""
    with pytest.raises(InvalidInputError, match="^" + re.escape(text)):
        call()


# --- Every accepted form gives the same lookup -----------------------------------------------------------------------


def jagged_with(values: Callable[[list[int]], Any], lengths: Callable[[list[int]], Any]) -> Callable[..., Any]:
    def make(bags: list[list[int]]) -> Jagged:
        flat, counts = flatten(bags)
        return Jagged(values(flat), lengths(counts))

    return make


FORMS: dict[str, Callable[[list[list[int]]], Any]] = {
    "lists": lambda bags: bags,
    "tuples": lambda bags: tuple(tuple(bag) for bag in bags),
    "ranges and lists": lambda bags: [range(bag[0], bag[0] + 1) if len(bag) == 1 else bag for bag in bags],
    "int64 arrays": lambda bags: [np.array(bag, np.int64) for bag in bags],
    "int16 arrays": lambda bags: [np.array(bag, np.int16) for bag in bags],
    "uint32 arrays": lambda bags: [np.array(bag, np.uint32) for bag in bags],
    "strided arrays": lambda bags: [np.repeat(np.array(bag, np.int64), 2)[::2] for bag in bags],
    "lists of numpy integers": lambda bags: [[np.int32(row) for row in bag] for bag in bags],
    "tensors": lambda bags: [torch.tensor(bag, dtype=torch.int64) for bag in bags],
    "int32 tensors": lambda bags: [torch.tensor(bag, dtype=torch.int32) for bag in bags],
    "an array of objects": lambda bags: np.array([[*bag] for bag in [*bags, [1, 2, 3, 4]]], object)[:-1],
    "Jagged of lists": jagged_with(list, list),
    "Jagged of tuples": jagged_with(tuple, tuple),
    "Jagged of int64 tensors": jagged_with(lambda v: torch.tensor(v, dtype=torch.int64), torch.tensor),
    "Jagged of int32 tensors": jagged_with(
        lambda v: torch.tensor(v, dtype=torch.int32), lambda v: torch.tensor(v, dtype=torch.int32)
    ),
    "Jagged of int64 arrays": jagged_with(lambda v: np.array(v, np.int64), lambda v: np.array(v, np.int64)),
    "Jagged of int32 arrays": jagged_with(lambda v: np.array(v, np.int32), lambda v: np.array(v, np.int32)),
    "Jagged of big-endian arrays": jagged_with(lambda v: np.array(v, ">i8"), lambda v: np.array(v, ">i4")),
    "big-endian arrays": lambda bags: [np.array(bag, ">i8") for bag in bags],
    "JaggedTensor": lambda bags: JaggedTensor(
        torch.tensor(flatten(bags)[0], dtype=torch.int64), lengths=torch.tensor(flatten(bags)[1])
    ),
    "JaggedTensor by offsets": lambda bags: JaggedTensor(
        torch.tensor(flatten(bags)[0], dtype=torch.int64),
        offsets=torch.tensor(np.cumsum([0, *flatten(bags)[1]])),
    ),
}


def shown(value: object) -> str:
    """An id that is the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_feature_gives_the_same_lookup(
    artifact: Artifact, stored: dict[str, np.ndarray], form: str
) -> None:
    pooled = artifact({name: FORMS[form](bags) for name, bags in BAGS.items()})
    assert torch.equal(pooled.values, expected_values(artifact, stored, BAGS))


def test_forms_may_be_mixed_in_one_batch(artifact: Artifact, stored: dict[str, np.ndarray]) -> None:
    forms = ["lists", "JaggedTensor", "int32 tensors", "Jagged of int32 arrays", "tuples"]
    features = {name: FORMS[form](BAGS[name]) for name, form in zip(FEATURES, forms, strict=True)}
    assert torch.equal(artifact(features).values, expected_values(artifact, stored, BAGS))


def test_a_matrix_is_a_batch_of_bags_of_one_length(artifact: Artifact) -> None:
    bags = [[1, 2], [3, 4], [5, 6]]
    others = {name: [[0], [0], [0]] for name in FEATURES}
    expected = artifact(others | {"user": bags})["user"]
    for matrix in (np.array(bags), torch.tensor(bags), torch.tensor(bags, dtype=torch.int32).t().contiguous().t()):
        assert torch.equal(artifact(others | {"user": matrix})["user"], expected)


def keyed(bags: Bags, keys: Sequence[str], dtype: torch.dtype = torch.int64, **options: Any) -> KeyedJaggedTensor:
    parts = [flatten(bags[name]) for name in keys]
    values = torch.tensor([row for flat, _ in parts for row in flat], dtype=dtype)
    lengths = torch.tensor([length for _, lengths in parts for length in lengths], dtype=options.pop("lengths", dtype))
    return KeyedJaggedTensor(keys=list(keys), values=values, lengths=lengths, **options)


def test_a_keyed_jagged_tensor_in_any_key_order_gives_the_same_lookup(
    artifact: Artifact, stored: dict[str, np.ndarray]
) -> None:
    expected = expected_values(artifact, stored, BAGS)
    for keys in permutations(FEATURES):
        assert torch.equal(artifact(keyed(BAGS, keys)).values, expected), keys


@pytest.mark.parametrize("values", [torch.int64, torch.int32])
@pytest.mark.parametrize("lengths", [torch.int64, torch.int32])
@pytest.mark.parametrize("keys", [FEATURES, FEATURES[::-1]], ids=["in order", "reversed"])
def test_a_keyed_jagged_tensor_may_hold_either_integer_type(
    artifact: Artifact, stored: dict[str, np.ndarray], values: torch.dtype, lengths: torch.dtype, keys: list[str]
) -> None:
    features = keyed(BAGS, keys, values, lengths=lengths)
    assert torch.equal(artifact(features).values, expected_values(artifact, stored, BAGS))


def test_a_keyed_jagged_tensor_may_be_given_by_offsets(artifact: Artifact, stored: dict[str, np.ndarray]) -> None:
    values, lengths = raw(BAGS)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    features = KeyedJaggedTensor(keys=FEATURES, values=values, offsets=offsets)
    assert torch.equal(artifact(features).values, expected_values(artifact, stored, BAGS))


@pytest.mark.parametrize("form", ["tensors", "int32 tensors", "lists", "arrays", "strided tensors"])
def test_the_raw_signature_takes_either_integer_type_in_any_memory(
    artifact: Artifact, stored: dict[str, np.ndarray], form: str
) -> None:
    values, lengths = raw(BAGS)
    convert: Callable[[torch.Tensor], Any] = {
        "tensors": lambda tensor: tensor,
        "int32 tensors": lambda tensor: tensor.to(torch.int32),
        "lists": torch.Tensor.tolist,
        "arrays": torch.Tensor.numpy,
        "strided tensors": lambda tensor: tensor.repeat_interleave(3)[::3],
    }[form]
    assert torch.equal(artifact.lookup(convert(values), convert(lengths)), expected_values(artifact, stored, BAGS))


# --- Per-sample weights ----------------------------------------------------------------------------------------------


def weighted_forms(dtype: torch.dtype) -> dict[str, Any]:
    forms: dict[str, Any] = dict(BAGS)
    for name, weights in WEIGHTED.items():
        values, lengths = flatten(BAGS[name])
        forms[name] = Jagged(values, lengths, torch.tensor(weights, dtype=dtype))
    return forms


def weighted_reference(artifact: Artifact, stored: Mapping[str, np.ndarray]) -> torch.Tensor:
    columns = []
    for feature in artifact.manifest.features:
        weights = iter(WEIGHTED.get(feature.name, []))
        columns.append(
            np.stack(
                [
                    references.pooled_bag(
                        stored[feature.table],
                        bag,
                        feature.pooling,
                        [next(weights) for _ in bag] if feature.weighted else None,
                    )
                    for bag in BAGS[feature.name]
                ]
            )
        )
    return torch.from_numpy(np.concatenate(columns, axis=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_form_of_weights_gives_the_same_lookup(
    weighted: Artifact, stored: dict[str, np.ndarray], dtype: torch.dtype
) -> None:
    expected = weighted_reference(weighted, stored)
    plain = weighted_forms(dtype)
    assert torch.equal(weighted(plain).values, expected)

    as_lists = {name: Jagged(*map(list, form)) if name in WEIGHTED else form for name, form in plain.items()}
    assert torch.equal(weighted(as_lists).values, expected)
    as_arrays = {name: Jagged(*map(np.asarray, form)) if name in WEIGHTED else form for name, form in plain.items()}
    assert torch.equal(weighted(as_arrays).values, expected)
    torchrec = {
        name: JaggedTensor(torch.tensor(form[0]), lengths=torch.tensor(form[1]), weights=form[2])
        if name in WEIGHTED
        else form
        for name, form in plain.items()
    }
    assert torch.equal(weighted(torchrec).values, expected)


@pytest.mark.parametrize("keys", [FEATURES, FEATURES[::-1], ["tag", "user", "age", "item", "last_item"]])
def test_weights_follow_their_keys_and_those_of_an_unweighted_feature_are_not_read(
    weighted: Artifact, stored: dict[str, np.ndarray], keys: list[str]
) -> None:
    """A KeyedJaggedTensor has weights for all of its values or for none."""
    weights = [weight for name in keys for weight in WEIGHTED.get(name, [float("nan")] * len(flatten(BAGS[name])[0]))]
    features = keyed(BAGS, keys, weights=torch.tensor(weights))
    assert torch.equal(weighted(features).values, weighted_reference(weighted, stored))


def test_weights_that_require_a_gradient_are_only_read(weighted: Artifact, stored: dict[str, np.ndarray]) -> None:
    features = weighted_forms(torch.float32)
    for name in WEIGHTED:
        features[name].per_sample_weights.requires_grad_(True)
    values = weighted(features).values
    assert not values.requires_grad
    assert torch.equal(values, weighted_reference(weighted, stored))


def test_missing_weights_are_refused(weighted: Artifact) -> None:
    text = "feature 'user' takes per-sample weights: give Jagged(values, lengths, per_sample_weights)"
    refused(lambda: weighted(BAGS), text)
    refused(
        lambda: weighted(keyed(BAGS, FEATURES)), "KeyedJaggedTensor: features ['age', 'user'] take per-sample weights"
    )
    refused(lambda: weighted.lookup(*raw(BAGS)), "per_sample_weights: features ['age', 'user'] take per-sample weights")


def test_unwanted_weights_are_refused(artifact: Artifact, weighted: Artifact) -> None:
    one = Jagged([0], [1], [1.0])
    refused(lambda: artifact(with_bags(user=one)), "feature 'user' takes no per-sample weights")
    refused(lambda: weighted(with_bags(user=one, age=one, tag=one)), "feature 'tag' takes no per-sample weights")
    values, lengths = raw(BAGS)
    ones = torch.ones(len(values))
    refused(
        lambda: artifact.lookup(values, lengths, ones), "per_sample_weights: this artifact takes no per-sample weights"
    )
    features = keyed(BAGS, FEATURES, weights=ones)
    refused(lambda: artifact(features), "KeyedJaggedTensor: no feature takes per-sample weights")


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([1.0], "feature 'user': per_sample_weights: 1 weights for 2 values"),
        ([1.0, 2.0, 3.0], "feature 'user': per_sample_weights: 3 weights for 2 values"),
        ([], "feature 'user': per_sample_weights: 0 weights for 2 values"),
        ([1, 2], "feature 'user': per_sample_weights: expected float32, got int64"),
        ([True, False], "feature 'user': per_sample_weights: expected float32, got bool"),
        (["1", "2"], "feature 'user': per_sample_weights: expected float32, got ['1', '2']"),
        ([[1.0], [2.0]], "feature 'user': per_sample_weights: expected one dimension, got shape [2, 1]"),
        ([1j, 2j], "feature 'user': per_sample_weights: expected float32, got complex128"),
    ],
)
def test_weights_of_a_wrong_number_or_type_are_refused(weighted: Artifact, weights: list[Any], text: str) -> None:
    age = Jagged([0], [1], [1.0])
    refused(lambda: weighted(with_bags(user=Jagged([0, 1], [2], weights), age=age)), text)


def test_weights_of_a_wrong_number_or_type_are_refused_in_the_raw_signature(weighted: Artifact) -> None:
    values, lengths = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int32)
    for weights, text in {
        torch.ones(4): "per_sample_weights: 4 weights for 5 values",
        torch.ones(5, dtype=torch.int64): "per_sample_weights: expected float32, got int64",
        torch.ones(5, 1): "per_sample_weights: expected one dimension, got shape [5, 1]",
    }.items():
        refused(lambda weights=weights: weighted.lookup(values, lengths, weights), text)


# --- Names -----------------------------------------------------------------------------------------------------------


def without(*names: str, **renamed: str) -> list[str]:
    return [renamed.get(name, name) for name in FEATURES if name not in names]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (without(user="users"), "unknown feature 'users'; did you mean 'user'?"),
        (without(last_item="lastitem"), "unknown feature 'lastitem'; did you mean 'last_item'?"),
        ([*FEATURES, "zzz"], "unknown feature 'zzz'; features: user, item, last_item, tag, age"),
        (without("tag"), "missing feature 'tag'; give every one of user, item, last_item, tag, age"),
        ([], "missing feature 'user'; give every one of user, item, last_item, tag, age"),
    ],
)
def test_unknown_and_missing_features_are_refused_in_both_forms(
    artifact: Artifact, names: list[str], text: str
) -> None:
    refused(lambda: artifact({name: [[0]] for name in names}), text)
    refused(lambda: artifact(keyed({name: [[0]] for name in names}, names)), text)


def test_a_feature_that_is_given_twice_is_refused(artifact: Artifact) -> None:
    features = keyed({name: [[0]] for name in FEATURES}, [*FEATURES, "tag"])
    refused(lambda: artifact(features), "feature 'tag' is given twice")


def test_a_name_that_is_no_string_is_refused(artifact: Artifact) -> None:
    refused(lambda: artifact({**with_bags(), 3: [[0]]}), "unknown feature '3'; features: ")


@pytest.mark.parametrize(
    "features", [None, "user", 3, [[[0]]], torch.zeros(3, dtype=torch.int64), np.zeros(3), object()]
)
def test_what_is_neither_a_mapping_nor_a_keyed_jagged_tensor_is_refused(artifact: Artifact, features: object) -> None:
    text = f"expected a mapping by feature name or a KeyedJaggedTensor, got {type(features).__name__}; features: user, "
    refused(lambda: artifact(features), text)


# --- What is no bag, and what is no id -------------------------------------------------------------------------------

BAGS_TEXT = "feature 'user': expected a sequence of bags, got "
BAG_TEXT = "feature 'user', bag 0: expected a sequence of ids, got "
ID_TEXT = "feature 'user', bag 0: an id is a 64-bit integer, got "
SUCH_AS = "; a batch is a list of bags, such as [[3, 5], []]"


@pytest.mark.parametrize(
    ("bags", "text"),
    [
        (None, BAGS_TEXT + "None"),
        (3, BAGS_TEXT + "3"),
        ("35", BAGS_TEXT + "'35'"),
        (b"35", BAGS_TEXT + "b'35'"),
        (iter([[3]]), BAGS_TEXT + "<list_iterator"),
        (np.array(3), BAGS_TEXT + "array(3)"),
        (torch.tensor(3), BAGS_TEXT + "tensor(3)"),
        ([3], BAG_TEXT + "3" + SUCH_AS),
        ([None], BAG_TEXT + "None" + SUCH_AS),
        (["35"], BAG_TEXT + "'35'" + SUCH_AS),
        (np.array([3]), BAG_TEXT + "np.int64(3)" + SUCH_AS),
        ([iter([3])], BAG_TEXT + "<list_iterator"),
        (torch.tensor([3]), "feature 'user', bag 0: expected a flat sequence of ids, got shape []"),
        ([[[3]]], "feature 'user', bag 0: expected a flat sequence of ids, got shape [1, 1]"),
        ([np.zeros((2, 3), np.int64)], "feature 'user', bag 0: expected a flat sequence of ids, got shape [2, 3]"),
        ([{3, 5}], "feature 'user', bag 0: expected a flat sequence of ids, got shape []"),
        ([[[3], [5, 6]]], "feature 'user', bag 0: expected ids, got [[3], [5, 6]]"),
        ([[3, "5"]], ID_TEXT + "'5' ("),
        ([["5"]], ID_TEXT + "'5' (<U1)"),
        ([[3, 5.0]], ID_TEXT + "5.0 (float64)"),
        ([[0.5]], ID_TEXT + "0.5 (float64)"),
        ([[float("nan")]], ID_TEXT + "nan (float64)"),
        ([[None]], ID_TEXT + "None (object)"),
        ([[3, None]], ID_TEXT + "None (object)"),
        ([[True]], ID_TEXT + "True"),
        ([[3j]], ID_TEXT + "3j (complex128)"),
        ([np.array([3.0])], ID_TEXT + "np.float64(3.0) (float64)"),
        ([np.array([True])], ID_TEXT + "np.True_ (bool)"),
        ([torch.tensor([3.0])], ID_TEXT + "tensor(3.) (float32)"),
        ([torch.tensor([3.0], requires_grad=True)], "feature 'user', bag 0: "),
        ([[2**63]], ID_TEXT + "[9223372036854775808] (uint64)"),
        ([[2**64]], ID_TEXT + "[18446744073709551616] (object)"),
        ([[-(2**63) - 1]], ID_TEXT + "[-9223372036854775809] (object)"),
        ([[-1, 2**63]], ID_TEXT + "[-1, 9223372036854775808] ("),
        ([np.array([3], np.uint64)], ID_TEXT + "array([3], dtype=uint64) (uint64)"),
        ([np.array(["2026-11-23"], "datetime64[D]")], ID_TEXT),
    ],
    ids=shown,
)
def test_what_is_no_id_is_refused_with_its_feature_and_bag(artifact: Artifact, bags: object, text: str) -> None:
    refused(lambda: artifact(with_bags(user=bags)), text)


def test_a_bool_among_integers_is_refused(artifact: Artifact) -> None:
    """numpy makes 1 of it."""
    refused(lambda: artifact(with_bags(user=[[3, True]])), ID_TEXT + "True")


def test_the_bag_of_a_refusal_is_counted_from_zero(artifact: Artifact) -> None:
    bags = {name: [[0]] * 3 for name in FEATURES} | {"tag": [[0], [0], [0.5]]}
    refused(lambda: artifact(bags), "feature 'tag', bag 2: an id is a 64-bit integer, got 0.5")


def test_a_huge_value_is_cut_short_in_the_message(artifact: Artifact) -> None:
    with pytest.raises(InvalidInputError) as caught:
        artifact(with_bags(user=["x" * 100_000]))
    assert len(str(caught.value)) < 300


JAGGED = "feature 'user': "


@pytest.mark.parametrize(
    ("jagged", "text"),
    [
        (Jagged([0.5], [1]), "values: expected int64 or int32, got float64"),
        (Jagged([True], [1]), "values: expected int64 or int32, got bool"),
        (Jagged(torch.tensor([3.0]), [1]), "values: expected int64 or int32, got float32"),
        (Jagged(["3"], [1]), "values: expected int64 or int32, got ['3']"),
        (Jagged(None, [1]), "values: expected int64 or int32, got None"),
        (Jagged([[3]], [1]), "values: expected one dimension, got shape [1, 1]"),
        (Jagged([[3], [5, 6]], [1]), "values: expected int64 or int32, got [[3], [5, 6]]"),
        (Jagged(3, [1]), "values: expected one dimension, got shape []"),
        (Jagged([3], [1.0]), "lengths: expected int64 or int32, got float64"),
        (Jagged([3], [True]), "lengths: expected int64 or int32, got bool"),
        (Jagged([3], 1), "lengths: expected one dimension, got shape []"),
        (Jagged([3], [[1]]), "lengths: expected one dimension, got shape [1, 1]"),
        (Jagged([3], ["1"]), "lengths: expected int64 or int32, got ['1']"),
        (Jagged([3], [2**31]), "lengths: 2147483648 does not fit int32"),
        (Jagged([3], torch.tensor([2**40])), "lengths: 1099511627776 does not fit int32"),
        (Jagged([3], [2]), "lengths add up to 2, and there are 1 values"),
        (Jagged([3], [0]), "lengths add up to 0, and there are 1 values"),
        (Jagged([], [1]), "lengths add up to 1, and there are 0 values"),
        (Jagged([3], [-1]), "length of bag 0 is -1; a length is 0 or more"),
        (Jagged([3], [2, -1]), "length of bag 1 is -1; a length is 0 or more"),
        (JaggedTensor(torch.tensor([3.0]), lengths=torch.tensor([1])), "values: expected int64 or int32, got float32"),
    ],
    ids=shown,
)
def test_a_jagged_feature_that_does_not_hold_together_is_refused(artifact: Artifact, jagged: object, text: str) -> None:
    refused(lambda: artifact(with_bags(user=jagged)), JAGGED + text)


@pytest.mark.parametrize("values", [[2**63], [2**64], np.array([3], np.uint64)], ids=shown)
def test_values_beyond_int64_are_refused_with_the_type_that_is_expected(artifact: Artifact, values: object) -> None:
    with pytest.raises(InvalidInputError, match=r"feature 'user': values: expected int64"):
        artifact(with_bags(user=Jagged(values, [1])))


UNUSUAL = {
    "long double": np.array([1], np.longdouble),
    "tensors with a gradient": [torch.tensor(1.0, requires_grad=True)],
    "dates": np.array(["2026-11-23"], "datetime64[D]"),
    "records": np.array([(1, 2)], "i4,i4"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_numpy_holds_and_torch_does_not_is_refused_by_name(
    artifact: Artifact, weighted: Artifact, kind: str
) -> None:
    refused(
        lambda: artifact(with_bags(user=Jagged(UNUSUAL[kind], [1]))), "feature 'user': values: expected int64 or int32"
    )
    refused(
        lambda: artifact(with_bags(user=Jagged([1], UNUSUAL[kind]))), "feature 'user': lengths: expected int64 or int32"
    )
    with_weights = with_bags(user=Jagged([1], [1], UNUSUAL[kind]), age=Jagged([0], [1], [1.0]))
    refused(lambda: weighted(with_weights), "feature 'user': per_sample_weights: expected float32")
    refused(lambda: artifact(with_bags(user=[UNUSUAL[kind]])), "feature 'user', bag 0: ")


MASKED = np.ma.array([1, 0], mask=[True, False])


@pytest.mark.parametrize("where", ["bag", "matrix", "values", "lengths", "weights", "raw"])
def test_a_masked_array_is_refused_by_name(weighted: Artifact, where: str) -> None:
    user = {
        "bag": [MASKED],
        "matrix": MASKED[None, :],
        "values": Jagged(MASKED, [2], [1.0, 1.0]),
        "lengths": Jagged([3], MASKED, [1.0]),
        "weights": Jagged([3, 4], [2], MASKED.astype(np.float32)),
    }
    text = "got a masked array; give its compressed() values, or filled(…)"
    if where == "raw":
        refused(lambda: weighted.lookup(MASKED, [1, 1, 0, 0, 0], [1.0, 1.0]), f"values: {text}")  # type: ignore[arg-type]
        return
    with pytest.raises(InvalidInputError, match=rf"^feature 'user'.*: {re.escape(text)}$"):
        weighted(with_bags(user=user[where], age=Jagged([0], [1], [1.0])))


def test_a_tensor_whose_sign_is_a_flag_is_read_as_what_it_shows(weighted: Artifact) -> None:
    values, lengths = raw(BAGS)
    weights = torch.arange(len(values)) * 0.5
    expected = weighted.lookup(values, lengths, weights)
    assert torch.equal(weighted.lookup(*(torch._neg_view(-part) for part in (values, lengths, weights))), expected)
    jagged = {
        name: Jagged([0], [1], [1.0]) if name in ("user", "age") else [torch._neg_view(torch.tensor([0]))]
        for name in FEATURES
    }
    plain = jagged | {name: [[0]] for name in FEATURES if name not in ("user", "age")}
    assert torch.equal(weighted(jagged).values, weighted(plain).values)


@pytest.mark.parametrize("length", [INT64_MIN, -(2**31) - 1, -(2**31), -1])
def test_a_negative_length_is_refused_as_it_is_however_far_from_zero(artifact: Artifact, length: int) -> None:
    """The smallest int64 has no absolute value, and its lower half is 0."""
    with pytest.raises(InvalidInputError, match=rf"feature 'user'.* {length}\b"):
        artifact(with_bags(user=Jagged([], [length])))
    with pytest.raises(InvalidInputError, match=rf"length.* {length}\b"):
        artifact.lookup(torch.zeros(4, dtype=torch.int64), torch.tensor([1, 1, 1, length, 1]))


# --- Batches that do not fit together --------------------------------------------------------------------------------


def test_batch_sizes_that_differ_are_refused(artifact: Artifact) -> None:
    text = "feature 'item': 2 bags, and 'user' has 1; every feature has one bag for each example"
    refused(lambda: artifact(with_bags(item=[[1], [2]])), text)
    refused(lambda: artifact(with_bags(item=Jagged([1, 2], [1, 1]))), text)
    refused(lambda: artifact(with_bags(age=[])), "feature 'age': 0 bags, and 'user' has 1")


def test_a_keyed_jagged_tensor_with_a_batch_size_for_each_key_is_refused(artifact: Artifact) -> None:
    features = KeyedJaggedTensor(
        keys=FEATURES,
        values=torch.zeros(6, dtype=torch.int64),
        lengths=torch.ones(6, dtype=torch.int32),
        stride_per_key_per_rank=[[2], [1], [1], [1], [1]],
    )
    refused(
        lambda: artifact(features), "the KeyedJaggedTensor has another batch size for each key; give one batch size"
    )


def test_a_keyed_jagged_tensor_with_inverse_indices_is_refused(artifact: Artifact) -> None:
    """They would have to be applied to the result."""
    indices = (FEATURES, torch.zeros(5, 3, dtype=torch.int64))
    features = keyed({name: [[0]] for name in FEATURES}, FEATURES, inverse_indices=indices)
    refused(lambda: artifact(features), "the KeyedJaggedTensor has inverse indices; give the bags themselves")


def test_more_ids_than_fbgemm_can_count_are_refused(artifact: Artifact) -> None:
    values = torch.zeros(1, dtype=torch.int64).expand(2**31)  # 8 bytes, seen 2**31 times
    lengths = torch.ones(5, dtype=torch.int32)  # too few, so that nothing this large is ever computed
    refused(lambda: artifact.lookup(values, lengths), "values: 2147483648 ids; a request has fewer than 2**31")


@pytest.mark.parametrize("keys", [FEATURES, FEATURES[::-1]], ids=["in order", "reversed"])
def test_a_keyed_jagged_tensor_that_does_not_hold_together_is_refused(artifact: Artifact, keys: list[str]) -> None:
    def features(values: int, lengths: Sequence[int]) -> KeyedJaggedTensor:
        numbers = torch.tensor(lengths, dtype=torch.int32)
        return KeyedJaggedTensor(keys=keys, values=torch.zeros(values, dtype=torch.int64), lengths=numbers, stride=1)

    with pytest.raises(InvalidInputError, match=r"lengths add up to .*5.*, and there are 4 values"):
        artifact(features(4, [1, 1, 1, 1, 1]))
    with pytest.raises(InvalidInputError, match=r"feature 'tag': length of bag 0 is -1; a length is 0 or more"):
        artifact(features(3, [1 if name != "tag" else -1 for name in keys]))
    with pytest.raises(InvalidInputError, match=r"lengths"):
        artifact(features(4, [1, 1, 1, 1]))


@pytest.mark.parametrize("keys", [FEATURES, FEATURES[::-1]], ids=["in order", "reversed"])
def test_the_tensors_of_a_keyed_jagged_tensor_are_checked_in_any_key_order(
    artifact: Artifact, weighted: Artifact, keys: list[str]
) -> None:
    zeros, ones, weights = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int32), torch.ones(5)
    cases: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str]] = [
        (zeros.float(), ones, None, "values: expected int64 or int32, got float32"),
        (zeros.view(5, 1), ones, None, "values: expected one dimension, got shape [5, 1]"),
        (zeros.view(1, 5), ones, None, "values: expected one dimension, got shape [1, 5]"),
        (zeros, ones.view(5, 1), None, "lengths: expected one dimension, got shape [5, 1]"),
        (zeros.to("meta"), ones.to("meta"), None, "values: expected a tensor on the CPU, got one on meta"),
        (zeros, ones, weights[:4], "weights: 4 weights for 5 values"),
        (zeros, ones, torch.ones(6), "weights: 6 weights for 5 values"),
        (zeros, ones, ones, "weights: expected float32, got int32"),
        (zeros, ones, weights.view(5, 1), "weights: expected one dimension, got shape [5, 1]"),
    ]
    for values, lengths, given_weights, text in cases:
        loaded = artifact if given_weights is None else weighted
        batch = KeyedJaggedTensor(keys=keys, values=values, lengths=lengths, weights=given_weights, stride=1)
        refused(lambda loaded=loaded, batch=batch: loaded(batch), f"KeyedJaggedTensor: {text}")


def test_the_raw_signature_is_checked(artifact: Artifact) -> None:
    zeros = torch.zeros(5, dtype=torch.int64)
    ones = torch.ones(5, dtype=torch.int32)
    cases: list[tuple[Any, Any, str]] = [
        (zeros, ones[:4], "lengths: 4 do not divide into 5 features (user, item, last_item, tag, age)"),
        (zeros, ones * 0, "lengths add up to 0 (user 0, item 0, last_item 0, tag 0, age 0), and there are 5 values"),
        (zeros[:4], ones, "lengths add up to 5 (user 1, item 1, last_item 1, tag 1, age 1), and there are 4 values"),
        (zeros, ones * 2, "lengths add up to 10 (user 2, item 2, "),
        (zeros[:0], ones, "lengths add up to 5 ("),
        (zeros.float(), ones, "values: expected int64 or int32, got float32"),
        (zeros.bool(), ones, "values: expected int64 or int32, got bool"),
        (zeros, ones.float(), "lengths: expected int64 or int32, got float32"),
        (zeros.view(5, 1), ones, "values: expected one dimension, got shape [5, 1]"),
        (zeros, ones.view(5, 1), "lengths: expected one dimension, got shape [5, 1]"),
        (zeros.to("meta"), ones, "values: expected a tensor on the CPU, got one on meta"),
        (zeros, ones.to("meta"), "lengths: expected a tensor on the CPU, got one on meta"),
        (["a"], ones, "values: expected int64 or int32, got ['a']"),
        (None, ones, "values: expected int64 or int32, got None"),
        (zeros, torch.tensor([2, 1, 1, 2, -1]), "feature 'age': length of bag 0 is -1; a length is 0 or more"),
        # Lengths whose sum in int32 would be 5.
        (zeros, torch.tensor([2**31 - 1, 2**31 - 1, 7, 0, 0]), "lengths add up to 4294967301 (user 2147483647, "),
    ]
    for values, lengths, text in cases:
        refused(lambda values=values, lengths=lengths: artifact.lookup(values, lengths), text)


# --- Ids outside their tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("row", [0, -1, 1, INT64_MIN, INT64_MAX, 2**31, 2**32, -(2**32)])
def test_the_first_and_the_last_row_are_inside_and_their_neighbours_are_not(
    artifact: Artifact, name: str, row: int
) -> None:
    """`row` counts from the last row of the table, but for the extremes."""
    last = SIZES[name] - 1
    got = row if abs(row) > 1 else last + row
    features = {feature: [[0], [0, 0]] for feature in FEATURES} | {name: [[0], [last, got]]}
    if 0 <= got <= last:
        artifact(features)
        return
    text = f"feature '{name}', bag 1, position 1: id {got} is outside [0, {last}]"
    for request in (features, keyed(features, FEATURES), keyed(features, FEATURES[::-1])):
        with pytest.raises(InvalidInputError, match="^" + re.escape(text) + "$"):
            artifact(request)
    values, lengths = raw(features)
    with pytest.raises(InvalidInputError, match="^" + re.escape(text) + "$"):
        artifact.lookup(values, lengths)


def test_every_feature_with_ids_outside_is_named_with_the_first_of_them_and_their_number(artifact: Artifact) -> None:
    bags = {
        "user": [[], [299, 300, -1], [], [10**6]],
        "item": [[0], [0], [], [0]],
        "last_item": [[], [40], [41], []],
        "tag": [[-7], [0], [7], []],
        "age": [[0], [0], [0], [0]],
    }
    with pytest.raises(InvalidInputError) as caught:
        artifact(bags)
    assert str(caught.value) == (
        "feature 'user', bag 1, position 1: id 300 is outside [0, 299] (and 2 more); "
        "feature 'last_item', bag 2, position 0: id 41 is outside [0, 40]; "
        "feature 'tag', bag 0, position 0: id -7 is outside [0, 6] (and 1 more)"
    )


def test_an_invalid_request_is_a_value_error_too(artifact: Artifact) -> None:
    with pytest.raises(ValueError, match=r"id 300 is outside \[0, 299\]"):
        artifact(with_bags(user=[[300]]))


def test_ids_outside_give_zero_vectors_where_asked(zeroing: Artifact, stored: dict[str, np.ndarray]) -> None:
    outside = {name: [[SIZES[name], -1, INT64_MIN, INT64_MAX], [], [0, SIZES[name]]] for name in FEATURES}
    pooled = zeroing(outside)
    assert torch.equal(pooled.values[:2], torch.zeros(2, pooled.values.shape[1]))
    assert torch.equal(pooled.values, expected_values(zeroing, stored, outside))
    # A mean is over the length of the bag, whatever its ids.
    assert torch.equal(pooled["tag"][2], torch.from_numpy(stored["tag"][0].astype(np.float32)) * 0.5)


def test_ids_outside_of_other_than_their_own_value_are_still_refused_where_zeros_are_asked(zeroing: Artifact) -> None:
    refused(lambda: zeroing(with_bags(user=[["a"]])), ID_TEXT + "'a'")
    refused(lambda: zeroing(with_bags(user=Jagged([1], [-1]))), "feature 'user': length of bag 0 is -1")
    refused(lambda: zeroing.lookup([0], [1]), "lengths: 1 do not divide into 5 features")


@pytest.mark.parametrize(
    "wrong", ["ignore", None, True, "row", "row:", "row:-1", "row:1.5", "row:007", "row:" + "9" * 40, 3]
)
def test_another_treatment_of_ids_outside_is_refused(built_artifact: Path, wrong: object) -> None:
    text = f"invalid_ids must be 'error', 'zero' or 'row:<k>' with a row k, got {wrong!r}"
    with pytest.raises(ValueError, match=re.escape(text)):
        load_artifact(built_artifact, invalid_ids=wrong)  # type: ignore[arg-type]


# --- The caller's tensors --------------------------------------------------------------------------------------------


def call_and_forget(call: Callable[[], object]) -> None:
    with contextlib.suppress(InvalidInputError):
        call()


@pytest.mark.parametrize("row", [0, 10**6, -5, INT64_MIN], ids=["valid", "too large", "negative", "smallest"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("stride", [1, 2], ids=["contiguous", "strided"])
def test_the_callers_tensors_and_arrays_are_never_changed(
    artifact: Artifact, zeroing: Artifact, weighted: Artifact, row: int, dtype: torch.dtype, stride: int
) -> None:
    if dtype is torch.int32:
        row = max(row, -(2**31))

    def tensor(numbers: Sequence[float], kind: torch.dtype) -> torch.Tensor:
        return torch.tensor(numbers, dtype=kind).repeat_interleave(stride)[::stride]

    values, lengths = tensor([row, 3, 0, 0, 0, 0], dtype), tensor([2, 1, 1, 1, 1], dtype)
    weights = tensor([0.5, 1, 2, 3, 4, 5], torch.float32)
    arrays = values.numpy(), lengths.numpy(), weights.numpy()  # the same memory
    before = [array.copy() for array in arrays]
    features: dict[str, Any] = with_bags(user=Jagged(values[:2], lengths[:1]))
    by_array: dict[str, Any] = with_bags(user=Jagged(arrays[0][:2], arrays[1][:1]))
    as_bags: dict[str, Any] = with_bags(user=[values[:2]])
    in_weighted = with_bags(
        user=Jagged(values[:2], lengths[:1], weights[:2]), age=Jagged(arrays[0][:1] * 0, arrays[1][1:2], arrays[2][:1])
    )
    for loaded in (artifact, zeroing):
        for request in (features, by_array, as_bags, with_bags(user=[arrays[0][:2]])):
            call_and_forget(lambda loaded=loaded, request=request: loaded(request))
        for keys in (FEATURES, FEATURES[::-1]):
            batch = KeyedJaggedTensor(keys=keys, values=values, lengths=lengths)
            call_and_forget(lambda loaded=loaded, batch=batch: loaded(batch))
        call_and_forget(lambda loaded=loaded: loaded.lookup(values, lengths))
    call_and_forget(lambda: weighted(in_weighted))
    call_and_forget(lambda: weighted.lookup(values, lengths, weights))
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_read_only_arrays_are_accepted(artifact: Artifact) -> None:
    values, lengths = np.array([1, 2]), np.array([2])
    values.flags.writeable = lengths.flags.writeable = False
    expected = artifact(with_bags(user=[[1, 2]])).values
    assert torch.equal(artifact(with_bags(user=Jagged(values, lengths))).values, expected)
    assert torch.equal(artifact(with_bags(user=[values])).values, expected)


def checked_by(artifact: Artifact, *request: torch.Tensor) -> Checked:
    """What the artifact looks up when it is given `request`."""
    seen: list[Checked] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact._lookups, "run", lambda checked, out: seen.append(checked))
        artifact.lookup(*request)
    return seen[0]


def test_the_graph_is_given_its_own_types(weighted: Artifact) -> None:
    values, lengths = raw(BAGS)
    weights = torch.ones(len(values), dtype=torch.float64)
    checked = checked_by(weighted, values.to(torch.int32), lengths.to(torch.int64), weights)
    assert (checked.values.dtype, checked.offsets.dtype) == (torch.int64, torch.int64)
    assert checked.lengths.dtype is torch.int32
    assert checked.weights is not None
    assert checked.weights.dtype is torch.float32


def test_what_is_looked_up_is_a_copy_so_that_no_id_changes_between_its_check_and_its_use(artifact: Artifact) -> None:
    values, lengths = raw(BAGS)
    checked = checked_by(artifact, values, lengths)
    for copy, original in ((checked.values, values), (checked.offsets, lengths)):
        assert not np.shares_memory(copy.numpy(), original.numpy())


def test_ids_that_are_cut_short_while_they_are_checked_are_refused(weighted: Artifact) -> None:
    """Offsets that end behind the ids would make the lookup read whatever lies there."""
    values, lengths = raw(BAGS)
    count = len(values)

    class Cutting:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            values.resize_(2)
            return np.ones(count, np.float32)

    text = f"per_sample_weights: {count} weights for 2 values"
    refused(lambda: weighted.lookup(values, lengths, Cutting()), text)  # type: ignore[arg-type]
    assert len(values) == 2


def test_ids_that_grow_while_weights_are_read_are_refused(weighted: Artifact) -> None:
    """The lookup would read weights behind the last one."""
    values, lengths = raw(BAGS)
    count = len(values)
    fewer = values[:2].clone()

    class Growing:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            fewer.resize_(count).copy_(values)
            return np.ones(2, np.float32)

    text = f"per_sample_weights: 2 weights for {count} values"
    refused(lambda: weighted.lookup(fewer, lengths, Growing()), text)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_tensor_without_memory_is_refused(weighted: Artifact, place: int) -> None:
    """Its address is 0, and compiled code would read there."""
    values, lengths = raw(BAGS)
    request = [values, lengths, torch.ones(len(values))]
    with FakeTensorMode():
        request[place] = torch.zeros(request[place].shape, dtype=request[place].dtype)
    name = ("values", "lengths", "per_sample_weights")[place]
    refused(lambda: weighted.lookup(*request), f"{name}: expected a tensor with memory, got a FakeTensor")


@pytest.mark.parametrize("place", [0, 1])
def test_a_tensor_of_a_transform_is_refused(artifact: Artifact, place: int) -> None:
    request = list(raw(BAGS))
    request[place] = torch._to_functional_tensor(request[place])
    with pytest.raises(ValueError, match="a request's tensor has no memory; give plain tensors"):
        artifact.lookup(*request)


def test_lengths_that_change_while_they_are_checked_are_refused(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, lengths = raw(BAGS)

    def change(*_: object) -> torch.Tensor:
        return torch.zeros(5)

    monkeypatch.setattr("runtime_py.checks.check_lengths", change)
    refused(
        lambda: artifact.lookup(values[:-1], lengths), "lengths changed while they were checked; a request must be "
    )


# --- Laws ------------------------------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn, inside: bool = True) -> dict[str, list[list[int]]]:
    """Random bags for every feature, of one batch size from 0 on; bags may be empty, rows are few so that they repeat."""
    batch = draw(st.integers(0, 6))

    def bag(size: int) -> st.SearchStrategy[list[int]]:
        rows = st.one_of(st.integers(0, min(size - 1, 3)), st.integers(0, size - 1))
        if not inside:
            rows = st.one_of(rows, rows, st.integers(INT64_MIN, INT64_MAX), st.sampled_from([-1, size]))
        return st.lists(rows, max_size=20)

    return {name: draw(st.lists(bag(SIZES[name]), min_size=batch, max_size=batch)) for name in FEATURES}


@given(batches())
@settings(deadline=None, max_examples=60)
def test_any_batch_gives_what_the_reference_gives_to_the_last_bit(
    artifact: Artifact, stored: dict[str, np.ndarray], bags: Bags
) -> None:
    assert torch.equal(artifact(bags).values, expected_values(artifact, stored, bags))


def describe_outside(bags: Bags) -> str:
    """The message that a batch with ids outside must give, in plain loops."""
    parts = []
    for name in FEATURES:
        outside = [
            f"feature '{name}', bag {bag}, position {position}: id {row} is outside [0, {SIZES[name] - 1}]"
            for bag, rows in enumerate(bags[name])
            for position, row in enumerate(rows)
            if not 0 <= row < SIZES[name]
        ]
        if outside:
            parts.append(outside[0] + (f" (and {len(outside) - 1} more)" if outside[1:] else ""))
    return "; ".join(parts)


@given(batches(inside=False))
@settings(deadline=None, max_examples=60)
def test_any_batch_with_ids_outside_gives_what_the_reference_gives_to_the_last_bit(
    artifact: Artifact, zeroing: Artifact, stored: dict[str, np.ndarray], bags: Bags
) -> None:
    """And the loader that refuses such ids refuses exactly the batches that have one, and says where."""
    expected = expected_values(zeroing, stored, bags)
    assert torch.equal(zeroing(bags).values, expected)
    if describe_outside(bags):
        with pytest.raises(InvalidInputError) as caught:
            artifact(bags)
        assert str(caught.value) == describe_outside(bags)
    else:
        assert torch.equal(artifact(bags).values, expected)


@given(batches(), st.permutations(FEATURES))
@settings(deadline=None, max_examples=60)
def test_the_order_of_the_features_makes_no_difference(artifact: Artifact, bags: Bags, names: list[str]) -> None:
    expected = artifact(bags).values
    assert torch.equal(artifact({name: bags[name] for name in names}).values, expected)
    assert torch.equal(artifact(keyed(bags, names)).values, expected)


@given(batches())
@settings(deadline=None, max_examples=60)
def test_a_call_by_name_is_a_lookup_in_the_raw_signature(artifact: Artifact, bags: Bags) -> None:
    assert torch.equal(artifact(bags).values, artifact.lookup(*raw(bags)))


@pytest.mark.parametrize(
    "ids",
    [[np.True_, 5], (5, True), deque([True, 5]), bytearray(b"\x01\x02")],
    ids=["numpy", "tuple", "deque", "bytes"],
)
def test_a_truth_value_or_a_byte_among_numbers_is_no_id(artifact: Artifact, ids: Any) -> None:
    refused(lambda: artifact(with_bags(user=[ids])), "feature 'user', bag 0: ")
    refused(lambda: artifact(with_bags(user=Jagged(ids, [2]))), "feature 'user': values: expected int64 or int32, got ")
    refused(lambda: artifact.lookup(ids, [2, 0, 0, 0, 0]), "values: expected int64 or int32, got ")
    refused(lambda: artifact.lookup([0, 0], ids), "lengths: expected int64 or int32, got ")


def test_what_came_is_shown_in_one_line(artifact: Artifact) -> None:
    with pytest.raises(InvalidInputError) as caught:
        artifact(with_bags(user=[np.arange(60, dtype=np.uint64)]))
    assert "\n" not in str(caught.value)


def test_tensors_without_memory_are_refused_as_bad_input(artifact: Artifact) -> None:
    ones = torch.ones(5, dtype=torch.int32)
    refused(
        lambda: artifact.lookup(torch._efficientzerotensor(5, dtype=torch.int64), ones), "a request's tensor has no "
    )
    refused(
        lambda: torch.func.vmap(lambda ids: artifact.lookup(ids, ones))(torch.zeros(2, 5, dtype=torch.int64)), "Cannot "
    )


def test_a_buffer_of_inference_mode_is_refused_outside_of_it(artifact: Artifact) -> None:
    values, lengths = raw(BAGS)
    shape = artifact.lookup(values, lengths).shape
    with torch.inference_mode():
        out = torch.empty(shape)
        assert artifact.lookup(values, lengths, out=out) is out
    refused(
        lambda: artifact.lookup(values, lengths, out=out), "out: a tensor of torch.inference_mode can only be written"
    )
    with FakeTensorMode():
        fake = torch.empty(shape)
    refused(
        lambda: artifact.lookup(values, lengths, out=fake), "out: expected a float32 tensor on the CPU, got FakeTensor"
    )
