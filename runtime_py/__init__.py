"""Loads a verified embedding artifact and looks embeddings up in it. Needs torch, numpy and the FBGEMM kernels.

    from runtime_py import load_artifact
    artifact = load_artifact("artifacts/demo")
    pooled = artifact({"user_id": [[3, 5], []], "item_id": [[7], [1, 2]]})

Modules: `artifact` (load and look up), `inputs` (requests in the forms that callers have), `convert` (their parts),
`entities` (requests of entity ids), `checks` (what stands between a request and the rows), `jagged` (compiled passes
over it), `lookups` and `team` (running it, on one core or several), `pooled` (results), `tally` (counts), `residency`
(pages), `verify` (is it what was published), `tensor_file` (a mapped file of known tensors), `weights` and `vocabulary`
(its two kinds), `manifest` (the contract), `manifest_reader` and `documents` (read strictly), `torchscript` and
`aot_inductor` (the graphs), `constants` (what they know of the rows), `operators` (FBGEMM's libraries), `golden` (answers
to replay), `pointer` (the current one of many versions), `reloading` (follows it), `compatibility`, `digests`,
`parallel`, `errors`.
On a GPU: `cuda` (load), `device_layout` (where tables lie), `device_rows` (their way there), `device_graph` (the graph over
them), `device_artifact` and `captured` (look up), `device_inputs` (checks there), `device_stream`.
"""

from runtime_py.artifact import Artifact, load_artifact
from runtime_py.device_artifact import DeviceArtifact
from runtime_py.errors import (
    ArtifactError,
    DeviceMemoryError,
    DigestMismatchError,
    ExtraFileError,
    GoldenCaseError,
    GraphError,
    IncompatibleError,
    InvalidInputError,
    ManifestError,
    MissingFileError,
    PointerError,
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
from runtime_py.reloading import Refusal, ReloadingArtifact, ReloadStatus
from runtime_py.verify import verify_artifact
from runtime_py.vocabulary import Vocabulary

__all__ = [
    "Artifact",
    "ArtifactError",
    "DeviceArtifact",
    "DeviceMemoryError",
    "DigestMismatchError",
    "ExtraFileError",
    "GoldenCaseError",
    "GraphError",
    "IncompatibleError",
    "InvalidInputError",
    "Jagged",
    "Manifest",
    "ManifestError",
    "MissingFileError",
    "PointerError",
    "Pooled",
    "Refusal",
    "ReloadStatus",
    "ReloadingArtifact",
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
