"""What must hold of an artifact on a GPU. Each check returns its figures, or raises."""

import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_artifacts import Decoded, Spec, columns, decode, draw, write_artifact

from runtime_py import DeviceMemoryError, InvalidInputError, UnsupportedError, device_layout, load_artifact
from runtime_py.device_artifact import DeviceArtifact
from runtime_py.device_inputs import move
from runtime_py.device_rows import padded_rows, strip_rows
from runtime_py.inputs import Request
from runtime_py.manifest import WEIGHTS, Manifest, ServingPrecision

GOLDEN = Path(__file__).parents[2] / "artifacts" / "golden" / "format-1"
# The smallest, odd ones, a common one and the largest of each kernel; int2 is refused.
DIMS: dict[ServingPrecision, list[int]] = {
    "fp32": [1, 3, 64, 2048],
    "fp16": [1, 5, 64, 4096],
    "int8": [2, 10, 64, 4092],
    "int4": [4, 12, 64, 4088],
}
ROWS = 500
PLACEMENTS = ["device", "uvm", "uvm_cache"]
_BUDGET = 0.5  # of the rows' bytes, for shared memory


class CheckError(Exception):
    """What was found is not what must be."""


@dataclass(frozen=True)
class Context:
    """Where the checks run. `load` takes a folder, and options of `load_artifact`; a dry run has a CPU for the device."""

    device: torch.device
    folder: Path
    load: Callable[..., DeviceArtifact]

    @property
    def dry(self) -> bool:
        return self.device.type != "cuda"

    @property
    def placements(self) -> list[str]:
        return PLACEMENTS[:1] if self.dry else PLACEMENTS

    def artifact(self, precision: ServingPrecision, weighted: bool) -> Path:
        """The artifact of all dims of a precision: sum and mean pooling, two features a table, weights where asked for."""
        folder = self.folder / f"{precision}-{'weighted' if weighted else 'plain'}"
        if not folder.exists():
            specs = [
                Spec(f"{precision}_{dim}", ROWS, dim, precision, 1 + number % 2)
                for number, dim in enumerate(DIMS[precision])
            ]
            specs[1] = replace(specs[1], pooling="mean")
            if weighted:
                specs[2:] = [replace(spec, weighted=True) for spec in specs[2:]]
            write_artifact(folder, specs)
        return folder

    def place(self, folder: Path, placement: str) -> DeviceArtifact:
        """Loaded; half of the rows do not fit where the placement makes a difference."""
        if placement == "device":
            return self.load(folder)
        layout = self.load(folder).layout
        artifact = self.load(folder, placement=placement, device_memory_bytes=int(layout.device_bytes * _BUDGET))
        expect(
            any(placed.location == placement for placed in artifact.layout.tables.values()), "no table left the device"
        )
        return artifact


def expect(condition: object, text: str) -> None:
    if not condition:
        raise CheckError(text)


# --- Answers -----------------------------------------------------------------------------------------------------------


class Reference:
    """What an artifact must answer on a device: sums in float64 of what the device decodes, and the CPU's answer."""

    def __init__(self, context: Context, folder: Path) -> None:
        self._device = context.device
        self.here = load_artifact(folder)
        self.manifest = self.here.manifest
        self._stored = decode(self.manifest, folder, in_fp16=not context.dry)

    def check(self, request: Request, pooled: torch.Tensor, what: str) -> tuple[float, int]:
        """Raises where an answer is beyond the bounds; the largest share of one, and how many values a CPU has otherwise.

        From a CPU it may be as much farther as its rows are decoded otherwise.
        """
        on_cpu = self.here.lookup(*request)
        expect(
            pooled.device == self._device and pooled.shape == on_cpu.shape, f"{what}: {pooled.device} {pooled.shape}"
        )
        reference, bound, unlike_cpu = _eager(self.manifest, self._stored, request, self._device)
        share = 0.0
        for other, where, most in (
            (reference, "eager on the device", bound),
            (on_cpu.double().to(self._device), "the CPU", bound + unlike_cpu),
        ):
            error = (pooled.double() - other).abs()
            expect(bool((error <= most).all()), f"{what}: {_largest(error):.3g} from {where}")
            share = max(share, _largest(error / most.clamp(min=1e-30)))
        return share, int((pooled.cpu() != on_cpu).sum())


