"""The release configuration: what to export, from which snapshot, at which precision.

The training section (`large_embeddings`) has the field names of twitter/the-algorithm-ml, so that a training
configuration loads unchanged; the serving fields are additions with defaults. `config_file` reads one.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    model_validator,
)

from export.config_values import (
    Cosine,
    Count,
    FeatureName,
    Float,
    Integer,
    Number,
    Ratio,
    TableName,
    check_class_path,
    check_json,
    check_published,
    check_unique,
    error_at,
    find_texts,
    is_utf8,
    one_of,
    read_size,
)
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


# --- What this version builds. The configuration names more than that; the rest is refused while it is read. -------


_BuiltGraph = Annotated[GraphKind, one_of(GraphKind.TORCHSCRIPT, GraphKind.AOT_INDUCTOR, GraphKind.ONNX)]
_BuiltTarget = Annotated[Target, one_of(Target.CPU)]


def _stored(value: Precision) -> Precision:
    if value is Precision.AUTO:
        raise error_at(f"'auto' is no type of rows; expected one of {', '.join(STORED)}")
    return value


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
    learning_rate_boundaries: list[Integer] | None = None
    learning_rate_values: list[Float] | None = None


class _LinearRampToConstant(_Section):
    learning_rate: Float
    num_ramp_steps: Count


class _LinearRampToCosine(_Section):
    learning_rate: Float
    final_learning_rate: Float
    num_ramp_steps: Count
    final_num_steps: Count


class _LearningRate(_Section):
    constant: Float | None = None
    linear_ramp_to_cosine: _LinearRampToCosine | None = None
    linear_ramp_to_constant: _LinearRampToConstant | None = None
    piecewise_constant: _PiecewiseConstant | None = None


class _Adam(_Section):
    lr: Float
    betas: tuple[Float, Float] = (0.9, 0.999)
    eps: Float = 1e-7


class _Sgd(_Section):
    lr: Float
    momentum: Float = 0.0


class _Adagrad(_Section):
    lr: Float
    eps: Float = 0.0


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
            raise error_at(f"exactly one of adam, sgd, adagrad is required, got {chosen}")
        return self


class EmbeddingSnapshot(_Section):
    """Another snapshot, and the table in it, whose rows a table takes; `prefix` as of the release's own snapshot."""

    emb_name: Annotated[str, Field(min_length=1)]
    embedding_snapshot_uri: Annotated[str, Field(min_length=1)]
    prefix: str | None = None


_S = TypeVar("_S")


def _two_columns(section: _S, first: str, second: str) -> _S:
    if first == second:
        raise error_at(f"expected two columns, got '{first}' for both")
    return section


class VocabularyConfig(_Section):
    """Which row belongs to which entity: a folder of parquet files, or one, with a column of ids and one of rows.

    `min_coverage` is the least share of the table's rows that must have an entity; below it the build fails.
    """

    uri: Annotated[str, Field(min_length=1)]
    entity_id: Annotated[str, Field(min_length=1)] = "entity_id"
    index: Annotated[str, Field(min_length=1)] = "index"
    min_coverage: Annotated[Float, Field(ge=0.0, le=1.0)] = 0.0

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
        raise error_at(f"expected a path, or a mapping with the key 'uri', got {value!r}")
    return value


class EmbeddingBagConfig(_Section):
    """One table: E = `num_embeddings` rows of D = `embedding_dim` values, and the features that look rows up in it."""

    name: TableName
    num_embeddings: Count
    embedding_dim: Annotated[StrictInt, Field(ge=1, le=2**20)]
    pretrained: EmbeddingSnapshot | None = None
    vocab: Annotated[VocabularyConfig | None, BeforeValidator(_read_uri)] = None
    optimizer: OptimizerConfig | None = None
    data_type: DataType
    feature_names: Annotated[list[FeatureName], Field(min_length=1)] | None = None
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
            raise error_at("per-sample weights need pooling: sum, as in torch.nn.EmbeddingBag")
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
                raise error_at(f"duplicate table name '{table.name}'", "tables", number, "name")
            tables.add(table.name)
            for feature in table.features:
                if feature in owners:
                    first = owners[feature]
                    where = f"table '{first}'" if first == table.name else f"tables '{first}' and '{table.name}'"
                    hint = (
                        ""
                        if first == table.name
                        else (
                            "; a feature looks rows up in one table: give the other one a name of its own, and send ids twice"
                        )
                    )
                    message = f"duplicate feature name '{feature}' in {where}{hint}"
                    raise error_at(message, "tables", number, "feature_names")
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
    step: Number | None = None
    prefix: str | None = None


