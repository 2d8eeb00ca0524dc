"""The report as a page: what `templates/report.html.j2` shows, and the charts in it."""

import json
import re
from typing import Any

import jinja2
from markupsafe import Markup, escape

from export import numerals
from export.charts import Bar, draw_bars, draw_histogram, histogram_range
from export.findings import FIGURES, SUBJECTS_SHOWN, Findings, TableFindings, difference, figure, find
from export.numerals import duration, percent, size
from export.report_data import ReportData

__all__ = ["render_page"]

_CHART_BARS = 40  # of larger releases the rest is one bar


def render_page(data: ReportData) -> str:
    """The report as one self-contained page; the same bytes for the same data."""
    found = find(data)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("export"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("cosine", "count", "coverage", "duration", "number", "percent", "plain", "size"):
        environment.filters[name] = getattr(numerals, name)
    environment.filters["breakable"] = _breakable
    edges = [edge for table in found.tables for edge in table.entry["row_errors"]["lower_edges"]]
    marks = [mark for table in found.tables if not table.exact for mark in _marks(table) if mark]
    scale = histogram_range(edges, marks)
    return environment.get_template("report.html.j2").render(
        data=data,
        manifest=data.manifest,
        found=found,
        figure_names=FIGURES,
        figure=figure,
        difference=difference,
        subjects_shown=SUBJECTS_SHOWN,
        configuration=_compact(_without_nulls(data.manifest.provenance.configuration)),
        size_chart=draw_bars(_size_bars(found), "Bytes of each table's rows, as trained and as stored"),
        budget_chart=draw_bars(_budget_bars(found), "How much of its budget each table uses", limit=1.0)
        if found.gates
        else None,
        phase_chart=_time_chart(data.build["seconds"], "Seconds of the build by phase"),
        stage_chart=_time_chart(data.build["stage_seconds"], "Seconds of the rows phase by stage"),
        histograms={table.name: _histogram(table, scale) for table in found.tables if any(_histogram_rows(table))},
    )


def _size_bars(found: Findings) -> list[Bar]:
    def bar(name: str, before: int, after: int) -> Bar:
        return Bar(name, f"{size(before)} → {size(after)}, {percent(after / before)}", (before, after))

    sizes = [(table.name, table.entry["bytes_before"], table.entry["bytes_after"]) for table in found.tables]
    sizes.sort(key=lambda entry: (-max(entry[1:]), entry[0]))
    shown, rest = sizes[:_CHART_BARS], sizes[_CHART_BARS:]
    if rest:
        shown.append((f"{len(rest)} smaller tables", sum(entry[1] for entry in rest), sum(entry[2] for entry in rest)))
    return [bar(*entry) for entry in shown]


def _budget_bars(found: Findings) -> list[Bar]:
    tables = sorted((table for table in found.tables if table.gates), key=lambda table: (-table.share, table.name))
    bars = [
        Bar(table.name, f"{table.closest.comparison}: {percent(table.share)}", (table.share,), failed=not table.kept)
        for table in tables[:_CHART_BARS]
        if table.closest
    ]
    if rest := tables[_CHART_BARS:]:
        bars.append(Bar(f"{len(rest)} other tables", f"at most {percent(rest[0].share)}", (rest[0].share,)))
    return bars


def _time_chart(seconds: dict[str, float], label: str) -> Markup | None:
    bars = [Bar(name, duration(value), (value,)) for name, value in seconds.items()]
    return draw_bars(bars, label) if bars else None


def _histogram(table: TableFindings, scale: tuple[float, float]) -> Markup:
    histogram = table.entry["row_errors"]
    mean, limit = _marks(table)
    label = f"Rows of {table.name} by relative L2 error"
    return draw_histogram(histogram["lower_edges"], histogram["rows"], scale, label, mean=mean, limit=limit)


def _histogram_rows(table: TableFindings) -> list[int]:
    rows: list[int] = table.entry["row_errors"]["rows"]
    return rows


def _marks(table: TableFindings) -> tuple[float | None, float | None]:
    """The root mean square of the rows' relative L2 errors, and the strictest limit on those or on the table's."""
    gates = [*table.gates_of("row_relative_l2"), *table.gates_of("relative_l2")]
    return table.entry["row_relative_l2"], min((gate.limit for gate in gates), default=None)


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line after each of its parts."""
    parts = re.findall(r"[^_./:,-]*[_./:,-]*", name)
    return Markup("<wbr>").join(escape(part) for part in parts if part)


def _without_nulls(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _without_nulls(value) for key, value in document.items() if value is not None}
    return [_without_nulls(value) for value in document] if isinstance(document, list) else document


def _compact(document: Any, indent: str = "") -> str:
    """JSON in which whatever fits into one line has one line."""
    line = json.dumps(document, ensure_ascii=False)
    if len(indent) + len(line) <= 110 or not isinstance(document, dict | list) or not document:
        return line
    deeper = indent + "  "
    if isinstance(document, list):
        parts, ends = [_compact(value, deeper) for value in document], "[]"
    else:
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {_compact(value, deeper)}" for key, value in document.items()]
        ends = "{}"
    return f"{ends[0]}\n" + ",\n".join(deeper + part for part in parts) + f"\n{indent}{ends[1]}"