def check_parity(context: Context, precision: ServingPrecision, placement: str) -> dict[str, Any]:
    """Against the CPU's answer, and against embedding_bag in float64 on the device, within the bound of float32 sums."""
    largest, different, values = 0.0, 0, 0
    for weighted in (False, True):
        folder = context.artifact(precision, weighted)
        reference, there = Reference(context, folder), context.place(folder, placement)
        for seed, bags in enumerate([0, 1, 2, 33] if context.dry else [0, 1, 2, 33, 512]):
            request = draw(reference.manifest, seed, bags, 12)
            for asked in (request, move(request, context.device)):
                pooled = there.lookup(*asked)
                share, unlike = reference.check(request, pooled, f"{bags} bags")
                largest, different, values = max(largest, share), different + unlike, values + pooled.numel()
    return {"largest_share_of_bound": largest, "values": values, "values_unlike_cpu": different}


def _eager(
    manifest: Manifest, stored: dict[str, Decoded], request: Request, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 sums of the decoded rows; how far float32 sums may be from one another, 2 gamma(2 (L + 1) + 2) sum |w x|; and
    how far a CPU may be beyond that, which decodes them otherwise.
    """
    lengths = request.lengths.view(len(manifest.features), -1).long()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.sum(1).cumsum(0)])
    pooled, bounds, unlike = [], [], []
    for number, (feature, _, _) in enumerate(columns(manifest)):
        span = slice(int(starts[number]), int(starts[number + 1]))
        ids, lengths_here, decoded = request.values[span].numpy(), lengths[number].to(device), stored[feature.table]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), lengths_here.cumsum(0)])
        weights = torch.ones(len(ids), dtype=torch.float64, device=device)
        if feature.weighted and request.per_sample_weights is not None:
            weights = request.per_sample_weights[span].double().to(device)
        sums = []
        for table, factors in (
            (decoded.values, weights),
            (decoded.terms, weights.abs()),
            (decoded.unlike_cpu, weights.abs()),
        ):
            rows = torch.from_numpy(table[ids]).to(device) * factors[:, None]
            zero = torch.zeros(1, rows.shape[1], dtype=torch.float64, device=device)
            running = torch.cat([zero, rows.cumsum(0)])
            sums.append(running[offsets[1:]] - running[offsets[:-1]])
        k = (2 * (lengths_here.double() + 1) + 2)[:, None] * 2.0**-24
        bound = 2 * k / (1 - k) * sums[1] + 1e-9 * (1 + decoded.terms.max())  # float64 running sums round, too
        if feature.pooling == "mean":
            mean = lengths_here.clamp(min=1).double()[:, None]
            sums[0], sums[2], bound = sums[0] / mean, sums[2] / mean, bound / mean + 1e-9
        pooled.append(sums[0])
        bounds.append(bound)
        unlike.append(sums[2])
    return torch.cat(pooled, 1), torch.cat(bounds, 1), torch.cat(unlike, 1)


def check_golden(context: Context) -> dict[str, Any]:
    """The committed artifact, its graph built by another torch on another machine, replays its golden cases.

    It has a table in int2 and is refused for that; past the refusal, the table's columns are left out, and what is wrong in
    them is counted.
    """
    try:
        context.load(GOLDEN)
    except UnsupportedError as error:
        expect("table 'shape': is stored as int2" in str(error), str(error))
    else:
        raise CheckError("an artifact with a table in int2 was loaded")
    with patch.object(device_layout, "_check_kernel", lambda _: None):
        there = context.load(GOLDEN, invalid_ids="zero")
    int2 = torch.zeros(sum(output.dim for output in there.manifest.outputs), dtype=torch.bool)
    for feature, start, end in columns(there.manifest):
        int2[start:end] = there.manifest.table[feature.table].serving_precision == "int2"
    cases = _read_tensors(GOLDEN / "golden" / "cases.safetensors")
    names = sorted({name.rpartition("/")[0] for name in cases})
    largest, int2_wrong = 0.0, 0
    for name in names:
        request = Request(cases[f"{name}/values"], cases[f"{name}/lengths"], cases.get(f"{name}/per_sample_weights"))
        for asked in (request, move(request, context.device)):
            pooled, expected = there.lookup(*asked).cpu(), cases[f"{name}/pooled"]
            expect(pooled.shape == expected.shape, f"case '{name}': {list(pooled.shape)} for {list(expected.shape)}")
            error = (pooled - expected).abs()
            wrong = error > 1e-5 * (1 + expected.abs())
            largest, int2_wrong = max(largest, _largest(error[:, ~int2])), int2_wrong + int(wrong[:, int2].sum())
            expect(not bool(wrong[:, ~int2].any()), f"case '{name}': off by {_largest(error[:, ~int2]):.3g}")
    graph = there.manifest.graphs[0]
    return {
        "cases": len(names),
        "largest_error": largest,
        "wrong_int2_values": int2_wrong,
        "graph_built_with_torch": graph.torch,
    }


def _largest(numbers: torch.Tensor) -> float:
    return float(numbers.max()) if numbers.numel() else 0.0


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    types = {"I64": np.int64, "I32": np.int32, "F32": np.float32}
    result = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            array = np.frombuffer(data[8 + size + start : 8 + size + end], types[entry["dtype"]])
            result[name] = torch.from_numpy(array.copy()).view(entry["shape"])
    return result


def check_rows(context: Context, precision: ServingPrecision) -> dict[str, Any]:
    """Rows that are read back from the device are the canonical ones, and their padding is zero."""
    folder = context.artifact(precision, weighted=False)
    there = context.load(folder)
    weights = there.graph.scripted.weights
    data = np.fromfile(folder / WEIGHTS, np.uint8, offset=there.manifest.weights_offset_bytes)
    for placed in there.layout.tables.values():
        table, padded = placed.table, padded_rows(weights, placed)
        found = strip_rows(padded, table.row_bytes).cpu().view(-1).numpy()
        expect(np.array_equal(found, data[table.offset_bytes : table.offset_bytes + table.bytes]), table.name)
        expect(not bool(padded[:, table.row_bytes :].any()), f"{table.name}: padding")
    return {"tables": len(there.layout.tables), "address_is_multiple_of_16": weights.data_ptr() % 16 == 0}


# --- Refusals ----------------------------------------------------------------------------------------------------------


def check_bad_requests(context: Context, placement: str) -> dict[str, Any]:
    """Bad requests raise the words of the CPU from either side, and the device answers the next one."""
    folder = context.artifact("fp16", weighted=False)
    here, there = load_artifact(folder), context.place(folder, placement)
    features, good = len(here.manifest.features), draw(here.manifest, 1, 8, 5)
    expected = here.lookup(*good)
    cases = {
        "too large": ([0, ROWS], [2]),
        "negative": ([1, -1, 2], [1, 2]),
        "extreme": ([-(2**63), 2**63 - 1, 0], [1, 2]),
        "2**32, which int32 takes for 0": ([2**32], [1]),
        "more lengths than ids": ([1, 2], [3]),
        "fewer lengths than ids": ([1, 2, 3], [1]),
        "a negative length": ([1, 2], [3, -1]),
        "lengths that overflow": ([1, 2], [2**63 - 1, 2**63 - 1, 4]),
        "a length beyond int32": ([1, 2], [2**31, 2]),
    }
    for name, (values, lengths) in cases.items():
        padded = torch.tensor([*lengths, *[0] * (features - len(lengths))])
        request = Request(torch.tensor(values), padded, None)
        wanted = _refusal(here.lookup, request)
        for asked in (request, move(request, context.device)):
            got = _refusal(there.lookup, asked)
            expect(got == wanted, f"{name}: said {got!r}, the CPU {wanted!r}")
        again = there.lookup(*move(good, context.device)).cpu()
        expect(torch.allclose(again, expected, rtol=1e-5, atol=1e-5), f"{name}: the next answer is wrong")
    loose = draw(here.manifest, 2, 64, 5, outside=300)
    zero = here.with_invalid_ids("zero").lookup(*loose)
    got = there.with_invalid_ids("zero").lookup(*move(loose, context.device)).cpu()
    expect(torch.allclose(got, zero, rtol=1e-5, atol=1e-5), "ids outside, which should give zero")
    return {"requests": len(cases) + 1}


def _refusal(lookup: Callable[..., torch.Tensor], request: Request) -> str:
    try:
        lookup(*request)
    except InvalidInputError as error:
        return str(error)
    raise CheckError("a bad request was answered")


def check_memory_budget(context: Context) -> dict[str, Any]:
    """Too little memory is refused with the numbers before any is taken, and memory goes back with the artifact."""
    folder = context.artifact("int8", weighted=False)
    for placement in ("device", "uvm_cache"):
        try:
            context.load(folder, placement=placement, device_memory_bytes=100)
        except DeviceMemoryError as error:
            expect("100 are to be used" in str(error), str(error))
        else:
            raise CheckError(f"{placement}: 100 bytes were enough")
    if context.dry:
        return {}
    before = torch.cuda.memory_allocated(context.device)
    for _ in range(3):
        context.load(folder)
    after = torch.cuda.memory_allocated(context.device)
    expect(after <= before + (1 << 20), f"{after - before} bytes did not come back")
    return {"bytes_left_behind": after - before}


# --- Streams, threads, fixed shapes ------------------------------------------------------------------------------------


def check_streams(context: Context, placement: str) -> dict[str, Any]:
    """200 lookups of 8 threads, each on a stream of its own, inputs made there."""
    folder = context.artifact("int8", weighted=False)
    reference, there = Reference(context, folder), context.place(folder, placement)
    requests = [draw(reference.manifest, seed, 8, 6) for seed in range(200)]

    def ask(request: Request) -> torch.Tensor:
        stream = None if context.dry else torch.cuda.Stream(context.device)
        pooled = there.lookup(*move(request, context.device), stream=stream)
        if stream is not None:
            stream.synchronize()
        return pooled

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, requests))
    for seed, (request, pooled) in enumerate(zip(requests, answers, strict=True)):
        reference.check(request, pooled, f"seed {seed}")
    return {"lookups": len(answers)}


def check_capture(context: Context, placement: str) -> dict[str, Any]:
    """A captured lookup answers requests of fewer and more ids, from either side, and refuses bad ones."""
    for weighted in (False, True):
        folder = context.artifact("int4", weighted)
        reference, there = Reference(context, folder), context.place(folder, placement)
        features = len(reference.manifest.features)
        captured = there.capture(bags=16, ids=16 * 10 * features)
        for seed in range(10):
            request = draw(reference.manifest, seed, 16, 1 + seed)
            for asked in (request, move(request, context.device)):
                reference.check(request, captured(*asked), f"seed {seed}")
        good = draw(reference.manifest, 1, 16, 9)
        wraps = good.lengths.long()
        wraps[0] += 2**32  # which int32 takes for the length before
        for bad in (draw(reference.manifest, 1, 16, 9, outside=9), good._replace(lengths=wraps)):
            wanted = _refusal(reference.here.lookup, bad)
            for asked in (bad, move(bad, context.device)):
                got = _refusal(captured, asked)
                expect(got == wanted, f"said {got!r}, the CPU {wanted!r}")
    return {"lookups": 40, "refused": 8}


def check_cache_evicts(context: Context) -> dict[str, Any]:
    """Many batches through a cache that holds a few rows of many: every one must be right."""
    folder = context.folder / "cached"
    long, other = Spec("long", 200_000, 64, "fp16", 2), Spec("other", 100_000, 64, "int8")
    write_artifact(folder, [long, other, Spec("tiny", 10, 8, "fp32")])
    reference = Reference(context, folder)
    there = context.load(folder, placement="uvm_cache", device_memory_bytes=3_000_000)
    expect(there.layout.cache is not None, "there is no cache")
    for seed in range(50):
        request = draw(reference.manifest, seed, 256, 20)
        reference.check(request, there.lookup(*move(request, context.device)), f"batch {seed}")
    return {"rows": there.layout.cache.rows, "cached_rows": there.layout.cache.sets * 32, "batches": 50}
