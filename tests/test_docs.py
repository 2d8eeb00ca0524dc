"""The README is kept true: its configuration loads, its code runs, its links lead somewhere."""

import re
import typing
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from support import TYPES, state_dict

from export import build_artifact, load_config
from export.config import OptimizerConfig, ReleaseConfig
from export.versions import publish_version
from runtime_py.manifest_reader import read_manifest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def demo_artifact(tmp_path_factory):
    """An artifact of the demo's tables, with rows of no training."""
    folder = tmp_path_factory.mktemp("demo")
    config = load_config(ROOT / "artifacts/examples/demo.yaml")
    rows = {
        table.name: torch.full((table.num_embeddings, table.embedding_dim), 0.5, dtype=TYPES[table.data_type])
        for table in config.large_embeddings.tables
    }
    torch.save(state_dict(rows), folder / "snapshot.pt")
    snapshot = config.snapshot.model_copy(update={"uri": str(folder / "snapshot.pt")})
    return build_artifact(config.model_copy(update={"snapshot": snapshot}), folder / "demo", workers=2).artifact


def test_the_python_example_runs_as_it_stands(demo_artifact):
    (code,) = (block for block in blocks("python") if "import load_artifact" in block)
    scope = {}
    exec(compile(code.replace("artifacts/demo", str(demo_artifact)), "README.md", "exec"), scope)
    assert list(scope["pooled"].values.shape) == [2, 260]
    assert list(scope["pooled"]["country"].shape) == [2, 4]


def test_the_refresh_example_runs_as_it_stands(demo_artifact, tmp_path):
    publish_version(demo_artifact, tmp_path)
    (code,) = (block for block in blocks("python") if "import ReloadingArtifact" in block)
    manifest = read_manifest(demo_artifact)
    scope = {"request": {feature.name: [[0]] for feature in manifest.features}}
    exec(compile(code.replace("/srv/ranking", str(tmp_path)), "README.md", "exec"), scope)
    scope["serving"].close()
    assert scope["pooled"].artifact_id == manifest.artifact_id == scope["artifact"].manifest.artifact_id


def test_the_refusal_that_it_shows_is_the_one_that_is_raised(demo_artifact):
    from runtime_py import InvalidInputError, load_artifact

    artifact = load_artifact(demo_artifact)
    request = {feature.name: [[0], [0]] for feature in artifact.manifest.features} | {"country": [[49], [250]]}
    with pytest.raises(InvalidInputError) as caught:
        artifact(request)
    assert f"```\n{caught.value}\n```" in README


def test_the_configuration_example_loads(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "release.yaml").write_text(text)
    config = load_config(tmp_path / "release.yaml")
    assert [table.num_embeddings for table in config.large_embeddings.tables] == [150_000, 50_000]


def test_the_gates_that_it_shows_are_keys_of_the_configuration():
    from export.config import Budget

    for name in Budget.model_fields:
        assert f"`{name}`" in README


def configuration_keys(section):
    """Every key of a section, and of those inside; what training alone reads is left out."""
    for name, field in section.model_fields.items():
        yield name
        for inner in [field.annotation, *typing.get_args(field.annotation)]:
            for part in [inner, *typing.get_args(inner)]:
                if isinstance(part, type) and issubclass(part, BaseModel) and part is not OptimizerConfig:
                    yield from configuration_keys(part)


def test_the_reference_has_every_key_and_its_example_loads(tmp_path):
    keys = set(configuration_keys(ReleaseConfig))
    assert len(keys) > 40
    reference = (ROOT / "artifacts/CONFIGURATION.md").read_text()
    for key in keys:
        assert re.search(rf"[`{{ ,]{key}[`:,}}]|^## {key}$", reference, re.MULTILINE), key
    (text,) = re.findall(r"```yaml\n(.*?)```", reference, re.DOTALL)
    (tmp_path / "release.yaml").write_text(text)
    assert load_config(tmp_path / "release.yaml").serving.precision == "fp16"


PAGES = ["README.md", "artifacts/FORMAT.md", "artifacts/DECISIONS.md", "artifacts/CONFIGURATION.md", "CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    for link in links:
        if "://" not in link:
            assert (ROOT / page).parent.joinpath(link).exists(), link


def test_it_opens_with_the_two_commands():
    (first, *_) = blocks("sh")
    assert [line.split()[0] for line in first.splitlines()] == ["scripts/demo", "scripts/test"]
