"""The main path: a release configuration and a training snapshot in, a published artifact out."""

import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from export.accuracy import check_budget
from export.config import EmbeddingBagConfig, ReleaseConfig, SnapshotConfig, load_config
from export.errors import ExportError, GateError, PublishError, SnapshotChangedError
from export.journal import has_pieces
from export.lookup import OPERATOR_LIBRARIES, make_lookup
from export.parity import Case, check_parity, make_cases, make_slots, probe_ids
from export.progress import NoProgress, Progress
from export.publish import Staging, publish, refuse_existing, staged, write_file, writing
from export.ranks import joined_ranks
from export.rows import help_with_rows, prepare_rows, write_rows
from export.snapshots import Snapshot, open_snapshot
from export.storage import drop_copies, redact
from export.torchscript import write_torchscript
from export.weight_file import PlannedTable, WeightPlan, WrittenWeights
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
from runtime_py.parallel import map_ordered

if TYPE_CHECKING:
    from export.vocabulary import VocabularyFigures, WrittenVocabulary

__all__ = ["BuildResult", "build_artifact"]

_TORCHSCRIPT = "graphs/lookup.torchscript.pt"
_ACCURACY = "reports/accuracy.json"
_PARITY = "reports/parity.json"
_VOCABULARY = "reports/vocabulary.json"
_REQUESTS = 16  # tables to look for at a time: where the snapshot is remote, each waits for answers
_TOOLS = ["torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "pyarrow", "large-embeddings-export"]


@dataclass(frozen=True)
class BuildResult:
    """What a build has published; `seconds` by phase, `stage_seconds` of the rows phase summed over its workers."""

    artifact: Path
    manifest: Manifest
    seconds: dict[str, float]
    stage_seconds: dict[str, float]
    vocabularies: "list[VocabularyFigures]"

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
            "vocabularies": [asdict(figures) for figures in self.vocabularies],
            "snapshots": [asdict(snapshot) for snapshot in self.manifest.provenance.snapshots],
        }


def build_artifact(
    config: ReleaseConfig | str | Path,
    output: str | Path,
    *,
    workers: int,
    resume: bool = False,
    progress: Progress | None = None,
) -> BuildResult | None:
    """Builds, checks and publishes one artifact; under torchrun, together with the other processes.

    Args:
        config: the configuration, or the path of its file.
        output: the artifact's folder, which must not exist.
        workers: how many threads of this process convert and check rows; each takes a few buffers of some MiB.
        resume: goes on with what an interrupted build of the same output has finished, where that is still right, and
            keeps what this one finishes should it be interrupted.
        progress: is told what is being done.

    Returns:
        what was published; None on every rank but 0.

    Raises:
        ExportError: what was refused, or the gate that failed. Nothing is left behind or, with `resume`, no more than what
            another build can go on with, which a note of the exception names.
    """
    clock = _Clock(progress or NoProgress())
    with joined_ranks() as ranks:
        if not isinstance(config, ReleaseConfig):
            config = load_config(config)
        target = Path(os.path.abspath(output))
        for path in (str(target), *_uris(config)):
            _refuse_undecodable(path)
        if ranks.rank == 0:
            refuse_existing(target)
        drop_copies()
        with clock.phase("snapshot"):
            cases = make_cases(config.large_embeddings, config.parity.seed, config.parity.batches)
            snapshots = _open_snapshots(config)
            plan = _plan(config, snapshots, cases)
        if ranks.rank:
            with clock.phase("rows"), writing(target):
                help_with_rows(ranks, plan, workers, clock.progress)
            ranks.wait("published", 0)
            return None
        adopt = (lambda container: has_pieces(container, plan.fingerprint)) if resume else None
        with staged(target, adopt=adopt) as staging:
            prepare_rows(ranks, plan, staging)
            vocabularies = []
            if any(table.vocab for table in config.large_embeddings.tables):
                with clock.phase("vocabularies"):  # before the rows, which take longer: what is wrong shows early
                    vocabularies = _write_vocabularies(config, staging, workers)
            with clock.phase("rows"):
                try:
                    weights = write_rows(ranks, plan, staging, workers, clock.progress)
                except ExportError:
                    _check_sources(config, snapshots, cases, plan)  # the snapshot may have been written again
                    raise
                _check_sources(config, snapshots, cases, plan)
            with clock.phase("graphs"):
                identities = [snapshot.identity for snapshot in snapshots.values()]
                manifest = _write_graphs(config, weights, vocabularies, identities, staging.folder)
                manifest = _write_manifest(staging.folder, manifest)  # the loader needs one; the final one comes last
            with clock.phase("digests"):
                verify_artifact(staging.folder, "full", workers)
            with clock.phase("parity"):
                manifest = _check(config, weights, cases, manifest, staging.folder)
            with clock.phase("publish"):
                manifest = _write_manifest(staging.folder, manifest)
                verify_artifact(staging.folder, "sizes")
                publish(staging.folder, target)
        ranks.tell("published", "")
    figures = [vocabulary.figures for vocabulary in vocabularies]
    return BuildResult(target, manifest, clock.seconds, weights.stage_seconds, figures)


