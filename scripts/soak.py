#!/usr/bin/env python
"""Serves one artifact from several processes of several threads, with good and bad requests mixed, and checks every answer.

Each process loads the artifact for itself; its threads share it. A good request must give the reference's answer bit for bit
(the artifact's own graph, asked once before the threads start), a bad one its own error, word for word, and the memory that
is the process's own must not grow: the median of the last third of the time is compared with that of the second third (in the
first one the allocator meets the sizes of the requests). Prints one JSON object; exit 1 where something was wrong.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime_py import Artifact, InvalidInputError, Jagged, load_artifact

_REQUESTS = 60


@dataclass(frozen=True)
class Trial:
    """One request, and what it must come to: a tensor, or the text of an error."""

    call: Callable[[], torch.Tensor]
    expected: torch.Tensor | str


def make_trials(artifact: Artifact, seed: int, largest: int) -> list[Trial]:
    """Requests in every form, good ones of 0 to `largest` examples and bad ones of every kind."""
    rng = np.random.default_rng(seed)
    return [_make_trial(artifact, rng, int(rng.integers(0, largest + 1)), number % 6) for number in range(_REQUESTS)]


def _make_trial(artifact: Artifact, rng: np.random.Generator, bags: int, kind: int) -> Trial:
    manifest = artifact.manifest
    rows = [manifest.table[feature.table].num_embeddings for feature in manifest.features]
    lengths = [rng.integers(0, 12, bags + 1).astype(np.int32) for _ in rows]
    for each in lengths:
        each[0] = 1  # the first bag of every feature holds an id, for a bad request to spoil
    ids = [rng.integers(0, count, each.sum()) for count, each in zip(rows, lengths, strict=True)]
    weights = [rng.normal(size=each.size).astype(np.float32) for each in ids]
    last = len(rows) - 1
    name, limit = manifest.features[last].name, rows[last]
    if kind == 5:
        ids[last][0] = limit
    values, flat = torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(lengths))
    raw = (values, flat, torch.from_numpy(np.concatenate(weights))) if manifest.weighted else (values, flat)
    named: dict[str, Any] = {
        feature.name: Jagged(*parts) if feature.weighted else Jagged(*parts[:2])
        for feature, *parts in zip(manifest.features, ids, lengths, weights, strict=True)
    }
    if kind == 3:
        text = f"lengths add up to {values.numel()} "
        return Trial(lambda: artifact.lookup(values[:-1], *raw[1:2], *(part[:-1] for part in raw[2:])), text)
    if kind == 4:
        named["no such feature"] = named.pop(name)
        return Trial(lambda: artifact(named).values, "unknown feature 'no such feature'; ")
    if kind == 5:
        text = f"feature '{name}', bag 0, position 0: id {limit} is outside [0, {limit - 1}]"
        call = (lambda: artifact(named).values) if rng.integers(2) else (lambda: artifact.lookup(*raw))
        return Trial(call, text)
    expected = artifact.graph(*raw)
    if kind == 0:
        return Trial(lambda: artifact(named).values, expected)
    if kind == 1:
        return Trial(lambda: artifact.lookup(*raw, out=torch.empty_like(expected)), expected)
    return Trial(lambda: artifact.lookup(*raw), expected)


def own_memory_kib() -> int:
    """What this process alone holds, without the mapped files."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0])


def try_out(trial: Trial) -> str | None:
    """What is wrong with the outcome of a trial."""
    try:
        pooled = trial.call()
    except InvalidInputError as error:
        if isinstance(trial.expected, str) and str(error).startswith(trial.expected):
            return None
        return f"unexpected error: {error}"
    if isinstance(trial.expected, str):
        return f"accepted, expected: {trial.expected}"
    if pooled.numpy().tobytes() != trial.expected.numpy().tobytes():
        return "another answer than the reference's"
    return None


def serve(path: Path, number: int, options: argparse.Namespace, results: "Queue[dict[str, Any]]") -> None:
    """One process: the counts of its requests, what went wrong, and its memory over time."""
    torch.set_num_threads(1)
    artifact = load_artifact(path, verify="sizes", threads=options.cores)
    trials = make_trials(artifact, number, options.largest)
    good, bad, wrong = [0] * options.threads, [0] * options.threads, [""] * options.threads
    stop = threading.Event()

    def run(thread: int) -> None:
        position = thread * 7
        while not stop.is_set():
            trial = trials[position % len(trials)]
            problem = try_out(trial)
            if problem:
                wrong[thread] = problem
                return
            (bad if isinstance(trial.expected, str) else good)[thread] += 1
            position += 1

    threads = [threading.Thread(target=run, args=(thread,), daemon=True) for thread in range(options.threads)]
    for each in threads:
        each.start()
    memory = []
    start = time.monotonic()
    while (passed := time.monotonic() - start) < options.seconds and not any(wrong):
        time.sleep(min(0.25, options.seconds / 60))  # requests in the air come and go, of megabytes each
        memory.append((passed, own_memory_kib()))
    stop.set()
    for each in threads:
        each.join()
    second, third = (
        statistics.median([kib for passed, kib in memory if first <= passed / options.seconds <= first + 1 / 3] or [1])
        for first in (1 / 3, 2 / 3)
    )
    results.put(
        {
            "good": sum(good),
            "bad": sum(bad),
            "wrong": [problem for problem in wrong if problem],
            "own_memory_mib": [round(kib / 1024, 1) for _, kib in memory[:: max(1, len(memory) // 12)]],
            "growth": round(third / second - 1, 4),
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the processes and prints what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=8, help="that send requests, in each process (default: 8)")
    parser.add_argument("--cores", type=int, default=2, help="threads= of load_artifact (default: 2)")
    parser.add_argument("--largest", type=int, default=500, help="examples of the largest request (default: 500)")
    parser.add_argument("--growth", type=float, default=0.02, help="of memory that is allowed (default: 0.02)")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    results: Queue[dict[str, Any]] = context.Queue()
    processes = [
        context.Process(target=serve, args=(options.artifact, number, options, results))
        for number in range(options.processes)
    ]
    for process in processes:
        process.start()
    found = []
    while len(found) < len(processes):
        try:
            found.append(results.get(timeout=1))
        except Exception:  # queue.Empty of another class in each context
            if all(process.exitcode is not None for process in processes) and results.empty():
                break
    for process in processes:
        process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    growth = max((each["growth"] for each in found), default=0.0)
    summary = {
        "seconds": options.seconds,
        "processes": len(processes),
        "threads": options.threads,
        "good": sum(each["good"] for each in found),
        "bad": sum(each["bad"] for each in found),
        "wrong": [problem for each in found for problem in each["wrong"]],
        "exit_codes": failed,
        "largest_growth": growth,
        "own_memory_mib": [each["own_memory_mib"] for each in found],
    }
    print(json.dumps(summary, indent=2))
    fine = len(found) == len(processes) and not failed and not summary["wrong"] and growth <= options.growth
    return 0 if fine and summary["good"] and summary["bad"] else 1


if __name__ == "__main__":
    sys.exit(main())
