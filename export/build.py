"""The main path: a release configuration and a training snapshot in, a published artifact out."""

import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from export.accuracy import check_budget, examine_table
from export.config import ReleaseConfig, SnapshotConfig, load_config
from export.errors import GateError, PublishError
from export.lookup import OPERATOR_LIBRARIES, make_lookup
from export.parity import check_parity, make_cases, make_slots, probe_ids
from export.publish import publish, staged, write_file
from export.snapshots import Snapshot, open_snapshot
from export.torchscript import write_torchscript
from export.weight_file import PlannedTable, WrittenWeights, write_weight_file
from runtime_py import verify_artifact
from runtime_py.digests import ZEROED, Digest, sha256
from runtime_py.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    Feature,
    File,
    Graph,
    Manifest,
    Output,
    ParitySummary,
    Provenance,
    SnapshotIdentity,
    TableAccuracy,
    compute_artifact_id,
)
from runtime_py.weights import WeightFile

__all__ = ["BuildResult", "build_artifact"]

_TORCHSCRIPT = "graphs/lookup.torchscript.pt"
_ACCURACY = "reports/accuracy.json"
_PARITY = "reports/parity.json"
_TOOLS = ["torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "large-embeddings-export"]


@dataclass(frozen=True)
class BuildResult:
    """What a build has published; `seconds` by phase, `stage_seconds` of the rows phase summed over its workers."""

    artifact: Path
    manifest: Manifest
    seconds: dict[str, float]
    stage_seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The object that `build --json` prints."""
        return {
            "artifact": str(self.artifact),
            "artifact_id": self.manifest.artifact_id,
            "bytes": {file.path: file.bytes for file in self.manifest.files},
            "seconds": self.seconds,
            "stage_seconds": self.stage_seconds,
            "parity": asdict(self.manifest.parity),
            "accuracy": [asdict(figures) for figures in self.manifest.accuracy],
            "snapshots": [asdict(snapshot) for snapshot in self.manifest.provenance.snapshots],
        }


def build_artifact(
    config: ReleaseConfig | str | Path,
    output: str | Path,
    *,
    workers: int,
    report: Callable[[str], None] = lambda _: None,
) -> BuildResult:
    """Builds, checks and publishes one artifact.

    Args:
        config: the configuration, or the path of its file.
        output: the artifact's folder, which must not exist.
        workers: how many threads convert and check rows; each takes two buffers of a few MiB.
        report: called with the name of each phase as it starts.

    Raises:
        ExportError: what was refused, or the gate that failed; nothing is left behind.
    """
    if not isinstance(config, ReleaseConfig):
        config = load_config(config)
    target = Path(os.path.abspath(output))
    pretrained = [table.pretrained for table in config.large_embeddings.tables if table.pretrained is not None]
    for path in (str(target), config.snapshot.uri, *(source.embedding_snapshot_uri for source in pretrained)):
        _refuse_undecodable(path)
    clock = _Clock(report)
    with staged(target) as staging:
        with clock.phase("snapshot"):
            tables, snapshots = _plan(config)
        with clock.phase("rows"):
            (staging / WEIGHTS).parent.mkdir()
            weights = write_weight_file(staging / WEIGHTS, tables, workers)
        with clock.phase("graphs"):
            manifest = _write_graphs(config, weights, snapshots, staging)
        with clock.phase("accuracy and parity"):
            manifest = _write_manifest(staging, manifest)  # the loader needs one: rewritten when the gates have passed
            manifest = _check(config, tables, manifest, staging, workers)
        with clock.phase("publish"):
            manifest = _write_manifest(staging, manifest)
            verify_artifact(staging, "sizes")
            publish(staging, target)
    return BuildResult(target, manifest, clock.seconds, weights.stage_seconds)


def _refuse_undecodable(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise PublishError(f"{path!r}: the name is not valid UTF-8; rename it") from error


class _Clock:
    """Names the phases as they start, and keeps their times."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._report(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def _plan(config: ReleaseConfig) -> tuple[list[PlannedTable], list[SnapshotIdentity]]:
    """Finds the rows of every table, and so refuses a snapshot that does not fit before anything is written."""
    opened: dict[SnapshotConfig, Snapshot] = {config.snapshot: open_snapshot(config.snapshot)}
    tables = []
    for table in config.large_embeddings.tables:
        source, name = config.snapshot, table.name
        if table.pretrained is not None:
            source = SnapshotConfig(uri=table.pretrained.embedding_snapshot_uri)
            name = table.pretrained.emb_name
        if source not in opened:
            opened[source] = open_snapshot(source)
        rows = opened[source].table(table, name)
        tables.append(PlannedTable(table.name, rows, config.serving_precision(table)))
    return tables, [snapshot.identity for snapshot in opened.values()]


def _write_graphs(
    config: ReleaseConfig, weights: WrittenWeights, snapshots: list[SnapshotIdentity], staging: Path
) -> Manifest:
    """Writes the graph, and drafts the manifest: everything but the outcome of the gates."""
    features = [
        Feature(slot.feature, slot.table.name, slot.table.pooling.value, slot.table.weighted)
        for slot in make_slots(config.large_embeddings)
    ]
    write_torchscript(make_lookup(weights.tables, features), staging / _TORCHSCRIPT)
    dims = {table.name: table.embedding_dim for table in weights.tables}
    tools = _tool_versions()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        artifact_id="",
        tables=weights.tables,
        features=features,
        outputs=[Output(feature.name, dims[feature.table]) for feature in features],
        weighted=config.large_embeddings.weighted,
        weights_offset_bytes=weights.offset_bytes,
        weights_bytes=weights.data_bytes,
        graphs=[
            Graph(
                backend="torchscript",
                target="cpu",
                path=_TORCHSCRIPT,
                operator_libraries=OPERATOR_LIBRARIES,
                torch=torch.__version__,
                fbgemm_gpu=tools.get("fbgemm-gpu-cpu") or tools["fbgemm-gpu"],
            )
        ],
        files=[
            File(WEIGHTS, weights.offset_bytes + weights.data_bytes, weights.digest),
            _describe_file(staging, _TORCHSCRIPT),
        ],
        accuracy=[],
        parity=ParitySummary(config.parity.seed, 0, "", 0.0, 0.0),
        provenance=Provenance(
            snapshots=snapshots,
            configuration=config.model_dump(mode="json"),
            tools=tools,
            built_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ),
        manifest_digest=Digest(ZEROED, ""),
    )
    return replace(manifest, artifact_id=compute_artifact_id(manifest))


