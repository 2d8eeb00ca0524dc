"""The main path: a release configuration and a training snapshot in, a published artifact out."""

import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from export.aot_inductor import check_build_isa, compiler, write_aot_inductor
from export.config import GraphKind, ReleaseConfig
from export.config_file import load_config
from export.errors import ExportError, GateError, PublishError
from export.golden import write_cases
from export.heap import fix_mapping_threshold
from export.journal import has_pieces
from export.lookup import OPERATOR_LIBRARIES, make_lookup
from export.onnx_graph import OPSET, write_onnx
from export.parity import check_parity, make_slots
from export.plan import Clock, ReleasePlan, plan_release
from export.progress import NoProgress, Progress
from export.publish import Staging, publish, refuse_existing, refuse_inside_artifact, staged, write_file, writing
from export.ranks import joined_ranks
from export.report import render_html, render_markdown
from export.report_data import BuildFigures, ReportData, peak_memory_bytes
from export.rows import help_with_rows, prepare_rows, write_rows
from export.splice import OpenedSurgery
from export.storage import drop_copies, redact
from export.table_report import TableReport, report_tables
from export.torchscript import write_torchscript
from export.weight_file import WrittenWeights, compare_written
from runtime_py import verify_artifact
from runtime_py.digests import ZEROED, Digest, sha256
from runtime_py.documents import FORMAT_VERSION
from runtime_py.golden import GOLDEN
from runtime_py.manifest import (
    MANIFEST,
    WEIGHTS,
    Feature,
    File,
    Graph,
    Manifest,
    Output,
    ParitySummary,
    Provenance,
    compute_artifact_id,
)
from runtime_py.verify import open_verified

if TYPE_CHECKING:
    from export.vocabulary import VocabularyFigures, WrittenVocabulary

__all__ = ["BuildResult", "build_artifact"]

_TORCHSCRIPT = "graphs/lookup.torchscript.pt"
_AOT_INDUCTOR = "graphs/lookup.cpu"
_ONNX = "model.onnx"  # beside `weights`: external data must lie below the model's folder
_ACCURACY = "reports/accuracy.json"
_PARITY = "reports/parity.json"
_VOCABULARY = "reports/vocabulary.json"
_BUILD = "reports/build.json"
_PAGE = "reports/report.html"
_SUMMARY = "reports/summary.md"
_TOOLS = ["torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "pyarrow", "large-embeddings-export"]


@dataclass(frozen=True)
class BuildResult:
    """What a build has published; `seconds` by phase, `stage_seconds` of the rows phase summed over its workers.

    `passed_over` are the newer steps of a snapshot's folder that are not complete.
    """

    artifact: Path
    manifest: Manifest
    seconds: dict[str, float]
    stage_seconds: dict[str, float]
    vocabularies: "list[VocabularyFigures]"
    passed_over: list[str]

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
            "choices": [asdict(choice) for choice in self.manifest.choices],
            "vocabularies": [asdict(figures) for figures in self.vocabularies],
            "snapshots": [asdict(snapshot) for snapshot in self.manifest.provenance.snapshots],
            "passed_over": self.passed_over,
        }


