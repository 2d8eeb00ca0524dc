#!/usr/bin/env python
"""Time of a lookup beside its peers: what the checks cost, what a second core gains, and what a start costs.

Every round runs each contender some times in a row, one contender after the other, so that all see the same machine, and
keeps the last three quarters: each has a mapping of the rows of its own, whose page tables the one before has put out of
the caches, as no server does. The figures are medians, and all outputs are compared. No two runs in a row have the same
request, as in a server: one request again and again would find its rows in the core's cache. Its ids have just been
written, as a server has just parsed them. Where the kernel let a thread of ours wait for a core for more than 2 % of that
time, the round is left out, and counted: on a busy machine it would measure the others. What the kernel of a virtual
machine can't see is asked of its cores: before and after a round of two threads each looks requests up with the bare
operator while the other does nothing, and the round is left out where one takes 15 % longer, as on a core that a
neighbour works on; what all rounds gave is told, too. The rounds of a comparison are spread over the run, in five passes.
Threads that share a request are bound to a core each, as some kernels keep both on one for milliseconds to leave the
other asleep. A helper looks out for work for a millisecond: it is awake where requests follow each other, as they do here,
and asleep after a pause, which is measured, too. Artifacts are built in a process of their own: what a build leaves to
malloc made it fetch every large result anew.

`bare operator` is FBGEMM's lookup called from Python with its offsets given, `bare TorchScript` the artifact's graph with
the checks that it makes itself. torchrec's quantized module is traced by torchrec.fx and scripted, over the same rows,
without any check; it takes tensors and gives one.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchrec import EmbeddingBagConfig
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import DataType
from torchrec.quant.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from export import build_artifact
from runtime_py import Artifact, load_artifact
from runtime_py.constants import make_constants

DIM = 64
WARM_UP = 20
PASSES = 5
Inputs = tuple[Any, ...]
Run = Callable[..., torch.Tensor]  # of the inputs that a contender takes
Contender = tuple[Run, Callable[[torch.Tensor], Inputs]]  # and how they are made of a request's values
Medians = dict[str, float]
IDS_IN_A_ROW = 320_000  # that a contender looks up before the next one's turn
PAUSE_SECONDS = 0.003  # in which a helper goes to sleep
ROWS_BYTES = 192 << 20  # that all requests of a comparison read together: several times a cache


def build(folder: Path, tables: int, rows: int) -> Path:
    """An artifact of fp16 tables with one feature each."""
    names = [f"t{number:02}" for number in range(tables)]
    generator = torch.Generator().manual_seed(0)
    trained = {name: torch.randn(rows, DIM, generator=generator) for name in names}
    torch.save({f"model.embedding_bags.{name}.weight": tensor for name, tensor in trained.items()}, folder / "s.pt")
    described = [
        {"name": name, "num_embeddings": rows, "embedding_dim": DIM, "data_type": "fp32", "serving_precision": "fp16"}
        for name in names
    ]
    config = {"large_embeddings": {"tables": described}, "snapshot": {"uri": "s.pt"}, "parity": {"batches": 1}}
    (folder / "release.yaml").write_text(json.dumps(config))
    artifact = build_artifact(folder / "release.yaml", folder / "artifact", workers=2).artifact
    (folder / "s.pt").unlink()
    return artifact


class TorchrecLookup(torch.nn.Module):
    """torchrec's quantized collection over an artifact's rows, from the raw signature to one tensor."""

    def __init__(self, artifact: Artifact, weights: torch.Tensor) -> None:
        super().__init__()
        self.keys = [feature.name for feature in artifact.manifest.features]
        configs = [
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=[table.name],
                data_type=DataType.FP16,
            )
            for table in artifact.manifest.tables
        ]
        rows = {
            table.name: (weights[table.offset_bytes :][: table.bytes].view(table.num_embeddings, -1), None)
            for table in artifact.manifest.tables
        }
        self.collection = EmbeddingBagCollection(
            configs, False, torch.device("cpu"), table_name_to_quantized_weights=rows
        )

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """As a graph of ours."""
        return self.collection(KeyedJaggedTensor(keys=self.keys, values=values, lengths=lengths)).values()


def script_torchrec(artifact: Artifact) -> torch.jit.ScriptModule:
    """`TorchrecLookup` as torchrec's users serve it."""
    lookup = TorchrecLookup(artifact, artifact.graph.weights)  # type: ignore[attr-defined]
    leaves = ["IntNBitTableBatchedEmbeddingBagsCodegen", "ComputeKJTToJTDict"]
    return torch.jit.script(symbolic_trace(lookup, leaf_modules=leaves))