def _check(
    config: ReleaseConfig, tables: list[PlannedTable], manifest: Manifest, staging: Path, workers: int
) -> Manifest:
    """Runs the gates on the staged artifact; returns the manifest with their reports."""
    cases = make_cases(config.large_embeddings, config.parity.seed, config.parity.batches)
    ids = probe_ids(config.large_embeddings, cases)
    with WeightFile(staging, manifest) as weights:
        examined = {table.name: examine_table(table, weights, ids[table.name], workers) for table in tables}
    accuracies = [accuracy for accuracy, _ in examined.values()]
    _check_budgets(config, accuracies)
    probes = {name: probe for name, (_, probe) in examined.items()}
    precisions = {table.name: table.precision for table in tables}
    summary, results = check_parity(staging, config.large_embeddings, precisions, cases, probes, config.parity.seed)
    write_file(staging / _ACCURACY, _to_json({"tables": [asdict(accuracy) for accuracy in accuracies]}))
    write_file(staging / _PARITY, _to_json(asdict(summary) | {"cases": results}))
    files = [*manifest.files, _describe_file(staging, _ACCURACY), _describe_file(staging, _PARITY)]
    return replace(manifest, files=files, accuracy=accuracies, parity=summary)


def _check_budgets(config: ReleaseConfig, accuracies: list[TableAccuracy]) -> None:
    lines = []
    for table, accuracy in zip(config.large_embeddings.tables, accuracies, strict=True):
        budget = config.parity.budget(table.name, config.serving_precision(table))
        lines += check_budget(accuracy, budget)
    if lines:
        raise GateError("\n".join(lines))


def _write_manifest(staging: Path, manifest: Manifest) -> Manifest:
    """Writes the manifest over an earlier draft, and returns it as it stands in the file."""
    data = manifest.to_bytes()
    (staging / MANIFEST).write_bytes(data)
    return replace(manifest, manifest_digest=Digest(ZEROED, json.loads(data)["manifest_digest"]["value"]))


def _describe_file(staging: Path, path: str) -> File:
    data = (staging / path).read_bytes()
    return File(path, len(data), sha256(data))


def _to_json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _tool_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # one of the two FBGEMM wheels is there, not both
    return versions