def build_artifact(
    config: ReleaseConfig | str | Path,
    output: str | Path,
    *,
    workers: int,
    resume: bool = False,
    sample: int = 1,
    progress: Progress | None = None,
) -> BuildResult | None:
    """Builds, checks and publishes one artifact; under torchrun, together with the other processes.

    Args:
        config: the configuration, or the path of its file.
        output: the artifact's folder, which must not exist.
        workers: how many threads of this process convert and check rows; each takes a few buffers of some MiB.
        resume: goes on with what an interrupted build of the same output has finished, where that is still right, and
            keeps what this one finishes should it be interrupted.
        sample: of every so many chunks of rows one counts in the figures; 1 measures all rows. Every row is compared with
            what it must be in any case.
        progress: is told what is being done.

    Returns:
        what was published; None on every rank but 0.

    Raises:
        ExportError: what was refused, or the gate that failed. Nothing is left behind or, with `resume`, no more than what
            another build can go on with, which a note of the exception names.
    """
    clock = Clock(progress or NoProgress())
    fix_mapping_threshold()
    with joined_ranks() as ranks:
        if not isinstance(config, ReleaseConfig):
            config = load_config(config)
        target = Path(os.path.abspath(output))
        for path in (str(target), *_uris(config)):
            _refuse_undecodable(path)
        if ranks.rank == 0:
            refuse_existing(target)
            refuse_inside_artifact(target, "--output")
        drop_copies()
        if GraphKind.AOT_INDUCTOR in config.serving.graphs and ranks.rank == 0:
            compiler()
            check_build_isa(config.serving.isa)
        plan = plan_release(config, ranks, workers, sample, clock)
        if ranks.rank:
            with clock.phase("rows"), writing(target):
                help_with_rows(ranks, plan.weights, workers, clock.progress)
            ranks.wait("published", 0)
            return None

        def has_use(container: Path) -> bool:
            return has_pieces(container, plan.weights.fingerprint) and not ranks.refused()

        with staged(target, adopt=has_use if resume else None) as staging:
            prepare_rows(ranks, plan.weights, staging)
            vocabularies = []
            if any(table.vocab for table in config.large_embeddings.tables):
                with clock.phase("vocabularies"):  # before the rows, which take longer: what is wrong shows early
                    vocabularies = _write_vocabularies(config, staging, workers)
            with clock.phase("rows"):
                try:
                    weights = write_rows(ranks, plan.weights, staging, workers, clock.progress)
                except ExportError:
                    plan.check_sources()  # the snapshot may have been written again
                    raise
                plan.check_sources()
            with clock.phase("graphs"):
                accuracy = report_tables(config, plan.precisions, plan.choices, plan.bags, weights)
                manifest = _write_graphs(plan, weights, accuracy, vocabularies, staging.folder)
                manifest = _write_manifest(staging.folder, manifest)  # the loader needs one; the final one comes last
            with clock.phase("digests"):
                _verify_staged(plan, weights, staging.folder, workers)
            with clock.phase("parity"):
                manifest, cases = _check(plan, weights, accuracy, manifest, staging.folder)
            with clock.phase("report"):
                took = BuildFigures(
                    dict(clock.seconds), weights.stage_seconds, peak_memory_bytes(), workers, ranks.world
                )
                figures = [vocabulary.figures for vocabulary in vocabularies]
                manifest = _write_reports(manifest, accuracy, cases, figures, took, staging.folder)
            with clock.phase("publish"):
                manifest = _write_manifest(staging.folder, manifest)
                _check_size(config, manifest, staging.folder)
                verify_artifact(staging.folder, "sizes")
                publish(staging.folder, target)
        ranks.tell("published", "")
    return BuildResult(target, manifest, clock.seconds, weights.stage_seconds, figures, plan.sources.passed_over)


def _uris(config: ReleaseConfig) -> Iterator[str]:
    yield config.snapshot.uri
    for table in config.large_embeddings.tables:
        if table.pretrained is not None:
            yield table.pretrained.embedding_snapshot_uri
        if table.vocab is not None:
            yield table.vocab.uri
        if table.access_counts is not None:
            yield table.access_counts.uri


def _refuse_undecodable(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise PublishError(f"{path!r}: the name is not valid UTF-8; rename it") from error


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
    plan: ReleasePlan,
    weights: WrittenWeights,
    accuracy: list[TableReport],
    vocabularies: "list[WrittenVocabulary]",
    staging: Path,
) -> Manifest:
    """Writes the graph, and drafts the manifest: everything but the outcome of the gates."""
    config = plan.config
    features = [
        Feature(slot.feature, slot.table.name, slot.table.pooling.value, slot.table.weighted)
        for slot in make_slots(config.large_embeddings)
    ]
    surgery = plan.surgery
    lookup = make_lookup(
        weights.tables,
        features,
        surgery.splice if surgery else None,
        sum(parameter.bytes for parameter in weights.parameters),
    )
    write_torchscript(lookup, staging / _TORCHSCRIPT)
    if GraphKind.AOT_INDUCTOR in config.serving.graphs:
        write_aot_inductor(lookup, config.serving.isa, staging / _AOT_INDUCTOR)
    if GraphKind.ONNX in config.serving.graphs:
        _write_onnx(weights, features, surgery, staging / _ONNX)
    dims = {table.name: table.embedding_dim for table in weights.tables}
    outputs = [Output(feature.name, dims[feature.table]) for feature in features]
    tools = _tool_versions()
    fbgemm = tools.get("fbgemm-gpu-cpu") or tools["fbgemm-gpu"]
    all_graphs = [
        Graph("torchscript", "cpu", _TORCHSCRIPT, OPERATOR_LIBRARIES, torch.__version__, fbgemm),
        Graph(
            "aot_inductor",
            "cpu",
            _AOT_INDUCTOR,
            OPERATOR_LIBRARIES,
            torch.__version__,
            fbgemm,
            config.serving.isa.value,
        ),
        Graph("onnx", "cpu", _ONNX, [], torch.__version__, fbgemm, opset=OPSET),
    ]
    graphs = [graph for graph in all_graphs if graph.backend in config.serving.graphs]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        artifact_id="",
        tables=weights.tables,
        features=features,
        outputs=surgery.outputs if surgery else outputs,
        surgery=surgery.describe(weights.parameters) if surgery else None,
        weighted=config.large_embeddings.weighted,
        weights_offset_bytes=weights.offset_bytes,
        weights_bytes=weights.data_bytes,
        vocabularies=[vocabulary.stored for vocabulary in vocabularies],
        graphs=graphs,
        files=[
            File(WEIGHTS, weights.offset_bytes + weights.data_bytes, weights.digest),
            *(_describe_file(staging, path) for graph in graphs for path in graph.files),
            *(vocabulary.file for vocabulary in vocabularies),
            *([_describe_file(staging, _VOCABULARY)] if vocabularies else []),
        ],
        accuracy=[report.figures for report in accuracy],
        choices=plan.choices,
        parity=ParitySummary(config.parity.seed, 0, "", 0.0, 0.0),
        provenance=Provenance(
            snapshots=plan.identities,
            configuration=_redacted(config.model_dump(mode="json")),
            tools=tools,
            built_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ),
        manifest_digest=Digest(ZEROED, ""),
    )
    return replace(manifest, artifact_id=compute_artifact_id(manifest))


