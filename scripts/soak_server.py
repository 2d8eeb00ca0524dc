"""The server of `soak_refresh.py`: follows a pointer, sends itself requests as fast as it can, compares every answer.

It imports torch and `runtime_py` alone, and holds nothing that grows. Each line on stdin, `status` or `latency`, is answered
by a line of JSON.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from runtime_py import ReloadingArtifact


class Latency:
    """A histogram of fixed size: bucket k is for latencies from 1.02**k microseconds on."""

    STEP = 1.02

    def __init__(self) -> None:
        self.buckets = [0] * 1200  # up to some 5 hours

    def add(self, seconds: float) -> None:
        self.buckets[int(math.log(max(seconds * 1e6, 1)) / math.log(self.STEP))] += 1

    def percentiles(self) -> dict[str, float]:
        """In milliseconds; starts again."""
        counts, total = self.buckets, sum(self.buckets)
        self.buckets = [0] * len(counts)
        found, reached = {}, 0
        wanted = {"p50": 0.5 * total, "p99": 0.99 * total, "p99.9": 0.999 * total, "max": total}
        for bucket, count in enumerate(counts):
            reached += count
            for name, rank in wanted.items():
                if name not in found and reached >= rank > reached - count:
                    found[name] = self.STEP ** (bucket + 1) / 1e3
        return found


class Load:
    """Threads that ask, and count."""

    def __init__(self, asked: dict[str, Any], reloading: ReloadingArtifact, threads: int) -> None:
        self.reloading = reloading
        self.expected = asked["expected"]  # artifact id -> float32 [requests, bags, columns]
        self.by_name = [
            {feature: [[i] if i >= 0 else [] for i in ids] for feature, ids in request.items()}
            for request in asked["requests"]
        ]
        flat = [torch.tensor([i for ids in request.values() for i in ids]) for request in asked["requests"]]
        self.raw = [(ids[ids >= 0], (ids >= 0).to(torch.int32)) for ids in flat]
        self.counts = {"answers": 0, "failed": 0, "wrong": 0}
        self.seen = dict.fromkeys(self.expected, 0)
        self.first_error = ""
        self.latency = Latency()
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(seed,)) for seed in range(threads)]
        for thread in self.threads:
            thread.start()

    def run(self, seed: int) -> None:
        chooser = random.Random(seed)
        while not self.stop.is_set():
            number = chooser.randrange(len(self.raw))
            begin = time.perf_counter()
            try:
                values, version = self.ask(number, by_name=chooser.random() < 0.5)
            except Exception as error:
                with self.lock:
                    self.counts["failed"] += 1
                    self.first_error = self.first_error or f"{type(error).__name__}: {error}"
                continue
            seconds = time.perf_counter() - begin
            right = torch.equal(values, self.expected[version][number])
            with self.lock:
                self.counts["answers"] += 1
                self.counts["wrong"] += not right
                self.seen[version] += 1
                self.latency.add(seconds)

    def ask(self, number: int, by_name: bool) -> tuple[torch.Tensor, str]:
        if by_name:
            answer = self.reloading(self.by_name[number])
            return answer.values, answer.artifact_id
        serving = self.reloading.current
        return serving.lookup(*self.raw[number]), serving.manifest.artifact_id

    def state(self) -> dict[str, Any]:
        with self.lock:
            return {"counts": dict(self.counts), "seen": dict(self.seen), "first_error": self.first_error}


def memory() -> dict[str, int]:
    """What this process has resident, in bytes, and numbers of mappings, open files and threads."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    rollup = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/versions/" in line]
    return {
        **{name: 1024 * int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon", "RssFile")},
        "Pss": 1024 * int(rollup["Pss"].split()[0]),
        "weight files mapped": sum("tables.safetensors" in line for line in maps),
        "vocabularies mapped": sum("/vocab/" in line for line in maps),
        "libraries mapped": len({line.split()[4] for line in maps if "lookup.wrapper" in line}),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": int(fields["Threads"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pointer", type=Path)
    parser.add_argument("requests", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--backend", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = {"interval_s": 0.02, "prefault": True, "backend": arguments.backend}
    with ReloadingArtifact(arguments.pointer, **options) as reloading:
        load = Load(torch.load(arguments.requests), reloading, arguments.threads)
        for line in sys.stdin:
            state = {"status": dataclasses.asdict(reloading.status()), "memory": memory(), **load.state()}
            print(json.dumps(load.latency.percentiles() if line.strip() == "latency" else state), flush=True)
        load.stop.set()
        for thread in load.threads:
            thread.join()


if __name__ == "__main__":
    main()
