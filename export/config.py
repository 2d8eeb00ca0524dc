"""The release configuration: what to export, from which snapshot, at which precision.

The training section (`large_embeddings`) has the field names of twitter/the-algorithm-ml, so that a training
configuration loads unchanged; the serving fields are additions with defaults. `load_config` is the only reader: every
error carries the file, the line, the key and, for an unknown key, the nearest known one.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.comments import TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from export.errors import ConfigError
from export.storage import redact
from runtime_py.manifest import ROW_FORMATS

__all__ = [
    "STORED",
    "AccessCountsConfig",
    "AutoConfig",
    "Budget",
    "DataType",
    "EmbeddingBagConfig",
    "EmbeddingSnapshot",
    "LargeEmbeddingsConfig",
    "Mode",
    "OptimizerConfig",
    "ParityConfig",
    "Pooling",
    "Precision",
    "ReleaseConfig",
    "ServingConfig",
    "SnapshotConfig",
    "SurgeryConfig",
    "VocabularyConfig",
    "load_config",
]


class DataType(StrEnum):
    """Type of a table's rows in training."""

    FP32 = "fp32"
    FP16 = "fp16"


class Mode(StrEnum):
    """Job modes of the upstream project; a release is built in `inference`."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    INFERENCE = "inference"


class Pooling(StrEnum):
    """How the rows of a bag become one vector."""

    SUM = "sum"
    MEAN = "mean"


class Precision(StrEnum):
    """Stored type of a table's rows in the artifact; `auto` asks the builder to choose."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"
    AUTO = "auto"


STORED = (Precision.FP32, Precision.FP16, Precision.INT8, Precision.INT4, Precision.INT2)  # widest first


class GraphKind(StrEnum):
    """A form in which the lookup is exported."""

    TORCHSCRIPT = "torchscript"
    AOT_INDUCTOR = "aot_inductor"
    ONNX = "onnx"


class Target(StrEnum):
    """A kind of device that the artifact is built for."""

    CPU = "cpu"
    CUDA = "cuda"


class Isa(StrEnum):
    """Instruction sets that compiled graphs may need: levels of the x86-64 psABI (v3 has AVX2, v4 has AVX-512)."""

    X86_64_V3 = "x86-64-v3"
    X86_64_V4 = "x86-64-v4"


class SnapshotFormat(StrEnum):
    """On-disk format of a training snapshot; `auto` looks at the files."""

    AUTO = "auto"
    DCP = "dcp"
    TORCHSNAPSHOT = "torchsnapshot"
    SAFETENSORS = "safetensors"
    STATE_DICT = "state_dict"


# The type of the errors raised here; "at", in their context, leads from the section to the key that they are about.
_OURS = "release"
_MODULE_DICT = torch.nn.ModuleDict()


def _error_at(message: str, *at: int | str) -> PydanticCustomError:
    return PydanticCustomError(_OURS, "{message}", {"message": message, "at": at})


# --- What this version builds. The configuration names more than that; the rest is refused while it is read. -------


def _built(*built: StrEnum) -> AfterValidator:
    def check(value: StrEnum) -> StrEnum:
        if value not in built:
            names = ", ".join(built)
            raise PydanticCustomError(_OURS, f"'{value}' is not supported by this version, which has: {names}")
        return value

    return AfterValidator(check)


_BuiltGraph = Annotated[GraphKind, _built(GraphKind.TORCHSCRIPT, GraphKind.AOT_INDUCTOR, GraphKind.ONNX)]
_BuiltTarget = Annotated[Target, _built(Target.CPU)]


def _stored(value: Precision) -> Precision:
    if value is Precision.AUTO:
        raise PydanticCustomError(_OURS, f"'auto' is no type of rows; expected one of {', '.join(STORED)}")
    return value


def _unique(values: list[StrEnum]) -> list[StrEnum]:
    for value in values:
        if values.count(value) > 1:
            raise PydanticCustomError(_OURS, f"'{value}' is listed twice")
    return values


