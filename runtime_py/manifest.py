"""The manifest: what an artifact promises, read strictly and written canonically.

`artifacts/FORMAT.md` is the specification. A reader refuses whatever it does not understand: an unknown version or
field, a missing one, a wrong type, a path that leaves the artifact, and figures that contradict one another.
"""

import dataclasses
import hashlib
import json
import math
import re
import stat
import types
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from runtime_py.digests import ROWS, SHA256, TABLES, ZEROED, Digest
from runtime_py.errors import ManifestError, UnknownFieldError, UnknownFormatVersionError
from runtime_py.tensor_file import encode_header

__all__ = [
    "AOT_INDUCTOR_FILES",
    "FORMAT_VERSION",
    "MANIFEST",
    "PARAMETER_BYTES",
    "PARAMETER_PREFIX",
    "ROW_FORMATS",
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
    "decode_document",
    "encode_document",
    "parse_manifest",
    "read_manifest",
    "table_shape",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights/tables.safetensors"
SLOT_BYTES = 16
PARAMETER_PREFIX = "surgery."
# The library, and what torch's loader reads beside it, in the folders where that looks.
AOT_INDUCTOR_FILES = tuple(
    f"data/aotinductor/model/lookup.wrapper{ending}" for ending in (".so", ".json", "_metadata.json")
)

Json = dict[str, Any]


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


def encode_document(document: Any) -> bytes:
    """The JSON of a dataclass whose last field is its digest, all zeros, with that digest computed."""
    text = json.dumps(dataclasses.asdict(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    value = hashlib.sha256(text.encode()).hexdigest()
    # The digest is the last field, so that its zeros are the last 64 in the text.
    head, zeros, tail = text.rpartition("0" * 64)
    return (head + value + tail if zeros else text).encode()


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


# --- Reading -------------------------------------------------------------------------------------------------------


def read_manifest(artifact: Path) -> Manifest:
    """Reads, parses and checks `<artifact>/manifest.json`.

    Raises:
        ManifestError: no manifest (so no artifact), or one of the kinds of `parse_manifest`.
    """
    path = artifact / MANIFEST
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise ManifestError(f"{path}: is a symbolic link; an artifact holds none")
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to read a pipe is to wait for its writer
            raise ManifestError(f"{path}: is no regular file")
        data = path.read_bytes()
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read: {error.strerror}; without a manifest there is no artifact"
        ) from error
    try:
        return parse_manifest(data)
    except ManifestError as error:
        raise type(error)(f"{path}: {error}") from error


def parse_manifest(data: bytes) -> Manifest:
    """Parses the bytes of a manifest.

    Raises:
        UnknownFormatVersionError: `format_version` is not 1.
        UnknownFieldError: a field that version 1 does not define.
        ManifestError: not UTF-8 JSON, a duplicate key, a missing field, a wrong type, a digest that does not match,
            or fields that contradict one another.
    """
    manifest: Manifest = decode_document(Manifest, data)
    _check_consistency(manifest)
    return manifest


def decode_document(kind: Any, data: bytes) -> Any:
    """A dataclass of the type `kind` from its JSON. Its fields' types are the schema, its last field is its digest.

    Raises:
        ManifestError: as `parse_manifest`.
    """
    digest_field = dataclasses.fields(kind)[-1].name
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
        )
        json.dumps(document, ensure_ascii=False).encode()  # half of a surrogate pair is legal JSON, and no text
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"is damaged: not UTF-8 JSON: {error}") from error
    if not isinstance(document, dict):
        raise ManifestError(f"is damaged: expected an object, got {type(document).__name__}")
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UnknownFormatVersionError(f"format_version is {version!r}, this reader knows {FORMAT_VERSION}")
    if digest_field in document:  # first, so that damage is not taken for what a newer writer meant
        _check_digest(data, digest_field, _decode(Digest, document[digest_field], digest_field))
    return _decode(kind, document, "")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ManifestError(f"is damaged: the key '{twice}' is given twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ManifestError(f"is damaged: {name} is no JSON number")


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ManifestError(f"is damaged: {text} is beyond float64")
    return value


def _decode(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, without any conversion: the types of the dataclasses are the schema."""
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, _expect(dict, value, where), where)
    if origin is list:
        return [_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_expect(list, value, where))]
    if origin is dict:
        items = _expect(dict, value, where).items()
        return {
            key: value if arguments[1] is Any else _decode(arguments[1], value, f"{where}.{key}")
            for key, value in items
        }
    if origin is Literal:
        if value not in arguments or type(value) is not type(arguments[0]):
            raise ManifestError(f"{where}: expected one of {list(arguments)}, got {value!r}")
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _decode(arguments[0], value, where)
    return _expect(hint, value, where)


def _decode_dataclass(hint: Any, value: Json, where: str) -> Any:
    hints = get_type_hints(hint)
    names = [field.name for field in dataclasses.fields(hint)]
    prefix = f"{where}." if where else ""
    unknown = [key for key in value if key not in names]
    if unknown:
        raise UnknownFieldError(
            f"unknown field '{prefix}{unknown[0]}'; format version {FORMAT_VERSION} does not define it"
        )
    missing = [name for name in names if name not in value]
    if missing:
        raise ManifestError(f"field '{prefix}{missing[0]}' is missing")
    return hint(**{name: _decode(hints[name], value[name], prefix + name) for name in names})


def _expect(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not kind:  # exact: a bool is no int here
        raise ManifestError(f"{where}: expected {kind.__name__}, got {value!r}")
    if kind is int and not -(2**63) <= value < 2**63:
        raise ManifestError(f"{where}: {value} is beyond 64 bits")
    return value


def _check_digest(data: bytes, name: str, digest: Digest) -> None:
    value = digest.value.encode()
    if digest.algorithm != ZEROED or data.count(value) != 1 or len(value) != 64:
        raise ManifestError(f"is damaged: {name} must be {ZEROED} with 64 digits, got {digest}")
    computed = hashlib.sha256(data.replace(value, b"0" * 64)).hexdigest()
    if computed != digest.value:
        raise ManifestError(f"is damaged: its digest is {computed}, and it says {digest.value}")


_LIBRARY = re.compile(r"[A-Za-z0-9_]+")
_HEX = re.compile(r"[0-9a-f]{64}")
_MOST_DIMS = 64  # as torch


def _check_consistency(manifest: Manifest) -> None:
    _check_unique("tables", [table.name for table in manifest.tables])
    _check_unique("features", [feature.name for feature in manifest.features])
    _check_unique("outputs", [output.key for output in manifest.outputs])
    _check_unique("graphs", [f"{graph.backend} for {graph.target}" for graph in manifest.graphs])
    _check_unique("files", [file.path for file in manifest.files])
    for file in manifest.files:
        _check_path(file.path)
        expected = TABLES if file.path in manifest.mapped else SHA256
        if file.digest.algorithm != expected:
            raise ManifestError(f"{file.path}: digest algorithm '{file.digest.algorithm}', expected '{expected}'")
        _check_hex(file.path, file.digest)
    if WEIGHTS not in manifest.file:
        raise ManifestError(f"files: '{WEIGHTS}' is not listed")
    for table in manifest.tables:
        _check_table(table)
    _check_names("a table or a feature", [table.name for table in manifest.tables])
    _check_names("a table or a feature", [feature.name for feature in manifest.features])
    listed = [figures.table for figures in manifest.accuracy]
    if listed != [table.name for table in manifest.tables]:
        raise ManifestError(f"accuracy: expected one entry a table, in their order, got {listed}")
    _check_choices(manifest)
    _check_vocabularies(manifest)
    for snapshot in manifest.provenance.snapshots:
        _check_hex(f"snapshot '{snapshot.uri}'", snapshot.digest)
    for feature in manifest.features:
        if feature.table not in manifest.table:
            raise ManifestError(f"feature '{feature.name}': table '{feature.table}' is not in the manifest")
    for name in ("tables", "features", "graphs"):
        if not getattr(manifest, name):
            raise ManifestError(f"{name}: an artifact has at least one")
    for graph in manifest.graphs:
        for path in graph.files:
            if path not in manifest.file or path in manifest.mapped:
                raise ManifestError(f"graph '{graph.backend}': '{path}' is not among the files")
        for key, value, backend in (("isa", graph.isa, "aot_inductor"), ("opset", graph.opset, "onnx")):
            if (value is not None) != (graph.backend == backend):
                raise ManifestError(
                    f"graph '{graph.backend}': {key} is {value!r}; {backend} graphs have one, others none"
                )
        for library in graph.operator_libraries:
            if not _LIBRARY.fullmatch(library):
                raise ManifestError(f"graph '{graph.backend}': {library!r} is no library name")
    if manifest.weighted != any(feature.weighted for feature in manifest.features):
        raise ManifestError(f"weighted is {manifest.weighted}, and the features say otherwise")
    _check_outputs(manifest)
    size = manifest.weights_offset_bytes + manifest.weights_bytes
    if manifest.file[WEIGHTS].bytes != size:
        raise ManifestError(f"{WEIGHTS}: {manifest.file[WEIGHTS].bytes} bytes, expected {size} (header and data)")
    computed = compute_artifact_id(manifest)
    if computed != manifest.artifact_id:
        raise ManifestError(f"artifact_id is {manifest.artifact_id}, computed {computed}")


def _check_table(table: Table) -> None:
    if table.num_embeddings < 1 or table.embedding_dim < 1:
        raise ManifestError(f"table '{table.name}': shape [{table.num_embeddings}, {table.embedding_dim}] is empty")
    row_format = ROW_FORMATS[table.serving_precision]
    if table.embedding_dim % row_format.dim_divisor:
        raise ManifestError(
            f"table '{table.name}': embedding_dim is {table.embedding_dim}, {table.serving_precision} rows need a "
            f"multiple of {row_format.dim_divisor}"
        )
    expected = row_format.row_bytes(table.embedding_dim)
    if table.row_bytes != expected:
        raise ManifestError(
            f"table '{table.name}': row_bytes is {table.row_bytes}, expected {expected} "
            f"({table.serving_precision}, embedding_dim {table.embedding_dim})"
        )
    if table.digest.algorithm != ROWS:
        raise ManifestError(f"table '{table.name}': digest algorithm '{table.digest.algorithm}', expected '{ROWS}'")
    _check_hex(f"table '{table.name}'", table.digest)


def _check_names(what: str, names: list[str]) -> None:
    for name in names:
        if not name or any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            raise ManifestError(f"{name!r} cannot name {what}: it is empty, or has control characters")


def _check_outputs(manifest: Manifest) -> None:
    if manifest.surgery is not None:
        _check_surgery(manifest.surgery, manifest)
        return
    dims = [(feature.name, manifest.table[feature.table].embedding_dim) for feature in manifest.features]
    if [(output.key, output.dim) for output in manifest.outputs] != dims:
        raise ManifestError(f"outputs do not follow from the features, whose dims are {dict(dims)}")


def _check_surgery(surgery: Surgery, manifest: Manifest) -> None:
    if not manifest.outputs or any(output.dim < 1 for output in manifest.outputs):
        raise ManifestError(f"outputs of surgery '{surgery.module}': expected one or more, of at least one column each")
    _check_names("an output", [output.key for output in manifest.outputs])
    for text in (surgery.module, surgery.kwargs):
        _check_names("a surgery", [text])
    if surgery.code.algorithm != SHA256:
        raise ManifestError(f"surgery: digest algorithm '{surgery.code.algorithm}', expected '{SHA256}'")
    _check_hex("surgery", surgery.code)
    _check_names("a parameter", [parameter.parameter for parameter in surgery.parameters])
    _check_unique("tables and parameters", [tensor.name for tensor in manifest.stored_tensors])
    for parameter in surgery.parameters:
        where = f"parameter '{parameter.parameter}'"
        if len(parameter.dims) > _MOST_DIMS or any(dim < 1 for dim in parameter.dims):
            raise ManifestError(f"{where}: shape {parameter.dims} is empty, or has more than {_MOST_DIMS} dimensions")
        if parameter.bytes >= 2**63:
            raise ManifestError(f"{where}: more bytes than 64 bits can count")
        if parameter.digest.algorithm != ROWS:
            raise ManifestError(f"{where}: digest algorithm '{parameter.digest.algorithm}', expected '{ROWS}'")
        _check_hex(where, parameter.digest)


def _check_choices(manifest: Manifest) -> None:
    chosen = [choice.table for choice in manifest.choices]
    _check_unique("choices", chosen)
    if chosen != [table.name for table in manifest.tables if table.name in chosen]:
        raise ManifestError(f"choices: expected tables of the manifest, in their order, got {chosen}")
    said = [(figures.table, figures.serving_precision) for figures in manifest.accuracy]
    said += [(choice.table, choice.serving_precision) for choice in manifest.choices]
    for name, precision in said:
        stored = manifest.table[name].serving_precision
        if precision != stored:
            raise ManifestError(f"table '{name}': is stored as {stored}, and elsewhere said to be {precision}")


def _check_vocabularies(manifest: Manifest) -> None:
    names = [vocabulary.table for vocabulary in manifest.vocabularies]
    _check_unique("vocabularies", names)
    _check_unique("vocabularies", [vocabulary.path for vocabulary in manifest.vocabularies])
    for vocabulary in manifest.vocabularies:
        where = f"vocabulary of table '{vocabulary.table}'"
        if vocabulary.table not in manifest.table:
            raise ManifestError(f"{where}: the table is not in the manifest")
        if vocabulary.path not in manifest.file or vocabulary.path == WEIGHTS:
            raise ManifestError(f"{where}: '{vocabulary.path}' is not among the files")
        rows = manifest.table[vocabulary.table].num_embeddings
        if not 1 <= vocabulary.entities <= rows:
            raise ManifestError(f"{where}: {vocabulary.entities} entities, expected 1 to {rows}, the table's rows")
        # At least one slot is empty: it is what ends the search for an unknown id.
        if not vocabulary.entities < vocabulary.capacity < 2**63 // SLOT_BYTES:
            raise ManifestError(
                f"{where}: capacity is {vocabulary.capacity}, expected more than its {vocabulary.entities} entities, "
                "and less than 2**59"
            )
        if vocabulary.digest.algorithm != ROWS:
            raise ManifestError(f"{where}: digest algorithm '{vocabulary.digest.algorithm}', expected '{ROWS}'")
        _check_hex(where, vocabulary.digest)
        size = len(encode_header([vocabulary])) + vocabulary.bytes
        if manifest.file[vocabulary.path].bytes != size:
            raise ManifestError(
                f"{vocabulary.path}: {manifest.file[vocabulary.path].bytes} bytes, expected {size} "
                f"(header and {vocabulary.capacity} slots)"
            )
    if names != [table.name for table in manifest.tables if table.name in names]:
        raise ManifestError("vocabularies are not in the order of the tables")


def _check_unique(what: str, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ManifestError(f"{what}: '{name}' is listed {count} times")


def _check_hex(where: str, digest: Digest) -> None:
    if not _HEX.fullmatch(digest.value):
        raise ManifestError(f"{where}: digest value must be 64 lower-case hexadecimal digits, got {digest.value!r}")


def _check_path(path: str) -> None:
    parts = PurePosixPath(path).parts
    if (
        not parts
        or path.startswith("/")
        or ".." in parts
        or "\\" in path
        or "\0" in path
        or str(PurePosixPath(path)) != path
    ):
        raise ManifestError(f"files: path {path!r} must be relative, POSIX and inside the artifact")
    if path == MANIFEST:
        raise ManifestError(f"files: '{MANIFEST}' must not list itself")