class Budget(_Section):
    """The largest loss of accuracy that a table's rows may show; a missing figure is not gated.

    Every figure compares the stored rows, dequantized, with the float32 rows of the snapshot, over the whole table:
    `max_row_relative_l2` is of the root mean square over rows, `min_cosine` of the mean over rows, `min_worst_cosine` of
    every row, `max_lookup_relative_l2` of pooled bags.
    """

    max_absolute_error: Ratio | None = None
    mean_absolute_error: Ratio | None = None
    max_relative_l2: Ratio | None = None
    max_row_relative_l2: Ratio | None = None
    min_cosine: Cosine | None = None
    min_worst_cosine: Cosine | None = None
    max_lookup_relative_l2: Ratio | None = None
    max_vanished_rows: Number | None = None
    max_outlier_rows: Number | None = None

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


class AutoConfig(_Section):
    """What `auto` has to keep to: figures of every table that is left to it, or the bytes of the whole artifact, or both.

    `precisions` are those to choose from.
    """

    max_relative_l2: Ratio | None = None
    min_cosine: Cosine | None = None
    max_bytes: Annotated[Annotated[ByteSize, Field(gt=0, lt=2**63)] | None, BeforeValidator(read_size)] = None
    precisions: Annotated[list[_StoredPrecision], Field(min_length=1), AfterValidator(check_unique)] = list(STORED)

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
            raise error_at("a limit is required: max_relative_l2, min_cosine or max_bytes")
        return self


class ServingConfig(_Section):
    """What to write."""

    precision: Precision = Precision.FP16
    auto: AutoConfig | None = None
    graphs: Annotated[list[_BuiltGraph], Field(min_length=1), AfterValidator(check_unique)] = [GraphKind.TORCHSCRIPT]
    targets: Annotated[list[_BuiltTarget], Field(min_length=1), AfterValidator(check_unique)] = [Target.CPU]
    isa: Isa = Isa.X86_64_V3

    @model_validator(mode="after")
    def _has_torchscript(self) -> Self:
        if GraphKind.TORCHSCRIPT not in self.graphs:
            raise error_at("expected torchscript among the graphs: it is what the loader runs by default", "graphs")
        return self

    @model_validator(mode="after")
    def _uses_isa(self) -> Self:
        if "isa" in self.model_fields_set and GraphKind.AOT_INDUCTOR not in self.graphs:
            raise error_at("is for a compiled graph: add aot_inductor to graphs, or leave isa out", "isa")
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

    seed: Number = 0
    batches: Count = 8
    budgets: dict[_StoredPrecision, Budget] = {}
    table_budgets: dict[str, Budget] = {}


class SurgeryConfig(_Section):
    """A `torch.nn.Module` that serving applies to the pooled embeddings, at `LargeEmbeddings.surgery_cut_point`.

    `prefix` is where its parameters sit in the snapshot's state dict, by default `surgery_cut_point`, beside the collection.
    """

    module: Annotated[str, AfterValidator(check_class_path)]
    kwargs: Annotated[dict[str, Any], AfterValidator(check_json), AfterValidator(check_published)] = {}
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
        for at, text in find_texts(document):
            if not is_utf8(text):
                message = f"{text!r} has half a character, which no UTF-8 text has; write the character itself"
                raise error_at(message, *(part for part in at if not isinstance(part, str) or is_utf8(part)))
        return document

    @model_validator(mode="after")
    def _is_a_release(self) -> Self:
        if self.mode is not Mode.INFERENCE:
            raise error_at(f"a release is built in mode 'inference', got '{self.mode}'", "mode")
        names = [table.name for table in self.large_embeddings.tables]
        for name in self.parity.table_budgets:
            if name not in names:
                message = f"parity.table_budgets names '{name}', which is no table; tables: {', '.join(names)}"
                raise error_at(message, "parity", "table_budgets", name)
        return self

    @model_validator(mode="after")
    def _rows_can_be_stored(self) -> Self:
        if self.serving.auto and Precision.AUTO not in map(self.serving_precision, self.large_embeddings.tables):
            raise error_at(
                "no table is left to 'auto'; remove the key, or say serving_precision: auto", "serving", "auto"
            )
        for number, table in enumerate(self.large_embeddings.tables):
            at = ("large_embeddings", "tables", number, "serving_precision")
            precision = self.serving_precision(table)
            if precision is Precision.AUTO:
                if self.serving.auto is None:
                    raise error_at(
                        f"table '{table.name}': 'auto' needs something to keep to; add serving.auto with max_relative_l2, "
                        "min_cosine or max_bytes",
                        *(at if table.serving_precision else ("serving", "precision")),
                    )
                if not self.candidates(table):
                    names = ", ".join(self.serving.auto.precisions)
                    raise error_at(f"table '{table.name}': no rows of {table.embedding_dim} values in {names}", *at[:3])
                continue
            divisor = dim_divisor(precision)
            if table.embedding_dim % divisor:
                raise error_at(
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
