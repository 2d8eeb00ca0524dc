"""Fixtures that the tests share: one small snapshot, one artifact built from it, and copies to damage."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from support import (
    SPLICED,
    TABLES,
    make_head,
    make_rows,
    state_dict,
    surgery_state,
    with_vocabularies,
    write_config,
    write_dcp,
)

# Two processes of tests on two cores: torch's default of two threads each only makes them wait for one another.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("shared machine", deadline=None)  # a slow example is no failure
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def rows() -> dict[str, torch.Tensor]:
    return make_rows(TABLES)


@pytest.fixture(scope="session")
def dcp_snapshot(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, torch.Tensor]) -> Path:
    return write_dcp(tmp_path_factory.mktemp("snapshot") / "7", rows)


@pytest.fixture(scope="session")
def built_artifact(tmp_path_factory: pytest.TempPathFactory, dcp_snapshot: Path) -> Path:
    """One artifact of `TABLES`; never change it, take `artifact_copy`."""
    from export import build_artifact

    folder = tmp_path_factory.mktemp("artifact")
    config = write_config(folder / "release.yaml", dcp_snapshot)
    return build_artifact(config, folder / "artifact", workers=2).artifact


@pytest.fixture(scope="session")
def vocabulary_artifact(tmp_path_factory: pytest.TempPathFactory, dcp_snapshot: Path) -> Path:
    """As `built_artifact`, with the vocabularies of `ENTITIES`; a module may take it for its `built_artifact`."""
    from export import build_artifact

    folder = tmp_path_factory.mktemp("vocabularies")
    config = write_config(folder / "release.yaml", dcp_snapshot, with_vocabularies(folder / "entities"))
    return build_artifact(config, folder / "artifact", workers=2).artifact


@pytest.fixture(scope="session")
def surgery_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three graphs with a surgery: `surgeries:Head` over sum, mean and weighted features. Needs g++; takes 15 s."""
    from export import build_artifact

    folder = tmp_path_factory.mktemp("surgery")
    torch.save(state_dict(make_rows(SPLICED)) | surgery_state(make_head()), folder / "snapshot.pt")
    config = write_config(
        folder / "release.yaml",
        folder / "snapshot.pt",
        SPLICED,
        serving={"graphs": ["torchscript", "aot_inductor", "onnx"]},
        surgery={"module": "surgeries:Head", "kwargs": {"width": 39}},
    )
    return build_artifact(config, folder / "artifact", workers=1).artifact


@pytest.fixture
def artifact_copy(built_artifact: Path, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return Path(shutil.copytree(built_artifact, tmp_path / "artifact"))


@pytest.fixture
def rebuild(tmp_path: Path) -> Callable[..., Path]:
    """Builds an artifact from rows and table descriptions given by the test."""

    def build(tables: list[dict[str, Any]], rows: Mapping[str, torch.Tensor], **sections: Any) -> Path:
        from export import build_artifact

        torch.save(state_dict(rows), tmp_path / "snapshot.pt")
        config = write_config(tmp_path / "release.yaml", tmp_path / "snapshot.pt", tables, **sections)
        return build_artifact(config, tmp_path / "built", workers=2).artifact

    return build
