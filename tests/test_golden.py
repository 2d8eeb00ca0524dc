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
    assert manifest.artifact_id == "5ac66fc4a5e85d8affdec1b0fffc64256055dbff4456280970eb66f5e9e5dba0"
    assert [table.serving_precision for table in manifest.tables] == [
        *("fp16", "fp32", "fp16", "fp16", "int8", "int4", "int2"),
    ]


def test_format_1_answers_as_on_the_first_day():
    artifact = load_artifact(GOLDEN / "format-1")
    pooled = artifact(
        {
            "user": [[0, 4], []],
            "item": [[2], [1, 1]],
            "tag": [[0, 1, 3], [3]],
            "seen": Jagged([3, 0, 1], [1, 2], [2.0, 1.0, -0.5]),
            "place": [[1], [0, 1]],
            "color": [[2], [0, 0]],
            "shape": [[0], [1]],
        }
    )
    assert pooled["user"].tolist() == [[10.0, 10.5, 11.0, 11.5], [0.0] * 4]
    assert pooled["item"].tolist() == [[30.0, 30.25], [55.0, 55.5]]
    third = pytest.approx([(200 + 210 + 230 + 3 * column) / 12 for column in range(3)], rel=1e-7)
    assert pooled["tag"].tolist()[0] == third
    assert pooled["tag"].tolist()[1] == [57.5, 57.75, 58.0]
    assert pooled["seen"].tolist()[0] == [(330 + column) / 2 for column in range(8)]
    assert pooled["seen"].tolist()[1] == [(300 + column) / 4 - (310 + column) / 8 for column in range(8)]
    assert pooled["place"].tolist()[0] == [(410 + column) / 4 for column in range(256)]
    assert pooled["place"].tolist()[1] == [(810 + 2 * column) / 4 for column in range(256)]
    assert pooled["color"].tolist()[0] == [(520 + column) / 4 for column in range(16)]
    assert pooled["color"].tolist()[1] == [(1000 + 2 * column) / 4 for column in range(16)]
    step = 0.58349609375  # 1.75 / 3 in fp16
    assert pooled["shape"].tolist()[0] == [150.0 + step * code for code in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert pooled["shape"].tolist()[1] == [152.5 + step * code for code in (0, 0, 1, 1, 2, 2, 3, 3)]


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
        "place": (2, 256),
        "color": (3, 16),
        "shape": (2, 8),
    }
    assert scope["rows"]["color"][2].tolist() == [(520 + column) / 4 for column in range(16)]
    assert scope["rows"]["place"][1].tolist() == [(410 + column) / 4 for column in range(256)]
    assert scope["rows"]["shape"][0, 7] == 150.0 + 3 * 0.58349609375


def test_every_field_of_the_manifest_is_in_format_md():
    page = (GOLDEN.parent / "FORMAT.md").read_text()
    manifest = json.loads((GOLDEN / "format-1" / "manifest.json").read_text())

    def names(node):
        if isinstance(node, list):
            return names(node[0]) if node else set()
        if isinstance(node, dict):
            return set(node).union(*(names(value) for value in node.values()))
        return set()

    contract = {key: value for key, value in manifest.items() if key not in ("parity",)}
    contract["provenance"] = {**manifest["provenance"], "configuration": None, "tools": None}
    missing = {name for name in names(contract) if name not in page}
    assert not missing
