"""The report: what a person must be able to read of it, and what no data may do to it."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from export import charts, numerals
from export.accuracy import check_budget
from export.config import Budget
from export.errors import ConfigError, ExportError
from export.findings import FIGURES, Gate, find
from export.report import render_html, render_markdown
from export.report_data import ReportData, read_report_data
from runtime_py.digests import ROWS, SHA256, TABLES, ZEROED, Digest
from runtime_py.manifest import (
    ROW_FORMATS,
    WEIGHTS,
    Feature,
    File,
    Graph,
    Manifest,
    Output,
    ParitySummary,
    Provenance,
    SnapshotIdentity,
    Table,
    TableAccuracy,
)

ID = "0123456789abcdef" * 4
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
SCRIPT = "<script>alert(1)</script>"
BUILD = {
    "seconds": {"snapshot": 0.5, "rows": 75.0, "parity": 4.0},
    "stage_seconds": {"read": 30.0, "convert": 100.0, "flush": 0.0},
    "peak_memory_bytes": 300_000_000,
    "workers": 2,
    "processes": 1,
}
CASE = {"name": "duplicate ids", "bags": 3, "ids": 60, "max_error": 0.25, "max_share_of_bound": 0.9996}


def entry(name: str, precision: Any = "int8", rows: int = 1000, dim: int = 64, **changes: Any) -> dict[str, Any]:
    """A table's entry in reports/accuracy.json; all but fp32 lose something."""
    exact = precision == "fp32"
    size = rows * ROW_FORMATS[precision].row_bytes(dim)
    figures = TableAccuracy(
        table=name,
        serving_precision=precision,
        rows=rows,
        rows_measured=rows,
        bytes_before=4 * rows * dim,
        bytes_after=size,
        bits_per_weight=8 * size / (rows * dim),
        max_absolute_error=0.0 if exact else 0.0625,
        mean_absolute_error=0.0 if exact else 0.002,
        root_mean_square_error=0.0 if exact else 0.003,
        relative_l2=0.0 if exact else 0.005,
        row_relative_l2=0.0 if exact else 0.0051,
        mean_cosine=1.0 if exact else 0.999987,
        worst_cosine=1.0 if exact else 0.9998,
        worst_cosine_row=0 if exact else 17,
        constant_rows=0,
        vanished_rows=0,
        outlier_rows=0,
        lookup_relative_l2=0.0 if exact else 0.0049,
        lookup_mean_cosine=1.0 if exact else 0.999988,
    )
    rest = {
        "budgets": [{"max_absolute_error": 0.0} if exact else {"max_relative_l2": 0.02, "min_cosine": 0.999}],
        "row_errors": {
            "exact_rows": rows if exact else 10,
            "lower_edges": [] if exact else [2.0**-8, 2.0**-7.5, 2.0**-7],
            "rows": [] if exact else [1, rows - 16, 5],
        },
        "worst_rows": [{"row": 0, "cosine": 1.0, "relative_l2": 0.0}]
        if exact
        else [{"row": 17, "cosine": 0.9998, "relative_l2": 0.02}, {"row": 4711, "cosine": 0.9999, "relative_l2": 0.01}],
        "outliers": [],
        "lookups": {
            "bags": 256,
            "ids": 1085,
            "drawn": "uniformly",
            "relative_l2": figures.lookup_relative_l2,
            "mean_cosine": figures.lookup_mean_cosine,
            "worst_cosine": figures.worst_cosine,
        },
        "choice": None,
    }
    return {**asdict(figures), **rest, **changes}


