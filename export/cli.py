"""The command line: `python -m export build | verify | inspect`.

stdout carries the result, stderr the progress. Exit codes: 0 done, 1 refused with one clear error, 2 usage, 3 a parity
or accuracy gate failed, 130 and 143 stopped by a signal. This module prints and exits; it decides nothing.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from export.errors import ExportError
from runtime_py.errors import ArtifactError
from runtime_py.manifest import Manifest, read_manifest
from runtime_py.verify import verify_artifact

__all__ = ["main"]

app = typer.Typer(
    name="export",
    help="Builds verified inference artifacts from training snapshots of large embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_JSON = typer.Option("--json", help="Print one JSON object instead of text.")
_WIDTH = 120
_CORES = os.cpu_count() or 1


@app.command()
def build(
    config: Annotated[Path, typer.Option(help="The release configuration (YAML).")],
    output: Annotated[Path, typer.Option(help="The artifact's folder; it must not exist.")],
    workers: Annotated[int, typer.Option(min=1, help="Threads that convert rows; default: one a core.")] = _CORES,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Build, check and publish an artifact."""
    from export.build import build_artifact  # torchrec takes seconds to import; the other commands do without

    result = build_artifact(config, output, workers=workers, report=_report_phase)
    if as_json:
        _print_json(result.to_json())
        return
    console = _console()
    _print_summary(console, result.artifact, result.manifest)
    console.print("built in  ", ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in result.seconds.items()))


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    sizes: Annotated[
        bool, typer.Option("--sizes", help="Compare only the size of the rows, not their digests.")
    ] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Compare an artifact with its manifest, byte for byte."""
    start = time.perf_counter()
    manifest = verify_artifact(artifact, "sizes" if sizes else "full")
    seconds = time.perf_counter() - start
    total = sum(file.bytes for file in manifest.files)
    if as_json:
        result = {
            "artifact": str(artifact),
            "artifact_id": manifest.artifact_id,
            "bytes": total,
            "seconds": round(seconds, 3),
        }
        _print_json(result | {"verified": "sizes" if sizes else "full"})
        return
    what = "sizes, and every digest but the rows'" if sizes else "every digest"
    print(f"{artifact}: intact: {len(manifest.files) + 1} files, {decimal(total)}, {what}, in {seconds:.2f} s")  # noqa: T201


@app.command()
def inspect(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Show what an artifact holds, from its manifest alone."""
    manifest = read_manifest(artifact)
    if as_json:
        _print_json(asdict(manifest))
    else:
        _print_summary(_console(), artifact, manifest)


def main() -> NoReturn:
    """Runs the command line and exits; the one place where errors become lines and exit codes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except ExportError as error:
        _fail(str(error), error.exit_code)
    except ArtifactError as error:
        _fail(str(error), 1)
    raise SystemExit(0)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    """Unwinds the build, which removes what it has staged; a second signal no longer waits for that."""
    signal.signal(number, signal.SIG_DFL)
    _fail(f"stopped by {signal.Signals(number).name}; nothing was published", 128 + number)


def _fail(message: str, code: int) -> NoReturn:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)  # noqa: T201
    raise SystemExit(code)


def _report_phase(name: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr)  # noqa: T201


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))  # noqa: T201


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False, emoji=False)


def _print_summary(console: Console, artifact: Path, manifest: Manifest) -> None:
    console.print("artifact  ", str(artifact), soft_wrap=True)
    console.print("id        ", manifest.artifact_id)
    for snapshot in manifest.provenance.snapshots:
        step = "" if snapshot.step is None else f", step {snapshot.step}"
        console.print("snapshot  ", f"{snapshot.uri} ({snapshot.format}{step})", soft_wrap=True)
    console.print(_table_of_tables(manifest))
    for graph in manifest.graphs:
        console.print("graph     ", f"{graph.backend} for {graph.target}, {decimal(manifest.file[graph.path].bytes)}")
    parity = manifest.parity
    console.print("parity    ", f"{parity['cases']} batches {parity['serving']};")
    share = parity["quantization_max_share_of_bound"]
    console.print(
        "          ", f"at most {parity['quantization_max_error']:.3g} from float32, {share:.0%} of the bound"
    )


def _table_of_tables(manifest: Manifest) -> Table:
    view = Table(box=None, pad_edge=False, header_style="")
    view.add_column("table")
    for name in ("features", "rows", "dim", "stored as", "before", "after", "max error", "rel. L2", "cosine"):
        view.add_column(name, justify="left" if name == "features" else "right")
    before = after = 0
    for figures in manifest.accuracy["tables"]:
        table = manifest.table[figures["table"]]
        features = [feature.name for feature in manifest.features if feature.table == table.name]
        before, after = before + figures["bytes_before"], after + figures["bytes_after"]
        view.add_row(
            table.name,
            ", ".join(features),
            f"{table.num_embeddings:,}",
            str(table.embedding_dim),
            table.serving_precision,
            decimal(figures["bytes_before"]),
            decimal(figures["bytes_after"]),
            *(_figure(figures[name]) for name in ("max_absolute_error", "relative_l2")),
            "-" if figures["cosine"] is None else f"{figures['cosine']:.7f}",
        )
    view.add_row("all", "", "", "", "", decimal(before), decimal(after), "", "", "")
    return view


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}" if value else "0"
