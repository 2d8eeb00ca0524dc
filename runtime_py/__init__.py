"""Loads a verified embedding artifact and looks embeddings up in it. Needs torch, numpy and the FBGEMM kernels.

    from runtime_py import load_artifact
    artifact = load_artifact("artifacts/demo")
    pooled = artifact({"user_id": [[3, 5], []], "item_id": [[7], [1, 2]]})

Modules: `artifact` (load and look up), `inputs` (requests in the forms that callers have), `convert` (their parts),
`entities` (requests of entity ids), `checks` (what stands between a request and the rows), `lookups` and `team` (running
it, on one core or several), `pooled` (results), `tally` (counts), `residency` (pages), `verify` (is it what was published),
`tensor_file` (a mapped file of known tensors), `weights` and `vocabulary` (its two kinds), `manifest` (the contract),
`torchscript` and `aot_inductor` (the graphs), `operators` (FBGEMM's libraries), `digests`, `parallel`, `errors`.
"""

from runtime_py.artifact import Artifact, load_artifact
from runtime_py.errors import (
    ArtifactError,
    DigestMismatchError,
    ExtraFileError,
    GraphError,
    InvalidInputError,
    ManifestError,
    MissingFileError,
    SizeMismatchError,
    UnknownFieldError,
    UnknownFormatVersionError,
    UnsupportedError,
    VocabularyFileError,
    WeightFileError,
)
from runtime_py.inputs import Jagged
from runtime_py.manifest import Manifest
from runtime_py.pooled import Pooled
from runtime_py.verify import verify_artifact
from runtime_py.vocabulary import Vocabulary

__all__ = [
    "Artifact",
    "ArtifactError",
    "DigestMismatchError",
    "ExtraFileError",
    "GraphError",
    "InvalidInputError",
    "Jagged",
    "Manifest",
    "ManifestError",
    "MissingFileError",
    "Pooled",
    "SizeMismatchError",
    "UnknownFieldError",
    "UnknownFormatVersionError",
    "UnsupportedError",
    "Vocabulary",
    "VocabularyFileError",
    "WeightFileError",
    "load_artifact",
    "verify_artifact",
]
