"""Importing does nothing, and loading an artifact brings in no more than it needs: each asked of a fresh process."""

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import export
import runtime_py
from runtime_py import errors
from runtime_py.manifest_reader import read_manifest

# Not in a serving image, or not before they are asked for.
HEAVY = ["export", "fbgemm_gpu", "hypothesis", "onnx", "pydantic", "pytest", "rich", "ruamel", "torchrec", "typer"]

PROBE = """
import ctypes, importlib.util, json, sys

def libraries():
    lines = open("/proc/self/maps").read().splitlines()
    return sorted({line.split("/")[-1] for line in lines if "/fbgemm_gpu/" in line})

def fbgemm_operators():
    import torch
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fbgemm::")]

def state():
    import torch
    return {
        "packages": sorted({name.split(".")[0] for name in sys.modules}),
        "modules": sorted(sys.modules),
        "libraries": libraries(),
        "operators": len(fbgemm_operators()),
        "cuda": torch.cuda.is_initialized(),
    }

result = None
"""


def probe(program: str, *arguments: Path | str) -> dict[str, Any]:
    """What a fresh process that has run `program` holds, with `result`, what the program leaves under that name."""
    code = f"{PROBE}\n{program}\nprint(json.dumps(state() | {{'result': result}}))"
    child = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    state: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return state


def heavy(state: dict[str, Any]) -> list[str]:
    return [name for name in HEAVY if name in state["packages"]]


@pytest.fixture(scope="module")
def loaded(built_artifact: Path) -> dict[str, Any]:
    """A process that has imported `runtime_py`, then loaded an artifact and called it."""
    program = """
import runtime_py
before = state()
artifact = runtime_py.load_artifact(sys.argv[1])
artifact({feature.name: [[0]] for feature in artifact.manifest.features})
result = before
"""
    return probe(program, built_artifact)


# --- runtime_py ------------------------------------------------------------------------------------------------------


def test_importing_runtime_py_imports_nothing_heavy_and_touches_neither_cuda_nor_operators(
    loaded: dict[str, Any],
) -> None:
    imported = loaded["result"]
    assert heavy(imported) == []
    assert imported["cuda"] is False
    assert imported["operators"] == 0
    assert imported["libraries"] == []


def test_loading_an_artifact_imports_nothing_heavy_either(loaded: dict[str, Any]) -> None:
    assert heavy(loaded) == []
    assert loaded["cuda"] is False
    assert loaded["operators"] > 0  # what the probe counts is there once the operators are loaded


def test_loading_an_artifact_loads_the_libraries_that_its_manifest_names_and_what_those_link_to(
    loaded: dict[str, Any], built_artifact: Path
) -> None:
    program = """
import torch
folder = importlib.util.find_spec("fbgemm_gpu").submodule_search_locations[0]
for name in sys.argv[1:]:
    ctypes.CDLL(f"{folder}/{name}.so")
"""
    named = read_manifest(built_artifact).graphs[0].operator_libraries
    expected = probe(program, *named)["libraries"]
    assert {f"{name}.so" for name in named} <= set(expected)
    assert loaded["libraries"] == expected


def test_verifying_loads_no_operators(built_artifact: Path) -> None:
    state = probe("import runtime_py\nruntime_py.verify_artifact(sys.argv[1])", built_artifact)
    assert heavy(state) == []
    assert state["libraries"] == []


# --- export ----------------------------------------------------------------------------------------------------------


def test_importing_export_and_reading_a_configuration_imports_no_torchrec() -> None:
    state = probe("""
import export
result = sorted(name for name in sys.modules if name.split(".")[0] in ("torchrec", "fbgemm_gpu", "pydantic"))
export.load_config
""")
    assert state["result"] == [], "import export"
    assert "pydantic" in state["packages"], "its names are found on first use"
    assert {"torchrec", "fbgemm_gpu"}.isdisjoint(state["packages"])
    assert state["operators"] == 0
    assert state["cuda"] is False


@pytest.mark.parametrize("command", ["verify", "inspect", "--help"])
def test_commands_that_need_no_torchrec_do_not_import_it(command: str, built_artifact: Path) -> None:
    arguments = [command] if command.startswith("-") else [command, str(built_artifact)]
    child = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "export", *arguments], capture_output=True, text=True, check=False
    )
    imported = {line.split("|")[2].strip() for line in child.stderr.splitlines() if line.startswith("import time:")}
    assert child.returncode == 0
    assert "export.cli" in imported
    assert {"torchrec", "fbgemm_gpu"}.isdisjoint(imported)


# --- Public names ----------------------------------------------------------------------------------------------------


def modules_of(package: ModuleType) -> list[ModuleType]:
    names = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return [package, *(importlib.import_module(name) for name in names if "._" not in name)]


@pytest.mark.parametrize("package", [runtime_py, export], ids=["runtime_py", "export"])
def test_every_module_lists_its_public_names_sorted_and_all_of_them_exist(
    package: ModuleType, subtests: pytest.Subtests
) -> None:
    modules = modules_of(package)
    assert len(modules) > 5
    for module in modules:
        with subtests.test(module=module.__name__):
            names = module.__all__
            assert len(set(names)) == len(names)
            # Constants, then classes, then functions, each in order: as ruff sorts them.
            assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
            for name in names:
                assert getattr(module, name) is not None


def test_the_public_names_are_those_of_the_design() -> None:
    assert {"load_artifact", "verify_artifact", "Artifact", "Manifest", "ArtifactError"} <= set(runtime_py.__all__)
    assert {
        "DataType",
        "EmbeddingBagConfig",
        "EmbeddingSnapshot",
        "LargeEmbeddings",
        "LargeEmbeddingsConfig",
        "Mode",
        "OptimizerConfig",
        "build_artifact",
        "load_config",
    } <= set(export.__all__)


def test_an_unknown_name_of_export_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'export' has no attribute 'build_artefact'"):
        export.build_artefact  # noqa: B018


def test_every_error_is_an_artifact_error_and_public_with_its_kind_documented() -> None:
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.ArtifactError)
        assert error.__doc__
        assert name in runtime_py.__all__
        assert getattr(runtime_py, name) is error
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(errors.__all__)


def test_only_a_bad_request_is_a_value_error() -> None:
    """So that a server can tell a bad request from a damaged artifact."""
    kinds = [getattr(errors, name) for name in errors.__all__]
    assert [kind.__name__ for kind in kinds if issubclass(kind, ValueError)] == ["InvalidInputError"]


def test_the_map_of_a_package_names_every_module() -> None:
    for package in (runtime_py, export):
        for info in pkgutil.iter_modules(package.__path__):
            if not info.name.startswith("_"):
                assert f"`{info.name}`" in (package.__doc__ or ""), f"{package.__name__}.{info.name}"