def make_data(*entries: dict[str, Any], **changes: Any) -> ReportData:
    tables = []
    for item in entries:
        dim = item["bytes_before"] // item["rows"] // 4
        row_bytes = ROW_FORMATS[item["serving_precision"]].row_bytes(dim)
        shape = item["rows"], dim
        tables.append(Table(item["table"], *shape, item["serving_precision"], row_bytes, 0, Digest(ROWS, ID)))
    weights_bytes = sum(table.bytes for table in tables)
    configuration = {"large_embeddings": {"tables": [{"name": table.name, "vocab": None} for table in tables]}}
    manifest = Manifest(
        format_version=1,
        artifact_id=ID,
        tables=tables,
        features=[Feature(table.name, table.name, "sum", False) for table in tables],
        outputs=[Output(table.name, table.embedding_dim) for table in tables],
        surgery=None,
        weighted=False,
        weights_offset_bytes=4096,
        weights_bytes=weights_bytes,
        vocabularies=[],
        graphs=[Graph("torchscript", "cpu", "graphs/lookup.torchscript.pt", ["library"], "2.13.0", "1.8.0")],
        files=[
            File(WEIGHTS, 4096 + weights_bytes, Digest(TABLES, ID)),
            File("graphs/lookup.torchscript.pt", 6000, Digest(SHA256, ID)),
            File("reports/accuracy.json", 10**9, Digest(SHA256, ID)),
        ],
        accuracy=[],
        choices=[],
        parity=ParitySummary(7, 1, "bit-equal to the reference", 0.25, 0.9996),
        provenance=Provenance(
            [SnapshotIdentity("snapshots/demo", "dcp", 1200, Digest(SHA256, ID))],
            configuration,
            {"python": "3.11.7"},
            "2026-11-23T04:05:06+00:00",
        ),
        manifest_digest=Digest(ZEROED, ID),
    )
    return replace(ReportData(manifest, list(entries), [CASE], BUILD, []), **changes)


def words(page: str) -> str:
    """The page as read: without tags, cells and lines apart, and with one kind of space."""
    page = re.sub(r"</t[dh]>|<br>", " ", page)
    return " ".join(re.sub(r"<[^>]*>", "", page).replace("&nbsp;", " ").split())


# --- The page ----------------------------------------------------------------------------------------------------------


def test_a_built_artifact_is_reported_from_its_folder(built_artifact: Path) -> None:
    data = read_report_data(built_artifact)
    page, summary = render_html(data), render_markdown(data)
    for table in data.manifest.tables:
        assert table.name in words(page)
        assert f"| `{table.name}` | {table.num_embeddings:,} |" in summary
    assert "Passed" in page
    assert summary.startswith("## Passed: 4 tables, ")
    assert data.manifest.artifact_id in page


def test_the_first_screen_says_the_verdict_the_sizes_and_the_worst_table() -> None:
    data = make_data(entry("user"), entry("item", relative_l2=0.011), entry("age", "fp32", 10, 4))
    text = words(render_html(data))
    screen = text[text.index("Build report") : text.index("In the order of the configuration")]
    assert "✓ Passed 3 tables, 512.2 kB → 136.2 kB" in screen
    assert "27 % of 512.2 kB as trained; the artifact takes 146.3 kB, reports aside" in screen
    assert "55 % item: relative L2 error 0.0110 of at most 0.02" in screen
    assert "5 of 5 kept by 3 tables; 1 stored exactly as trained" in screen
    assert "From snapshots/demo (dcp, step 1200)" in screen
    assert "Nothing to look at" in screen


def test_a_figure_outside_its_budget_fails_the_report_and_says_by_how_much() -> None:
    data = make_data(entry("user"), entry("item", relative_l2=0.03))
    page, summary = render_html(data), render_markdown(data)
    text = words(page)
    assert "<title>Failed: artifact" in page
    assert "✕ Outside its budget: item (relative L2 error 0.0300 of at most 0.02, 150 % of its budget)" in text
    assert "3 of 4 kept" in text
    assert "✕ 150 %" in text
    assert "relative L2 0.0300 &gt; 0.02: 150 %" in text, "the chart"
    assert summary.startswith("## Failed: 2 tables")
    assert "- **Outside its budget**: `item`" in summary
    assert "| **failed** 150 % |" in summary.replace("\N{NO-BREAK SPACE}", " ")


def test_every_table_and_every_row_to_look_at_is_there() -> None:
    outliers = [{"row": 900_001 + n, "value": -1e4, "relative_l2_of_others": 2.5 + n} for n in range(10)]
    tables = [entry(f"table_{n}", rows=10**6 + n) for n in range(19)]
    data = make_data(*tables, entry("last", rows=10**6, outlier_rows=12_345, outliers=outliers))
    page, summary = render_html(data), render_markdown(data)
    text = words(page)
    for item in data.accuracy:
        assert text.count(item["table"]) > 4
        assert f"`{item['table']}`" in summary
    for outlier in outliers:
        assert f">{outlier['row']}<" in page
    assert "the worst 10 of 12,345" in text
    assert "last (12,345, the worst is row 900001)" in text
    assert ">4711<" in page


