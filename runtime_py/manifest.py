"""The manifest: what an artifact promises. `artifacts/FORMAT.md` is the specification, `manifest_reader` reads one."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from runtime_py.digests import ZEROED, Digest
from runtime_py.documents import Json, encode_document

__all__ = [
    "AOT_INDUCTOR_FILES",
    "MANIFEST",
    "PARAMETER_BYTES",
    "PARAMETER_PREFIX",
    "ROW_FORMATS",
    "SLOT_BYTES",
    "WEIGHTS",
    "Feature",
    "File",
    "Graph",
    "Manifest",
    "Output",
    "ParameterType",
    "ParitySummary",
    "PrecisionChoice",
    "Provenance",
    "RowFormat",
    "ServingPrecision",
    "SnapshotIdentity",
    "StoredParameter",
    "StoredVocabulary",
    "Surgery",
    "Table",
    "TableAccuracy",
    "compute_artifact_id",
    "table_shape",
]

MANIFEST = "manifest.json"
WEIGHTS = "weights/tables.safetensors"
SLOT_BYTES = 16
PARAMETER_PREFIX = "surgery."
# The library, and what torch's loader reads beside it, in the folders where that looks.
AOT_INDUCTOR_FILES = tuple(
    f"data/aotinductor/model/lookup.wrapper{ending}" for ending in (".so", ".json", "_metadata.json")
)

ServingPrecision = Literal["fp32", "fp16", "int8", "int4", "int2"]


@dataclass(frozen=True)
class RowFormat:
    """How one serving precision is stored: the safetensors dtype, and FBGEMM's number for it (`SparseType`).

    A row is `scale_bias_bytes` (fp16 scale, fp16 bias, of a quantized row), then `bits` for each value.
    """

    safetensors_dtype: str
    sparse_type: int
    bits: int
    scale_bias_bytes: int = 0

    def row_bytes(self, embedding_dim: int) -> int:
        """Bytes of one canonical row of `embedding_dim` values."""
        return self.scale_bias_bytes + embedding_dim * self.bits // 8

    def columns(self, embedding_dim: int) -> int:
        """Columns of the safetensors tensor: one for each value, or one for each byte of a quantized row."""
        return self.row_bytes(embedding_dim) if self.scale_bias_bytes else embedding_dim

    @property
    def dim_divisor(self) -> int:
        """What `embedding_dim` must be a multiple of: FBGEMM's quantized rows are a whole number of 16-bit units."""
        return 16 // self.bits if self.scale_bias_bytes else 1


ROW_FORMATS: dict[ServingPrecision, RowFormat] = {
    "fp32": RowFormat("F32", 0, 32),
    "fp16": RowFormat("F16", 1, 16),
    "int8": RowFormat("U8", 2, 8, 4),
    "int4": RowFormat("U8", 3, 4, 4),
    "int2": RowFormat("U8", 4, 2, 4),
}


@dataclass(frozen=True)
class Table:
    """E = `num_embeddings` canonical rows of D = `embedding_dim` values, at `offset_bytes` of the weight data."""

    name: str
    num_embeddings: int
    embedding_dim: int
    serving_precision: ServingPrecision
    row_bytes: int
    offset_bytes: int
    digest: Digest

    @property
    def dtype(self) -> str:
        """The safetensors type of the stored rows."""
        return ROW_FORMATS[self.serving_precision].safetensors_dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the stored tensor."""
        return self.num_embeddings, ROW_FORMATS[self.serving_precision].columns(self.embedding_dim)

    @property
    def bytes(self) -> int:
        """All of the table's rows."""
        return self.num_embeddings * self.row_bytes


@dataclass(frozen=True)
class StoredVocabulary:
    """A table's vocabulary: a hash table int64 [capacity, 2] of (entity id, row), -1 in empty slots, in its own file.

    `digest` is that of the slots, as of a table's rows.
    """

    table: str
    path: str
    entities: int
    capacity: int
    digest: Digest

    @property
    def name(self) -> str:
        """The tensor's name in the file: the table's."""
        return self.table

    @property
    def dtype(self) -> str:
        """The safetensors type of the slots."""
        return "I64"

    @property
    def shape(self) -> tuple[int, int]:
        """Slots, and their two numbers."""
        return self.capacity, 2

    @property
    def row_bytes(self) -> int:
        """Bytes of one slot."""
        return SLOT_BYTES

    @property
    def bytes(self) -> int:
        """All slots."""
        return self.capacity * SLOT_BYTES


