#!/usr/bin/env python
"""What each serving precision does to the model's task: held-out log loss, normalised entropy and recall@10.

Errors of rows say little about clicks. This takes a snapshot of `make_snapshot.py` and generated impressions that training
did not see, measures the training model on them in float32, then builds and loads one real artifact for each precision,
pools the same impressions with it and puts the trained dense head on top. No gate of accuracy stops a build here: to see
what a precision costs is the point.

* Log loss: the mean over the held-out impressions, in nats.
* Normalised entropy: the log loss over the entropy of the held-out click rate; 1 is as good as knowing that rate alone
  (He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at Facebook").
* Recall@10: a query is a held-out impression that was clicked and has at least one id of the retrieval feature. Its true id
  is drawn from that bag. It and 999 others, drawn uniformly from the table's ids outside the bag, are ranked by the
  model's logit with the bag replaced by the one candidate, everything else as in the impression. Recall@10 is the share of
  queries whose true id is among the first ten; an id with an equal logit counts as ranked before it.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_snapshot import HELD_OUT, ClickBatch, ClickData, ClickModel
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from export import build_artifact, load_config
from export.config import STORED, Budget, LargeEmbeddingsConfig, Precision, ReleaseConfig, SnapshotConfig, dim_divisor
from export.errors import ConfigError, ExportError, SnapshotError
from export.snapshots import open_snapshot
from runtime_py import Artifact, ArtifactError, load_artifact
from runtime_py.manifest import SnapshotIdentity

BASELINE = "float32 model"
METRICS = [
    {"name": "log loss", "better": "lower", "unit": "nats"},
    {"name": "normalised entropy", "better": "lower", "unit": ""},
    {"name": "recall@10", "better": "higher", "unit": ""},
]
_FIRST = 10
_DIGITS = {"log loss": 6, "normalised entropy": 6, "recall@10": 4}
_ROWS_AT_ONCE = 8192  # to pool
_QUERIES_AT_ONCE = 32  # to rank

# From impressions to what was pooled: float32 [B, D] by feature.
Pool = Callable[[KeyedJaggedTensor], Mapping[str, torch.Tensor]]


# --- The metrics -----------------------------------------------------------------------------------------------------


def log_loss(logits: torch.Tensor, clicks: torch.Tensor) -> float:
    """Mean log loss of B logits, in nats; summed in float64, as the differences to be seen are small."""
    return functional.binary_cross_entropy_with_logits(logits.double(), clicks.double()).item()


def normalised_entropy(loss: float, click_rate: float) -> float:
    """A log loss over the entropy of the click rate.

    Raises:
        ConfigError: the rate is 0 or 1, which has none.
    """
    if not 0.0 < click_rate < 1.0:
        raise ConfigError(f"of the held-out impressions {click_rate:.0%} were clicked; take more with --held-out")
    return loss / -(click_rate * math.log(click_rate) + (1 - click_rate) * math.log(1 - click_rate))


def recall(logits: torch.Tensor, first: int) -> float:
    """The share of queries whose true candidate, in column 0 of [Q, C], is among the `first` of its row."""
    before = ~(logits[:, 1:] < logits[:, :1])  # in this form, ties and NaN count against it
    return (before.sum(dim=1) < first).double().mean().item()


# --- The queries -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Queries:
    """Q retrieval queries: `impressions` [Q] are numbers in the held-out batch, `candidates` [Q, C] ids, the true first."""

    feature: str
    impressions: np.ndarray
    candidates: np.ndarray


def draw_queries(
    config: LargeEmbeddingsConfig, batch: ClickBatch, feature: str, count: int, candidates: int, seed: int
) -> Queries:
    """Draws `count` clicked impressions, and `candidates` ids for each.

    Raises:
        ConfigError: no table has the feature, its table has too few rows, or too few impressions would do.
    """
    table = next((table for table in config.tables if feature in table.features), None)
    if table is None:
        known = ", ".join(_features(config))
        raise ConfigError(f"--retrieval-feature: no table has the feature '{feature}'; features: {known}")
    rng = np.random.default_rng((seed, 3))  # the clicks' own streams have three numbers
    lengths = batch.features[feature].lengths().numpy()
    bags = np.split(batch.features[feature].values().numpy(), np.cumsum(lengths)[:-1])
    possible = np.flatnonzero((batch.clicks.numpy() > 0) & (lengths > 0))
    if len(possible) < count:
        raise ConfigError(
            f"{len(possible)} held-out impressions were clicked and have a '{feature}', and --queries asks for {count}; "
            "ask for fewer, or take more with --held-out"
        )
    impressions = rng.choice(possible, count, replace=False)
    drawn = []
    for bag in (bags[impression] for impression in impressions):
        inside = len(np.unique(bag))
        if table.num_embeddings - inside < candidates - 1:
            raise ConfigError(
                f"table '{table.name}': {table.num_embeddings} rows are too few for --candidates {candidates}; ask for fewer"
            )
        # Enough that those outside the bag are enough; any `candidates - 1` of them in a row are as good as drawn alone.
        others = rng.choice(table.num_embeddings, candidates - 1 + inside, replace=False)
        others = others[~np.isin(others, bag)][: candidates - 1]
        drawn.append(np.concatenate([[rng.choice(bag)], others]))
    return Queries(feature, impressions, np.stack(drawn))


# --- The evaluation --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What every row of the report is measured on: the trained head, the order of its columns, impressions, queries."""

    head: torch.nn.Sequential
    features: list[str]
    batch: ClickBatch
    queries: Queries

    @torch.no_grad()
    def evaluate(self, pool: Pool) -> dict[str, float]:
        """The value of every metric, by its name."""
        pooled = pool(self.batch.features)
        loss = log_loss(self.head(self._columns(pooled)).squeeze(1), self.batch.clicks)
        return {
            "log loss": loss,
            "normalised entropy": normalised_entropy(loss, self.batch.clicks.double().mean().item()),
            "recall@10": recall(self.candidate_logits(pool, pooled), _FIRST),
        }

    @torch.no_grad()
    def candidate_logits(self, pool: Pool, pooled: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The logits of every query's candidates, float32 [Q, C]; `pooled` is of the whole batch.

        A candidate changes one feature's columns only, and the head's first layer is linear: so each id is pooled once, the
        layer's share of it is computed once, and added to that of the other features.
        """
        feature, layer = self.queries.feature, self.head[0]
        ids, places = np.unique(self.queries.candidates, return_inverse=True)
        places = torch.from_numpy(places.reshape(self.queries.candidates.shape))
        alone = torch.cat([pool(self._alone(part))[feature] for part in torch.from_numpy(ids).split(_ROWS_AT_ONCE)])
        others = {name: values[self.queries.impressions] for name, values in pooled.items()}
        others[feature] = torch.zeros_like(others[feature])
        start = sum(others[name].shape[1] for name in self.features[: self.features.index(feature)])
        of_ids = functional.linear(alone, layer.weight[:, start : start + alone.shape[1]])
        of_others = layer(self._columns(others)).unsqueeze(1)
        parts = zip(of_others.split(_QUERIES_AT_ONCE), places.split(_QUERIES_AT_ONCE), strict=True)
        return torch.cat([self.head[1:](rest + of_ids[part]).squeeze(2) for rest, part in parts])

    def _columns(self, pooled: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([pooled[feature] for feature in self.features], dim=1)

    def _alone(self, ids: torch.Tensor) -> KeyedJaggedTensor:
        """Impressions of one id of the retrieval feature, and nothing else."""
        lengths = torch.zeros(len(self.features), len(ids), dtype=torch.int32)
        lengths[self.features.index(self.queries.feature)] = 1
        return KeyedJaggedTensor(keys=self.features, values=ids, lengths=lengths.flatten())


def pool_with_model(model: ClickModel) -> Pool:
    return lambda features: model.embeddings(features).to_dict()


def pool_with_artifact(artifact: Artifact) -> Pool:
    return lambda features: artifact(features).to_dict()


# --- The model and its artifacts -------------------------------------------------------------------------------------


def find_snapshot(config: SnapshotConfig) -> tuple[Path, SnapshotIdentity]:
    """The snapshot that the builder would take, and its folder.

    Raises:
        SnapshotError: there is none, or not of the kind that make_snapshot.py writes.
    """
    identity = open_snapshot(config).identity
    folder = Path(config.uri) if identity.step is None else Path(config.uri) / str(identity.step)
    if identity.format != "dcp" or not folder.is_dir():
        raise SnapshotError(f"{config.uri}: holds no DCP folder of this machine, as scripts/make_snapshot.py writes it")
    return folder, identity


def load_model(config: LargeEmbeddingsConfig, folder: Path) -> ClickModel:
    """The trained model in float32: rows that were trained in fp16 are widened, which loses nothing.

    Raises:
        SnapshotError: the snapshot is of another model, or is damaged.
    """
    model = ClickModel(config)
    bags = model.embeddings.ebc.embedding_bags
    model.embeddings.fill({name: torch.empty(bag.weight.shape, dtype=bag.weight.dtype) for name, bag in bags.items()})
    state = model.state_dict()
    stored = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, tensor in state.items():
        size = getattr(stored.get(f"model.{name}"), "size", None)
        if size != tensor.shape:
            found = "nothing" if size is None else list(size)
            raise SnapshotError(
                f"{folder}: has {found} under 'model.{name}', expected {list(tensor.shape)}; "
                "make the snapshot again with scripts/make_snapshot.py and this configuration"
            )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process, as meant
            checkpoint.load({"model": state}, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise SnapshotError(f"{folder}: cannot be loaded: {reason}") from error
    return model.float().requires_grad_(False)


def table_precisions(config: LargeEmbeddingsConfig, precision: Precision) -> dict[str, Precision]:
    """The precision of every table by its name: this one or, where it does not allow the table's dimension, a wider one."""
    wider = STORED[STORED.index(precision) :: -1]
    return {
        table.name: next(value for value in wider if table.embedding_dim % dim_divisor(value) == 0)
        for table in config.tables
    }


def release_of(config: ReleaseConfig, precision: Precision, step: int | None) -> ReleaseConfig:
    """The release in one precision, from this very snapshot, with no budget."""
    chosen = table_precisions(config.large_embeddings, precision)
    tables = [
        # Vocabularies and access counts change no row.
        table.model_copy(update={"serving_precision": chosen[table.name], "vocab": None, "access_counts": None})
        for table in config.large_embeddings.tables
    ]
    parity = {"budgets": dict.fromkeys(STORED, Budget()), "table_budgets": {}}
    return config.model_copy(
        update={
            "large_embeddings": config.large_embeddings.model_copy(update={"tables": tables}),
            "snapshot": config.snapshot.model_copy(update={"step": step}),
            "serving": config.serving.model_copy(update={"precision": precision, "auto": None}),
            "parity": config.parity.model_copy(update=parity),
        }
    )


def check_artifact(folder: Path, artifact: Artifact, config: LargeEmbeddingsConfig, snapshot: SnapshotIdentity) -> None:
    """Refuses an artifact that is not of this model: its rows under this head would mean nothing.

    Raises:
        ConfigError: its features, or the snapshot that it was built from, are others.
    """
    expected = {feature: table.embedding_dim for table in config.tables for feature in table.features}
    found = {output.key: output.dim for output in artifact.manifest.outputs}
    if found != expected:
        raise ConfigError(f"{folder}: has the features {_dims(found)}, the configuration has {_dims(expected)}")
    built_from = artifact.manifest.provenance.snapshots[0]
    if built_from.digest != snapshot.digest:
        raise ConfigError(
            f"{folder}: was built from another snapshot than the one evaluated here (step {built_from.step} of "
            f"{built_from.uri}, not step {snapshot.step} of {snapshot.uri}); build it again"
        )


def _features(config: LargeEmbeddingsConfig) -> list[str]:
    """All features, in the order of the model's columns."""
    return [feature for table in config.tables for feature in table.features]


def _dims(features: Mapping[str, int]) -> str:
    return ", ".join(f"{name} [{dim}]" for name, dim in features.items())


# --- The report ------------------------------------------------------------------------------------------------------


def describe_task(options: argparse.Namespace, step: int | None, feature: str, kept: Sequence[str]) -> str:
    """The report's "task": what was measured, on what, and what to know when reading it."""
    trained = "the snapshot" if step is None else f"step {step}"
    sentences = [
        f"Click prediction on {options.held_out:,} generated impressions that training did not see; model and dense head of "
        f"{trained}, the tables served in each precision. Bytes are of the tables' rows, the model's as trained.",
        "Log loss: the mean, in nats.",
        "Normalised entropy: log loss over the entropy of the held-out click rate (He et al. 2014).",
        f"Recall@10: of {options.queries:,} clicked held-out impressions, the share in which a true '{feature}', drawn from "
        f"the impression's bag, is among the first ten of {options.candidates:,} candidates, the others drawn uniformly "
        "outside the bag, all ranked by the logit with the bag replaced by the one candidate; ties count against. "
        f"Chance is {_FIRST / options.candidates:.2g}; one query is {1 / options.queries:.2g}.",
        *kept,
        f"Seeds: {options.seed} of the clicks, {options.retrieval_seed} of queries and candidates.",
    ]
    return " ".join(sentences)


def describe_kept(config: LargeEmbeddingsConfig, precision: Precision) -> list[str]:
    """A sentence for every table that does not get the precision."""
    dims = {table.name: table.embedding_dim for table in config.tables}
    return [
        f"In {precision}, table '{name}' keeps {kept}: its {dims[name]} values a row are no multiple of "
        f"{dim_divisor(precision)}."
        for name, kept in table_precisions(config, precision).items()
        if kept is not precision
    ]


def show(report: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Prints the table, each metric beside its difference to the first row."""
    view = Table(box=None, pad_edge=False, header_style="")
    view.add_column("")
    view.add_column("rows", justify="right")
    for metric in report["metrics"]:
        view.add_column(metric["name"], justify="right")
        view.add_column("change", justify="right")
    baseline = report["rows"][0]["values"]
    for row in report["rows"]:
        cells = []
        for name, value in row["values"].items():
            change = "" if row["name"] == BASELINE else f"{value - baseline[name]:+z.{_DIGITS[name]}f}"
            cells += [f"{value:.4f}", change]
        view.add_row(row["name"], decimal(row["bytes"]), *cells)
    console = Console(width=120, highlight=False, markup=False, emoji=False)
    console.print(view)
    for note in notes:
        console.print(note)


# --- The job ---------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Evaluates everything; returns the report, and what to know of single tables."""
    release = load_config(options.config)
    config = release.large_embeddings
    for table in config.tables:
        if table.pretrained is not None:  # the head was trained on this snapshot's rows
            raise ConfigError(f"table '{table.name}': its rows come from elsewhere ('pretrained'); remove the key")
    folder, snapshot = find_snapshot(release.snapshot)
    model = load_model(config, folder)
    batch = ClickData(config, options.seed).batch("held_out", 0, options.held_out)
    feature = options.retrieval_feature or config.tables[min(1, len(config.tables) - 1)].features[0]
    queries = draw_queries(config, batch, feature, options.queries, options.candidates, options.retrieval_seed)
    task = Task(model.head, _features(config), batch, queries)

    rows: list[dict[str, Any]] = []

    def add(name: str, size: int, pool: Pool) -> None:
        started = time.monotonic()
        rows.append({"name": name, "bytes": size, "values": task.evaluate(pool)})
        _say(f"{name}: evaluated in {time.monotonic() - started:.1f} s")

    trained_bytes = sum(
        table.num_embeddings * table.embedding_dim * _item_bytes(table.data_type) for table in config.tables
    )
    add(BASELINE, trained_bytes, pool_with_model(model))
    entropy = rows[0]["values"]["normalised entropy"]
    if not entropy < 1.0:  # in this form, NaN is refused too
        raise ConfigError(
            f"the model of {folder} predicts no better than the click rate (normalised entropy {entropy:.4f}); "
            "give the --seed that make_snapshot.py had, or train for more steps"
        )
    for precision in options.precisions:
        with tempfile.TemporaryDirectory(prefix="evaluate-") as scratch:
            target = Path(scratch) / precision
            build_artifact(release_of(release, precision, snapshot.step), target, workers=os.cpu_count() or 1)
            artifact = load_artifact(target)
            add(precision.value, artifact.manifest.weights_bytes, pool_with_artifact(artifact))
    for path in options.artifact:
        artifact = load_artifact(path)
        check_artifact(path, artifact, config, snapshot)
        add(_row_name(path), artifact.manifest.weights_bytes, pool_with_artifact(artifact))
    kept = [sentence for precision in options.precisions for sentence in describe_kept(config, precision)]
    return {"task": describe_task(options, snapshot.step, feature, kept), "metrics": METRICS, "rows": rows}, kept


def _item_bytes(data_type: str) -> int:
    return {"fp32": 4, "fp16": 2}[data_type]


def _row_name(artifact: Path) -> str:
    return artifact.absolute().name


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    stored = [value.value for value in STORED]
    parser = argparse.ArgumentParser(
        description="Measure what each serving precision does to held-out click prediction."
    )
    parser.add_argument("--config", type=Path, required=True, help="release configuration; its snapshot is evaluated")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file for the report; an earlier one is replaced"
    )
    parser.add_argument(
        "--precisions",
        nargs="*",
        choices=stored,
        default=stored,
        metavar="NAME",
        help=f"of {', '.join(stored)} (default: all)",
    )
    parser.add_argument(
        "--artifact", type=Path, action="append", default=[], help="evaluate this artifact, too (may be repeated)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the clicks, the one that make_snapshot.py had (default: %(default)s)"
    )
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="impressions (default: %(default)s)")
    parser.add_argument("--retrieval-feature", help="default: the first one of the second table")
    parser.add_argument(
        "--retrieval-seed", type=int, default=0, help="of the queries and candidates (default: %(default)s)"
    )
    parser.add_argument("--queries", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--candidates", type=int, default=1000, help="for each query (default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.seed, options.retrieval_seed) < 0 or options.queries < 1 or options.held_out < 1:
        parser.error("--queries and --held-out must be at least 1, the seeds at least 0")
    if options.candidates <= _FIRST:
        parser.error(f"--candidates must be more than {_FIRST}: among fewer, every id is among the first {_FIRST}")
    if options.output.is_dir():
        parser.error(f"--output: {options.output} is a folder; name a file")
    options.precisions = [Precision(name) for name in dict.fromkeys(options.precisions)]
    names = [BASELINE, *options.precisions, *map(_row_name, options.artifact)]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"--artifact: two rows would be called '{name}'; give the folder another name")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Progress goes to stderr, the table to stdout, the report to a file; exit code 1 with one line where it refuses."""
    options = _parse(arguments)
    started = time.monotonic()
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)  # now: what cannot be written should not cost the run
        report, notes = _run(options)
        options.output.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    except (ExportError, ArtifactError, OSError) as error:
        raise SystemExit(f"error: {'; '.join(str(error).splitlines())}") from error
    _say(f"{len(report['rows'])} rows in {time.monotonic() - started:.1f} s: {options.output}")
    show(report, notes)


if __name__ == "__main__":
    main()