def test_a_large_release_has_short_charts_and_all_of_its_tables() -> None:
    tables = [entry(f"table_{n}", rows=100 + n) for n in range(60)]
    text = words(render_html(make_data(*tables)))
    assert "20 smaller tables" in text
    assert "20 other tables" in text
    assert all(item["table"] in text for item in tables)


def test_an_exact_table_is_said_to_be_exact_and_has_no_histogram() -> None:
    page = render_html(make_data(entry("country", "fp32", 250, 8), entry("one", "fp32", 1, 4)))
    assert "All 250 rows are stored exactly as trained." in words(page)
    assert "The row is stored exactly as trained." in words(page)
    assert "relative L2 error of a row" not in page
    assert "Rows with the lowest cosine" not in page


def test_a_table_whose_inexact_rows_all_vanish_is_not_called_exact() -> None:
    errors = {"exact_rows": 1000, "lower_edges": [], "rows": []}
    text = words(render_html(make_data(entry("user", vanished_rows=3, row_errors=errors, worst_rows=[]))))
    assert "Every row is exact, or zero as stored." in text
    assert "0 stored exactly as trained" in text


def test_a_table_of_zeros_has_no_figures() -> None:
    none = dict.fromkeys(["relative_l2", "row_relative_l2", "mean_cosine", "worst_cosine", "worst_cosine_row"])
    zeros = entry("zeros", "fp32", lookup_relative_l2=None, lookup_mean_cosine=None, worst_rows=[], **none)
    zeros["lookups"] |= {"relative_l2": None, "mean_cosine": None, "worst_cosine": None}
    zeros |= {"serving_precision": "fp16", "budgets": [{"max_relative_l2": 0.001}], "constant_rows": 1000}
    page = render_html(make_data(zeros))
    assert "None" not in words(page).replace("'none'", "")
    assert "no figure" in page
    assert "Passed" in render_markdown(make_data(zeros))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"relative_l2": 0.0199},
            "90 % of a budget used, or more: user (relative L2 error 0.0199 of at most 0.02, 99.5 %)",
        ),
        ({"rows_measured": 125}, "Measured on a sample of the rows: user (125 of 1,000 rows)"),
        ({"budgets": [{}]}, "No budget: user (nothing gates its figures)"),
        ({"vanished_rows": 4}, "Rows that vanish, zero as stored and not as trained: user (4 of 1,000 rows)"),
        ({"outlier_rows": 3}, "Outlier rows, in which one value flattens the others: user (3)"),
    ],
)
def test_what_passes_and_is_worth_a_look_is_listed(changes: dict[str, Any], text: str) -> None:
    data = make_data(entry("user", **changes))
    assert text in words(render_html(data))
    assert "✓ Passed" in words(render_html(data))
    assert text.partition(":")[0] in " ".join(render_markdown(data).split())


def test_why_a_table_has_its_precision_is_said() -> None:
    data = make_data(entry("auto", choice="the fewest bytes that keep to its budgets"), entry("own"), entry("default"))
    data.manifest.provenance.configuration["large_embeddings"]["tables"][1]["serving_precision"] = "int8"
    text = words(render_html(data))
    assert "auto int8 the builder: the fewest bytes that keep to its budgets" in text
    assert "own int8 serving_precision of the table" in text
    assert "default int8 serving.precision, the release&#39;s default" in text


def test_batches_are_listed_by_graph_and_one_beyond_its_bound_fails() -> None:
    cases = [CASE | {"graph": "torchscript for cpu"}, CASE | {"graph": "onnx for cpu", "max_share_of_bound": 1.25}]
    text = words(render_html(make_data(entry("user"), cases=cases)))
    assert "torchscript for cpu batch bags ids" in text
    assert "onnx for cpu batch bags ids" in text
    assert "✕ Farther from the float32 model than rounding explains: duplicate ids (onnx for cpu, 125 %" in text
    assert "✕ Failed" in text


