"""What a report says: the figures of a build held against their budgets.

The page and the summary are two views of the same `Findings`, so that they cannot disagree.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.config import Budget
from export.numerals import cosine, count, coverage, number, percent, signed
from export.report_data import ReportData
from runtime_py.manifest import Table

__all__ = [
    "FIGURES",
    "SUBJECTS_SHOWN",
    "Difference",
    "Findings",
    "Flag",
    "Gate",
    "TableFindings",
    "difference",
    "figure",
    "find",
]

SUBJECTS_SHOWN = 6  # of a flag; how many more there are is said
_CLOSE = 0.9  # of a budget: what is worth a look before it fails the next build
_NEGLIGIBLE = 1e-4  # of a task's metric: far below what its own sample lets one see
_COSINES = ("mean_cosine", "worst_cosine", "lookup_mean_cosine")

# The figures of a table, in the order in which they are shown.
FIGURES = {
    "relative_l2": "relative L2 error",
    "row_relative_l2": "rows, relative L2 error",
    "lookup_relative_l2": "lookups, relative L2 error",
    "mean_cosine": "mean cosine",
    "worst_cosine": "worst cosine",
    "lookup_mean_cosine": "lookups, mean cosine",
    "max_absolute_error": "largest error",
    "mean_absolute_error": "mean error",
    "root_mean_square_error": "root mean square error",
    "vanished_rows": "vanished rows",
    "outlier_rows": "outlier rows",
    "constant_rows": "constant rows",
}


@dataclass(frozen=True)
class Gate:
    """One figure of a table, and the limit that its budget sets under `key`; None where there is no figure to hold."""

    key: str
    value: float | None
    limit: float

    @property
    def figure(self) -> str:
        """The figure's name in `reports/accuracy.json`."""
        return Budget.FIGURES.get(self.key, self.key)

    @property
    def least(self) -> bool:
        """Whether the limit is the lowest figure that passes, not the highest."""
        return self.key.startswith("min_")

    @property
    def kept(self) -> bool:
        """As `accuracy.check_budget` decides."""
        if self.value is None:
            return True
        return self.value >= self.limit if self.least else self.value <= self.limit

    @property
    def share(self) -> float:
        """How much of the budget is used: 1 at the limit, at most 1 where it is kept, infinite beyond a limit of no loss."""
        if self.value is None:
            return 0.0
        used, allowed = (1 - self.value, 1 - self.limit) if self.least else (self.value, self.limit)
        if allowed <= 0:
            return 0.0 if self.kept else math.inf
        return min(used / allowed, 1.0) if self.kept else max(used / allowed, math.nextafter(1.0, 2.0))

    @property
    def texts(self) -> tuple[str, str]:
        """Figure and limit, in as many digits as it takes to tell them apart."""
        for digits in range(3, 17):
            value, limit = figure(self.figure, self.value, digits), figure(self.figure, self.limit, digits)
            if value != limit or self.value == self.limit:
                break
        if "." in limit and "e" not in limit:  # somebody has written it, without zeros at its end
            limit = limit.rstrip("0").rstrip(".")
        return value, limit

    @property
    def comparison(self) -> str:
        """The same in a few words, for a chart."""
        if self.value is None:
            return "no figure"
        value, limit = self.texts
        sign = {(False, True): "≤", (False, False): ">", (True, True): "≥", (True, False): "<"}[self.least, self.kept]
        return f"{FIGURES.get(self.figure, self.figure).replace('relative L2 error', 'relative L2')} {value} {sign} {limit}"

    def __str__(self) -> str:
        value, limit = self.texts
        name = FIGURES.get(self.figure, self.figure)
        if self.value is None:
            return f"{name}: no figure"
        return f"{name} {value} of at {'least' if self.least else 'most'} {limit}"