def _write_onnx(weights: WrittenWeights, features: list[Feature], surgery: OpenedSurgery | None, path: Path) -> None:
    if surgery is None:
        write_onnx(weights.tables, features, weights.offset_bytes, path)
        return
    from export.onnx_surgery import export_onnx, place_parameters  # onnx only where there is such a graph

    graph = export_onnx(surgery)
    place_parameters(graph, weights.parameters, weights.offset_bytes)
    write_onnx(weights.tables, features, weights.offset_bytes, path, graph)


def _verify_staged(plan: ReleasePlan, weights: WrittenWeights, staging: Path, workers: int) -> None:
    """Compares the staged files with what was written into them: rows by checksum, all else by its digest."""
    compare_written(staging / WEIGHTS, plan.weights, weights, workers)
    with open_verified(staging, "sizes") as verified:
        for vocabulary in verified.vocabularies.values():
            vocabulary.verify_digests(verified.manifest.file[vocabulary.stored.path].digest, workers)


def _check(
    plan: ReleasePlan,
    weights: WrittenWeights,
    accuracy: list[TableReport],
    manifest: Manifest,
    staging: Path,
) -> tuple[Manifest, list[dict[str, Any]]]:
    """Runs the gates on the staged artifact, and keeps answers; returns the manifest with the outcome, and each case's."""
    problems = [line for report in accuracy for line in report.problems]
    if problems:
        raise GateError("\n".join(problems))
    config = plan.config
    summary, cases, golden = check_parity(
        staging, config.large_embeddings, plan.precisions, plan.cases, weights.probes, config.parity.seed, plan.surgery
    )
    write_cases(staging / GOLDEN, golden)
    return replace(manifest, parity=summary, files=[*manifest.files, _describe_file(staging, GOLDEN)]), cases


def _write_reports(
    manifest: Manifest,
    accuracy: list[TableReport],
    cases: list[dict[str, Any]],
    vocabularies: "list[VocabularyFigures]",
    took: BuildFigures,
    staging: Path,
) -> Manifest:
    """Writes everything for people to read; returns the manifest that lists it."""
    tables = [report.to_json() for report in accuracy]
    data = ReportData(manifest, tables, cases, asdict(took), [asdict(figures) for figures in vocabularies])
    documents = {
        _ACCURACY: _to_json({"tables": tables}),
        _PARITY: _to_json({"seed": manifest.parity.seed, "serving": manifest.parity.serving, "cases": cases}),
        _BUILD: _to_json(data.build),
        _PAGE: render_html(data).encode(),
        _SUMMARY: render_markdown(data).encode(),
    }
    for path, document in documents.items():
        write_file(staging / path, document)
    return replace(manifest, files=[*manifest.files, *(_describe_file(staging, path) for path in documents)])


def _check_size(config: ReleaseConfig, manifest: Manifest, staging: Path) -> None:
    """Raises a GateError where the artifact is larger than its byte budget."""
    auto = config.serving.auto
    total = sum(file.bytes for file in manifest.files) + (staging / MANIFEST).stat().st_size
    if auto is not None and auto.max_bytes is not None and total > auto.max_bytes:
        raise GateError(
            f"the artifact has {total:,} bytes, {total - int(auto.max_bytes):,} more than serving.auto.max_bytes: "
            f"{int(auto.max_bytes):,}; raise it"
        )


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
