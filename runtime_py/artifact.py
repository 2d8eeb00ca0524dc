"""Loading an artifact, and looking embeddings up in it.

`load_artifact` verifies first, then maps the rows, loads the graph from the very bytes that were verified, attaches the
mapping to it and warms it up. Nothing is copied: N processes that load one artifact hold one copy of the rows.
"""

import io
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from runtime_py.errors import GraphError, UnsupportedError
from runtime_py.inputs import Request, RequestReader
from runtime_py.manifest import ROW_FORMATS, Graph, Manifest
from runtime_py.operators import load_operators
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
        graph: torch.jit.ScriptModule,
        invalid_ids: InvalidIds,
        vocabularies: Mapping[str, Vocabulary],
    ) -> None:
        self.manifest = manifest
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

    def _run(self, request: Request) -> torch.Tensor:
        values, lengths, weights = request
        pooled: torch.Tensor = (
            self._graph(values, lengths) if weights is None else self._graph(values, lengths, weights)
        )
        return pooled

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
                raise GraphError(f"{path} does not run on the manifest's features: {_last_line(error)}") from error
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
        backend: "torchscript".
        verify: "full" compares every digest, "sizes" compares all but those of the rows and the vocabularies
            (see `verify_artifact`).
        invalid_ids: "error" refuses a request with an id outside its table; "zero" gives that id a zero vector.

    Raises:
        ArtifactError: the artifact is damaged (see `verify_artifact`).
        UnsupportedError: it has no graph for this device and backend.
        GraphError: its graph cannot run here, or does not fit its rows.
    """
    if invalid_ids not in ("error", "zero"):
        raise ValueError(f"invalid_ids must be 'error' or 'zero', got {invalid_ids!r}")
    with open_verified(Path(path), verify) as verified:
        manifest = verified.manifest
        graph = _choose_graph(manifest, backend, device)
        _load_operators(graph)
        scripted = _load_torchscript(manifest, graph, verified.contents[graph.path])
        scripted.weights = verified.weights.map()
        vocabularies = {table: Vocabulary(file) for table, file in verified.vocabularies.items()}
    artifact = Artifact(manifest, scripted, invalid_ids, vocabularies)
    artifact.warm_up(graph.path)
    return artifact


def _choose_graph(manifest: Manifest, backend: str, device: str) -> Graph:
    for graph in manifest.graphs:
        if (graph.backend, graph.target) == (backend, device):
            return graph
    has = ", ".join(f"{graph.backend} for {graph.target}" for graph in manifest.graphs)
    raise UnsupportedError(f"the artifact has no graph '{backend}' for device '{device}'; it has: {has}")


def _load_operators(graph: Graph) -> None:
    try:
        load_operators(graph.operator_libraries)
    except GraphError as error:
        raise GraphError(f"{graph.path} {error}; {_versions(graph)}") from error


def _load_torchscript(manifest: Manifest, graph: Graph, data: bytes) -> torch.jit.ScriptModule:
    try:
        scripted: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(data), map_location="cpu")
    except (RuntimeError, MemoryError) as error:
        raise GraphError(f"{graph.path} cannot be loaded: {_last_line(error)}; {_versions(graph)}") from error
    weights = getattr(scripted, "weights", None)
    if not isinstance(weights, torch.Tensor) or weights.dtype is not torch.uint8:
        raise GraphError(
            f"{graph.path} has no uint8 attribute 'weights' to attach the rows to; build the artifact again"
        )
    for name, expected in _graph_attributes(manifest).items():
        found = getattr(scripted, name, None)
        found = found.tolist() if isinstance(found, torch.Tensor) else found
        if found != expected:
            raise GraphError(
                f"{graph.path} was built for other rows: its {name} is {found}, the manifest says {expected}"
            )
    return scripted


def _graph_attributes(manifest: Manifest) -> dict[str, Any]:
    """What the graph must hold to read these rows and no others, by attribute."""
    tables = [manifest.table[feature.table] for feature in manifest.features]
    ends = itertools.accumulate((table.embedding_dim for table in tables), initial=0)
    return {
        "weights_bytes": manifest.weights_bytes,
        "weights_offsets": [table.offset_bytes for table in tables],
        "weights_types": [ROW_FORMATS[table.serving_precision].sparse_type for table in tables],
        "num_embeddings": [table.num_embeddings for table in tables],
        "dim_offsets": list(ends),
        "is_mean": [[feature.pooling == "mean"] for feature in manifest.features],
        "is_weighted": [feature.weighted for feature in manifest.features],
    }


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _versions(graph: Graph) -> str:
    return f"it was built with torch {graph.torch} and FBGEMM {graph.fbgemm_gpu}, this is torch {torch.__version__}"