@dataclass(frozen=True)
class TableFindings:
    """One table: its `entry` of `reports/accuracy.json`, its gates, and `why` it has its precision."""

    table: Table
    entry: Mapping[str, Any]
    gates: list[Gate]
    why: str
    chosen: bool

    @property
    def name(self) -> str:
        """The table's."""
        return self.table.name

    @property
    def closest(self) -> Gate | None:
        """The gate of which most is used."""
        return max(self.gates, key=lambda gate: gate.share, default=None)

    @property
    def share(self) -> float:
        """How much of its budget is used, by the gate of which most is."""
        return self.closest.share if self.closest else 0.0

    @property
    def kept(self) -> bool:
        """Whether all of its gates pass."""
        return all(gate.kept for gate in self.gates)

    @property
    def exact(self) -> bool:
        """Whether every row that was measured is stored as it was trained."""
        return bool(self.entry["max_absolute_error"] == 0)

    def gates_of(self, name: str) -> list[Gate]:
        """The gates on one figure: one for each budget that limits it."""
        return [gate for gate in self.gates if gate.figure == name]


@dataclass(frozen=True)
class Flag:
    """Something to look at, and the tables or batches it is about; `failed` where it fails the build."""

    text: str
    subjects: list[tuple[str, str]]
    failed: bool = False


@dataclass(frozen=True)
class Findings:
    """The whole of it; `cases` by graph, in the order of `reports/parity.json`."""

    tables: list[TableFindings]
    cases: dict[str, list[dict[str, Any]]]
    flags: list[Flag]
    vocabularies: list[dict[str, Any]]
    bytes_before: int
    bytes_after: int
    artifact_bytes: int

    @property
    def passed(self) -> bool:
        """Whether nothing fails the build."""
        return not any(flag.failed for flag in self.flags)

    @property
    def closest(self) -> TableFindings | None:
        """The gated table of which most of the budget is used."""
        return max((table for table in self.tables if table.gates), key=lambda table: table.share, default=None)

    @property
    def gates(self) -> list[Gate]:
        """Those of all tables."""
        return [gate for table in self.tables for gate in table.gates]


def find(data: ReportData) -> Findings:
    """Holds what was measured against what it must keep to."""
    manifest = data.manifest
    configured = manifest.provenance.configuration
    tables = [
        TableFindings(
            manifest.table[entry["table"]],
            entry,
            [Gate(key, entry.get(Budget.FIGURES.get(key, key)), limit) for key, limit in _limits(entry["budgets"])],
            entry["choice"] or _configured(configured, entry["table"]),
            entry["choice"] is not None,
        )
        for entry in data.accuracy
    ]
    graphs = ", ".join(f"{graph.backend} for {graph.target}" for graph in manifest.graphs)
    cases: dict[str, list[dict[str, Any]]] = {}
    for case in data.cases:
        cases.setdefault(case.get("graph", graphs), []).append(case)
    vocabularies = [entry | {"required": _min_coverage(configured, entry["table"])} for entry in data.vocabularies]
    return Findings(
        tables=tables,
        cases=cases,
        flags=[*_failures(tables, cases, vocabularies), *_remarks(tables, vocabularies)],
        vocabularies=vocabularies,
        bytes_before=sum(table.entry["bytes_before"] for table in tables),
        bytes_after=sum(table.entry["bytes_after"] for table in tables),
        # Without reports: one of them is what is being written.
        artifact_bytes=sum(file.bytes for file in manifest.files if not file.path.startswith("reports/")),
    )


def _limits(budgets: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, float]]:
    for budget in budgets:
        yield from budget.items()


def _failures(
    tables: Sequence[TableFindings], cases: Mapping[str, list[dict[str, Any]]], vocabularies: Iterable[dict[str, Any]]
) -> Iterator[Flag]:
    for table in tables:
        lost = [f"{gate}, {percent(gate.share)} of its budget" for gate in table.gates if not gate.kept]
        if lost:
            yield Flag("Outside its budget", [(table.name, "; ".join(lost))], failed=True)
    beyond = [
        (case["name"], f"{graph}, {percent(case['max_share_of_bound'])} of the bound")
        for graph, some in cases.items()
        for case in some
        if case["max_share_of_bound"] > 1
    ]
    if beyond:
        yield Flag("Farther from the float32 model than rounding explains", beyond, failed=True)
    uncovered = [
        (entry["table"], f"{coverage(entry['coverage'])} of the rows, required {percent(entry['required'])}")
        for entry in vocabularies
        if entry["required"] is not None and entry["coverage"] < entry["required"]
    ]
    if uncovered:
        yield Flag("Too few rows have an entity", uncovered, failed=True)


