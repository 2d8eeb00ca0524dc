"""Builds verified inference artifacts from training snapshots of large embeddings.

    from export import build_artifact
    result = build_artifact("release.yaml", "artifacts/demo", workers=2)
    print(result.manifest.artifact_id)

Modules: `cli` (the command line), `build` (the main path), `config` (the release configuration), `config_values` and
`config_file` (what may be in it, and where), `large_embeddings` (the model), `storage` (files and URLs, read alike),
`snapshots` (the only reader of checkpoints), `plan` (what a build is going to do), `access` (which rows are looked up),
`choose` (precisions that are left to the builder), `quantize` and `weight_file` (rows), `rows`, `journal` and `ranks`
(the rows phase: resumed, and shared by several processes), `parquet_columns` (the only reader of parquet), `entities`
and `vocabulary` (entity id to row), `lookup` (the plain-op module), `torchscript`, `aot_inductor` and `onnx_graph` (its
graphs), `surgery` (modules to apply to what is pooled), `surgery_source`, `splice`, `surgery_code`, `surgery_writes`,
`onnx_surgery` and `surgery_errors` (any such module, inside the graphs), `accuracy`, `row_kernels`, `parity`,
`onnx_parity` and `surgery_parity` (the gates), `golden` (answers to replay), `table_report` and `report` (what people
read, with `report_data`, `findings`, `numerals`, `charts`, `page`, `summary` and `evaluation`), `publish`, `versions`
(a root of published versions), `progress`, `heap`, `errors`, `triton` (a server's model repository) and `doctor` (would
it run here).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.build import build_artifact
    from export.config import (
        DataType,
        EmbeddingBagConfig,
        EmbeddingSnapshot,
        LargeEmbeddingsConfig,
        Mode,
        OptimizerConfig,
    )
    from export.config_file import load_config
    from export.large_embeddings import LargeEmbeddings

__all__ = [
    "DataType",
    "EmbeddingBagConfig",
    "EmbeddingSnapshot",
    "LargeEmbeddings",
    "LargeEmbeddingsConfig",
    "Mode",
    "OptimizerConfig",
    "build_artifact",
    "load_config",
]


def __getattr__(name: str) -> Any:
    """Public names on first use: importing torchrec takes 2 s and loads operators; `import export` does not."""
    if name not in __all__:
        raise AttributeError(f"module 'export' has no attribute '{name}'")
    home = {
        "LargeEmbeddings": "export.large_embeddings",
        "build_artifact": "export.build",
        "load_config": "export.config_file",
    }.get(name, "export.config")
    return getattr(importlib.import_module(home), name)
