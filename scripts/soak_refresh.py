#!/usr/bin/env python
"""Refreshes under load: swaps a served artifact again and again, then offers it candidates that must be refused.

A server process (`soak_server.py`) follows a pointer while its threads send requests as fast as they can. Every answer is
compared, bit for bit, with the trained rows of the version that it says it came from. This process publishes, deletes
old versions, damages candidates, and prints figures. It exits with 1 where a promise is broken.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import loads
from pathlib import Path
from typing import Any

import torch
from soak_candidates import WEIGHTS, Root, make_offers
from soak_release import Release

from export.versions import publish_version

VERSIONS = 3
WAIT_S = 120.0
BYTES = {"VmRSS", "RssAnon", "RssFile", "Pss"}
GROWTH_BYTES = {"RssAnon": 8 << 20, "RssFile": 4 << 20}  # that pass for noise
GRAPHS = {
    "torchscript": "graphs/lookup.torchscript.pt",
    "aot_inductor": "graphs/lookup.cpu/data/aotinductor/model/lookup.wrapper.so",
}
State = dict[str, Any]


class Server:
    """The server process."""

    def __init__(self, pointer: Path, requests: Path, threads: int, backend: str) -> None:
        command = [sys.executable, Path(__file__).with_name("soak_server.py"), pointer, requests]
        command += ["--threads", str(threads), "--backend", backend]
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def ask(self, command: str = "status") -> State:
        print(command, file=self.child.stdin, flush=True)
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit(f"FAILED: the server died, exit code {self.child.wait()}")
        return loads(line)

    def wait(self, what: str, done: Callable[[State], bool]) -> State:
        end = time.monotonic() + WAIT_S
        while not done(state := self.ask()):
            if time.monotonic() > end:
                raise SystemExit(f"FAILED: {what}: nothing in {WAIT_S:.0f} s; the server says {state}")
            time.sleep(0.005)
        return state

    def wait_for_answers(self, count: int) -> State:
        begin = self.ask()["counts"]["answers"]
        return self.wait("answers", lambda state: state["counts"]["answers"] >= begin + count)


@contextmanager
def serving(*arguments: Any) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
        server.child.stdin.close()
        server.child.wait(60)
    finally:
        if server.child.poll() is None:
            server.child.kill()


@dataclass
class Soak:
    """What was seen."""

    first: State  # before the swaps
    swapped: State  # after them
    last: State  # after the refusals
    latency: dict[str, dict[str, float]]
    seconds: float
    peak_bytes: int
    deleted: int
    in_use: int
    outcome: list[tuple[str, bool, str]]  # candidate, whether it was refused as it should be, error

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept."""
        before, after, end = self.first["memory"], self.swapped["memory"], self.last["memory"]
        kept = {
            "a request failed": not self.last["counts"]["failed"],
            "an answer is wrong": not self.last["counts"]["wrong"],
            "a version never answered": all(self.last["seen"].values()),
            "a candidate was not refused": all(refused for _, refused, _ in self.outcome),
            "a candidate left something behind": all(end[name] == after[name] for name in after if name not in BYTES),
        }
        for name, value in before.items():
            grown = after[name] - value
            kept[f"{name} has grown"] = grown <= GROWTH_BYTES.get(name, 0) or name in BYTES - GROWTH_BYTES.keys()
        return [what for what, good in kept.items() if not good]


def swap(root: Root, release: Release, server: Server, swaps: int) -> tuple[int, int, int]:
    """Publishes one version after the other; gives versions deleted, spared while in use, and the highest VmRSS."""
    deleted = in_use = peak = 0
    for number in range(1, swaps + 1):
        move = publish_version(release.artifacts[number % VERSIONS], root.folder, keep=2)
        deleted, in_use = deleted + len(move.deleted), in_use + len(move.in_use)

        def follows(state: State, number: int = number) -> bool:
            nonlocal peak
            peak = max(peak, state["memory"]["VmRSS"])
            return state["status"]["swaps"] >= number

        state = server.wait(f"swap {number}", follows)
        if (state["status"]["swaps"], state["status"]["sequence"]) != (number, move.sequence):
            raise SystemExit(f"FAILED: swap {number}: {state['status']}")
        server.wait_for_answers(50)
    return deleted, in_use, peak