ParameterType = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL"]
PARAMETER_BYTES: dict[ParameterType, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "BOOL": 1,
}


def table_shape(dims: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as it is stored: a vector is one row; of more dimensions the first counts rows."""
    if len(dims) < 2:
        return 1, math.prod(dims)
    return dims[0], math.prod(dims[1:])


@dataclass(frozen=True)
class StoredParameter:
    """A parameter or buffer of the surgery module, in the weight file as `surgery.<parameter>`; `dims` is its shape."""

    parameter: str
    dtype: ParameterType
    dims: list[int]
    offset_bytes: int
    digest: Digest

    @property
    def name(self) -> str:
        """The tensor's name in the weight file."""
        return f"{PARAMETER_PREFIX}{self.parameter}"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the stored tensor."""
        return table_shape(self.dims)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the stored tensor."""
        return self.shape[1] * PARAMETER_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        """The whole tensor."""
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True)
class Surgery:
    """What every graph does to the pooled embeddings: a module of the release, named `package.module:Class`.

    `kwargs` is the canonical JSON of its constructor's arguments, `code` the digest of what TorchScript made of its source.
    """

    module: str
    kwargs: str
    code: Digest
    parameters: list[StoredParameter]


@dataclass(frozen=True)
class Feature:
    """One input of the lookup, in graph order, and the table that it looks rows up in."""

    name: str
    table: str
    pooling: Literal["sum", "mean"]
    weighted: bool


@dataclass(frozen=True)
class Output:
    """One block of output columns, in graph order."""

    key: str
    dim: int


@dataclass(frozen=True)
class Graph:
    """One exported form of the lookup, and what it needs from the machine that runs it.

    `path` is its file or, of an AOTInductor graph, the folder of its `AOT_INDUCTOR_FILES`; `isa` is the instruction set that
    the latter was compiled for, `opset` that of an ONNX graph, null for others.
    """

    backend: Literal["torchscript", "aot_inductor", "onnx"]
    target: Literal["cpu"]
    path: str
    operator_libraries: list[str]
    torch: str
    fbgemm_gpu: str
    isa: str | None = None
    opset: int | None = None

    @property
    def files(self) -> list[str]:
        """The paths of its files in the artifact."""
        if self.backend == "aot_inductor":
            return [f"{self.path}/{name}" for name in AOT_INDUCTOR_FILES]
        return [self.path]


@dataclass(frozen=True)
class File:
    """One file of the artifact other than the manifest."""

    path: str
    bytes: int
    digest: Digest


@dataclass(frozen=True)
class TableAccuracy:
    """How far a table's stored rows, dequantized, are from its trained rows, in float32.

    Over the E * D values of the rows that were measured: the largest and the mean absolute error, the root of the mean
    squared error, and relative_l2 = ||stored - trained|| / ||trained|| with the table taken as one vector. Over rows that are
    zero neither as trained nor as stored: row_relative_l2, the root mean square of each row's own relative L2 error; the
    mean cosine between a row as stored and as trained, the worst one and its row. Over bags of rows, drawn as the table is
    accessed where counts were given, else uniformly: relative L2 error and mean cosine of what pooling makes of them.
    Figures are null where there is no such row. `vanished_rows` are zero as stored only, and in `outlier_rows` one value
    flattens the others.
    """

    table: str
    serving_precision: ServingPrecision
    rows: int
    rows_measured: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    max_absolute_error: float
    mean_absolute_error: float
    root_mean_square_error: float
    relative_l2: float | None
    row_relative_l2: float | None
    mean_cosine: float | None
    worst_cosine: float | None
    worst_cosine_row: int | None
    constant_rows: int
    vanished_rows: int
    outlier_rows: int
    lookup_relative_l2: float | None
    lookup_mean_cosine: float | None


