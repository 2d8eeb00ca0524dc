"""How fast rows come to a GPU and are looked up there, beside what the hardware and the bare operator do."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpu_artifacts import Spec, write_artifact
from gpu_checks import Context

from runtime_py.device_artifact import DeviceArtifact
from runtime_py.inputs import Request
from runtime_py.manifest import ServingPrecision

_REPEATS = 30


@dataclass(frozen=True)
class Size:
    """How much is loaded and looked up: T tables of E rows, B bags of L ids."""

    tables: int
    rows: int
    bags: int
    length: int


FULL = Size(tables=16, rows=500_000, bags=4096, length=20)
SMALL = Size(tables=3, rows=2_000, bags=16, length=5)


def measure_speed(context: Context, precision: ServingPrecision) -> dict[str, Any]:
    """Loads an artifact of one precision and looks up in it: seconds, and 1e9 bytes a second."""
    size = SMALL if context.dry else FULL
    folder = context.folder / f"speed-{precision}"
    specs = [Spec(f"t{number:02}", size.rows, 64, precision) for number in range(size.tables)]
    manifest = write_artifact(folder, specs, digests=False)
    context.load(folder, verify="sizes")  # the file is in the page cache then
    start = time.perf_counter()
    there = context.load(folder, verify="sizes")
    load_s = time.perf_counter() - start
    figures: dict[str, Any] = {"rows_bytes": manifest.weights_bytes, "device_bytes": there.layout.device_bytes}
    figures |= {"load_s": load_s, "load_gb_s": there.layout.device_bytes / load_s / 1e9}
    figures |= _lookups(context, there, size)
    for placement in context.placements[1:]:
        part = there.layout.device_bytes // 4
        shared = context.load(folder, verify="sizes", placement=placement, device_memory_bytes=part)
        request = _request(there, size, context.device, seed=1)
        seconds = _seconds(context.device, lambda shared=shared, request=request: shared.lookup(*request))
        figures[f"{placement}_quarter_on_device_us"] = seconds * 1e6
    shutil.rmtree(folder)
    return figures


def measure_copies(context: Context) -> dict[str, Any]:
    """What the hardware gives: page-locked host memory to the device, and the device to itself (read and written)."""
    count = 1 << (20 if context.dry else 30)
    host = torch.empty(count // 4, dtype=torch.uint8, pin_memory=not context.dry)
    source, target = (torch.zeros(count, dtype=torch.uint8, device=context.device) for _ in range(2))
    to_device = _seconds(context.device, lambda: target[: count // 4].copy_(host, non_blocking=True))
    on_device = _seconds(context.device, lambda: target.copy_(source))
    return {"host_to_device_gb_s": count / 4 / to_device / 1e9, "device_copy_gb_s": 2 * count / on_device / 1e9}


def _request(artifact: DeviceArtifact, size: Size, device: torch.device, seed: int) -> Request:
    features = len(artifact.manifest.features)
    drawn = np.random.default_rng(seed).integers(0, size.rows, features * size.bags * size.length)
    lengths = torch.full((features * size.bags,), size.length, dtype=torch.int32, device=device)
    return Request(torch.from_numpy(drawn).to(device), lengths, None)


def _lookups(context: Context, artifact: DeviceArtifact, size: Size) -> dict[str, Any]:
    """A large batch and a single request: the operator alone, the checked lookup, the captured one, and from the host."""
    figures: dict[str, Any] = {}
    row_bytes = next(iter(artifact.layout.tables.values())).row_bytes
    for name, bags in (("batch", size.bags), ("one", 1)):
        shape = Size(size.tables, size.rows, bags, size.length)
        request = _request(artifact, shape, context.device, seed=0)
        on_host = Request(request.values.cpu(), request.lengths.cpu(), None)
        count = request.values.numel()
        moved = count * row_bytes + bags * 64 * size.tables * 4
        captured = artifact.capture(bags=bags, ids=count)
        for what, run in {
            "operator": _bare_operator(artifact, request),
            "lookup": lambda request=request: artifact.lookup(*request),
            "captured": lambda captured=captured, request=request: captured(*request),
            "from_host": lambda on_host=on_host: artifact.lookup(*on_host),
        }.items():
            seconds = _seconds(context.device, run)
            figures[f"{name}_{what}_us"] = seconds * 1e6
            figures[f"{name}_{what}_gb_s"] = moved / seconds / 1e9
        figures[f"{name}_ids"] = count
    return figures


def _bare_operator(artifact: DeviceArtifact, request: Request) -> Callable[[], object]:
    """FBGEMM's lookup over the same rows, with ids and offsets that nobody checks."""
    graph = artifact.graph.scripted
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(request.lengths.long())
    largest = [graph.max_dim_int2, graph.max_dim_int4, graph.max_dim_int8, graph.max_dim_fp16, graph.max_dim_fp32]

    def run() -> object:
        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            *(graph.weights, graph.uvm_weights, graph.weights_placements, graph.weights_offsets, graph.weights_types),
            *(
                graph.dim_offsets,
                graph.total_dim,
                *largest,
                request.values,
                offsets,
                0,
                None,
                0,
                None,
                None,
                16,
                0,
                -1,
                -1,
            ),
        )

    return run


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    """The median time of one call, from its start to the end of its work on the device."""
    for _ in range(3):
        run()
    times = []
    for _ in range(_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times))