def _remarks(tables: Sequence[TableFindings], vocabularies: Iterable[dict[str, Any]]) -> Iterator[Flag]:
    def flag(
        text: str, of: Callable[[TableFindings], object], detail: Callable[[TableFindings], str]
    ) -> Iterator[Flag]:
        subjects = [(table.name, detail(table)) for table in tables if of(table)]
        if subjects:
            yield Flag(text, subjects)

    yield from flag(
        f"{percent(_CLOSE)} of a budget used, or more",
        lambda table: table.kept and table.share >= _CLOSE,
        lambda table: f"{table.closest}, {percent(table.share)}",
    )
    yield from flag(
        "Outlier rows, in which one value flattens the others",
        lambda table: table.entry["outlier_rows"],
        lambda table: (
            f"{count(table.entry['outlier_rows'])}, the worst is row {table.entry['outliers'][0]['row']}"
            if table.entry["outliers"]
            else count(table.entry["outlier_rows"])
        ),
    )
    yield from flag(
        "Rows that vanish, zero as stored and not as trained",
        lambda table: table.entry["vanished_rows"],
        lambda table: f"{count(table.entry['vanished_rows'])} of {count(table.entry['rows_measured'])} rows",
    )
    yield from flag(
        "Measured on a sample of the rows",
        lambda table: table.entry["rows_measured"] < table.entry["rows"],
        lambda table: f"{count(table.entry['rows_measured'])} of {count(table.entry['rows'])} rows",
    )
    yield from flag("No budget", lambda table: not table.gates, lambda _: "nothing gates its figures")
    holes = [
        (entry["table"], f"{count(entry['holes'])} of {count(entry['rows'])} rows")
        for entry in vocabularies
        if entry["holes"]
    ]
    if holes:
        yield Flag("Rows without an entity", holes)


def _configured(configuration: Mapping[str, Any], name: str) -> str:
    """Which key of the release configuration set the precision of a table."""
    own = _table(configuration, name).get("serving_precision")
    return "serving.precision, the release's default" if own is None else "serving_precision of the table"


def _min_coverage(configuration: Mapping[str, Any], name: str) -> float | None:
    required: float | None = (_table(configuration, name).get("vocab") or {}).get("min_coverage")
    return required


def _table(configuration: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    tables: Iterable[Mapping[str, Any]] = configuration.get("large_embeddings", {}).get("tables", ())
    return next((table for table in tables if table["name"] == name), {})


def figure(name: str, value: float | None, digits: int = 3) -> str:
    """A figure of `FIGURES` as its kind is written."""
    if value is not None and name.endswith("_rows"):
        return count(int(value))
    return cosine(value, digits) if name in _COSINES else number(value, digits)


# --- Differences to a baseline ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far a value is from the baseline's: `text`, and whether that is `better`, `worse` or the `same`."""

    text: str
    verdict: str


def difference(metric: Mapping[str, str], value: float, baseline: float) -> Difference:
    """Compares one value of a task-level metric with the baseline's."""
    change = value - baseline
    if abs(change) < _NEGLIGIBLE * max(abs(value), abs(baseline)):
        return Difference("same" if abs(change) < 1e-12 * abs(value) else "same to 0.01 %", "same")
    verdict = "better" if (change < 0) == (metric["better"] == "lower") else "worse"
    share = f", {percent(abs(change / baseline))}\N{NO-BREAK SPACE}{verdict}" if baseline else f", {verdict}"
    return Difference(signed(change) + share, verdict)
