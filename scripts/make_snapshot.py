#!/usr/bin/env python
"""Trains the tables of a release configuration on generated clicks, and saves snapshots as a trainer would.

The demo and the checks need a snapshot that training made: popular rows that moved and rare ones that hardly did, real
optimizer state next to the model, several steps in one folder. This is the smallest job that makes one. It is no part
of the builder; `ClickData` and `ClickModel` are for checks of accuracy on held-out clicks as well.
"""

import argparse
import math
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from export.config import EmbeddingBagConfig, LargeEmbeddingsConfig
from export.config_file import load_config
from export.errors import ConfigError
from export.large_embeddings import LargeEmbeddings

BATCH = 2048  # impressions
HELD_OUT = 8192  # impressions
REPORT_EVERY = 50  # steps

# --- The clicks ------------------------------------------------------------------------------------------------------

_SPLITS = {"population": 0, "train": 1, "held_out": 2}  # first part of every random stream's key
_ZIPF_EXPONENT = 1.1
_MAX_BAG = 4
_TASTES = 3  # dimensions of an id's planted latent vector
_TASTE_SCALE = 0.8
_BIAS_SCALE = 0.5
_BASE_LOGIT = -1.0


@dataclass(frozen=True)
class ClickBatch:
    """B impressions: features, clicks (float32 [B], 0 or 1) and the probabilities that the clicks were drawn with."""

    features: KeyedJaggedTensor
    clicks: torch.Tensor
    probabilities: torch.Tensor


