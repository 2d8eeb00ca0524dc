"""Every released format version stays readable: its golden artifact loads and answers as on the first day.

Made by scripts/make_golden.py; value(table, row, column) = (100 * table + 10 * row + column) / 4.
"""

import json
from pathlib import Path

import pytest
import torch
from references import find_row
from safetensors.numpy import load_file

from runtime_py import Jagged, load_artifact, verify_artifact

GOLDEN = Path(__file__).parents[1] / "artifacts" / "golden"


def test_format_1_has_the_identity_that_it_was_committed_with():
    manifest = verify_artifact(GOLDEN / "format-1")
    assert manifest.artifact_id == "b4a6c862297728408e14c1d6467bce1346ccfd50c39145d289bc894f1a57682e"
    assert [table.serving_precision for table in manifest.tables] == ["fp16", "fp32", "fp16", "fp16"]


def test_format_1_answers_as_on_the_first_day():
    artifact = load_artifact(GOLDEN / "format-1")
    pooled = artifact(
        {
            "user": [[0, 4], []],
            "item": [[2], [1, 1]],
            "tag": [[0, 1, 3], [3]],
            "seen": Jagged([3, 0, 1], [1, 2], [2.0, 1.0, -0.5]),
        }
    )
    assert pooled["user"].tolist() == [[10.0, 10.5, 11.0, 11.5], [0.0] * 4]
    assert pooled["item"].tolist() == [[30.0, 30.25], [55.0, 55.5]]
    third = pytest.approx([(200 + 210 + 230 + 3 * column) / 12 for column in range(3)], rel=1e-7)
    assert pooled["tag"].tolist()[0] == third
    assert pooled["tag"].tolist()[1] == [57.5, 57.75, 58.0]
    assert pooled["seen"].tolist()[0] == [(330 + column) / 2 for column in range(8)]
    assert pooled["seen"].tolist()[1] == [(300 + column) / 4 - (310 + column) / 8 for column in range(8)]


def test_format_1_finds_the_rows_of_entities_as_on_the_first_day():
    entities = {2**63 - 1: 4, -(2**63): 3, 1000: 1, 0: 0}
    asked = [*entities, -1, 1, 1001]
    rows = [*entities.values(), -1, -1, -1]
    artifact = load_artifact(GOLDEN / "format-1")
    assert artifact.vocabularies["user"].rows(torch.tensor(asked)).tolist() == rows
    slots = load_file(GOLDEN / "format-1/vocab/user.safetensors")["user"]  # and without FBGEMM
    assert [find_row(slots, entity) for entity in asked] == rows


def test_the_reader_in_format_md_reads_every_row():
    page = (GOLDEN.parent / "FORMAT.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    scope = {"artifact": str(GOLDEN / "format-1")}
    exec(compile(code, "FORMAT.md", "exec"), scope)
    assert {name: array.shape for name, array in scope["rows"].items()} == {
        "user": (5, 4),
        "item": (3, 2),
        "tag": (4, 3),
        "seen": (4, 8),
    }


def test_every_field_of_the_manifest_is_in_format_md():
    page = (GOLDEN.parent / "FORMAT.md").read_text()
    manifest = json.loads((GOLDEN / "format-1" / "manifest.json").read_text())

    def names(node):
        if isinstance(node, list):
            return names(node[0]) if node else set()
        if isinstance(node, dict):
            return set(node).union(*(names(value) for value in node.values()))
        return set()

    contract = {key: value for key, value in manifest.items() if key not in ("accuracy", "parity")}
    contract["provenance"] = {**manifest["provenance"], "configuration": None, "tools": None}
    missing = {name for name in names(contract) if name not in page}
    assert not missing