def bare_operator(artifact: Artifact) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """FBGEMM's operator over an artifact's rows."""
    weights = artifact.graph.weights  # type: ignore[attr-defined]
    constants = make_constants(artifact.manifest, weights)
    names = ("weights_placements", "weights_offsets", "weights_types", "dim_offsets")
    tables = [constants[name] for name in names]
    width = sum(output.dim for output in artifact.manifest.outputs)
    operator = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function.default

    def run(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = operator(
            weights, weights, *tables, width, 0, 0, 0, DIM, 0, values, offsets, 0, None, 0, None, None, 1, 0, -1, -1
        )
        return pooled

    return run


@dataclass(frozen=True)
class Requests:
    """Requests of bags of one length, ids drawn uniformly: the values of each, and what they have in common."""

    values: list[torch.Tensor]
    lengths: torch.Tensor
    offsets: torch.Tensor

    @property
    def ids(self) -> int:
        """Of one request."""
        return self.values[0].numel()


def draw(artifact: Artifact, bags: int, length: int) -> Requests:
    count = len(artifact.manifest.features)
    ids = count * bags * length
    generator = torch.Generator().manual_seed(1)
    number = min(max(2, ROWS_BYTES // (ids * 2 * DIM)), 4096)
    rows = artifact.manifest.tables[0].num_embeddings
    values = [torch.randint(0, rows, (ids,), generator=generator) for _ in range(number)]
    lengths = torch.full((count * bags,), length, dtype=torch.int32)
    return Requests(values, lengths, torch.arange(0, ids + 1, length))


class Waiting:
    """How long the threads of this process have waited for a core, though they could have run."""

    def __init__(self) -> None:
        self._files = [os.open(task / "schedstat", os.O_RDONLY) for task in Path("/proc/self/task").iterdir()]

    def read_ns(self) -> int:
        """Of the threads that were there at the start, all together; a system call for each, so that caches stay warm."""
        return sum(self._read(file) for file in self._files)

    def _read(self, file: int) -> int:
        try:
            return int(os.pread(file, 64, 0).split()[1])
        except ProcessLookupError:  # the thread has ended
            return 0

    def close(self) -> None:
        """Closes what it reads."""
        for file in self._files:
            os.close(file)


class Cores:
    """Whether the second thread's core is as fast as the caller's: a virtual one may share its core with a neighbour's."""

    def __init__(self, other: ThreadPoolExecutor, operator: Run, requests: "Requests") -> None:
        """`other` has the second thread; the operator looks some of the requests up on each, while the other does nothing."""
        self._other, self._operator, self._offsets = other, operator, requests.offsets
        self._turn = itertools.cycle(requests.values)

    def are_alike(self) -> bool:
        """Whether neither takes 15 % longer than the other."""
        times = self._look_up(), self._other.submit(self._look_up).result()
        return max(times) <= 1.15 * min(times)

    def _look_up(self) -> float:
        times = []
        for values in itertools.islice(self._turn, 16):
            start = time.perf_counter_ns()
            self._operator(values, self._offsets)
            times.append(time.perf_counter_ns() - start)
        return statistics.median(times[4:])  # the thread has just woken up


@dataclass
class Comparison:
    """Contenders with the same requests. Its rounds are spread over the whole run."""

    title: str
    contenders: dict[str, Contender]
    requests: list[torch.Tensor]
    judge: Callable[[Medians, Medians], None]  # prints what those of the kept rounds and those of all rounds mean
    share: float = 1  # of the time that others get
    cores: Cores | None = None  # where two threads take part
    kept: list[dict[str, list[int]]] = field(default_factory=list)
    rounds: list[dict[str, list[int]]] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        """Some more rounds, after a warm-up in which outputs are compared."""
        for number in range(WARM_UP):
            values = self.requests[number % len(self.requests)]
            outputs = {name: run(*prepare(values.clone())).clone() for name, (run, prepare) in self.contenders.items()}
            first = next(iter(outputs.values()))
            for name, output in outputs.items():
                if not torch.equal(output, first):
                    raise SystemExit(f"'{name}' gives another result")
        del outputs, first
        turn = itertools.cycle(self.requests)
        in_a_row = min(32, max(4, IDS_IN_A_ROW // max(1, self.requests[0].numel()) // 4 * 4))
        waiting = Waiting()
        end = time.perf_counter() + seconds * self.share
        while time.perf_counter() < end:
            times: dict[str, list[int]] = {name: [] for name in self.contenders}
            fine = self.cores is None or self.cores.are_alike()
            for name, (run, prepare) in self.contenders.items():
                for values in itertools.islice(turn, in_a_row // 4):
                    run(*prepare(values.clone()))
                waited = waiting.read_ns()
                for values in itertools.islice(turn, in_a_row // 4 * 3):
                    inputs = prepare(values.clone())
                    start = time.perf_counter_ns()
                    run(*inputs)
                    times[name].append(time.perf_counter_ns() - start)
                fine &= waiting.read_ns() - waited <= 0.02 * sum(times[name]) + 2000
            self.rounds.append(times)
            if fine and (self.cores is None or self.cores.are_alike()):
                self.kept.append(times)
        waiting.close()

    def tell(self) -> None:
        """Prints median microseconds of each, of the rounds in which all had their cores, and how many there were."""
        few = len(self.kept) < 5
        print(self.title)
        print(
            f"  {len(self.kept)} of {len(self.rounds)} rounds had their cores"
            + ("; too few: of all rounds" if few else "")
        )
        everything = find_medians(self.rounds)
        medians = everything if few else find_medians(self.kept)
        for name, median in medians.items():
            print(f"  {name:34}{median:12.1f} us")
        self.judge(medians, everything)


def find_medians(rounds: list[dict[str, list[int]]]) -> Medians:
    """Microseconds of each contender."""
    return {name: statistics.median(itertools.chain(*(times[name] for times in rounds))) / 1000 for name in rounds[0]}


def run_all(comparisons: list[Comparison], seconds: float) -> None:
    """Runs each for so long, in several passes over all of them: what disturbs a machine often lasts for seconds."""
    for _ in range(PASSES):
        for comparison in comparisons:
            comparison.run(seconds / PASSES)
    for comparison in comparisons:
        comparison.tell()


def verdict(what: str, value: float, limit: float, *, least: bool = False) -> None:
    """One line a target."""
    met = value >= limit if least else value <= limit
    print(f"  -> {what}: {value:.2f}, {'at least' if least else 'at most'} {limit:g}: {'met' if met else 'NOT met'}")


def compare_overhead(path: Path, seconds: float) -> None:
    """What the checks cost: one example, and more, on one thread."""
    artifact = load_artifact(path, verify="sizes")
    operator, torchrec = bare_operator(artifact), script_torchrec(artifact)
    keys = [feature.name for feature in artifact.manifest.features]
    comparisons = []
    for bags, length in ((1, 1), (1, 5), (20, 20), (60, 20), (200, 20), (600, 20)):
        requests = draw(artifact, bags, length)
        lengths, offsets = requests.lengths, requests.offsets

        def raw(values: torch.Tensor, lengths: torch.Tensor = lengths) -> Inputs:
            return values, lengths

        def keyed(values: torch.Tensor, lengths: torch.Tensor = lengths) -> Inputs:
            return (KeyedJaggedTensor(keys=keys, values=values, lengths=lengths),)

        def with_offsets(values: torch.Tensor, offsets: torch.Tensor = offsets) -> Inputs:
            return values, offsets

        contenders: dict[str, Contender] = {
            "bare operator": (operator, with_offsets),
            "bare TorchScript": (artifact.graph, raw),
            "artifact.lookup": (artifact.lookup, raw),
            "artifact(KeyedJaggedTensor)": (lambda request: artifact(request).values, keyed),
            "torchrec.fx, TorchScript": (torchrec, raw),
        }
        title = f"\n{len(keys)} tables, {bags} bags of {length} ids each: {requests.ids} ids, {len(requests.values)} requests"
        judge = functools.partial(judge_overhead, requests.ids)
        comparisons.append(Comparison(title, contenders, requests.values, judge))
    run_all(comparisons, seconds)


def judge_overhead(ids: int, medians: Medians, _: Medians) -> None:
    """Of requests of so many ids."""
    ours = medians["artifact.lookup"]
    if ids >= 10_000:
        verdict("artifact.lookup / bare operator", ours / medians["bare operator"], 1.1)
    else:
        verdict("artifact.lookup / bare TorchScript", ours / medians["bare TorchScript"], 2.5)
        verdict("artifact.lookup / torchrec.fx", ours / medians["torchrec.fx, TorchScript"], 1.0)


def bind_threads() -> None:
    """Each thread that takes part to a core of its own; the first core is the caller's."""
    cores = sorted(os.sched_getaffinity(0))
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(task.name), cores[:1] if int(task.name) == os.getpid() else cores[1:2])


def compare_threads(path: Path, seconds: float) -> None:
    """What a second core gains, beside what it can gain: two threads that each look half of the bags up, and no more."""
    cores = os.sched_getaffinity(0)
    one, two = (load_artifact(path, verify="sizes", threads=threads) for threads in (1, 2))
    operator = bare_operator(one)
    count = len(one.manifest.features)
    pool = ThreadPoolExecutor(1)
    pool.submit(torch.set_num_threads, 1).result()
    bind_threads()
    both = Cores(pool, operator, draw(one, math.ceil(10_000 / (40 * count)) * 2, 20))
    comparisons = []
    for ids in (10_000, 20_000, 50_000, 100_000, 250_000, 1_000_000):
        bags = math.ceil(ids / (40 * count)) * 2
        requests = draw(one, bags, 20)
        lengths, offsets = requests.lengths, requests.offsets
        half_offsets = offsets[: count * bags // 2 + 1].contiguous()

        def raw(values: torch.Tensor, lengths: torch.Tensor = lengths) -> Inputs:
            return values, lengths

        def halves(values: torch.Tensor, half_offsets: torch.Tensor = half_offsets) -> Inputs:
            """A feature's first half of bags, and the others."""
            first, other = values.view(count, 2, -1).transpose(0, 1).reshape(2, -1).contiguous().unbind()
            return first, other, half_offsets

        def look_up_halves(first: torch.Tensor, other: torch.Tensor, half_offsets: torch.Tensor) -> torch.Tensor:
            future = pool.submit(operator, other, half_offsets)
            return torch.cat([operator(first, half_offsets), future.result()])

        def with_offsets(values: torch.Tensor, offsets: torch.Tensor = offsets) -> Inputs:
            return values, offsets

        def into(artifact: Artifact, out: torch.Tensor) -> Run:
            return functools.partial(artifact.lookup, out=out)

        def after_a_pause(values: torch.Tensor, lengths: torch.Tensor = lengths) -> Inputs:
            time.sleep(PAUSE_SECONDS)
            return values, lengths

        title = f"\n{count} table(s), {bags} bags of 20 ids each: {requests.ids} ids, {len(requests.values)} requests"
        out = torch.empty(bags, DIM * count)
        contenders: dict[str, Contender] = {
            "threads=1": (one.lookup, raw),
            "threads=2": (two.lookup, raw),
            "threads=1, into out": (into(one, out), raw),
            "threads=2, into out": (into(two, out), raw),
            "bare operator": (operator, with_offsets),
            "two bare operators, halves": (look_up_halves, halves),
        }
        comparisons.append(Comparison(title, contenders, requests.values, judge_threads, cores=both))
        late: dict[str, Contender] = {
            "threads=1, after a pause": (one.lookup, after_a_pause),
            "threads=2, after a pause": (two.lookup, after_a_pause),
        }
        comparisons.append(Comparison("", late, requests.values, judge_late, share=0.5, cores=both))
    run_all(comparisons, seconds)
    pool.shutdown()
    os.sched_setaffinity(0, cores)


def judge_threads(medians: Medians, everything: Medians) -> None:
    """What the second core gained."""
    for name in ("threads=1", "threads=1, into out"):
        other = name.replace("=1", "=2")
        verdict(f"{name} / {other}", medians[name] / medians[other], 1.7, least=True)
        print(f"     {everything[name] / everything[other]:.2f} in all rounds")
    possible = medians["bare operator"] / medians["two bare operators, halves"]
    print(f"     two bare operators gained {possible:.2f}, nothing checked")


def judge_late(medians: Medians, _: Medians) -> None:
    """What it gained after a pause."""
    alone, helped = medians.values()
    print(f"     a helper that had gone to sleep gained {alone / helped:.2f}")


def memory_kib(field: str) -> int:
    """A figure of this process's mappings of weight files."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            ours = line.endswith("tables.safetensors")
        elif ours and line.startswith(f"{field}:"):
            total += int(line.split()[1])
    return total


def _hold(path: Path, ready: "multiprocessing.synchronize.Barrier", results: "multiprocessing.Queue[int]") -> None:
    artifact = load_artifact(path, verify="sizes", prefault=True)
    ready.wait()
    results.put(memory_kib("Pss"))
    ready.wait()
    del artifact


def compare_starts(path: Path, workers: int) -> None:
    """Seconds of a start, from a cold and a warm page cache, and what several workers hold together."""
    size = (path / "weights/tables.safetensors").stat().st_size
    print(f"\nload_artifact(verify='sizes') of {size / 2**20:.0f} MiB")
    for name, options in {
        "plain": {},
        "prefault": {"prefault": True},
        "lock_memory": {"lock_memory": True},
    }.items():
        seconds = []
        for cold in (True, False):
            fd = os.open(path / "weights/tables.safetensors", os.O_RDONLY)
            if cold:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
            start = time.perf_counter()
            artifact = load_artifact(path, verify="sizes", **options)  # type: ignore[arg-type]
            seconds.append(time.perf_counter() - start)
            resident = memory_kib("Rss")
            del artifact
        print(f"  {name:34}{seconds[0]:8.3f} s cold, {seconds[1]:.3f} s warm; {resident / 1024:.0f} MiB mapped in")
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=_hold, args=(path, ready, results)) for _ in range(workers)]
    for process in processes:
        process.start()
    shares = sum(results.get() for _ in processes)
    for process in processes:
        process.join()
    print(
        f"  {workers} workers hold {shares / 1024:.0f} MiB of rows together (sum of Pss), {size / 2**20:.0f} MiB in the file"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints every comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each of 26 tables (default: 100000)")
    parser.add_argument("--one", type=int, default=2_000_000, help="rows of the one large table (default: 2000000)")
    parser.add_argument("--seconds", type=float, default=6, help="for each comparison (default: 6)")
    parser.add_argument(
        "--parts", nargs="+", choices=["checks", "threads", "starts"], default=["checks", "threads", "starts"]
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="runtime-speed-") as name:
        folders = [Path(name, kind) for kind in ("many", "one")]
        for folder in folders:
            folder.mkdir()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            many, large = pool.starmap(build, [(folders[0], 26, options.rows), (folders[1], 1, options.one)])
        if "checks" in options.parts:
            compare_overhead(many, options.seconds)
        if "threads" in options.parts:
            compare_threads(large, options.seconds)
            compare_threads(many, options.seconds)
        if "starts" in options.parts:
            compare_starts(large, 4)


if __name__ == "__main__":
    main()