def test_a_vocabulary_shows_its_coverage_and_fails_below_what_is_required() -> None:
    figures = {"table": "user", "entities": 899, "rows": 1000, "holes": 101, "coverage": 0.899}
    data = make_data(entry("user"), vocabularies=[{**figures, "capacity": 2000, "files": []}])
    assert f"user 899 1,000 101 89.9 % {DASH}" in words(render_html(data))
    assert "✓ Passed" in words(render_html(data))
    data.manifest.provenance.configuration["large_embeddings"]["tables"][0]["vocab"] = {"min_coverage": 0.9}
    assert "✕ Too few rows have an entity: user (89.9 % of the rows, required 90 %)" in words(render_html(data))


# --- What no data may do -------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects what a browser would act on, and refuses tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attributes
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_names_are_text_and_never_markup() -> None:
    names = [SCRIPT, "a & b", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "$x_1$ \\frac", "表格_日本語", "text0"]
    data = make_data(*(entry(name, choice=f"because {SCRIPT}") for name in names), cases=[CASE | {"name": SCRIPT}])
    evaluation = {
        "task": SCRIPT,
        "metrics": [{"name": SCRIPT, "better": "lower", "unit": SCRIPT}],
        "rows": [{"name": SCRIPT, "bytes": 1, "values": {SCRIPT: 1.0}}],
    }
    html = render_html(replace(data, evaluation=evaluation))
    page = _Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "onerror" not in dict(page.attributes)
    for name in names:
        assert escape(name).replace("&quot;", "&#34;") in html.replace("<wbr>", "")
    assert "<script" not in re.sub(r"`[^`\n]*`|\\<", "", render_markdown(replace(data, evaluation=evaluation)))


