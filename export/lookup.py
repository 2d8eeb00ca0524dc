"""The lookup that is exported: one module of plain operators, for every graph format.

It is not torchrec's Python, which neither scripts nor traces safely, but the operator underneath with its metadata in
buffers. Rows are one flat uint8 buffer, `weights`, that a loader attaches: in the saved graph it is a placeholder.

The graph is safe whatever it is given: an id outside its table becomes -1, FBGEMM's mark for a pruned row, on a copy,
and contributes zero; a negative length counts as zero; lengths that do not add up to the number of values raise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime_py.aot_inductor import HOST
from runtime_py.manifest import ROW_FORMATS, Table
from runtime_py.manifest import Feature as ManifestFeature

__all__ = ["OPERATOR_LIBRARIES", "Lookup", "WeightedLookup", "make_lookup"]

# The FBGEMM libraries that register the operators used below.
OPERATOR_LIBRARIES = ["fbgemm_gpu_tbe_inference", "fbgemm_gpu_sparse_async_cumsum"]

_PLACEHOLDER_BYTES = 64  # AOTInductor drops an empty constant from its package


@dataclass(frozen=True)
class _Slot:
    """One feature with all that the operator needs to know of its table."""

    table: Table
    mean: bool
    weighted: bool


class _PlainOpLookup(torch.nn.Module):
    """State and steps that both signatures share. F features, B bags a feature, N ids, D `embedding_dim`."""

    weights: torch.Tensor
    weights_placements: torch.Tensor
    weights_offsets: torch.Tensor
    weights_types: torch.Tensor
    dim_offsets: torch.Tensor
    num_embeddings: torch.Tensor
    is_mean: torch.Tensor
    is_weighted: torch.Tensor
    column_features: torch.Tensor

    def __init__(self, slots: Sequence[_Slot], weights_bytes: int) -> None:
        super().__init__()
        dims = [slot.table.embedding_dim for slot in slots]
        self.num_features = len(slots)
        self.total_dim = sum(dims)
        self.weights_bytes = weights_bytes
        largest = dict.fromkeys(ROW_FORMATS, 0)
        for slot in slots:
            precision = slot.table.serving_precision
            largest[precision] = max(largest[precision], slot.table.embedding_dim)
        self.max_dim_int2 = largest["int2"]
        self.max_dim_int4 = largest["int4"]
        self.max_dim_int8 = largest["int8"]
        self.max_dim_fp16 = largest["fp16"]
        self.max_dim_fp32 = largest["fp32"]
        self.any_mean = any(slot.mean for slot in slots)
        self.all_weighted = all(slot.weighted for slot in slots)

        types = [ROW_FORMATS[slot.table.serving_precision].sparse_type for slot in slots]
        starts = [sum(dims[:i]) for i in range(len(dims) + 1)]
        columns = [feature for feature, dim in enumerate(dims) for _ in range(dim)]
        self.register_buffer("weights", torch.zeros(_PLACEHOLDER_BYTES, dtype=torch.uint8))
        self.register_buffer("weights_placements", torch.full((len(slots),), HOST, dtype=torch.int32))
        self.register_buffer("weights_offsets", torch.tensor([slot.table.offset_bytes for slot in slots]))
        self.register_buffer("weights_types", torch.tensor(types, dtype=torch.uint8))
        self.register_buffer("dim_offsets", torch.tensor(starts, dtype=torch.int32))
        self.register_buffer("num_embeddings", torch.tensor([slot.table.num_embeddings for slot in slots]))
        self.register_buffer("is_mean", torch.tensor([[slot.mean] for slot in slots]))
        self.register_buffer("is_weighted", torch.tensor([slot.weighted for slot in slots]))
        # The feature of every output column; only mean pooling reads it.
        self.register_buffer("column_features", torch.tensor(columns if self.any_mean else [], dtype=torch.int64))

    def pool(self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        lengths = lengths.clamp(min=0)
        by_feature = lengths.view(self.num_features, -1)
        counts = by_feature.sum(1)
        # Raises where the counts do not add up to N, so that nothing below reads past the ids.
        limits = torch.repeat_interleave(self.num_embeddings, counts, output_size=values.size(0))
        indices = values.masked_fill((values < 0) | (values >= limits), -1)
        if weights is not None and not self.all_weighted:
            weighted = torch.repeat_interleave(self.is_weighted, counts, output_size=values.size(0))
            weights = weights.masked_fill(~weighted, 1.0)
        if weights is not None:
            weights = weights.contiguous()  # FBGEMM reads them as if they were, whatever the strides
        pooled: torch.Tensor = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            self.weights,
            self.weights,
            self.weights_placements,
            self.weights_offsets,
            self.weights_types,
            self.dim_offsets,
            self.total_dim,
            self.max_dim_int2,
            self.max_dim_int4,
            self.max_dim_int8,
            self.max_dim_fp16,
            self.max_dim_fp32,
            indices,
            torch.ops.fbgemm.asynchronous_complete_cumsum(lengths),
            0,  # fbgemm PoolingMode.SUM (TorchScript takes no global by name)
            weights,
            0,  # output type, fbgemm SparseType.FP32
            None,
            None,
            1,  # row alignment: canonical rows are not padded
            0,
            -1,
            -1,
        )
        if self.any_mean:
            # FBGEMM's mean is this very product: the sum times the float32 reciprocal of the length.
            unused = torch.logical_or(~self.is_mean, by_feature == 0)
            # masked_fill, as everywhere here: `where` with a number would follow the process's default dtype.
            scales = by_feature.to(torch.float32).reciprocal().masked_fill(unused, 1.0)
            pooled = pooled * scales.t().index_select(1, self.column_features)
        return pooled


class Lookup(_PlainOpLookup):
    """The graph of an artifact without per-sample weights."""

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Int64 [N] and int32 [F * B] to float32 [B, sum(D)]."""
        return self.pool(values, lengths, None)


