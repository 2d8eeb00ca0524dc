"""Loading an artifact, and looking embeddings up in it.

`load_artifact` verifies first, then maps the rows, loads the graph from the very bytes that were verified, attaches the
mapping to it and warms it up. Nothing is copied: N processes that load one artifact hold one copy of the rows.
"""

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from runtime_py.aot_inductor import load_aot_inductor
from runtime_py.errors import GraphError, UnsupportedError
from runtime_py.inputs import Request, RequestReader
from runtime_py.manifest import Graph, Manifest
from runtime_py.operators import load_operators
from runtime_py.torchscript import last_line, load_torchscript, versions
from runtime_py.verify import Verify, open_verified
from runtime_py.vocabulary import Vocabulary

__all__ = ["Artifact", "Pooled", "load_artifact"]

InvalidIds = Literal["error", "zero"]


@dataclass(frozen=True)
class Pooled:
    """The pooled embeddings of one batch: `values` float32 [B, sum(D)], and a view of them by output key."""

    values: torch.Tensor
    columns: Mapping[str, tuple[int, int]]

    def keys(self) -> list[str]:
        """The output keys, in column order."""
        return list(self.columns)

    def __getitem__(self, key: str) -> torch.Tensor:
        """float32 [B, D] of one output key."""
        start, end = self.columns[key]
        return self.values[:, start:end]

    def to_dict(self) -> dict[str, torch.Tensor]:
        """float32 [B, D] by output key."""
        return {key: self[key] for key in self.columns}


class Artifact:
    """A loaded artifact: call it with a request by name, or `lookup` with the raw signature.

    `vocabularies` holds, by table name, what finds the rows of entity ids. The artifact holds no state that a call
    changes, so any number of threads may use one.
    """

    def __init__(
        self,
        manifest: Manifest,
        backend: str,
        graph: Callable[..., torch.Tensor],
        invalid_ids: InvalidIds,
        vocabularies: Mapping[str, Vocabulary],
        mapping: mmap.mmap,
    ) -> None:
        self.manifest = manifest
        self.backend = backend
        self._mapping = mapping  # of the rows; never closed, as tensors and graph have its address
        self.vocabularies = MappingProxyType(dict(vocabularies))
        self._graph = graph
        self._reader = RequestReader(manifest)
        self._check_ids = invalid_ids == "error"
        columns: dict[str, tuple[int, int]] = {}
        end = 0
        for output in manifest.outputs:
            columns[output.key] = (end, end + output.dim)
            end += output.dim
        self._columns = MappingProxyType(columns)  # every answer shows it

    def __repr__(self) -> str:
        return f"Artifact({self.manifest.artifact_id[:12]}, features={self._reader.features})"

    def __call__(self, features: Any) -> Pooled:
        """Looks up one batch given by feature name.

        Args:
            features: a mapping from each feature name to B bags of ids (or to a `Jagged`), or a torchrec
                `KeyedJaggedTensor` in any key order.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
        """
        values, lengths, weights = self._reader.read(features)
        return Pooled(self.lookup(values, lengths, weights), self._columns)

    def lookup(
        self, values: torch.Tensor, lengths: torch.Tensor, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Looks up one batch in the raw signature, and returns float32 [B, sum(D)].

        Args:
            values: int64 [N], the ids, feature after feature in the manifest's order.
            lengths: int32 [F * B], feature-major: how many ids each bag has.
            per_sample_weights: float32 [N] where the artifact is weighted, else None.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
        """
        request = self._reader.check(Request(values, lengths, per_sample_weights), ids=self._check_ids)
        return self._run(request)

    def pool(
        self, values: torch.Tensor, lengths: torch.Tensor, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `lookup`, but before a surgery: float32 [B, sum of the tables' D], the features in the manifest's order.

        Raises:
            InvalidInputError: as `lookup`.
            UnsupportedError: the backend is not TorchScript; a compiled graph has one answer only.
        """
        if not isinstance(self._graph, torch.jit.ScriptModule):
            raise UnsupportedError(f"a graph of {self.backend} does not show what it pools; use torchscript")
        pooled: torch.Tensor = self._graph.pool(
            *self._reader.check(Request(values, lengths, per_sample_weights), ids=self._check_ids)
        )
        return pooled

    def _run(self, request: Request) -> torch.Tensor:
        values, lengths, weights = request
        pooled: torch.Tensor = (
            self._graph(values, lengths) if weights is None else self._graph(values, lengths, weights)
        )
        return pooled

    def with_invalid_ids(self, invalid_ids: InvalidIds) -> "Artifact":
        """The same artifact over the same mapping and graph, that treats ids outside their table in this way."""
        _check_invalid_ids(invalid_ids)
        return Artifact(self.manifest, self.backend, self._graph, invalid_ids, self.vocabularies, self._mapping)

    def release_pages(self) -> None:
        """Takes the rows that were looked up out of this process's resident memory; they stay in the page cache."""
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def warm_up(self, path: str) -> None:
        """Runs the graph until TorchScript has specialised it: the first two calls take some 50 ms.

        Raises:
            GraphError: the graph, which `path` names, does not take or give what the manifest says.
        """
        count = len(self.manifest.features)
        values = torch.zeros(count, dtype=torch.int64, device="cpu")  # whatever the process's default device
        lengths = torch.ones(count, dtype=torch.int32, device="cpu")
        weights = torch.ones(count, dtype=torch.float32, device="cpu") if self.manifest.weighted else None
        width = sum(output.dim for output in self.manifest.outputs)
        for _ in range(3):
            try:
                pooled = self._run(Request(values, lengths, weights))
            except RuntimeError as error:
                raise GraphError(f"{path} does not run on the manifest's features: {last_line(error)}") from error
            if not isinstance(pooled, torch.Tensor):
                raise GraphError(f"{path} gives a {type(pooled).__name__}, expected a tensor")
            if pooled.shape != (1, width) or pooled.dtype is not torch.float32:
                raise GraphError(f"{path} gives {list(pooled.shape)} {pooled.dtype}, expected [1, {width}] float32")


def load_artifact(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    backend: str = "torchscript",
    verify: Verify = "full",
    invalid_ids: InvalidIds = "error",
) -> Artifact:
    """Verifies an artifact and makes it ready to serve.

    Args:
        path: the artifact's folder.
        device: "cpu".
        backend: "torchscript" or "aot_inductor", where the artifact has that graph.
        verify: "full" compares every digest, "sizes" compares all but those of the rows and the vocabularies
            (see `verify_artifact`).
        invalid_ids: "error" refuses a request with an id outside its table; "zero" gives that id a zero vector.

    Raises:
        ArtifactError: the artifact is damaged (see `verify_artifact`).
        UnsupportedError: it has no graph for this device and backend, or the graph needs instructions that this CPU lacks.
        GraphError: its graph cannot run here, or does not fit its rows.
    """
    _check_invalid_ids(invalid_ids)
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
    artifact = Artifact(manifest, graph.backend, run, invalid_ids, vocabularies, mapping)
    artifact.warm_up(graph.path)
    return artifact


def _check_invalid_ids(invalid_ids: str) -> None:
    if invalid_ids not in ("error", "zero"):
        raise ValueError(f"invalid_ids must be 'error' or 'zero', got {invalid_ids!r}")


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