def test_the_page_needs_nothing_from_elsewhere_and_its_links_lead_somewhere() -> None:
    html = render_html(make_data(*(entry(f"table_{n}") for n in range(20))))
    page = _Page(html)
    names = Counter(value for name, value in page.attributes if name == "id")
    assert max(names.values()) == 1
    links = [value or "" for name, value in page.attributes if name == "href"]
    assert len(links) == 20
    assert {link.removeprefix("#") for link in links} <= set(names)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    assert not {"src", "srcset", "action", "xlink:href"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|url\(|@import", html)
    assert page.tags["svg"] == 24


def test_equal_data_give_equal_bytes_whatever_the_settings_of_matplotlib() -> None:
    data = make_data(entry("user"), entry("item", relative_l2=0.03), entry("age", "fp32"))
    first = render_html(data)
    changed = {"font.size": 30, "savefig.facecolor": "red", "lines.linewidth": 9, "axes.unicode_minus": False}
    with matplotlib.rc_context(changed):
        assert render_html(data) == first
        assert matplotlib.rcParams["font.size"] == 30, "the user's settings are the user's again"
    assert render_markdown(data) == render_markdown(data)


def test_a_name_in_a_chart_leaves_room_for_the_numbers_beside_it() -> None:
    names = ["W" * 90, "ii" * 90, "表格" * 40, "user_history_long_term_category_interaction_embedding_v3", "short"]
    text = "relative L2 error 0.000207 of 0.000977: 21 %"
    svg = charts.draw_bars([charts.Bar(name, text, (1.0,)) for name in names], "label")
    drawn = [shown for shown in re.findall(r"<text [^>]*>([^<]*)</text>", svg) if shown != text]
    room = charts._WIDTH - charts._width_of(text, charts._TEXT)
    assert [charts._width_of(shown, charts._TEXT) < room for shown in drawn] == [True] * 5
    assert drawn[3].startswith("user_history")
    assert drawn[3].endswith("embedding_v3")
    assert "…" in drawn[3]
    assert drawn[4] == "short"


def test_importing_the_report_imports_no_matplotlib_and_no_jinja() -> None:
    program = "import sys, export.report; print(sorted({'matplotlib', 'jinja2', 'pydantic'} & set(sys.modules)))"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"


# --- Budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", Budget.model_fields)
@pytest.mark.parametrize("limit", [0, 1, 0.005, 0.999987, 0.5])
def test_a_gate_passes_as_the_build_decides(key: str, limit: float) -> None:
    figures = entry("user", outlier_rows=1)
    if key.endswith("_rows"):
        limit = round(limit)
    accuracy = TableAccuracy(**{name: figures[name] for name in TableAccuracy.__dataclass_fields__})
    gate = Gate(key, figures[Budget.FIGURES.get(key, key)], limit)
    assert gate.figure in FIGURES
    assert gate.kept == (check_budget(accuracy, Budget(**{key: limit})) == [])
    assert (gate.share <= 1) == gate.kept


def test_a_share_of_a_budget_is_of_what_it_allows() -> None:
    assert Gate("max_relative_l2", 0.005, 0.02).share == 0.25
    assert Gate("min_cosine", 0.99, 0.96).share == pytest.approx(0.25)
    assert Gate("max_absolute_error", 0.0, 0.0).share == 0
    assert Gate("max_absolute_error", 1e-9, 0.0).share == float("inf")
    assert Gate("min_cosine", None, 0.99).share == 0


@pytest.mark.parametrize("value", [0.02, 0.0200001, 0.02 + 1e-15])
def test_a_figure_and_its_limit_read_alike_only_where_they_are_equal(value: float) -> None:
    gate = Gate("max_relative_l2", value, 0.02)
    assert (float(gate.texts[0]) == float(gate.texts[1])) == (value == 0.02)


def test_the_strictest_of_two_budgets_counts() -> None:
    found = find(make_data(entry("user", budgets=[{"max_relative_l2": 0.02}, {"max_relative_l2": 0.0051}])))
    assert found.closest is not None
    assert str(found.closest.closest) == "relative L2 error 0.00500 of at most 0.0051"


def test_every_figure_of_a_table_has_its_words() -> None:
    figures = set(TableAccuracy.__dataclass_fields__) - {"table", "serving_precision", "rows", "rows_measured"}
    assert figures - {"bytes_before", "bytes_after", "bits_per_weight", "worst_cosine_row"} == set(FIGURES)


# --- Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numerals.number(None), DASH),
        (numerals.number(0.0), "0"),
        (numerals.number(0.00210999), "0.00211"),
        (numerals.number(2.07e-5), "2.07e-05"),
        (numerals.number(-12345.6), f"{MINUS}12,346"),
        (numerals.number(999.9), "1,000"),
        (numerals.number(1e300), "1.00e+300"),
        (numerals.cosine(1.0), "1"),
        (numerals.cosine(0.999999984), "0.999999984"),
        (numerals.cosine(0.5), "0.500"),
        (numerals.cosine(-0.25), f"{MINUS}0.250"),
        (numerals.cosine(1 - 2**-53), "0.99999999999999989"),
        (numerals.percent(1.0), "100 %"),
        (numerals.percent(0.99999), "99.999 %"),
        (numerals.percent(1 + 1e-7), "100.00001 %"),
        (numerals.percent(1 + 2**-52), "just over 100 %"),
        (numerals.percent(0.0), "0 %"),
        (numerals.percent(1e-9), "< 0.01 %"),
        (numerals.percent(float("inf")), "more than all"),
        (numerals.coverage(0.99999), "99.99 %"),
        (numerals.duration(0.019), "0.019 s"),
        (numerals.duration(154.2), "2 min 34 s"),
        (numerals.duration(7265.0), "2 h 1 min"),
        (numerals.size(1), "1 byte"),
        (numerals.size(21_200_000), "21.2 MB"),
        (numerals.plain(-0.48213), f"{MINUS}0.48213"),
        (numerals.signed(1e-5), "+1.00e-05"),
    ],
)
def test_numbers_are_short_have_a_unit_and_are_never_rounded_into_a_better_one(text: str, expected: str) -> None:
    assert text.replace("\N{NO-BREAK SPACE}", " ") == expected


# --- Markdown ------------------------------------------------------------------------------------------------------------