class _Population:
    """The ids of one table: how often each is seen, and what it does to a click."""

    def __init__(self, table: EmbeddingBagConfig, rng: np.random.Generator) -> None:
        count = table.num_embeddings
        popularity = np.arange(1, count + 1, dtype=np.float64) ** -_ZIPF_EXPONENT
        self._cumulative = np.cumsum(popularity) / popularity.sum()
        self._ids = rng.permutation(count)  # by popularity, so that popular rows are spread over the table
        biases = rng.normal(0.0, _BIAS_SCALE, size=(count, 1))
        tastes = rng.normal(0.0, _TASTE_SCALE, size=(count, _TASTES))
        self._effects = torch.from_numpy(np.hstack([biases, tastes]).astype(np.float32))
        self._pooling = str(table.pooling)

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Ids [count], Zipf-distributed."""
        ranks = np.searchsorted(self._cumulative, rng.random(count), side="right")
        return self._ids[np.minimum(ranks, len(self._ids) - 1)]

    def effects(self, ids: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """Bias and tastes of every bag [B, 1 + tastes], pooled as the table pools its rows."""
        indices = torch.from_numpy(ids)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        return functional.embedding_bag(indices, self._effects, offsets, mode=self._pooling, include_last_offset=True)


class ClickData:
    """Generated impressions whose clicks depend on the ids, so that there is something to learn.

    The first feature is who looks: always one id. Every other feature is a bag of 0 to 4 ids. A click is likelier when
    the ids are popular with everyone (their biases) and when they suit who looks (the product of both sides' tastes).
    The same seed gives the same ids, tastes and batches; a batch does not depend on the batches before it.
    """

    def __init__(self, config: LargeEmbeddingsConfig, seed: int) -> None:
        if config.weighted:
            raise ConfigError("the generated clicks have no per-sample weights; remove 'weighted' from the tables")
        self._seed = seed
        self._populations: dict[str, _Population] = {}
        for index, table in enumerate(config.tables):
            population = _Population(table, np.random.default_rng((seed, _SPLITS["population"], index)))
            self._populations |= dict.fromkeys(table.features, population)

    def batch(self, split: Literal["train", "held_out"], index: int, size: int) -> ClickBatch:
        """Batch `index` of a split, with `size` impressions."""
        rng = np.random.default_rng((self._seed, _SPLITS[split], index))
        ids, lengths, effects = [], [], []
        for population in self._populations.values():
            first = not lengths
            lengths.append(np.ones(size, dtype=np.int64) if first else rng.integers(0, _MAX_BAG + 1, size=size))
            ids.append(population.draw(int(lengths[-1].sum()), rng))
            effects.append(population.effects(ids[-1], lengths[-1]))
        logits = _BASE_LOGIT + sum(effect[:, 0] for effect in effects)
        logits = logits + sum((effects[0][:, 1:] * effect[:, 1:]).sum(dim=1) for effect in effects[1:])
        probabilities = torch.sigmoid(logits)
        clicks = (torch.from_numpy(rng.random(size, dtype=np.float32)) < probabilities).float()
        features = KeyedJaggedTensor(
            keys=list(self._populations),
            values=torch.from_numpy(np.concatenate(ids)),
            lengths=torch.from_numpy(np.concatenate(lengths)).int(),
        )
        return ClickBatch(features, clicks, probabilities)


# --- The model -------------------------------------------------------------------------------------------------------


class ClickModel(torch.nn.Module):
    """Pooled embeddings, then a small dense head: one logit an impression."""

    def __init__(self, config: LargeEmbeddingsConfig) -> None:
        super().__init__()
        width = sum(table.embedding_dim * len(table.features) for table in config.tables)
        self.embeddings = LargeEmbeddings(config)
        self.head = torch.nn.Sequential(torch.nn.Linear(width, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """F features of B bags to click logits, float32 [B]."""
        return self.head(self.embeddings(features).values()).squeeze(1)


def new_model(config: LargeEmbeddingsConfig, seed: int) -> ClickModel:
    """A model before its first step: small normal rows, of each table's own type."""
    torch.manual_seed(seed)
    model = ClickModel(config)
    bags = model.embeddings.ebc.embedding_bags
    model.embeddings.fill(
        {name: torch.randn(bag.weight.shape).mul_(0.1).to(bag.weight.dtype) for name, bag in bags.items()}
    )
    return model.requires_grad_()


def log_loss(model: ClickModel, batch: ClickBatch) -> float:
    """Mean log loss of a batch, in nats."""
    with torch.no_grad():
        return functional.binary_cross_entropy_with_logits(model(batch.features), batch.clicks).item()


def new_optimizers(config: LargeEmbeddingsConfig, model: ClickModel) -> list[torch.optim.Optimizer]:
    """One optimizer a table, as configured, and Adam for the head."""
    bags = model.embeddings.ebc.embedding_bags
    tables = [_table_optimizer(table, bags[table.name].weight) for table in config.tables]
    return [*tables, torch.optim.Adam(model.head.parameters(), lr=0.003)]


def _table_optimizer(table: EmbeddingBagConfig, weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    chosen = table.optimizer
    if chosen is None:
        raise ConfigError(f"table '{table.name}': training needs an 'optimizer'; add one, such as {{sgd: {{lr: 0.1}}}}")
    rate = {}
    if chosen.learning_rate is not None:  # it overrides the algorithm's own, as upstream
        if chosen.learning_rate.constant is None:
            raise ConfigError(f"table '{table.name}': this script knows no learning rate but {{constant: ...}}")
        rate = {"lr": chosen.learning_rate.constant}
    if chosen.sgd is not None:
        return torch.optim.SGD([weight], **chosen.sgd.model_dump() | rate)
    if chosen.adagrad is not None:
        return torch.optim.Adagrad([weight], **chosen.adagrad.model_dump() | rate)
    return torch.optim.Adam([weight], **chosen.adam.model_dump() | rate)


# --- The job ---------------------------------------------------------------------------------------------------------


def train_step(model: ClickModel, optimizers: Sequence[torch.optim.Optimizer], batch: ClickBatch) -> float:
    """One step; returns the mean log loss before it."""
    model.zero_grad()
    # Summed, not averaged: a row is in a few bags of a batch, whatever the size of the batch, and in fp16 the gradient
    # of an average would vanish.
    loss = functional.binary_cross_entropy_with_logits(model(batch.features), batch.clicks, reduction="sum")
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item() / len(batch.clicks)


def train(
    model: ClickModel, optimizers: Sequence[torch.optim.Optimizer], data: ClickData, folders: dict[int, Path]
) -> None:
    """Trains up to the last step of `folders` and saves a snapshot at each of its steps."""
    held_out = data.batch("held_out", 0, HELD_OUT)
    initial = log_loss(model, held_out)
    _report_bounds(held_out)
    _say(f"held-out log loss before training: {initial:.4f}")
    for step in range(1, max(folders) + 1):
        loss = train_step(model, optimizers, data.batch("train", step, BATCH))
        if step % REPORT_EVERY == 0:
            _say(f"step {step:4d}  training log loss {loss:.4f}")
        if step in folders:
            reached = log_loss(model, held_out)
            if not reached < initial:  # in this form, NaN is refused too
                reason = f"held-out log loss is {reached:.4f} at step {step} and was {initial:.4f} before training"
                raise SystemExit(
                    f"error: {reason}: nothing was learned, so nothing is saved; change the learning rates"
                )
            save_snapshot(folders[step], model, optimizers, step)
            _say(f"step {step:4d}  held-out log loss {reached:.4f}, saved")


def _report_bounds(batch: ClickBatch) -> None:
    rate = batch.clicks.mean().item()
    base = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    best = functional.binary_cross_entropy(batch.probabilities, batch.clicks).item()
    _say(f"held-out clicks: rate {rate:.3f}; log loss of that rate {base:.4f}, of the true probabilities {best:.4f}")


def save_snapshot(folder: Path, model: ClickModel, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    """Saves the whole training state. `.metadata` is written last: without it, a folder is no snapshot."""
    model_state, optimizer_state = get_state_dict(model, optimizers)
    state = {"model": model_state, "optimizer": optimizer_state, "step": step}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process, as meant
        checkpoint.save(state, checkpoint_id=folder, no_dist=True)


def clear_folders(folders: Sequence[Path], overwrite: bool) -> None:
    """Makes sure that no folder exists: refuses, or removes it, commit mark first."""
    existing = [folder for folder in folders if folder.exists()]
    if existing and not overwrite:
        names = ", ".join(map(str, existing))
        raise SystemExit(f"error: already there: {names}; choose another --output, or replace with --overwrite")
    for folder in existing:
        (folder / ".metadata").unlink(missing_ok=True)
        shutil.rmtree(folder)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small click model and save step-numbered snapshots of it.")
    parser.add_argument("--config", type=Path, required=True, help="release configuration with the tables to train")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the snapshots, one a step: <output>/<step>"
    )
    parser.add_argument("--steps", type=int, default=300, help="steps to train (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=200, help="and after the last step (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the clicks and of the first rows (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the snapshots of the same steps")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.save_every < 1 or options.seed < 0:
        parser.error("--steps and --save-every must be at least 1, --seed at least 0")
    return options


def _run(options: argparse.Namespace) -> list[Path]:
    """Trains and saves; returns the snapshots' folders, oldest first."""
    config = load_config(options.config).large_embeddings
    steps = [*range(options.save_every, options.steps, options.save_every), options.steps]
    folders = {step: options.output / str(step) for step in steps}
    data = ClickData(config, options.seed)
    model = new_model(config, options.seed)
    optimizers = new_optimizers(config, model)
    options.output.mkdir(parents=True, exist_ok=True)
    clear_folders(list(folders.values()), options.overwrite)  # not before all the above was accepted
    train(model, optimizers, data, folders)
    return list(folders.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Progress goes to stderr, the folders of the snapshots to stdout; exit code 1 with one line where it refuses."""
    options = _parse(arguments)
    started = time.monotonic()
    try:
        folders = _run(options)
    except (ConfigError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    _say(f"{options.steps} steps and {len(folders)} snapshots in {time.monotonic() - started:.1f} s")
    print(*folders, sep="\n")


if __name__ == "__main__":
    main()
