"""What a report is made of: the artifact's manifest and its own JSON, so that it says no more than these do."""

import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import ExportError
from runtime_py.digests import sha256
from runtime_py.manifest import Manifest
from runtime_py.manifest_reader import read_manifest

__all__ = ["BuildFigures", "ReportData", "peak_memory_bytes", "read_report_data"]


@dataclass(frozen=True)
class BuildFigures:
    """What a build took: seconds by phase and, of the rows phase, by stage, summed over workers; the peak of resident memory.

    `workers` threads of each of `processes`; `peak_memory_bytes` is of the process that published, mapped pages included.
    """

    seconds: dict[str, float]
    stage_seconds: dict[str, float]
    peak_memory_bytes: int
    workers: int
    processes: int


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident, pages of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class ReportData:
    """What a report is made of.

    Attributes:
        manifest: the artifact's.
        accuracy: `tables` of `reports/accuracy.json`.
        cases: `cases` of `reports/parity.json`; those with a `graph` are shown by graph.
        build: `reports/build.json`, a `BuildFigures`.
        vocabularies: `tables` of `reports/vocabulary.json`, if any.
        evaluation: a task-level evaluation as `evaluation.read_evaluation` gives it.
    """

    manifest: Manifest
    accuracy: list[dict[str, Any]]
    cases: list[dict[str, Any]]
    build: dict[str, Any]
    vocabularies: list[dict[str, Any]]
    evaluation: dict[str, Any] | None = None


def read_report_data(artifact: Path, evaluation: Path | None = None) -> ReportData:
    """Reads what a published artifact says of itself and, from a file beside it, a task-level evaluation.

    Raises:
        ManifestError: the folder is no artifact.
        ExportError: a report is missing, or is not the one that the manifest lists.
        ConfigError: the evaluation is unreadable, or not what `evaluation.read_evaluation` expects.
    """
    manifest = read_manifest(artifact)
    if evaluation is not None:
        from export.evaluation import read_evaluation

    def read(name: str) -> dict[str, Any]:
        path = artifact / "reports" / f"{name}.json"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ExportError(f"{path}: cannot be read: {error.strerror}; build the artifact again") from error
        listed = manifest.file.get(f"reports/{name}.json")
        if listed is None or sha256(data) != listed.digest:
            raise ExportError(f"{path}: is not the one that the manifest lists; restore it or build the artifact again")
        document: dict[str, Any] = json.loads(data)
        return document

    return ReportData(
        manifest=manifest,
        accuracy=read("accuracy")["tables"],
        cases=read("parity")["cases"],
        build=read("build"),
        vocabularies=read("vocabulary")["tables"] if manifest.vocabularies else [],
        evaluation=None if evaluation is None else read_evaluation(evaluation),
    )
