"""Loads a TorchScript graph from its verified bytes, and attaches the mapped rows to it."""

import functools
import io
import itertools
from typing import Any

import torch

from runtime_py.errors import GraphError
from runtime_py.manifest import ROW_FORMATS, Graph, Manifest
from runtime_py.weights import view_parameters

__all__ = ["last_line", "load_torchscript", "versions"]


def load_torchscript(manifest: Manifest, graph: Graph, data: bytes, weights: torch.Tensor) -> torch.jit.ScriptModule:
    """The graph in `data`, looking rows up in `weights`, uint8.

    Raises:
        GraphError: it cannot be loaded, or was built for other rows than the manifest describes.
    """
    try:
        scripted: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(data), map_location="cpu")
    except (RuntimeError, MemoryError) as error:
        raise GraphError(f"{graph.path} cannot be loaded: {last_line(error)}; {versions(graph)}") from error
    placeholder = getattr(scripted, "weights", None)
    if not isinstance(placeholder, torch.Tensor) or placeholder.dtype is not torch.uint8:
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
    _attach_surgery(scripted, manifest, graph, weights)
    scripted.weights = weights
    return scripted


def _attach_surgery(scripted: torch.jit.ScriptModule, manifest: Manifest, graph: Graph, weights: torch.Tensor) -> None:
    """Makes the mapped parameters those of the graph's surgery; placeholders without bytes stand in the file for them."""
    splice = getattr(scripted, "surgery", None)
    if manifest.surgery is None and splice is None:
        return
    expected: dict[str, Any] = {"feature_names": None, "feature_dims": None, "output_keys": None}
    if manifest.surgery is not None:
        expected = {
            "feature_names": [feature.name for feature in manifest.features],
            "feature_dims": [manifest.table[feature.table].embedding_dim for feature in manifest.features],
            "output_keys": [output.key for output in manifest.outputs],
        }
    for name, wanted in expected.items():
        found = getattr(splice, name, None)
        if found != wanted:
            raise GraphError(
                f"{graph.path} was built for another surgery: its {name} is {found}, the manifest says {wanted}"
            )
    for name, tensor in view_parameters(manifest, weights).items():
        owner, _, leaf = f"module.{name}".rpartition(".")
        module = functools.reduce(lambda node, part: getattr(node, part, None), owner.split("."), splice)
        placeholder = getattr(module, leaf, None)
        if not isinstance(placeholder, torch.Tensor) or (placeholder.shape, placeholder.dtype) != (
            tensor.shape,
            tensor.dtype,
        ):
            raise GraphError(
                f"{graph.path} was built for another surgery: it has no '{name}' of {list(tensor.shape)} {tensor.dtype}"
            )
        setattr(module, leaf, tensor)


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


def last_line(error: Exception) -> str:
    """What an error of torch says in the end; before come its internals."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def versions(graph: Graph) -> str:
    """What a graph was built with, and what is here."""
    return f"it was built with torch {graph.torch} and FBGEMM {graph.fbgemm_gpu}, this is torch {torch.__version__}"