def refuse(root: Root, release: Release, server: Server, graph: str) -> list[tuple[str, bool, str]]:
    """Offers every candidate; each time the same version must go on answering, and the pointer is put right again."""
    good, serves = root.pointer.read_bytes(), server.ask()["status"]
    outcome = []
    for name, offer in make_offers(root, release, graph).items():
        before = server.ask()["status"]
        offer()
        server.wait(name, lambda state: state["status"]["refusal"] or state["status"]["version"] != serves["version"])
        status = server.wait_for_answers(50)["status"]
        refused = status["version"] == serves["version"] and status["refusals"] > before["refusals"]
        outcome.append((name, refused, (status["refusal"] or {}).get("error", "nothing was refused")))
        if root.version(release.artifacts[1]).is_symlink():
            root.version(release.artifacts[1]).unlink()
        root.write(good)
        server.wait(name, lambda state: state["status"]["refusal"] is None)
    return outcome


def soak(folder: Path, arguments: argparse.Namespace) -> Soak:
    (folder / "artifacts").mkdir()
    graphs = list(dict.fromkeys(["torchscript", arguments.backend]))
    release, root = Release(folder / "artifacts", arguments.rows, VERSIONS, graphs), Root(folder / "root")
    publish_version(release.artifacts[0], root.folder)
    size = (release.artifacts[0] / WEIGHTS).stat().st_size
    print(
        f"{arguments.swaps} swaps, {arguments.threads} threads, {arguments.backend}, weight file of {mib(size).strip()}"
    )
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, Linux {platform.release()}"
    )
    requests = release.folder / "requests.pt"
    with serving(root.pointer, requests, arguments.threads, arguments.backend) as server:
        server.wait_for_answers(2000)
        server.ask("latency")
        server.wait_for_answers(6000)
        latency = {"quiet": server.ask("latency")}
        first, begin = server.ask(), time.monotonic()
        deleted, in_use, peak = swap(root, release, server, arguments.swaps)
        seconds = time.monotonic() - begin
        latency["swapping"] = server.ask("latency")
        swapped = server.wait_for_answers(2000)
        outcome = refuse(root, release, server, GRAPHS[arguments.backend])
        last = server.wait_for_answers(2000)
    return Soak(first, swapped, last, latency, seconds, peak, deleted, in_use, outcome)


def mib(value: int) -> str:
    return f"{value / 2**20:.1f} MiB"


def print_report(seen: Soak) -> None:
    status, counts = seen.swapped["status"], seen.last["counts"]
    print(
        f"\nswaps            {status['swaps']} in {seen.seconds:.1f} s, each a copy, its digests and the golden cases"
    )
    print(f"versions         {seen.deleted} deleted, {seen.in_use} times one was spared since the server had it mapped")
    print(
        f"answers          {counts['answers']:,}; by version {', '.join(f'{n:,}' for n in seen.last['seen'].values())}"
    )
    print(f"failed           {counts['failed']} {seen.last['first_error']}")
    print(f"mixed or wrong   {counts['wrong']}")
    for name, figures in seen.latency.items():
        print(f"latency          {name:<9}" + ", ".join(f"{p} {value:.2f} ms" for p, value in figures.items()))
    print(f"\n{'the server':<22}{'before':>16}{'after the swaps':>18}{'after refusals':>16}{'highest':>14}")
    for name, value in seen.first["memory"].items():
        values = [value, seen.swapped["memory"][name], seen.last["memory"][name]]
        shown = [mib(v) if name in BYTES else str(v) for v in values]
        peak = mib(seen.peak_bytes) if name == "VmRSS" else ""
        print(f"{name:<22}{shown[0]:>16}{shown[1]:>18}{shown[2]:>16}{peak:>14}")
    refused = sum(refused for _, refused, _ in seen.outcome)
    print(f"\n{refused} of {len(seen.outcome)} candidates refused while serving went on:")
    for name, refused, error in seen.outcome:
        error = re.sub(r"(/\S*)?/(root|artifacts)/", "", error)
        error = re.sub(r"([0-9a-f]{8})[0-9a-f]{56}", r"\1..", error)
        print(f"  {'' if refused else 'NOT REFUSED: '}{name}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--swaps", type=int, default=102, help="a multiple of 3 ends on the version that it began with")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rows", type=int, default=400_000, help="of the largest table, 128 bytes each")
    parser.add_argument("--backend", default="torchscript", choices=list(GRAPHS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        seen = soak(Path(name), arguments)
    print_report(seen)
    print(f"\n{'FAILED: ' + '; '.join(seen.broken) if seen.broken else 'every promise was kept'}")
    return 1 if seen.broken else 0


if __name__ == "__main__":
    sys.exit(main())
