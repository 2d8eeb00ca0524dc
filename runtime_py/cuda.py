"""Loading an artifact onto a CUDA device: what must be there, the memory for the rows, and the graph over it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime_py.checks import InvalidIds
from runtime_py.device_artifact import DeviceArtifact
from runtime_py.device_graph import attach_device_rows, without_fusion
from runtime_py.device_layout import DeviceLayout, Placement, plan_layout
from runtime_py.device_rows import copy_rows
from runtime_py.errors import DeviceMemoryError, UnsupportedError
from runtime_py.manifest import Graph, Manifest
from runtime_py.operators import load_operators
from runtime_py.torchscript import last_line, load_torchscript
from runtime_py.verify import Verify, open_verified
from runtime_py.vocabulary import Vocabulary

__all__ = ["find_device", "load_cuda_artifact"]

# Memory that lookups need beside rows and cache: requests, answers, and what FBGEMM sorts to fill a cache.
_RESERVE_BYTES = 512 << 20
_MOST_THREADS = 8
_LOOKUP = "fbgemm::int_nbit_split_embedding_codegen_lookup_function"
_CUMSUM = "fbgemm::asynchronous_complete_cumsum"
_NEW_UVM = "fbgemm::new_unified_tensor"
_UVM_LIBRARY = "fbgemm_gpu_py"


def load_cuda_artifact(
    path: Path,
    *,
    device: str,
    backend: str,
    verify: Verify,
    invalid_ids: InvalidIds,
    placement: Placement,
    device_memory_bytes: int | None,
) -> DeviceArtifact:
    """As `load_artifact`, which see, onto a CUDA device.

    Raises:
        ArtifactError: as `load_artifact`.
        DeviceMemoryError: the rows do not fit.
        UnsupportedError: the kernels there cannot look up in a table, or decode a row.
    """
    where = find_device(device)
    with open_verified(path, verify) as verified:
        manifest = verified.manifest
        graph = _choose_graph(manifest, backend)
        if manifest.surgery is not None:
            raise UnsupportedError("an artifact with a surgery is not loaded onto a GPU yet; use device='cpu'")
        load_operators(graph.operator_libraries)
        _check_kernels([_LOOKUP, _CUMSUM])
        memory_bytes = (
            max(0, _free_bytes(where) - _RESERVE_BYTES) if device_memory_bytes is None else device_memory_bytes
        )
        layout = plan_layout(manifest, placement, memory_bytes)
        data = verified.weights.map()
        scripted = load_torchscript(manifest, graph, verified.contents[graph.path], _bytes(0, torch.device("cpu")))
        with _enough_memory(layout, where):
            rows, uvm_rows, uvm_on_host = _allocate(layout, where)
            attach_device_rows(scripted, manifest, graph, layout, rows, uvm_rows)
            memories = {"device": rows, "uvm": uvm_on_host, "uvm_cache": uvm_on_host}
            threads = min(_MOST_THREADS, os.cpu_count() or 1)
            copy_rows(data, verified.weights.mapping, layout, memories, threads)
        vocabularies = {table: Vocabulary(file) for table, file in verified.vocabularies.items()}
        mapping = verified.weights.mapping
    run = without_fusion(scripted)
    artifact = DeviceArtifact(manifest, run, invalid_ids, vocabularies, mapping, where, layout)
    artifact.warm_up(graph.path)
    return artifact


def find_device(device: str) -> torch.device:
    """The CUDA device that `device` names; "cuda" is the process's current one.

    Raises:
        UnsupportedError: torch finds none, or not that one.
    """
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device here"
        raise UnsupportedError(
            f"device '{device}' was asked for, and {why} (torch {torch.__version__}); use device='cpu'"
        )
    try:
        number = torch.device(device).index
    except RuntimeError as error:
        raise UnsupportedError(f"device '{device}' is none; use 'cuda', 'cuda:0' and so on, or 'cpu'") from error
    count = torch.cuda.device_count()
    if number is not None and number >= count:
        raise UnsupportedError(f"device '{device}' was asked for, and there are {count}, from 'cuda:0' on")
    return torch.device("cuda", torch.cuda.current_device() if number is None else number)


def _choose_graph(manifest: Manifest, backend: str) -> Graph:
    """The TorchScript graph: the file is the same for CPU and GPU."""
    for graph in manifest.graphs:
        if graph.backend == backend == "torchscript":
            return graph
    has = ", ".join(dict.fromkeys(graph.backend for graph in manifest.graphs))
    raise UnsupportedError(
        f"on a GPU the graph 'torchscript' runs, and '{backend}' was asked for; the artifact has: {has}"
    )


def _free_bytes(device: torch.device) -> int:
    """What the device has left, and what torch keeps of it for tensors that are gone: it gives that back when it must."""
    free, _ = torch.cuda.mem_get_info(device)
    stats = torch.cuda.memory_stats(device)
    reserved, active, split = (
        stats.get(f"{name}_bytes.all.current", 0) for name in ("reserved", "active", "inactive_split")
    )
    return int(free + reserved - active - split)  # a part of a block that is in use stays


def _check_kernels(operators: list[str]) -> None:
    for name in operators:
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA"):
            raise UnsupportedError(
                f"the installed FBGEMM has no CUDA kernel of {name}; install fbgemm-gpu in place of fbgemm-gpu-cpu"
            )


def _allocate(layout: DeviceLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory of the device, memory that it shares with the host, and the same as a tensor of the host."""
    rows = _bytes(layout.device_bytes, device)
    if not layout.uvm_bytes:
        return rows, _bytes(0, device), _bytes(0, torch.device("cpu"))
    load_operators([_UVM_LIBRARY])
    _check_kernels([_NEW_UVM])
    try:
        uvm_rows = torch.ops.fbgemm.new_unified_tensor(_bytes(1, device), [layout.uvm_bytes], False)
    except RuntimeError as error:
        raise DeviceMemoryError(
            f"the machine cannot give {layout.uvm_bytes} bytes that {device} shares with it: {last_line(error)}"
        ) from error
    return rows, uvm_rows, torch.ops.fbgemm.uvm_to_cpu(uvm_rows)


@contextmanager
def _enough_memory(layout: DeviceLayout, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise DeviceMemoryError(
            f"{device} cannot give {layout.total_device_bytes} bytes for rows and cache: {free} of its {total} are free; "
            "use placement='uvm' or 'uvm_cache' with a smaller device_memory_bytes"
        ) from error


def _bytes(count: int, device: torch.device) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)
