"""What a build is going to do: snapshots opened, rows found, precisions chosen, the weight file laid out.

Whatever does not fit is refused here, before anything is written. `python -m export plan` shows it and stops.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from export.access import draw_bags, total_accesses
from export.accuracy import outlier_limit
from export.choose import Candidate, TableToMeasure, choose_precisions, measure_candidates
from export.config import STORED, EmbeddingBagConfig, Precision, ReleaseConfig, SnapshotConfig, dim_divisor
from export.errors import GateError, SnapshotChangedError
from export.heap import fix_mapping_threshold
from export.parity import Case, make_cases, probe_ids
from export.progress import Progress
from export.quantize import row_format
from export.ranks import Ranks
from export.snapshots import Snapshot, TableRows, open_snapshot
from export.splice import OpenedSurgery, express
from export.surgery_source import open_surgery
from export.weight_file import PlannedTable, WeightPlan
from runtime_py.manifest import PrecisionChoice, SnapshotIdentity
from runtime_py.parallel import map_ordered
from runtime_py.tensor_file import ALIGNMENT_BYTES

__all__ = ["Clock", "Preview", "ReleasePlan", "plan_release", "preview_release"]

_REQUESTS = 16  # tables to look for at a time: where the snapshot is remote, each waits for answers
_GRAPHS_AND_REPORTS_BYTES = 192 << 10  # set aside of a byte budget, and so much for each table:
_REPORT_BYTES_PER_TABLE = 16 << 10
_BYTES_PER_FEATURE = 600  # in manifest, graph and page, and its name so many times:
_NAMES_PER_FEATURE = 8
_HEADER_BYTES = 200  # of a table's entry in the weight file's header, at most, without its name


class Clock:
    """Names the phases as they start, and keeps their times."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the body."""
        self.progress.phase(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


@dataclass(frozen=True)
class _Sources:
    """The snapshots that a release reads, the rows of every table in them, and the surgery, filled from the first."""

    snapshots: dict[SnapshotConfig, Snapshot]
    rows: dict[str, TableRows]
    surgery: OpenedSurgery | None

    @property
    def passed_over(self) -> list[str]:
        """The newer steps of their folders that are not complete."""
        return [path for snapshot in self.snapshots.values() for path in snapshot.passed_over]


@dataclass(frozen=True)
class ReleasePlan:
    """A build, up to its first byte: `bags` are those to measure lookups on, `precisions` what each table is stored in."""

    config: ReleaseConfig
    cases: list[Case]
    bags: dict[str, list[np.ndarray]]
    precisions: dict[str, Precision]
    choices: list[PrecisionChoice]
    sources: _Sources
    weights: WeightPlan

    @property
    def identities(self) -> list[SnapshotIdentity]:
        """The configuration's snapshot, then those of pretrained tables."""
        return [snapshot.identity for snapshot in self.sources.snapshots.values()]

    @property
    def surgery(self) -> OpenedSurgery | None:
        """What serving does to the pooled embeddings."""
        return self.sources.surgery

    def check_sources(self) -> None:
        """Opens the snapshots again: whatever was written again since the first look shows as another plan.

        Raises:
            SnapshotChangedError: it was.
        """
        steps = {source: snapshot.identity.step for source, snapshot in self.sources.snapshots.items()}
        again = _open_sources(self.config, steps)
        for source, snapshot in self.sources.snapshots.items():
            if again.snapshots[source].identity != snapshot.identity:
                raise SnapshotChangedError(f"{source.uri}: the snapshot changed while it was read; build again")
        if self._lay_out(again).fingerprint != self.weights.fingerprint:
            raise SnapshotChangedError(
                f"{self.config.snapshot.uri}: the snapshot changed while it was read; build again"
            )

    def _lay_out(self, sources: _Sources) -> WeightPlan:
        return _lay_out(self.config, sources, self.cases, self.bags, self.precisions, self.weights.sample)


def plan_release(config: ReleaseConfig, ranks: Ranks, workers: int, sample: int, clock: Clock) -> ReleasePlan:
    """Plans a build; where precisions are to be chosen or counts to be read, rank 0 does it for all.

    Args:
        config: the release.
        ranks: the processes of the build.
        workers: threads that measure what is to be chosen from.
        sample: of every so many chunks one is measured; 1 measures all rows.
        clock: is told of the phases.

    Raises:
        ExportError: the snapshot does not fit, counts cannot be read, or no choice keeps to its budgets.
    """
    tables = config.large_embeddings.tables
    with clock.phase("snapshot"):
        cases = make_cases(config.large_embeddings, config.parity.seed, config.parity.batches)
        sources = _open_sources(config)
        if sources.surgery is not None and not ranks.rank:
            express(sources.surgery, config.serving.graphs)
    auto = [table for table in tables if config.serving_precision(table) is Precision.AUTO]
    by_rank_0 = bool(auto) or any(table.access_counts for table in tables)
    if ranks.rank and by_rank_0:
        choices = [PrecisionChoice(**choice) for choice in json.loads(ranks.wait("choices", 0))]
        bags = {}
        for number, table in enumerate(tables):
            if table.access_counts:
                told = json.loads(ranks.wait(f"bags {number}", 0))
                bags[table.name] = [np.array(bag, np.int64) for bag in told]
            else:
                bags[table.name] = draw_bags(table, config.parity.seed)
    else:
        bags = {table.name: draw_bags(table, config.parity.seed) for table in tables}
        choices = []
        if auto:
            with clock.phase("choice"):
                offered = {table.name: config.candidates(table) for table in auto}
                found = _measure(config, sources, bags, offered, workers, sample, clock.progress)
                choices = _choose(config, found, sources.surgery)
        if by_rank_0:
            for number, table in enumerate(tables):
                if table.access_counts:  # one by one: the store takes 8 MiB at most
                    ranks.tell(f"bags {number}", json.dumps([bag.tolist() for bag in bags[table.name]]))
            ranks.tell("choices", json.dumps([asdict(choice) for choice in choices]))
    chosen = {choice.table: Precision(choice.serving_precision) for choice in choices}
    precisions = {table.name: chosen.get(table.name, config.serving_precision(table)) for table in tables}
    weights = _lay_out(config, sources, cases, bags, precisions, sample)
    return ReleasePlan(config, cases, bags, precisions, choices, sources, weights)


def _open_sources(config: ReleaseConfig, steps: Mapping[SnapshotConfig, int | None] | None = None) -> _Sources:
    """Opens every snapshot, at these steps where they are known, and finds the rows of every table.

    Raises:
        SnapshotError: a snapshot cannot be read, or does not have a table as the configuration says.
        SurgeryError: the surgery cannot be had, filled or called.
    """
    tables = config.large_embeddings.tables
    snapshots = {}
    for source in dict.fromkeys([config.snapshot, *(_source(config, table)[0] for table in tables)]):
        snapshots[source] = open_snapshot(source.model_copy(update={"step": steps[source]}) if steps else source)

    def find(table: EmbeddingBagConfig) -> TableRows:
        source, name = _source(config, table)
        return snapshots[source].table(table, name)

    found = list(map_ordered(find, tables, _REQUESTS))  # all before the surgery, which lies beside them
    snapshots[config.snapshot].check_one_collection()
    surgery = None
    if config.surgery is not None:
        surgery = open_surgery(config.surgery, config.large_embeddings, snapshots[config.snapshot])
    return _Sources(snapshots, {table.name: rows for table, rows in zip(tables, found, strict=True)}, surgery)


def _source(config: ReleaseConfig, table: EmbeddingBagConfig) -> tuple[SnapshotConfig, str]:
    """The snapshot that has the table's rows, and what the table is called there."""
    if table.pretrained is None:
        return config.snapshot, table.name
    return SnapshotConfig(uri=table.pretrained.embedding_snapshot_uri), table.pretrained.emb_name


def _lay_out(
    config: ReleaseConfig,
    sources: _Sources,
    cases: list[Case],
    bags: Mapping[str, list[np.ndarray]],
    precisions: Mapping[str, Precision],
    sample: int,
) -> WeightPlan:
    ids = probe_ids(config.large_embeddings, cases)
    planned = []
    for table in config.large_embeddings.tables:
        precision = precisions[table.name]
        wanted = np.unique(np.concatenate([ids[table.name], *bags[table.name]]))
        limit = outlier_limit(precision, config.budgets(table, precision))
        planned.append(PlannedTable(table.name, sources.rows[table.name], precision, wanted, limit))
    digests = [snapshot.identity.digest for snapshot in sources.snapshots.values()]
    return WeightPlan(planned, sample, digests, sources.surgery.parameters() if sources.surgery else ())


# --- The choice ------------------------------------------------------------------------------------------------------


def _measure(
    config: ReleaseConfig,
    sources: _Sources,
    bags: Mapping[str, list[np.ndarray]],
    precisions: Mapping[str, list[Precision]],
    workers: int,
    sample: int,
    progress: Progress,
) -> dict[str, list[Candidate]]:
    tables = [
        TableToMeasure(table, sources.rows[table.name], bags[table.name], precisions[table.name])
        for table in config.large_embeddings.tables
        if table.name in precisions
    ]
    return measure_candidates(config, tables, workers, sample, progress)


def _choose(
    config: ReleaseConfig, candidates: Mapping[str, list[Candidate]], surgery: OpenedSurgery | None
) -> list[PrecisionChoice]:
    auto = [table for table in config.large_embeddings.tables if config.serving_precision(table) is Precision.AUTO]
    accesses = {table.name: float(len(table.features)) for table in auto}
    if all(table.access_counts for table in auto):
        accesses = {table.name: total_accesses(table) for table in auto}
    return choose_precisions(config, candidates, _other_bytes(config, surgery), accesses)


def _other_bytes(config: ReleaseConfig, surgery: OpenedSurgery | None) -> int:
    """What the artifact takes besides the rows of tables that are left to `auto`: graphs and reports as set aside."""
    tables = config.large_embeddings.tables
    header = (
        -(-sum(_HEADER_BYTES + 2 * len(table.name.encode()) for table in tables) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    )
    total = header + _GRAPHS_AND_REPORTS_BYTES + _REPORT_BYTES_PER_TABLE * len(tables)
    for table in tables:
        total += sum(_BYTES_PER_FEATURE + _NAMES_PER_FEATURE * len(name.encode()) for name in table.features)
        precision = config.serving_precision(table)
        if precision is not Precision.AUTO:
            total += table.num_embeddings * row_format(precision).row_bytes(table.embedding_dim)
        if table.vocab is not None:
            from export.vocabulary import vocabulary_bytes  # pyarrow only where there is a vocabulary

            total += vocabulary_bytes(table, table.vocab)
    for parameter in surgery.parameters() if surgery else ():  # in the weight file, its header and the manifest
        total += parameter.bytes + _BYTES_PER_FEATURE + _NAMES_PER_FEATURE * len(parameter.name.encode())
    return total


# --- The preview -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preview:
    """What `plan` shows: every table at every precision that it could have, and what would be built.

    `precisions` lacks the tables that no choice could be made for; `refusal` says why then. `artifact_bytes` is of rows and
    vocabularies, and what is set aside for graphs and reports. `seconds` is what reading, converting, examining and
    digesting the rows would take on these workers; writing them comes on top. `sample` as for `plan_release`,
    `passed_over` as for `BuildResult`.
    """

    candidates: dict[str, list[Candidate]]
    precisions: dict[str, Precision]
    choices: list[PrecisionChoice]
    refusal: str
    artifact_bytes: int
    seconds: float
    sample: int
    phases: dict[str, float]
    passed_over: list[str]

    def to_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints."""
        return {
            "tables": [
                {
                    "table": name,
                    "serving_precision": self.precisions.get(name),
                    "candidates": [
                        {
                            "precision": entry.precision,
                            "bytes": entry.bytes,
                            "problems": entry.problems,
                            "accuracy": entry.accuracy and asdict(entry.accuracy),
                        }
                        for entry in found
                    ],
                }
                for name, found in self.candidates.items()
            ],
            "choices": [asdict(choice) for choice in self.choices],
            "refusal": self.refusal or None,
            "artifact_bytes": self.artifact_bytes,
            "build_seconds": self.seconds,
            "sample": self.sample,
            "seconds": self.phases,
            "passed_over": self.passed_over,
        }


def preview_release(config: ReleaseConfig, workers: int, sample: int, clock: Clock) -> Preview:
    """Measures every table at every precision that its dimension allows, and chooses as a build would; writes nothing.

    Raises:
        ExportError: the snapshot does not fit, or counts cannot be read.
    """
    tables = config.large_embeddings.tables
    fix_mapping_threshold()
    with clock.phase("snapshot"):
        sources = _open_sources(config)
        if sources.surgery is not None:
            express(sources.surgery, config.serving.graphs)
        bags = {table.name: draw_bags(table, config.parity.seed) for table in tables}
    with clock.phase("measure"):
        possible = {table.name: _possible(config, table) for table in tables}
        found = _measure(config, sources, bags, possible, workers, sample, clock.progress)
    refusal, choices = "", []
    try:
        choices = _choose(config, found, sources.surgery)
    except GateError as error:
        refusal = str(error)
    chosen = {choice.table: Precision(choice.serving_precision) for choice in choices}
    precisions: dict[str, Precision] = {}
    for table in tables:
        precision = chosen.get(table.name, config.serving_precision(table))
        if precision is not Precision.AUTO:
            precisions[table.name] = precision
    if not refusal:  # what is fixed must keep to its budgets, too
        refusal = "; ".join(
            problem
            for name, entries in found.items()
            for entry in entries
            if entry.precision is precisions.get(name)
            for problem in entry.problems
        )
    picked = [entry for name, entries in found.items() for entry in entries if entry.precision is precisions.get(name)]
    rows_of_auto = sum(
        entry.bytes for name, entries in found.items() for entry in entries if entry.precision is chosen.get(name)
    )
    size = _other_bytes(config, sources.surgery) + rows_of_auto
    seconds = sum(entry.seconds for entry in picked) + 2 * sum(entry.bytes for entry in picked) * _digest_seconds()
    return Preview(
        found,
        precisions,
        choices,
        refusal,
        size,
        round(seconds / workers, 3),
        sample,
        clock.seconds,
        sources.passed_over,
    )


def _possible(config: ReleaseConfig, table: EmbeddingBagConfig) -> list[Precision]:
    if config.serving_precision(table) is Precision.AUTO:
        return config.candidates(table)
    return [value for value in STORED if table.embedding_dim % dim_divisor(value) == 0]


def _digest_seconds() -> float:
    """What SHA-256 takes for a byte, on one core."""
    data = bytes(8 << 20)
    start = time.perf_counter()
    hashlib.sha256(data)
    return (time.perf_counter() - start) / len(data)
