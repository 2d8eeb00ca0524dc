"""One copy of the rows for every graph: a sample of scripts/bench/shared_memory.py, which measures 1 GiB."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from runtime_py.manifest import WEIGHTS
from runtime_py.manifest_reader import read_manifest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "shared_memory.py"
MIB = 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a graph with"),
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("shared_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(script, tmp_path_factory):
    """Where the artifacts are, and what processes hold that serve 64 MiB at the same time, by server."""
    folder = tmp_path_factory.mktemp("shared")
    found = script.measure(folder, MIB, [script.SERVERS])
    print(*script.describe(found), sep="\n")
    return folder, {entry["server"]: entry for entry in found}


@pytest.fixture(scope="module")
def entries(measured):
    return measured[1]


def test_each_graph_of_torch_maps_the_weight_file_once_and_onnx_runtime_once_a_table(script, entries):
    """Or once in all, where ONNX Runtime is given views of one mapping."""
    mappings = {server: entry["mappings"] for server, entry in entries.items()}
    assert mappings == {"torchscript": 1, "aot_inductor": 1, "onnx": script.TABLES, "onnx one mapping": 1}


def test_every_row_is_resident_in_every_process_and_copied_in_none(entries):
    for entry in entries.values():
        assert MIB * 2**20 <= entry["rss"] <= entry["size"]
        assert entry["anonymous"] == 0


def test_all_processes_together_hold_one_copy_of_the_rows(entries):
    assert sum(entry["weights"] for entry in entries.values()) <= 1.001 * MIB * 2**20
    added = {server: entry["weights"] + entry["elsewhere"] - entry["few_rows"] for server, entry in entries.items()}
    # A process that had a copy of its own, mapped or not, would add 64 MiB more.
    assert all(each < 0.7 * MIB * 2**20 for each in added.values())
    assert sum(added.values()) < 1.5 * MIB * 2**20


def test_an_artifact_with_every_graph_is_no_larger_than_its_weight_file_and_4_mb(measured):
    artifact = measured[0] / "rows" / "artifact"
    assert len(read_manifest(artifact).graphs) == 3
    everything = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    assert everything - (artifact / WEIGHTS).stat().st_size <= 4_000_000
