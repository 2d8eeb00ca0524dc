"""The command line: `python -m export plan | build | verify | inspect | report | triton | publish | rollback | doctor`.

stdout carries the result, stderr the progress. Exit codes: 0 done, 1 refused with one clear error, 2 usage, 3 a parity
or accuracy gate failed, 130 and 143 stopped by a signal. This module prints and exits; it decides nothing.
"""

import io
import json
import math
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from export.errors import ExportError, GateError, PeerError
from export.progress import progress_on
from export.ranks import processes_of_this_host, rank_of_this_process
from export.storage import drop_copies, redact_all
from runtime_py.errors import ArtifactError
from runtime_py.manifest import Manifest
from runtime_py.manifest_reader import read_manifest
from runtime_py.verify import verify_artifact

if TYPE_CHECKING:
    from export.plan import Preview
    from export.versions import Move

__all__ = ["main"]

app = typer.Typer(
    name="export",
    help="Builds verified inference artifacts from training snapshots of large embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_SAMPLE = typer.Option(
    min=1, help="Measure accuracy on one of so many chunks of rows (some MiB each); default: on every row."
)
_JSON = typer.Option("--json", help="Print one JSON object instead of text.")
_WIDTH = 120
_WIDE = 250  # where the last column has sentences
_RANK = rank_of_this_process()
_WORKERS = max(1, (os.cpu_count() or 1) // processes_of_this_host())


@app.command()
def build(
    config: Annotated[Path, typer.Option(help="The release configuration (YAML).")],
    output: Annotated[Path, typer.Option(help="The artifact's folder; it must not exist.")],
    workers: Annotated[int, typer.Option(min=1, help="Threads that convert rows; default: one a core.")] = _WORKERS,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted build, and leave what another one can go on with."),
    ] = False,
    sample: Annotated[int, _SAMPLE] = 1,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Build, check and publish an artifact; under torchrun, with all of its processes."""
    from export.build import build_artifact  # torchrec takes seconds to import; the other commands do without

    try:
        with progress_on(None if _RANK else sys.stderr) as progress:
            result = build_artifact(config, output, workers=workers, resume=resume, sample=sample, progress=progress)
    except _Stopped as stop:
        stop.outcome = f"{output} is complete" if os.path.lexists(output) else "nothing was published"
        raise
    if result is None:  # rank 0 speaks for all
        return
    _warn_of_steps(result.passed_over)
    seconds = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in result.seconds.items())
    text = (
        _to_json(result.to_json())
        if as_json
        else _summary(result.artifact, result.manifest) + f"built in   {seconds}\n"
    )
    try:
        _write(text)
    except OSError as error:
        _fail(f"{output} is complete, but its summary could not be written: {error.strerror}", 1)


@app.command()
def plan(
    config: Annotated[Path, typer.Option(help="The release configuration (YAML).")],
    workers: Annotated[
        int, typer.Option(min=1, help="Threads that read and measure rows; default: one a core.")
    ] = _WORKERS,
    sample: Annotated[int, _SAMPLE] = 1,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Show what each precision would cost each table, and what a build would choose; writes nothing."""
    from export.config_file import load_config
    from export.plan import Clock, preview_release  # see `build`

    with progress_on(sys.stderr) as progress:
        preview = preview_release(load_config(config), workers, sample, Clock(progress))
    _warn_of_steps(preview.passed_over)
    _write(_to_json(preview.to_json()) if as_json else _describe_preview(preview))
    if preview.refusal:
        raise GateError(preview.refusal)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    sizes: Annotated[
        bool, typer.Option("--sizes", help="Compare only the size of the rows, not their digests.")
    ] = False,
    replay: Annotated[
        bool, typer.Option("--replay", help="Also run the golden cases, and compare the answers.")
    ] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Compare an artifact with its manifest, byte for byte."""
    start = time.perf_counter()
    manifest = verify_artifact(artifact, "sizes" if sizes else "full")
    replayed = 0
    if replay:
        from export.golden import replay_cases  # only this needs torch's operators

        replayed = replay_cases(artifact, manifest)
    seconds = time.perf_counter() - start
    total = sum(file.bytes for file in manifest.files)
    if as_json:
        result = {
            "artifact": str(artifact),
            "artifact_id": manifest.artifact_id,
            "bytes": total,
            "seconds": round(seconds, 3),
        }
        _write(_to_json(result | {"verified": "sizes" if sizes else "full", "replayed": replayed}))
        return
    what = "sizes, and every digest but the rows'" if sizes else "every digest"
    files = f"{len(manifest.files) + 1} files, {decimal(total)}"
    how = "within their tolerance" if manifest.surgery else "bit for bit"
    answers = f", {replayed} golden cases {how}" if replay else ""
    _write(f"{artifact}: intact: {files}, {what}{answers}, in {seconds:.2f} s\n")


@app.command()
def report(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    output: Annotated[Path, typer.Option(help="The page to write; an existing one is replaced.")],
    evaluation: Annotated[
        Path | None, typer.Option(help="Figures of a task, as JSON, to show beside the artifact's own.")
    ] = None,
) -> None:
    """Write an artifact's report again, to a file outside of it, with the figures of a task."""
    from export.report import render_html
    from export.report_data import read_report_data

    if output.resolve().is_relative_to(artifact.resolve()):
        raise ExportError(f"--output: {output} is inside the artifact, which never changes; name a file outside of it")
    page = render_html(read_report_data(artifact, evaluation))
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ExportError(f"--output: {output}: cannot be written: {error.strerror}") from error
    _write(f"{output}\n")


@app.command()
def triton(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    repository: Annotated[Path, typer.Option(help="The model repository; made where it is missing.")],
    name: Annotated[
        str, typer.Option(help="What the models' names start with; `_` and the graph follow.")
    ] = "large_embeddings",
    graph: Annotated[
        list[str] | None, typer.Option(help="A graph to serve, such as onnx; may be repeated; default: all.")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the files, for another file system, instead of linking them.")
    ] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Write a model repository for Triton Inference Server over an artifact's one weight file."""
    from export.triton import write_repository

    models = write_repository(artifact, repository, name=name, graphs=graph or (), copy=copy)
    if as_json:
        _write(_to_json({"repository": str(repository), "models": [model.to_json() for model in models]}))
        return
    _write("".join(f"{model.path}: {model.graph}, Triton's {model.backend} backend\n" for model in models))


@app.command()
def doctor(
    artifact: Annotated[Path | None, typer.Argument(help="An artifact's folder: would it run here?")] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Say what is installed, whether it fits together, and whether an artifact would run here; exit 1 where not."""
    from export.doctor import describe, diagnose

    diagnosis = diagnose(artifact)
    _write(_to_json(asdict(diagnosis)) if as_json else describe(diagnosis))
    if diagnosis.problems:
        raise ExportError("\n".join(diagnosis.problems))


@app.command()
def inspect(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Show what an artifact holds, from its manifest alone."""
    manifest = read_manifest(artifact)
    _write(_to_json(asdict(manifest)) if as_json else _summary(artifact, manifest))


@app.command()
def publish(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    to: Annotated[Path, typer.Option(help="The root: the folder of current.json and of all versions.")],
    keep: Annotated[
        int | None, typer.Option(min=2, help="Delete all but so many versions, those that were current last.")
    ] = None,
    allow_signature_change: Annotated[
        bool,
        typer.Option(
            "--allow-signature-change",
            help="Publish what servers that follow the root refuse: other features, outputs, or fewer rows.",
        ),
    ] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Copy an artifact to a root, verify the copy, and make it the version that servers take."""
    from export.versions import publish_version

    move = publish_version(artifact, to, keep, allow_signature_change=allow_signature_change)
    _write(_to_json(move.to_json()) if as_json else _describe_move(move))


@app.command()
def rollback(
    to: Annotated[Path, typer.Option(help="The root: the folder of current.json and of all versions.")],
    version: Annotated[
        str | None, typer.Argument(help="The version, or the start of its name; default: the one before.")
    ] = None,
    allow_signature_change: Annotated[
        bool,
        typer.Option(
            "--allow-signature-change",
            help="Take what running servers refuse, such as a table with fewer rows; they take it when they start again.",
        ),
    ] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Verify an earlier version, and make it the one that servers take."""
    from export.versions import roll_back

    move = roll_back(to, version, allow_signature_change=allow_signature_change)
    _write(_to_json(move.to_json()) if as_json else _describe_move(move))


class _Stopped(BaseException):
    """A signal asks the process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.outcome = ""


def main() -> NoReturn:
    """Runs the command line and exits; the one place where errors become lines and exit codes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where the shell has closed it
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except _Stopped as stop:
        message = "; ".join(filter(None, (f"stopped by {signal.Signals(stop.number).name}", stop.outcome)))
        _fail(_with_notes(message, stop), 128 + stop.number)
    except PeerError as error:
        _fail("" if _RANK else _with_notes(str(error), error), error.exit_code)  # its rank has said so itself
    except ExportError as error:
        _fail(_with_notes(str(error), error), error.exit_code)
    except ArtifactError as error:
        _fail(str(error), 1)
    except OSError as error:  # of the output: everything else is one of the two above
        _fail(f"the result could not be written: {error.strerror}", 1)
    raise SystemExit(0)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second signal does not wait
    raise _Stopped(number)


def _fail(message: str, code: int) -> NoReturn:
    if sys.stderr is not None:  # the shell may have closed it
        with suppress(OSError):
            lines = [f"error: {redact_all(line)}\n" for line in message.splitlines()]
            print("".join(lines), end="", file=sys.stderr, flush=True)  # noqa: T201
    drop_copies()
    # Not through the interpreter's exit, which would report an output that cannot be flushed a second time.
    os._exit(code)


def _warn_of_steps(passed_over: list[str]) -> None:
    """Says on stderr that a trainer may have stopped writing whole steps."""
    for step in passed_over:
        with suppress(OSError):
            print(f"warning: {redact_all(step)}: is newer, not complete, and was passed over", file=sys.stderr)  # noqa: T201


def _with_notes(message: str, error: BaseException) -> str:
    return "\n".join([message, *getattr(error, "__notes__", [])])


def _write(text: str) -> None:
    """Writes a result to stdout, to the end; where the shell has closed it, to nowhere."""
    print(text, end="", flush=True)  # noqa: T201


def _to_json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _summary(artifact: Path, manifest: Manifest) -> str:
    console, text = _console()
    console.print("artifact  ", str(artifact), soft_wrap=True)
    console.print("id        ", manifest.artifact_id)
    for snapshot in manifest.provenance.snapshots:
        step = "" if snapshot.step is None else f", step {snapshot.step}"
        console.print("snapshot  ", f"{snapshot.uri} ({snapshot.format}{step})", soft_wrap=True)
    console.print(_table_of_tables(manifest))
    for vocabulary in manifest.vocabularies:
        rows = manifest.table[vocabulary.table].num_embeddings
        # Never rounded up: 100 % is said of no vocabulary that lacks an entity.
        coverage = math.floor(1e4 * vocabulary.entities / rows) / 1e2
        line = f"{vocabulary.table}: {vocabulary.entities:,} entities, {coverage:g} % of the rows"
        console.print("vocabulary", f"{line}, {decimal(manifest.file[vocabulary.path].bytes)}", soft_wrap=True)
    for graph in manifest.graphs:
        target = graph.target if graph.isa is None else f"{graph.target} ({graph.isa})"
        console.print("graph     ", f"{graph.backend} for {target}, {decimal(manifest.graph_bytes(graph))}")
    if manifest.surgery is not None:
        outputs = ", ".join(f"{output.key} [{output.dim}]" for output in manifest.outputs)
        size = decimal(sum(parameter.bytes for parameter in manifest.surgery.parameters))
        line = f"{manifest.surgery.module} {manifest.surgery.kwargs}, {size} of parameters, gives {outputs}"
        console.print("surgery   ", line, soft_wrap=True)
    for choice in manifest.choices:
        console.print("choice    ", f"{choice.table}: {choice.serving_precision}: {choice.reason}", soft_wrap=True)
    for figures in manifest.accuracy:
        if figures.vanished_rows:
            line = f"{figures.table}: {figures.vanished_rows:,} of {figures.rows_measured:,} rows, of which nothing is stored"
            console.print("vanished  ", line, soft_wrap=True)
    for figures in manifest.accuracy:
        if figures.outlier_rows:
            line = f"{figures.table}: {figures.outlier_rows:,} rows in which one value flattens the others"
            console.print("outliers  ", f"{line}; see reports/accuracy.json", soft_wrap=True)
    parity = manifest.parity
    console.print("parity    ", f"{parity.cases} batches {parity.serving};")
    share = parity.quantization_max_share_of_bound
    console.print(
        "          ",
        f"at most {parity.quantization_max_error:.3g} from float32, {math.ceil(100 * share):.0f}% of the bound",
    )
    return text.getvalue()


def _describe_move(move: "Move") -> str:
    lines = [f"current    {move.version}" + ("" if move.moved else ", as before")]
    lines += [f"before     {name}" for name in move.history[:1]]
    lines += [f"deleted    {name}" for name in move.deleted]
    lines += [
        f"in use     {name}: a server has it mapped; the next publish with --keep tries again" for name in move.in_use
    ]
    lines += [f"kept       {name}: cannot be deleted: {reason}" for name, reason in move.kept.items()]
    return "\n".join(lines) + "\n"


def _describe_preview(preview: "Preview") -> str:
    view = Table(box=None, pad_edge=False, header_style="")
    view.add_column("table")
    for name in ("", "precision", "bytes", "max error", "rel. L2", "mean cosine", "worst cosine", "outliers"):
        view.add_column(name, justify="right")
    view.add_column("outside its budget")
    for table, candidates in preview.candidates.items():
        for number, entry in enumerate(candidates):
            figures = entry.accuracy
            numbers = ["-"] * 5
            if figures is not None:
                numbers = [
                    _figure(figures.max_absolute_error),
                    _figure(figures.relative_l2),
                    _cosine(figures.mean_cosine),
                    _cosine(figures.worst_cosine),
                    f"{figures.outlier_rows:,}",
                ]
            view.add_row(
                "" if number else table,
                "->" if entry.precision is preview.precisions.get(table) else "",
                entry.precision,
                decimal(entry.bytes),
                *numbers,
                "; ".join(problem.partition(": ")[2].partition(",")[0] for problem in entry.problems),
            )
    console, text = _console(_WIDE)
    console.print(view)
    for choice in preview.choices:
        console.print("choice    ", f"{choice.table}: {choice.serving_precision}: {choice.reason}", soft_wrap=True)
    measured = "every row" if preview.sample == 1 else f"one chunk of rows of {preview.sample}"
    console.print("measured  ", measured)
    if not preview.refusal:
        console.print(
            "artifact  ", f"{decimal(preview.artifact_bytes)}, graphs and reports included as set aside for them"
        )
        console.print("time      ", f"{preview.seconds:.1f} s on these workers, and the disk's to write it")
    return text.getvalue()


def _console(width: int = _WIDTH) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=width, highlight=False, markup=False, emoji=False), text


def _table_of_tables(manifest: Manifest) -> Table:
    view = Table(box=None, pad_edge=False, header_style="")
    view.add_column("table")
    for name in ("features", "rows", "dim", "stored as", "before", "after", "max error", "rel. L2", "worst cosine"):
        view.add_column(name, justify="left" if name == "features" else "right")
    for figures in manifest.accuracy:
        table = manifest.table[figures.table]
        features = [feature.name for feature in manifest.features if feature.table == table.name]
        view.add_row(
            table.name,
            ", ".join(features),
            f"{table.num_embeddings:,}",
            str(table.embedding_dim),
            table.serving_precision,
            decimal(figures.bytes_before),
            decimal(figures.bytes_after),
            _figure(figures.max_absolute_error),
            _figure(figures.relative_l2),
            _cosine(figures.worst_cosine),
        )
    before = sum(figures.bytes_before for figures in manifest.accuracy)
    after = sum(figures.bytes_after for figures in manifest.accuracy)
    view.add_row("all", "", "", "", "", decimal(before), decimal(after), "", "", "")
    return view


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}" if value else "0"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.7f}"
