"""What is reported of one table: its figures, what they were held against, and the rows to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from export.accuracy import (
    ErrorSums,
    LookupErrors,
    ProbeRows,
    check_budget,
    describe_histogram,
    measure_lookups,
    table_accuracy,
)
from export.config import Budget, EmbeddingBagConfig, Precision, ReleaseConfig
from export.weight_file import WrittenWeights
from runtime_py.manifest import PrecisionChoice, TableAccuracy

__all__ = ["TableReport", "report_tables"]


@dataclass(frozen=True)
class TableReport:
    """One table.

    `problems` are the figures outside its `budgets`. `histogram`: `lower_edges` of the relative L2 error of a row and the
    number of `rows` from each up to the next, sqrt(2) times it, with `exact_rows` apart. `worst_rows` have `row`,
    `cosine`, `relative_l2`; `outliers` have `row`, `value` (its largest), `relative_l2_of_others`: ten each at most.
    """

    figures: TableAccuracy
    budgets: list[Budget]
    problems: list[str]
    histogram: dict[str, Any]
    worst_rows: list[dict[str, float | int]]
    outliers: list[dict[str, float | int]]
    lookups: LookupErrors
    choice: PrecisionChoice | None

    def to_json(self) -> dict[str, Any]:
        """The table's entry in `reports/accuracy.json`."""
        return {
            **asdict(self.figures),
            "budgets": [budget.model_dump(exclude_none=True) for budget in self.budgets],
            "row_errors": self.histogram,
            "worst_rows": self.worst_rows,
            "outliers": self.outliers,
            "lookups": asdict(self.lookups),
            "choice": self.choice and self.choice.reason,
        }


def report_tables(
    config: ReleaseConfig,
    precisions: Mapping[str, Precision],
    choices: Sequence[PrecisionChoice],
    bags: Mapping[str, list[np.ndarray]],
    weights: WrittenWeights,
) -> list[TableReport]:
    """Adds up what was measured of every table, in configuration order."""
    reasons = {choice.table: choice for choice in choices}
    return [
        _report_table(
            table,
            precisions[table.name],
            config.budgets(table, precisions[table.name]),
            weights.bytes_before[table.name],
            weights.sums[table.name],
            weights.probes[table.name],
            bags[table.name],
            reasons.get(table.name),
        )
        for table in config.large_embeddings.tables
    ]


def _report_table(
    table: EmbeddingBagConfig,
    precision: Precision,
    budgets: list[Budget],
    bytes_before: int,
    sums: ErrorSums,
    probes: ProbeRows,
    bags: list[np.ndarray],
    choice: PrecisionChoice | None,
) -> TableReport:
    lookups = measure_lookups(probes, precision, bags, table)
    shape = table.num_embeddings, table.embedding_dim
    figures = table_accuracy(table.name, precision, shape, bytes_before, sums, lookups)
    return TableReport(
        figures=figures,
        budgets=budgets,
        problems=[line for budget in budgets for line in check_budget(figures, budget)],
        histogram=describe_histogram(sums),
        worst_rows=[{"row": int(row), "cosine": cosine, "relative_l2": error} for cosine, error, row in sums.worst],
        outliers=[
            {"row": int(row), "value": value, "relative_l2_of_others": error} for error, value, row in sums.outliers
        ],
        lookups=lookups,
        choice=choice,
    )
