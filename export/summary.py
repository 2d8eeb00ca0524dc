"""The report in GitHub's Markdown, for a pull request: the verdict, what to look at, and a line for each table."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from export.findings import SUBJECTS_SHOWN, Findings, Flag, difference, find
from export.numerals import cosine, count, duration, number, percent, plain, size
from export.report_data import ReportData

__all__ = ["render_summary"]


def render_summary(data: ReportData) -> str:
    """The verdict, what to look at, and the tables, in GitHub's Markdown."""
    found = find(data)
    manifest = data.manifest
    sections = [
        [f"## {_verdict(found)}"],
        [_closest(found)],
        [f"- {_flag(flag)}" for flag in found.flags],
        _evaluation_table(data.evaluation),
        _table_of_tables(found),
        [
            f"- Parity: {_plural(len(data.cases), 'batch', 'batches')} {_escape(manifest.parity.serving)}; at most "
            f"{number(manifest.parity.quantization_max_error)} from the float32 model",
            *(
                f"- Snapshot: {_code(snapshot.uri)} ({_escape(snapshot.format)}"
                f"{'' if snapshot.step is None else f', step {snapshot.step}'})"
                for snapshot in manifest.provenance.snapshots
            ),
            f"- Artifact: `{manifest.artifact_id}`, {size(found.artifact_bytes)} without reports",
            f"- Built {manifest.provenance.built_at} in {duration(sum(data.build['seconds'].values()))}, at most "
            f"{size(data.build['peak_memory_bytes'])} resident",
        ],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _verdict(found: Findings) -> str:
    return (
        f"{'Passed' if found.passed else 'Failed'}: {_plural(len(found.tables), 'table', 'tables')}, "
        f"{size(found.bytes_before)} → {size(found.bytes_after)} ({percent(found.bytes_after / found.bytes_before)})"
    )


def _closest(found: Findings) -> str:
    closest = found.closest
    if closest is None:
        return "No table has a budget."
    return f"Worst against its budget: {_code(closest.name)}, {closest.closest} ({percent(closest.share)} of it)."


def _flag(flag: Flag) -> str:
    shown = [f"{_code(name)} ({_escape(detail)})" for name, detail in flag.subjects[:SUBJECTS_SHOWN]]
    more = len(flag.subjects) - len(shown)
    end = f", and {more} more" if more else ""
    text = f"**{flag.text}**" if flag.failed else flag.text
    return f"{text}: {', '.join(shown)}{end}"


def _table_of_tables(found: Findings) -> list[str]:
    heads = [
        "table",
        "rows",
        "dim",
        "stored as",
        "before",
        "after",
        "relative L2 error",
        "worst cosine",
        "of its budget",
    ]
    rows = [
        [
            _code(table.name),
            count(table.entry["rows"]),
            str(table.table.embedding_dim),
            table.entry["serving_precision"],
            size(table.entry["bytes_before"]),
            size(table.entry["bytes_after"]),
            number(table.entry["relative_l2"]),
            cosine(table.entry["worst_cosine"]),
            f"{'' if table.kept else '**failed** '}{percent(table.share)}" if table.gates else "none",
        ]
        for table in found.tables
    ]
    return list(_table(heads, rows))


def _evaluation_table(evaluation: dict[str, Any] | None) -> list[str]:
    if evaluation is None:
        return []
    metrics = evaluation["metrics"]
    heads = ["task", "size", *(f"{metric['name']} ({metric['better']} is better)" for metric in metrics)]
    first = evaluation["rows"][0]

    def cell(row: dict[str, Any], metric: dict[str, str]) -> str:
        value = row["values"][metric["name"]]
        text = f"{plain(value)} {metric['unit']}".rstrip()
        if row is not first:
            text += f" ({difference(metric, value, first['values'][metric['name']]).text})"
        return _escape(text)

    rows = [
        [_escape(row["name"]), size(row["bytes"]), *(cell(row, metric) for metric in metrics)]
        for row in evaluation["rows"]
    ]
    return [_escape(" ".join(evaluation["task"].split())), "", *_table([_escape(head) for head in heads], rows)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown: the first column is text, the others numbers."""
    yield f"| {' | '.join(heads)} |"
    yield f"|---|{'---:|' * (len(heads) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _code(text: str) -> str:
    """A name as code, where nothing in it means anything; a bar would still end a table's cell."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _escape(text: str) -> str:
    """Text in which no character means anything to Markdown or HTML."""
    return re.sub(r"([\\`*{}\[\]<>|#~&!$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _plural(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