def test_the_markdown_tables_are_well_formed_whatever_the_names() -> None:
    names = ["a|b", "`tick`", "``", "_x_", "*", "[link](x)", "@someone #1", "plain", SCRIPT]
    evaluation = {
        "task": "a|b",
        "metrics": [{"name": "log|loss", "better": "lower", "unit": "nats"}],
        "rows": [{"name": name, "bytes": 10, "values": {"log|loss": 0.5}} for name in names],
    }
    summary = render_markdown(make_data(*(entry(name) for name in names), evaluation=evaluation))
    lines = [line for line in summary.splitlines() if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in lines]
    assert cells == [3] * (len(names) + 2) + [9] * (len(names) + 2)
    assert "| `a\\|b` |" in summary
    assert "| `` `tick` `` |" in summary
    assert "| ``` `` ``` |" in summary
    assert "| \\_x\\_ |" in summary


# --- Reading -------------------------------------------------------------------------------------------------------------

EVALUATION: dict[str, Any] = {
    "task": "click prediction",
    "metrics": [
        {"name": "log loss", "better": "lower", "unit": "nats"},
        {"name": "recall@10", "better": "higher", "unit": ""},
    ],
    "rows": [
        {"name": "float32 model", "bytes": 1000, "values": {"log loss": 0.5, "recall@10": 0.3}},
        {"name": "int8", "bytes": 250, "values": {"log loss": 0.501, "recall@10": 0.33}},
        {"name": "fp16", "bytes": 500, "values": {"log loss": 0.5, "recall@10": 0.297}},
    ],
}


def test_an_evaluation_is_shown_with_its_differences_to_the_first_row(built_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(EVALUATION))
    data = read_report_data(built_artifact, path)
    text = words(render_html(data))
    assert "Task click prediction" in text
    assert "log loss nats, lower is better" in text
    assert "int8 250 bytes 25 % 0.501 +0.00100, 0.20 % worse 0.33 +0.0300, 10 % better" in text
    assert f"fp16 500 bytes 50 % 0.5 same 0.297 {MINUS}0.00300, 1.0 % worse" in text
    summary = render_markdown(data).replace("\N{NO-BREAK SPACE}", " ")
    assert "| int8 | 250 bytes | 0.501 nats (+0.00100, 0.20 % worse) | 0.33 (+0.0300, 10 % better) |" in summary


def _with(path: list[Any], value: Any) -> str:
    document = json.loads(json.dumps(EVALUATION))
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not UTF-8 JSON: "),
        ("[]", "input should be"),
        (_with(["surprise"], 1), "surprise: extra inputs are not permitted"),
        (_with(["metrics", 0, "better"], "more"), "metrics.0.better: input should be 'lower' or 'higher'"),
        (_with(["metrics", 1, "name"], "log loss"), "metrics: 'log loss' is listed 2 times"),
        (_with(["rows", 2, "name"], "int8"), "rows: 'int8' is listed 2 times"),
        (_with(["rows"], []), "rows: list should have at least 1 item"),
        (_with(["rows", 1, "values"], {"log loss": 1.0}), r"rows: 'int8' has values of \['log loss'\], expected \["),
        (_with(["rows", 1, "values", "log loss"], float("nan")), r"rows.1.values.log loss: input should be a finite"),
        (_with(["rows", 1, "bytes"], -1), "rows.1.bytes: input should be greater than or equal to 0"),
    ],
)
def test_a_malformed_evaluation_is_refused_with_what_is_expected(
    content: str, message: str, built_artifact: Path, tmp_path: Path
) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(
        ConfigError, match=f"^{re.escape(str(path))}: {message}.*; expected an evaluation: .*baseline first$"
    ):
        read_report_data(built_artifact, path)


def test_a_missing_evaluation_is_refused(built_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot be read: No such file or directory"):
        read_report_data(built_artifact, tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"reports/accuracy\.json: cannot be read: No such file or directory; build the artifact again"),
        (
            b"{}",
            r"reports/accuracy\.json: is not the one that the manifest lists; restore it or build the artifact again",
        ),
    ],
)
def test_a_damaged_report_is_refused(content: bytes | None, message: str, built_artifact: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(built_artifact, tmp_path / "artifact")
    path = artifact / "reports" / "accuracy.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        read_report_data(artifact)
