"""Loading an artifact, and looking embeddings up in it.

`load_artifact` verifies first, then maps the rows, loads the graph from the very bytes that were verified, attaches the
mapping to it and warms it up. Nothing is copied: N processes that load one artifact hold one copy of the rows.
"""

import mmap
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from runtime_py import residency
from runtime_py.aot_inductor import load_aot_inductor
from runtime_py.checks import InvalidIds, RequestChecker
from runtime_py.device_layout import Placement
from runtime_py.entities import EntityReader
from runtime_py.errors import GraphError, UnsupportedError
from runtime_py.inputs import ExtraFeatures, RequestReader
from runtime_py.lookups import Lookups
from runtime_py.manifest import Graph, Manifest
from runtime_py.operators import load_operators
from runtime_py.pooled import Pooled
from runtime_py.tally import Tally
from runtime_py.team import Team
from runtime_py.torchscript import last_line, load_torchscript, versions
from runtime_py.verify import Verify, open_verified
from runtime_py.vocabulary import Vocabulary

__all__ = ["Artifact", "load_artifact"]


class Artifact:
    """A loaded artifact: call it with a request by name, or `lookup` with the raw signature.

    `vocabularies` holds, by table name, what finds the rows of entity ids. Any number of threads may use one
    artifact: a call changes nothing but the counts of replaced ids, and takes a lock only where it has some to add.
    """

    def __init__(
        self,
        manifest: Manifest,
        backend: str,
        graph: Callable[..., torch.Tensor],
        invalid_ids: InvalidIds,
        vocabularies: Mapping[str, Vocabulary],
        mapping: mmap.mmap,
        team: Team | None = None,
    ) -> None:
        self.manifest = manifest
        self.backend = backend
        self._mapping = mapping  # of the rows; never closed, as tensors and graph have its address
        self.vocabularies = MappingProxyType(dict(vocabularies))
        self._checker = RequestChecker(manifest, invalid_ids)
        self._reader = RequestReader(manifest)
        self._entities = EntityReader(manifest, self.vocabularies, self._reader, self._checker)
        self._lookups = Lookups(manifest, graph, self._checker, team)
        self._invalid, self._unknown = Tally(self._reader.features), Tally(self._reader.features)
        columns: dict[str, tuple[int, int]] = {}
        end = 0
        for output in manifest.outputs:
            columns[output.key] = (end, end + output.dim)
            end += output.dim
        self._columns = MappingProxyType(columns)  # every answer shows it

    def __repr__(self) -> str:
        return f"Artifact({self.manifest.artifact_id[:12]}, features={self._reader.features})"

    def __call__(
        self, features: Any, *, extra_features: ExtraFeatures = "error", out: torch.Tensor | None = None
    ) -> Pooled:
        """Looks up one batch given by feature name.

        Args:
            features: a mapping from each feature name to B bags of ids (or to a `Jagged`), or a torchrec
                `KeyedJaggedTensor` in any key order.
            extra_features: "error" refuses a name that is no feature, "ignore" passes over it.
            out: float32 [B, sum(D)] on the CPU, where the embeddings are written; by default a new tensor. After an error
                its contents are undefined.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
        """
        pooled, invalid = self._lookups.look_up(*self._reader.read(features, extra_features), out)
        self._invalid.add(invalid)
        return Pooled(pooled, self._columns, self.manifest.artifact_id, invalid)

    def lookup(
        self,
        values: torch.Tensor,
        lengths: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Looks up one batch in the raw signature, and returns float32 [B, sum(D)].

        Args:
            values: int64 [N], the ids, feature after feature in the manifest's order.
            lengths: int32 [F * B], feature-major: how many ids each bag has.
            per_sample_weights: float32 [N] where the artifact is weighted, else None.
            out: as for a call.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
        """
        pooled, invalid = self._lookups.look_up(values, lengths, per_sample_weights, out)
        if invalid:
            self._invalid.add(invalid)
        return pooled

    def pool(
        self, values: torch.Tensor, lengths: torch.Tensor, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `lookup`, but before a surgery: float32 [B, sum of the tables' D], the features in the manifest's order.

        Raises:
            InvalidInputError: as `lookup`.
            UnsupportedError: the backend is not TorchScript; a compiled graph has one answer only.
        """
        graph = self.graph
        if not isinstance(graph, torch.jit.ScriptModule):
            raise UnsupportedError(f"a graph of {self.backend} does not show what it pools; use torchscript")
        checked = self._checker.check(values, lengths, per_sample_weights)
        pooled: torch.Tensor = graph.pool(checked.values, checked.lengths, checked.weights)
        self._invalid.add(checked.replaced)
        return pooled

    def lookup_entities(
        self,
        features: Any,
        *,
        rows: Mapping[str, Any] | None = None,
        unknown_ids: InvalidIds = "error",
        extra_features: ExtraFeatures = "error",
        out: torch.Tensor | None = None,
    ) -> Pooled:
        """Looks up one batch of entity ids, in the tables that have a vocabulary.

        Args:
            features: as for a call, with 64-bit entity ids.
            rows: the features that are given as rows: all whose table has no vocabulary, and any other. A mapping.
            unknown_ids: what becomes of an entity that the vocabulary does not have: "error", "zero" (a zero vector), or
                "row:<k>" (row k of its table in its place).
            extra_features: as for a call.
            out: as for a call.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
            ValueError: `unknown_ids` is none of these.
        """
        checked, unknown = self._entities.read(features, rows, unknown_ids, extra_features)
        pooled = self._lookups.run(checked, out)
        self._invalid.add(checked.replaced)
        self._unknown.add(unknown)
        return Pooled(pooled, self._columns, self.manifest.artifact_id, checked.replaced, unknown)

    @property
    def graph(self) -> Callable[..., torch.Tensor]:
        """The graph alone, in the raw signature, without a check of ours: ids outside their table are zero vectors."""
        return self._lookups.graph

    @property
    def invalid_id_counts(self) -> dict[str, int]:
        """How many ids outside their table every feature was given so far, where they are no error."""
        return self._invalid.read()

    @property
    def unknown_id_counts(self) -> dict[str, int]:
        """How many entities that no vocabulary has every feature was given so far, where they are no error."""
        return self._unknown.read()

    def with_invalid_ids(self, invalid_ids: InvalidIds) -> "Artifact":
        """The same artifact over the same mapping, graph and threads, that treats ids outside their table in this way."""
        team = self._lookups.team
        return Artifact(self.manifest, self.backend, self.graph, invalid_ids, self.vocabularies, self._mapping, team)

    def release_pages(self) -> None:
        """Takes the rows that were looked up out of this process's resident memory; they stay in the page cache.

        Raises:
            UnsupportedError: they are locked.
        """
        residency.release(self._mapping)

    def warm_up(self, path: str) -> None:
        """Runs the graph until TorchScript has specialised it: the first two calls take some 50 ms.

        Raises:
            GraphError: the graph, which `path` names, does not take or give what the manifest says.
        """
        count = len(self.manifest.features)
        values = torch.zeros(count, dtype=torch.int64, device="cpu")  # whatever the process's default device
        lengths = torch.ones(count, dtype=torch.int32, device="cpu")
        weights = torch.ones(count, dtype=torch.float32, device="cpu") if self.manifest.weighted else None
        width = self._lookups.width
        inputs = (values, lengths) if weights is None else (values, lengths, weights)
        for turn in range(6):
            try:
                with torch.autocast("cpu", enabled=False):  # the caller's would change what a surgery gives
                    pooled = self.graph(*inputs) if turn % 2 else self.lookup(values, lengths, weights)
            except RuntimeError as error:
                raise GraphError(f"{path} does not run on the manifest's features: {last_line(error)}") from error
            if not isinstance(pooled, torch.Tensor):
                raise GraphError(f"{path} gives a {type(pooled).__name__}, expected a tensor")
            if pooled.shape != (1, width) or pooled.dtype is not torch.float32:
                raise GraphError(f"{path} gives {list(pooled.shape)} {pooled.dtype}, expected [1, {width}] float32")
        if self._lookups.team is not None:
            self._lookups.compare_with_graph(self._lookups.team)


def load_artifact(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    backend: str = "torchscript",
    verify: Verify = "full",
    invalid_ids: InvalidIds = "error",
    threads: int = 1,
    spin_us: int = 1000,
    prefault: bool = False,
    lock_memory: bool = False,
    placement: Placement = "device",
    device_memory_bytes: int | None = None,
) -> Artifact:
    """Verifies an artifact and makes it ready to serve.

    Args:
        path: the artifact's folder.
        device: "cpu"; or "cuda", "cuda:1" and so on, for a `DeviceArtifact` (never run on a GPU yet).
        backend: "torchscript" or "aot_inductor", where the artifact has that graph.
        verify: "full" compares every digest, "sizes" compares all but those of the rows and the vocabularies
            (see `verify_artifact`).
        invalid_ids: "error" refuses a request with an id outside its table; "zero" gives that id a zero vector; "row:<k>"
            gives it row k, which every table must have. Whatever was replaced is counted by feature.
        threads: cores that a request of 8,192 ids and 1 MiB of rows or more may use, the caller's included; one where
            there is a surgery. Such a request does not run the graph, but its operator, and holds no lock of Python.
        spin_us: how many microseconds each further thread looks out for the next such request, at full use of its core,
            before it sleeps; to wake one that sleeps takes 20 to 100.
        prefault: whether all rows and vocabularies are brought into memory now rather than at their first use.
        lock_memory: whether they are kept there; that brings them in, too, and needs RLIMIT_MEMLOCK.
        placement: on a GPU, where rows lie that do not fit into `device_memory_bytes`: "device" refuses, "uvm" leaves them in
            memory that is shared with the host, "uvm_cache" does so and keeps a cache of rows on the device.
        device_memory_bytes: on a GPU, what rows and cache may take; default: what is free, less 512 MiB.

    Raises:
        ArtifactError: the artifact is damaged (see `verify_artifact`).
        DeviceMemoryError: the rows do not fit where `placement` says.
        UnsupportedError: it has no graph for this device and backend, the graph needs instructions that this CPU lacks, or
            the kernel does not lock that much memory.
        GraphError: its graph cannot run here, or does not fit its rows.
        ValueError: an option is none of these.
    """
    device = str(device)
    if type(threads) is not int or not 1 <= threads <= 1024:
        raise ValueError(f"threads must be between 1 and 1024, got {threads!r}")
    if type(spin_us) is not int or not 0 <= spin_us <= 10**9:
        raise ValueError(f"spin_us must be between 0 and {10**9}, got {spin_us!r}")
    if device.partition(":")[0] == "cuda":
        if threads != 1 or prefault or lock_memory:
            raise ValueError(f"threads, prefault and lock_memory are for a CPU, and device is {device!r}")
        from runtime_py.cuda import load_cuda_artifact  # which is made of what is defined here

        return load_cuda_artifact(
            Path(path),
            device=device,
            backend=backend,
            verify=verify,
            invalid_ids=invalid_ids,
            placement=placement,
            device_memory_bytes=device_memory_bytes,
        )
    if placement != "device" or device_memory_bytes is not None:
        raise ValueError(f"placement and device_memory_bytes are for a GPU, and device is {device!r}")
    with open_verified(Path(path), verify) as verified:
        manifest = verified.manifest
        graph = _choose_graph(manifest, backend, device)
        _load_operators(graph)
        weights = verified.weights.map()
        run: Callable[..., torch.Tensor]
        if graph.backend == "torchscript":
            run = load_torchscript(manifest, graph, verified.contents[graph.path], weights)
        else:
            run = load_aot_inductor(manifest, graph, Path(path), weights)
        vocabularies = {table: Vocabulary(file) for table, file in verified.vocabularies.items()}
        mapping = verified.weights.mapping
        for file in (verified.weights, *verified.vocabularies.values()):
            if prefault:
                residency.prefault(file.mapping)
            if lock_memory:
                residency.lock(file.mapping, file.path.name)
    # What a surgery does with the other examples of a batch is its own affair.
    splits = threads > 1 and manifest.surgery is None
    team = Team(manifest, weights, threads, spin_us) if splits else None
    artifact = Artifact(manifest, graph.backend, run, invalid_ids, vocabularies, mapping, team)
    _warm_up(artifact, graph)
    return artifact


def _warm_up(artifact: Artifact, graph: Graph) -> None:
    """On a thread of its own, where the main thread loads.

    The threads that torch's operators start for their caller are not there after a fork, and the child of a thread that has
    some waits for them for ever. Another thread costs some MiB of malloc's: not at every refresh.
    """
    if threading.current_thread() is not threading.main_thread():
        artifact.warm_up(graph.path)
        return
    with ThreadPoolExecutor(1) as apart:
        apart.submit(artifact.warm_up, graph.path).result()


def _choose_graph(manifest: Manifest, backend: str, device: str) -> Graph:
    if backend == "onnx":
        raise UnsupportedError("an ONNX graph is not for this loader: open model.onnx with ONNX Runtime")
    for graph in manifest.graphs:
        if (graph.backend, graph.target) == (backend, device):
            return graph
    has = ", ".join(f"{graph.backend} for {graph.target}" for graph in manifest.graphs)
    raise UnsupportedError(f"the artifact has no graph '{backend}' for device '{device}'; it has: {has}")


def _load_operators(graph: Graph) -> None:
    try:
        load_operators(graph.operator_libraries)
    except GraphError as error:
        raise GraphError(f"{graph.path} {error}; {versions(graph)}") from error