@dataclass(frozen=True)
class PrecisionChoice:
    """Why a table whose `serving_precision` was left to the builder has the one that it has."""

    table: str
    serving_precision: ServingPrecision
    reason: str


@dataclass(frozen=True)
class ParitySummary:
    """The outcome of the parity gate over its batches (`cases`), which `reports/parity.json` lists.

    `serving` says what the graphs were compared with and how; the quantization figures are the largest distance from
    the float32 model, and the largest share that it took of the bound that rounding explains.
    """

    seed: int
    cases: int
    serving: str
    quantization_max_error: float
    quantization_max_share_of_bound: float


@dataclass(frozen=True)
class SnapshotIdentity:
    """The training state that the rows came from; `digest` is of its index, not of its rows."""

    uri: str
    format: str
    step: int | None
    digest: Digest


@dataclass(frozen=True)
class Provenance:
    """Where the artifact came from. None of it enters the artifact id."""

    snapshots: list[SnapshotIdentity]
    configuration: Json
    tools: dict[str, str]
    built_at: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of format version 1."""

    format_version: int
    artifact_id: str
    tables: list[Table]
    features: list[Feature]
    outputs: list[Output]
    surgery: Surgery | None
    weighted: bool
    weights_offset_bytes: int
    weights_bytes: int
    vocabularies: list[StoredVocabulary]
    graphs: list[Graph]
    files: list[File]
    accuracy: list[TableAccuracy]
    choices: list[PrecisionChoice]
    parity: ParitySummary
    provenance: Provenance
    manifest_digest: Digest

    @cached_property
    def table(self) -> dict[str, Table]:
        """The tables by name."""
        return {table.name: table for table in self.tables}

    @property
    def stored_tensors(self) -> list[Table | StoredParameter]:
        """What the weight file holds: the tables, then the parameters of a surgery."""
        return [*self.tables, *(self.surgery.parameters if self.surgery else [])]

    @cached_property
    def file(self) -> dict[str, File]:
        """The files by path."""
        return {file.path: file for file in self.files}

    def graph_bytes(self, graph: Graph) -> int:
        """The bytes of all files of a graph."""
        return sum(self.file[path].bytes for path in graph.files)

    @cached_property
    def mapped(self) -> set[str]:
        """The paths of the files that are as large as the tables: mapped, and never read as a whole."""
        return {WEIGHTS, *(vocabulary.path for vocabulary in self.vocabularies)}

    def to_bytes(self) -> bytes:
        """The bytes of manifest.json, with a fresh manifest digest."""
        return encode_document(dataclasses.replace(self, manifest_digest=Digest(ZEROED, "0" * 64)))


def compute_artifact_id(manifest: Manifest) -> str:
    """The identity of what the artifact does, as 64 hexadecimal digits.

    SHA-256 of the canonical JSON (keys sorted, no spaces, UTF-8) of the tables with their row digests, the
    vocabularies, the features, the outputs, the kinds of graph and, where there is one, the surgery. Provenance,
    reports and the graph files' own bytes are outside it, so that the same rows give the same id from any snapshot
    format on any machine.
    """
    content: Json = {
        "features": [dataclasses.asdict(feature) for feature in manifest.features],
        "graphs": sorted({graph.backend for graph in manifest.graphs}),
        "outputs": [dataclasses.asdict(output) for output in manifest.outputs],
        "tables": [
            {
                "digest": str(table.digest),
                "embedding_dim": table.embedding_dim,
                "name": table.name,
                "num_embeddings": table.num_embeddings,
                "serving_precision": table.serving_precision,
            }
            for table in manifest.tables
        ],
        "vocabularies": [
            {"digest": str(vocabulary.digest), "entities": vocabulary.entities, "table": vocabulary.table}
            for vocabulary in manifest.vocabularies
        ],
    }
    if manifest.surgery is not None:
        content["surgery"] = {
            "code": str(manifest.surgery.code),
            "kwargs": manifest.surgery.kwargs,
            "module": manifest.surgery.module,
            "parameters": [
                {
                    "digest": str(parameter.digest),
                    "dims": parameter.dims,
                    "dtype": parameter.dtype,
                    "parameter": parameter.parameter,
                }
                for parameter in manifest.surgery.parameters
            ],
        }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