def _check_class_path(value: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
        raise PydanticCustomError(_OURS, f"expected 'package.module:Class', got {value!r}")
    return value


def _check_json(value: dict[str, Any]) -> dict[str, Any]:
    """What the manifest keeps: text, finite numbers, booleans, null, and lists and mappings of these."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PydanticCustomError(
            _OURS, f"expected text, finite numbers, booleans, null, lists and mappings: {error}"
        ) from error
    return value


def _check_published(value: dict[str, Any]) -> dict[str, Any]:
    """The manifest keeps arguments as they are: no integer that it has no place for, and nothing that is to stay secret."""
    for at, part in _parts(value):
        if type(part) is int and not -(2**63) <= part < 2**63:
            raise _error_at(
                f"expected an integer that fits in signed 64 bits, got {part}; write a float, or a text", *at
            )
        if isinstance(part, str) and redact(part) != part:
            raise _error_at(
                "a URL with a user, a password or a query, which the manifest would publish; "
                "write it without, and let the module find its credentials where it runs",
                *at,
            )
    return value


def _parts(value: Any, *at: int | str) -> Iterator[tuple[tuple[int | str, ...], Any]]:
    """Every key and every value that is no container, and the way to it. The key of a mapping is at the mapping."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield at, key
            yield from _parts(part, *at, key)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _parts(part, *at, number)
    else:
        yield at, value


def _check_name(name: str) -> str:
    """Table names become module names and tensor names: what `nn.ModuleDict` or safetensors refuses is refused here."""
    if not name or not name.isprintable():
        raise PydanticCustomError(_OURS, f"a name must be printable and not empty, got {name!r}")
    if "." in name or name == "__metadata__" or hasattr(_MODULE_DICT, name):
        raise PydanticCustomError(_OURS, f"{name!r} cannot name a table: torch or safetensors reserves it")
    return name


def _check_feature_name(name: str) -> str:
    if not name or not name.isprintable():
        raise PydanticCustomError(_OURS, f"a name must be printable and not empty, got {name!r}")
    return name


_TableName = Annotated[str, AfterValidator(_check_name)]
_FeatureName = Annotated[str, AfterValidator(_check_feature_name)]
# The manifest, which has the configuration, holds signed integers of 64 bits.
_Integer = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
_Number = Annotated[StrictInt, Field(ge=0, lt=2**63)]
_Count = Annotated[StrictInt, Field(ge=1, lt=2**63)]
_Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
_Ratio = Annotated[_Float, Field(ge=0.0)]


_Cosine = Annotated[_Float, Field(ge=-1.0, le=1.0)]
_StoredPrecision = Annotated[Precision, AfterValidator(_stored)]


def dim_divisor(precision: Precision) -> int:
    """What `embedding_dim` must be a multiple of for rows of a precision other than `auto`."""
    name: Any = precision.value
    return ROW_FORMATS[name].dim_divisor


class _Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --- large_embeddings: the training section ------------------------------------------------------------------------


class _PiecewiseConstant(_Section):
    learning_rate_boundaries: list[_Integer] | None = None
    learning_rate_values: list[_Float] | None = None


class _LinearRampToConstant(_Section):
    learning_rate: _Float
    num_ramp_steps: _Count


class _LinearRampToCosine(_Section):
    learning_rate: _Float
    final_learning_rate: _Float
    num_ramp_steps: _Count
    final_num_steps: _Count


class _LearningRate(_Section):
    constant: _Float | None = None
    linear_ramp_to_cosine: _LinearRampToCosine | None = None
    linear_ramp_to_constant: _LinearRampToConstant | None = None
    piecewise_constant: _PiecewiseConstant | None = None


class _Adam(_Section):
    lr: _Float
    betas: tuple[_Float, _Float] = (0.9, 0.999)
    eps: _Float = 1e-7


class _Sgd(_Section):
    lr: _Float
    momentum: _Float = 0.0


class _Adagrad(_Section):
    lr: _Float
    eps: _Float = 0.0


class OptimizerConfig(_Section):
    """The optimizer of one table, as training wrote it. Read so that the section loads; serving does not use it."""

    learning_rate: _LearningRate | None = None
    adam: _Adam | None = None
    sgd: _Sgd | None = None
    adagrad: _Adagrad | None = None

    @model_validator(mode="after")
    def _one_algorithm(self) -> Self:
        chosen = [name for name in ("adam", "sgd", "adagrad") if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise PydanticCustomError(_OURS, f"exactly one of adam, sgd, adagrad is required, got {chosen}")
        return self


class EmbeddingSnapshot(_Section):
    """Another snapshot, and the table in it, whose rows a table takes."""

    emb_name: Annotated[str, Field(min_length=1)]
    embedding_snapshot_uri: Annotated[str, Field(min_length=1)]


_S = TypeVar("_S")


def _two_columns(section: _S, first: str, second: str) -> _S:
    if first == second:
        raise PydanticCustomError(_OURS, f"expected two columns, got '{first}' for both")
    return section


class VocabularyConfig(_Section):
    """Which row belongs to which entity: a folder of parquet files, or one, with a column of ids and one of rows.

    `min_coverage` is the least share of the table's rows that must have an entity; below it the build fails.
    """

    uri: Annotated[str, Field(min_length=1)]
    entity_id: Annotated[str, Field(min_length=1)] = "entity_id"
    index: Annotated[str, Field(min_length=1)] = "index"
    min_coverage: Annotated[_Float, Field(ge=0.0, le=1.0)] = 0.0

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        return _two_columns(self, self.entity_id, self.index)


class AccessCountsConfig(_Section):
    """How often each row was looked up: a folder of parquet files, or one, with a column of rows and one of counts.

    A row that is named more than once has the sum of its counts, one that is not named has none.
    """

    uri: Annotated[str, Field(min_length=1)]
    index: Annotated[str, Field(min_length=1)] = "index"
    count: Annotated[str, Field(min_length=1)] = "count"

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        return _two_columns(self, self.index, self.count)


def _read_uri(value: object) -> object:
    if isinstance(value, str):  # a vocabulary, as a training configuration has it
        return {"uri": value}
    if value is not None and not isinstance(value, Mapping | VocabularyConfig | AccessCountsConfig):
        raise PydanticCustomError(_OURS, f"expected a path, or a mapping with the key 'uri', got {value!r}")
    return value


class EmbeddingBagConfig(_Section):
    """One table: E = `num_embeddings` rows of D = `embedding_dim` values, and the features that look rows up in it."""

    name: _TableName
    num_embeddings: _Count
    embedding_dim: Annotated[StrictInt, Field(ge=1, le=2**20)]
    pretrained: EmbeddingSnapshot | None = None
    vocab: Annotated[VocabularyConfig | None, BeforeValidator(_read_uri)] = None
    optimizer: OptimizerConfig | None = None
    data_type: DataType
    feature_names: Annotated[list[_FeatureName], Field(min_length=1)] | None = None
    pooling: Pooling = Pooling.SUM
    weighted: StrictBool = False
    access_counts: Annotated[AccessCountsConfig | None, BeforeValidator(_read_uri)] = None
    serving_precision: Precision | None = None

    @property
    def features(self) -> list[str]:
        """The features of this table: `feature_names`, by default the table's own name."""
        return self.feature_names or [self.name]

    @model_validator(mode="after")
    def _mean_is_unweighted(self) -> Self:
        if self.weighted and self.pooling is not Pooling.SUM:
            raise PydanticCustomError(_OURS, "per-sample weights need pooling: sum, as in torch.nn.EmbeddingBag")
        return self


class LargeEmbeddingsConfig(_Section):
    """The tables of one `EmbeddingBagCollection`, in its order."""

    tables: Annotated[list[EmbeddingBagConfig], Field(min_length=1)]
    tables_to_log: list[str] | None = None

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        tables: set[str] = set()
        owners: dict[str, str] = {}
        for number, table in enumerate(self.tables):
            if table.name in tables:
                raise _error_at(f"duplicate table name '{table.name}'", "tables", number, "name")
            tables.add(table.name)
            for feature in table.features:
                if feature in owners:
                    first = owners[feature]
                    where = f"table '{first}'" if first == table.name else f"tables '{first}' and '{table.name}'"
                    raise _error_at(f"duplicate feature name '{feature}' in {where}", "tables", number, "feature_names")
                owners[feature] = table.name
        return self

    @property
    def weighted(self) -> bool:
        """Whether a lookup takes per-sample weights."""
        return any(table.weighted for table in self.tables)


# --- The release ---------------------------------------------------------------------------------------------------


class SnapshotConfig(_Section):
    """Where the trained rows are."""

    uri: Annotated[str, Field(min_length=1)]
    format: SnapshotFormat = SnapshotFormat.AUTO
    step: _Number | None = None
    prefix: str | None = None


class Budget(_Section):
    """The largest loss of accuracy that a table's rows may show; a missing figure is not gated.

    Every figure compares the stored rows, dequantized, with the float32 rows of the snapshot, over the whole table:
    `max_row_relative_l2` is of the root mean square over rows, `min_cosine` of the mean over rows, `min_worst_cosine` of
    every row, `max_lookup_relative_l2` of pooled bags.
    """

    max_absolute_error: _Ratio | None = None
    mean_absolute_error: _Ratio | None = None
    max_relative_l2: _Ratio | None = None
    max_row_relative_l2: _Ratio | None = None
    min_cosine: _Cosine | None = None
    min_worst_cosine: _Cosine | None = None
    max_lookup_relative_l2: _Ratio | None = None
    max_vanished_rows: _Number | None = None
    max_outlier_rows: _Number | None = None

    # The figure of `TableAccuracy` that a key limits, where it has another name.
    FIGURES: ClassVar[Mapping[str, str]] = {
        "max_relative_l2": "relative_l2",
        "max_row_relative_l2": "row_relative_l2",
        "min_cosine": "mean_cosine",
        "min_worst_cosine": "worst_cosine",
        "max_lookup_relative_l2": "lookup_relative_l2",
        "max_vanished_rows": "vanished_rows",
        "max_outlier_rows": "outlier_rows",
    }


def _read_size(value: object) -> object:
    fraction = isinstance(value, str) and "." in value and value.replace(".", "", 1).strip().isdigit()
    if isinstance(value, bool | float) or fraction:
        raise PydanticCustomError(_OURS, f"expected bytes, or a size with a unit such as '20 GB', got {value!r}")
    return value


class AutoConfig(_Section):
    """What `auto` has to keep to: figures of every table that is left to it, or the bytes of the whole artifact, or both.

    `precisions` are those to choose from.
    """

    max_relative_l2: _Ratio | None = None
    min_cosine: _Cosine | None = None
    max_bytes: Annotated[Annotated[ByteSize, Field(gt=0, lt=2**63)] | None, BeforeValidator(_read_size)] = None
    precisions: Annotated[list[_StoredPrecision], Field(min_length=1), AfterValidator(_unique)] = list(STORED)

    @property
    def budget(self) -> Budget:
        """The figures, as a budget.

        The relative error is that of the table and that of its rows: a few rows that are much longer than the others hide
        in the first what these lose.
        """
        return Budget(
            max_relative_l2=self.max_relative_l2, max_row_relative_l2=self.max_relative_l2, min_cosine=self.min_cosine
        )

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if (self.max_relative_l2, self.min_cosine, self.max_bytes) == (None, None, None):
            raise PydanticCustomError(_OURS, "a limit is required: max_relative_l2, min_cosine or max_bytes")
        return self


class ServingConfig(_Section):
    """What to write."""

    precision: Precision = Precision.FP16
    auto: AutoConfig | None = None
    graphs: Annotated[list[_BuiltGraph], Field(min_length=1), AfterValidator(_unique)] = [GraphKind.TORCHSCRIPT]
    targets: Annotated[list[_BuiltTarget], Field(min_length=1), AfterValidator(_unique)] = [Target.CPU]
    isa: Isa = Isa.X86_64_V3

    @model_validator(mode="after")
    def _has_torchscript(self) -> Self:
        if GraphKind.TORCHSCRIPT not in self.graphs:
            raise _error_at("expected torchscript among the graphs: it is what the loader runs by default", "graphs")
        return self


DEFAULT_BUDGETS: Mapping[Precision, Budget] = {
    Precision.FP32: Budget(max_absolute_error=0.0),
    # One rounding to fp16 costs at most 2**-11 of a normal value (6.1e-5 and up): a table beyond twice that is mostly
    # subnormal, where fp16 has few bits left.
    Precision.FP16: Budget(max_relative_l2=2**-10, min_cosine=0.999),
    # A code is off by at most half a step, on average (uniformly distributed) by step / sqrt(12): of normally distributed
    # rows of 64 values, which span 4.7 standard deviations, 0.5 %, 9 % and 45 % of the norm. These leave room for rows
    # that span more.
    Precision.INT8: Budget(max_relative_l2=0.02, min_cosine=0.999),
    Precision.INT4: Budget(max_relative_l2=0.25, min_cosine=0.97),
    Precision.INT2: Budget(max_relative_l2=0.75, min_cosine=0.75),
}


class ParityConfig(_Section):
    """The gates of the build: how many random batches, and each table's budget."""

    seed: _Number = 0
    batches: _Count = 8
    budgets: dict[_StoredPrecision, Budget] = {}
    table_budgets: dict[str, Budget] = {}


class SurgeryConfig(_Section):
    """A `torch.nn.Module` that serving applies to the pooled embeddings, at `LargeEmbeddings.surgery_cut_point`.

    `prefix` is where its parameters sit in the snapshot's state dict, by default `surgery_cut_point`, beside the collection.
    """

    module: Annotated[str, AfterValidator(_check_class_path)]
    kwargs: Annotated[dict[str, Any], AfterValidator(_check_json), AfterValidator(_check_published)] = {}
    prefix: Annotated[str, Field(min_length=1)] | None = None


class ReleaseConfig(_Section):
    """A whole release configuration."""

    large_embeddings: LargeEmbeddingsConfig
    mode: Mode = Mode.INFERENCE
    snapshot: SnapshotConfig
    serving: ServingConfig = ServingConfig()
    surgery: SurgeryConfig | None = None
    parity: ParityConfig = ParityConfig()

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, document: Any) -> Any:
        for at, text in _texts(document):
            if not _is_utf8(text):
                message = f"{text!r} has half a character, which no UTF-8 text has; write the character itself"
                raise _error_at(message, *(part for part in at if not isinstance(part, str) or _is_utf8(part)))
        return document

    @model_validator(mode="after")
    def _is_a_release(self) -> Self:
        if self.mode is not Mode.INFERENCE:
            raise _error_at(f"a release is built in mode 'inference', got '{self.mode}'", "mode")
        names = [table.name for table in self.large_embeddings.tables]
        for name in self.parity.table_budgets:
            if name not in names:
                message = f"parity.table_budgets names '{name}', which is no table; tables: {', '.join(names)}"
                raise _error_at(message, "parity", "table_budgets", name)
        return self

    @model_validator(mode="after")
    def _rows_can_be_stored(self) -> Self:
        if self.serving.auto and Precision.AUTO not in map(self.serving_precision, self.large_embeddings.tables):
            raise _error_at(
                "no table is left to 'auto'; remove the key, or say serving_precision: auto", "serving", "auto"
            )
        for number, table in enumerate(self.large_embeddings.tables):
            at = ("large_embeddings", "tables", number, "serving_precision")
            precision = self.serving_precision(table)
            if precision is Precision.AUTO:
                if self.serving.auto is None:
                    raise _error_at(
                        f"table '{table.name}': 'auto' needs something to keep to; add serving.auto with max_relative_l2, "
                        "min_cosine or max_bytes",
                        *(at if table.serving_precision else ("serving", "precision")),
                    )
                if not self.candidates(table):
                    names = ", ".join(self.serving.auto.precisions)
                    raise _error_at(
                        f"table '{table.name}': no rows of {table.embedding_dim} values in {names}", *at[:3]
                    )
                continue
            divisor = dim_divisor(precision)
            if table.embedding_dim % divisor:
                raise _error_at(
                    f"table '{table.name}': {precision} needs an embedding_dim that is a multiple of {divisor} (FBGEMM's "
                    f"rows are whole 16-bit units), got {table.embedding_dim}; choose another precision for this table",
                    *at,
                )
        return self

    def serving_precision(self, table: EmbeddingBagConfig) -> Precision:
        """The precision that the table is stored in, or `auto`."""
        return table.serving_precision or self.serving.precision

    def candidates(self, table: EmbeddingBagConfig) -> list[Precision]:
        """The precisions that a table left to `auto` may get, widest first."""
        offered = self.serving.auto.precisions if self.serving.auto else STORED
        return [value for value in STORED if value in offered and table.embedding_dim % dim_divisor(value) == 0]

    def budgets(self, table: EmbeddingBagConfig, precision: Precision) -> list[Budget]:
        """What the table has to keep to in a precision: its own budget, else the precision's, else the default one.

        A table left to `auto` keeps to the figures of `serving.auto` instead of the default, and to both where there are
        both.
        """
        own = self.parity.table_budgets.get(table.name) or self.parity.budgets.get(precision)
        auto = self.serving.auto.budget if self.serving.auto else Budget()
        if self.serving_precision(table) is not Precision.AUTO or auto == Budget():
            return [own or DEFAULT_BUDGETS[precision]]
        return [own, auto] if own else [auto]


def _texts(node: Any, at: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Every text of a document, keys included, with where it is."""
    if isinstance(node, str):
        yield at, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(key, at)
            yield from _texts(value, (*at, key))
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _texts(value, (*at, number))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a half of a surrogate pair
        return False
    return True


# --- Reading -------------------------------------------------------------------------------------------------------


def load_config(path: str | Path) -> ReleaseConfig:
    """Reads a release configuration.

    Relative paths in it are relative to its own folder, and absolute in the result.

    Raises:
        ConfigError: the file is unreadable, is no YAML mapping, or does not fit the model. Each problem is one line
            `file:line: key: what is wrong`.
    """
    path = Path(path)
    try:
        document = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = ", ".join(str(part).splitlines()[0] for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}: not valid YAML: {problem}") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    except (RecursionError, ValueError) as error:  # nested without end, or a number of thousands of digits
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(document, Mapping):
        raise ConfigError(f"{path}: expected a mapping with the keys {', '.join(ReleaseConfig.model_fields)}")
    try:
        config = ReleaseConfig.model_validate(_plain(document))
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(path, document, error))) from error
    return _with_absolute_paths(config, path)


def _plain(node: Any) -> Any:
    """YAML nodes without the round-trip types, which pydantic's strict integers do not know."""
    if isinstance(node, TaggedScalar) and str(node.tag) == "tag:yaml.org,2002:str":
        return str(node.value)
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _describe(path: Path, document: Any, error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        location = [part for part in problem["loc"] if part != "[key]"]
        message = problem["msg"]
        if problem["type"] == _OURS:
            location += problem.get("ctx", {}).get("at", ())
        elif problem["type"] == "extra_forbidden":
            message = f"unknown key; {_nearest_key(location)}"
        elif not isinstance(problem["input"], Mapping | list):
            message += f", got {problem['input']!r}"
        key = ""
        for part in location:
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
        yield f"{path}:{_line(document, location)}: {key}: {message}" if key else f"{path}: {message}"


def _nearest_key(location: Sequence[int | str]) -> str:
    """A hint for an unknown key, the last part of `location`."""
    section: Any = _inner(ReleaseConfig)
    for part in location[:-1]:
        if get_origin(section) in (list, dict):
            section = _inner(get_args(section)[-1])
        elif str(part) in getattr(section, "model_fields", {}):
            section = _inner(section.model_fields[part].annotation)
    known = getattr(section, "model_fields", {})
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"


def _inner(annotation: Any) -> Any:
    """What an annotation is about, without Annotated and None."""
    while get_origin(annotation) not in (None, list, dict):
        annotation = next(argument for argument in get_args(annotation) if argument is not type(None))
    return annotation


def _line(document: Any, location: Sequence[int | str]) -> int:
    """The line (from 1) of the deepest part of the location that the document has."""
    line = 1
    node: Any = document
    for part in location:
        try:
            marks = node.lc
            if isinstance(node, list):
                place, node = marks.item(part), node[int(part)]
            else:
                key = next(key for key in node if str(key) == str(part))
                place, node = marks.key(key), node[key]
            line = place[0] + 1
        except (KeyError, IndexError, TypeError, AttributeError, StopIteration):
            break
    return line


def _with_absolute_paths(config: ReleaseConfig, path: Path) -> ReleaseConfig:
    def absolute(uri: str, key: str) -> str:
        try:
            return uri if "://" in uri else str((path.absolute().parent / Path(uri).expanduser()).resolve())
        except (RuntimeError, ValueError) as error:  # no such user, or a NUL
            raise ConfigError(f"{path}: {key}: {uri!r} is no path: {error}") from error

    tables = []
    for number, table in enumerate(config.large_embeddings.tables):
        if table.pretrained is not None:
            key = f"large_embeddings.tables[{number}].pretrained.embedding_snapshot_uri"
            uri = absolute(table.pretrained.embedding_snapshot_uri, key)
            pretrained = table.pretrained.model_copy(update={"embedding_snapshot_uri": uri})
            table = table.model_copy(update={"pretrained": pretrained})
        for key in ("vocab", "access_counts"):
            section = getattr(table, key)
            if section is not None:
                uri = absolute(section.uri, f"large_embeddings.tables[{number}].{key}.uri")
                table = table.model_copy(update={key: section.model_copy(update={"uri": uri})})
        tables.append(table)
    return config.model_copy(
        update={
            "large_embeddings": config.large_embeddings.model_copy(update={"tables": tables}),
            "snapshot": config.snapshot.model_copy(update={"uri": absolute(config.snapshot.uri, "snapshot.uri")}),
        }
    )