class WeightedLookup(_PlainOpLookup):
    """The graph of an artifact with per-sample weights; those of an unweighted feature are not read."""

    def forward(self, values: torch.Tensor, lengths: torch.Tensor, per_sample_weights: torch.Tensor) -> torch.Tensor:
        """Int64 [N], int32 [F * B] and float32 [N] to float32 [B, sum(D)]."""
        return self.pool(values, lengths, per_sample_weights)


class SplicedLookup(Lookup):
    """A `Lookup` whose pooled embeddings go through a surgery."""

    def __init__(self, slots: Sequence[_Slot], weights_bytes: int, surgery: torch.nn.Module) -> None:
        super().__init__(slots, weights_bytes)
        self.surgery = surgery

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Int64 [N] and int32 [F * B] to float32 [B, W], the outputs of the surgery."""
        answer: torch.Tensor = self.surgery(self.pool(values, lengths, None))
        return answer


class SplicedWeightedLookup(WeightedLookup):
    """A `WeightedLookup` whose pooled embeddings go through a surgery."""

    def __init__(self, slots: Sequence[_Slot], weights_bytes: int, surgery: torch.nn.Module) -> None:
        super().__init__(slots, weights_bytes)
        self.surgery = surgery

    def forward(self, values: torch.Tensor, lengths: torch.Tensor, per_sample_weights: torch.Tensor) -> torch.Tensor:
        """Int64 [N], int32 [F * B] and float32 [N] to float32 [B, W], the outputs of the surgery."""
        answer: torch.Tensor = self.surgery(self.pool(values, lengths, per_sample_weights))
        return answer


def make_lookup(
    tables: Sequence[Table],
    features: Sequence[ManifestFeature],
    surgery: torch.nn.Module | None = None,
    parameters_bytes: int = 0,
) -> Lookup | WeightedLookup:
    """The lookup over `features`, in their order, whose rows lie where `tables` say.

    A `surgery` takes float32 [B, sum(D)] and gives what is returned instead (see `export.splice`); its parameters take
    `parameters_bytes` of the weight data.
    """
    by_name = {table.name: table for table in tables}
    slots = [_Slot(by_name[feature.table], feature.pooling == "mean", feature.weighted) for feature in features]
    weighted = any(slot.weighted for slot in slots)
    weights_bytes = sum(table.bytes for table in tables) + parameters_bytes
    if surgery is None:
        return (WeightedLookup if weighted else Lookup)(slots, weights_bytes).eval()
    return (SplicedWeightedLookup if weighted else SplicedLookup)(slots, weights_bytes, surgery).eval()
