"""Results in other forms."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from support import FEATURES
from torchrec.sparse.jagged_tensor import KeyedTensor

from runtime_py import UnsupportedError, load_artifact


def test_a_result_becomes_torchrecs_keyed_tensor_over_the_same_memory(built_artifact: Path) -> None:
    pooled = load_artifact(built_artifact)({name: [[0], []] for name in FEATURES})
    keyed = pooled.to_keyed_tensor()
    assert isinstance(keyed, KeyedTensor)
    assert keyed.keys() == FEATURES
    assert keyed.values().data_ptr() == pooled.values.data_ptr()
    assert all(torch.equal(keyed[name], pooled[name]) for name in FEATURES)


def test_an_output_that_there_is_not_is_refused_with_those_there_are(built_artifact: Path) -> None:
    pooled = load_artifact(built_artifact)({name: [[0]] for name in FEATURES})
    with pytest.raises(KeyError, match=r"no output 'users'; outputs: user, item, last_item, tag, age"):
        pooled["users"]


def test_without_torchrec_a_keyed_tensor_is_refused_with_what_does_without(
    built_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled = load_artifact(built_artifact)({name: [[0]] for name in FEATURES})
    monkeypatch.setitem(sys.modules, "torchrec.sparse.jagged_tensor", None)
    with pytest.raises(UnsupportedError, match=r"^a KeyedTensor needs torchrec, .*to_dict\(\) does without"):
        pooled.to_keyed_tensor()


def test_a_result_can_be_copied_and_sent_to_another_process(built_artifact: Path) -> None:
    artifact = load_artifact(built_artifact, invalid_ids="zero")
    pooled = artifact({feature.name: [[10**9], [0]] for feature in artifact.manifest.features})
    for other in (pickle.loads(pickle.dumps(pooled)), copy.deepcopy(pooled)):
        assert torch.equal(other.values, pooled.values)
        assert other.keys() == pooled.keys()
        assert (other.artifact_id, other.columns, other.invalid_ids) == (
            pooled.artifact_id,
            pooled.columns,
            pooled.invalid_ids,
        )
        assert other.invalid_ids["user"] == 1
        assert pooled != other  # by identity: tensors have no truth
