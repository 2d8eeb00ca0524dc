"""Makes the TorchScript graph look rows up on a GPU: the same file, its attributes set for padded rows that lie there."""

from collections.abc import Callable

import torch

from runtime_py.device_layout import CACHE_WAYS, ROW_ALIGNMENT, DeviceLayout
from runtime_py.errors import GraphError
from runtime_py.manifest import Graph, Manifest

__all__ = ["attach_cache", "attach_device_rows", "without_fusion"]


def attach_device_rows(
    scripted: torch.jit.ScriptModule,
    manifest: Manifest,
    graph: Graph,
    layout: DeviceLayout,
    rows: torch.Tensor,
    uvm_rows: torch.Tensor,
) -> None:
    """Sets what `export.lookup` leaves to the loader, and moves the graph's metadata to the device of `rows`.

    Args:
        scripted: the graph, its attributes checked (`load_torchscript`), with its placeholder for `weights`.
        manifest: what it was checked against.
        graph: its entry there, for messages.
        layout: where the rows lie.
        rows: uint8, the device's memory; of no element where all tables lie in shared memory.
        uvm_rows: uint8, shared memory, as a tensor of the device; of no element where there is none. FBGEMM has a
            faster kernel for that case.

    Raises:
        GraphError: the graph was built before it could run on a GPU.
    """
    if not hasattr(scripted, "row_alignment") or not hasattr(scripted, "raises"):
        raise GraphError(f"{graph.path} was built before graphs could run on a GPU; build the artifact again")
    device = rows.device
    scripted.to(device)
    scripted.weights = rows
    scripted.uvm_weights = uvm_rows
    scripted.weights_offsets = torch.tensor(layout.offsets(manifest), dtype=torch.int64, device=device)
    scripted.weights_placements = torch.tensor(layout.placements(manifest), dtype=torch.int32, device=device)
    scripted.row_alignment = ROW_ALIGNMENT
    scripted.raises = False
    attach_cache(scripted, manifest, layout, device)


def attach_cache(
    scripted: torch.jit.ScriptModule, manifest: Manifest, layout: DeviceLayout, device: torch.device
) -> None:
    """An empty cache, where the layout has one, as FBGEMM's `IntNBitTableBatchedEmbeddingBagsCodegen` sets it up."""
    scripted.cached = layout.cache is not None
    if layout.cache is None:
        return
    cache = layout.cache
    feature_of = {feature.table: number for number, feature in enumerate(manifest.features)}  # any of the table's
    features = torch.empty(cache.rows, dtype=torch.int32, device=device)
    for table, first in cache.first_row.items():
        features[first : first + manifest.table[table].num_embeddings] = feature_of[table]
    scripted.cache_features = features
    scripted.cache_starts = torch.tensor(layout.cache_starts(manifest), dtype=torch.int64, device=device)
    scripted.cache_rows = cache.rows
    scripted.cache_weights = torch.zeros(cache.sets * CACHE_WAYS, cache.row_bytes, dtype=torch.uint8, device=device)
    scripted.cache_state = torch.full((cache.sets, CACHE_WAYS), -1, dtype=torch.int64, device=device)
    scripted.cache_times = torch.zeros(cache.sets, CACHE_WAYS, dtype=torch.int64, device=device)


def without_fusion(scripted: torch.jit.ScriptModule) -> Callable[..., torch.Tensor]:
    """The graph, run operator by operator.

    TorchScript's executor would else compile kernels of its own for a GPU, anew for new shapes of a request: a pause of
    many milliseconds in a server. The flag is the calling thread's.
    """

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            pooled: torch.Tensor = scripted(*inputs)
        return pooled

    run.scripted = scripted  # type: ignore[attr-defined]  # where the rows are, for who reads them back
    return run
