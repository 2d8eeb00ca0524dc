"""What FBGEMM's operator must know of the rows besides their bytes: small tensors that follow from the manifest."""

import itertools

import torch

from runtime_py.manifest import ROW_FORMATS, Manifest
from runtime_py.weights import view_parameters

__all__ = ["HOST", "make_constants"]

HOST = 3  # fbgemm EmbeddingLocation.HOST: rows are read from `weights` in host memory


def make_constants(manifest: Manifest, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every constant that a graph may have, by name: `weights`, what says how to read them, and a surgery's parameters."""
    tables = [manifest.table[feature.table] for feature in manifest.features]
    dims = [table.embedding_dim for table in tables]
    columns = [feature for feature, dim in enumerate(dims) for _ in range(dim)]
    any_mean = any(feature.pooling == "mean" for feature in manifest.features)

    def tensor(values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device="cpu")  # whatever the process's default device

    return {
        "weights": weights,
        "weights_placements": tensor([HOST] * len(tables), torch.int32),
        "weights_offsets": tensor([table.offset_bytes for table in tables], torch.int64),
        "weights_types": tensor([ROW_FORMATS[table.serving_precision].sparse_type for table in tables], torch.uint8),
        "dim_offsets": tensor(list(itertools.accumulate(dims, initial=0)), torch.int32),
        "num_embeddings": tensor([table.num_embeddings for table in tables], torch.int64),
        "is_mean": tensor([[feature.pooling == "mean"] for feature in manifest.features], torch.bool),
        "is_weighted": tensor([feature.weighted for feature in manifest.features], torch.bool),
        "column_features": tensor(columns if any_mean else [], torch.int64),
        **{f"surgery.module.{name}": view for name, view in view_parameters(manifest, weights).items()},
    }