def _uris(config: ReleaseConfig) -> Iterator[str]:
    yield config.snapshot.uri
    for table in config.large_embeddings.tables:
        if table.pretrained is not None:
            yield table.pretrained.embedding_snapshot_uri
        if table.vocab is not None:
            yield table.vocab.uri


def _refuse_undecodable(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise PublishError(f"{path!r}: the name is not valid UTF-8; rename it") from error


class _Clock:
    """Names the phases as they start, and keeps their times."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.progress.phase(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def _open_snapshots(config: ReleaseConfig) -> dict[SnapshotConfig, Snapshot]:
    """The configuration's snapshot, then those of pretrained tables."""
    sources = dict.fromkeys([config.snapshot, *(_source(config, table)[0] for table in config.large_embeddings.tables)])
    return {source: open_snapshot(source) for source in sources}


def _plan(config: ReleaseConfig, snapshots: Mapping[SnapshotConfig, Snapshot], cases: list[Case]) -> WeightPlan:
    """Finds the rows of every table, and so refuses a snapshot that does not fit before anything is written."""
    ids = probe_ids(config.large_embeddings, cases)

    def find(table: EmbeddingBagConfig) -> PlannedTable:
        source, name = _source(config, table)
        rows = snapshots[source].table(table, name)
        return PlannedTable(table.name, rows, config.serving_precision(table), ids[table.name])

    return WeightPlan(list(map_ordered(find, config.large_embeddings.tables, _REQUESTS)))


def _check_sources(
    config: ReleaseConfig, snapshots: Mapping[SnapshotConfig, Snapshot], cases: list[Case], plan: WeightPlan
) -> None:
    """Opens the snapshots again: whatever was written again since the first look shows as another plan."""
    again = {}
    for source, snapshot in snapshots.items():
        again[source] = open_snapshot(source.model_copy(update={"step": snapshot.identity.step}))
        if again[source].identity != snapshot.identity:
            raise SnapshotChangedError(f"{source.uri}: the snapshot changed while it was read; build again")
    if _plan(config, again, cases).fingerprint != plan.fingerprint:
        raise SnapshotChangedError(f"{config.snapshot.uri}: the snapshot changed while it was read; build again")


def _source(config: ReleaseConfig, table: EmbeddingBagConfig) -> tuple[SnapshotConfig, str]:
    """The snapshot that has the table's rows, and what the table is called there."""
    if table.pretrained is None:
        return config.snapshot, table.name
    return SnapshotConfig(uri=table.pretrained.embedding_snapshot_uri), table.pretrained.emb_name


def _write_vocabularies(config: ReleaseConfig, staging: Staging, workers: int) -> "list[WrittenVocabulary]":
    """Writes the vocabulary of every table that has one, and the report on all of them."""
    written = []
    for table in config.large_embeddings.tables:
        if table.vocab is not None:
            from export.vocabulary import write_vocabulary  # pyarrow only where there is a vocabulary

            with tempfile.TemporaryDirectory(prefix="scratch-", dir=staging.container) as scratch:
                written.append(write_vocabulary(table, table.vocab, staging.folder, Path(scratch), workers))
    if written:
        report = {"tables": [asdict(vocabulary.figures) for vocabulary in written]}
        write_file(staging.folder / _VOCABULARY, _to_json(report))
    return written


def _write_graphs(
    config: ReleaseConfig,
    weights: WrittenWeights,
    vocabularies: "list[WrittenVocabulary]",
    snapshots: list[SnapshotIdentity],
    staging: Path,
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
        vocabularies=[vocabulary.stored for vocabulary in vocabularies],
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
            *(vocabulary.file for vocabulary in vocabularies),
            *([_describe_file(staging, _VOCABULARY)] if vocabularies else []),
        ],
        accuracy=weights.accuracies,
        parity=ParitySummary(config.parity.seed, 0, "", 0.0, 0.0),
        provenance=Provenance(
            snapshots=snapshots,
            configuration=_redacted(config.model_dump(mode="json")),
            tools=tools,
            built_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ),
        manifest_digest=Digest(ZEROED, ""),
    )
    return replace(manifest, artifact_id=compute_artifact_id(manifest))


def _check(
    config: ReleaseConfig, weights: WrittenWeights, cases: list[Case], manifest: Manifest, staging: Path
) -> Manifest:
    """Runs the gates on the staged artifact; returns the manifest with their reports."""
    _check_budgets(config, weights.accuracies)
    precisions = {table.name: config.serving_precision(table) for table in config.large_embeddings.tables}
    seed = config.parity.seed
    summary, results = check_parity(staging, config.large_embeddings, precisions, cases, weights.probes, seed)
    write_file(staging / _ACCURACY, _to_json({"tables": [asdict(accuracy) for accuracy in weights.accuracies]}))
    write_file(staging / _PARITY, _to_json(asdict(summary) | {"cases": results}))
    files = [*manifest.files, _describe_file(staging, _ACCURACY), _describe_file(staging, _PARITY)]
    return replace(manifest, files=files, parity=summary)


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


def _redacted(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _redacted(value) for key, value in document.items()}
    if isinstance(document, list):
        return [_redacted(value) for value in document]
    return redact(document) if isinstance(document, str) else document


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
