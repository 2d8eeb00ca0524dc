"""The lookup that is exported: one module of plain operators, for every graph format.

It is not torchrec's Python, which neither scripts nor traces safely, but the operator underneath with its metadata in
buffers. Rows are one flat uint8 buffer, `weights`, that a loader attaches: in the saved graph it is a placeholder.

The graph is safe whatever it is given: an id outside its table becomes -1, FBGEMM's mark for a pruned row, on a copy,
and contributes zero; a negative length counts as zero; lengths that do not add up to the number of values raise, and so
does another number of weights. (AOTInductor takes that number for granted: it is one symbol of the exported program.)

A scripted module also looks rows up on a GPU, where a loader pads rows and sets the attributes that `_prepare_device`
lists. An operator that raises there ends the process's use of the device: lengths that do not add up are then cut instead.

Its method `lookup_checked`, which only TorchScript keeps, leaves the checks out: a loader that checks every request, on
copies of its own, need not have it checked again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime_py.constants import HOST
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
        self._prepare_device()

    def _prepare_device(self) -> None:
        """What only a loader for a GPU changes: attributes, no buffers, so that no exported program has them."""
        self.row_alignment = 1  # canonical rows are not padded
        self.raises = True
        self.uvm_weights = torch.zeros(0, dtype=torch.uint8)
        # FBGEMM's cache of rows: `cached` is whether there is one.
        self.cached = False
        self.cache_weights = torch.zeros(0, 0, dtype=torch.uint8)
        self.cache_starts = torch.zeros(0, dtype=torch.int64)
        self.cache_rows = 0
        self.cache_features = torch.zeros(0, dtype=torch.int32)
        self.cache_state = torch.zeros(0, 0, dtype=torch.int64)
        self.cache_times = torch.zeros(0, 0, dtype=torch.int64)

    def pool(self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        if weights is not None and weights.numel() != values.numel():  # sizes, which the host knows: no GPU is asked
            raise ValueError(f"per_sample_weights: {weights.numel()} weights for {values.numel()} values")
        lengths = lengths.clamp(min=0)
        by_feature = lengths.view(self.num_features, -1)
        limits = self.spread(self.num_embeddings, by_feature, values)
        indices = values.masked_fill((values < 0) | (values >= limits), -1)
        if self.raises:
            offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
        else:
            # int64, so that no sum overflows, and cut, so that no bag ends behind the ids.
            offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.to(torch.int64)).clamp(max=values.size(0))
        return self.pool_checked(indices, by_feature, offsets, weights)

    def measure(self, offsets: torch.Tensor) -> torch.Tensor:
        """Lengths [F, B]."""
        return (offsets[1:] - offsets[:-1]).view(self.num_features, -1)

    def pool_checked(
        self, indices: torch.Tensor, by_feature: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """What is left to do when nothing is outside: lengths `by_feature` [F, B], and their sums, `offsets` [F * B + 1]."""
        if weights is not None and not self.all_weighted:
            weights = weights.masked_fill(~self.spread(self.is_weighted, by_feature, indices), 1.0)
        if weights is not None:
            weights = weights.contiguous()  # FBGEMM reads them as if they were, whatever the strides
        pooled = (
            self.look_up_cached(indices, offsets, weights) if self.cached else self.look_up(indices, offsets, weights)
        )
        if self.any_mean:
            # FBGEMM's mean is this very product: the sum times the float32 reciprocal of the length.
            unused = torch.logical_or(~self.is_mean, by_feature == 0)
            # masked_fill, as everywhere here: `where` with a number would follow the process's default dtype.
            scales = by_feature.to(torch.float32).reciprocal().masked_fill(unused, 1.0)
            pooled = pooled * scales.t().index_select(1, self.column_features)
        return pooled

    def spread(self, said: torch.Tensor, by_feature: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What is `said` of each feature [F], of the feature of each id [N]; lengths `by_feature` [F, B]."""
        counts = by_feature.sum(1)
        if self.raises:
            # Raises where the counts do not add up to N, so that nothing after it reads past the ids.
            return torch.repeat_interleave(said, counts, output_size=values.size(0))
        positions = torch.arange(values.size(0), dtype=torch.int64, device=values.device)
        features = torch.searchsorted(counts.cumsum(0), positions, right=True)
        return said.index_select(0, features.clamp(max=self.num_features - 1))

    def look_up(self, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        pooled: torch.Tensor = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            self.weights,
            self.weights if self.raises else self.uvm_weights,  # a CPU does not read it
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
            offsets,
            0,  # fbgemm PoolingMode.SUM (TorchScript takes no global by name)
            weights,
            0,  # output type, fbgemm SparseType.FP32
            None,
            None,
            self.row_alignment,
            0,
            -1,
            -1,
        )
        return pooled

    def look_up_cached(
        self, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """As `look_up`, after it has moved the rows that are asked for into the cache; there is none on a CPU."""
        pooled: torch.Tensor = torch.ops.fbgemm.int_nbit_split_embedding_uvm_caching_codegen_lookup_function(
            self.weights,
            self.uvm_weights,
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
            offsets,
            0,
            weights,
            0,
            self.cache_weights,
            None,
            self.row_alignment,
            0,
            -1,
            -1,
            self.cache_starts,
            self.cache_rows,
            self.cache_features,
            self.cache_state,
            self.cache_times,
        )
        return pooled


class Lookup(_PlainOpLookup):
    """The graph of an artifact without per-sample weights."""

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Int64 [N] and int32 [F * B] to float32 [B, sum(D)]."""
        return self.pool(values, lengths, None)

    @torch.jit.export
    def lookup_checked(self, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """As `forward` for a request that was checked: int64 [N], each -1 or in its table, and int64 [F * B + 1]."""
        by_feature = self.measure(offsets) if self.any_mean else offsets  # only a mean reads it
        return self.pool_checked(values, by_feature, offsets, None)


class WeightedLookup(_PlainOpLookup):
    """The graph of an artifact with per-sample weights; those of an unweighted feature are not read."""

    def forward(self, values: torch.Tensor, lengths: torch.Tensor, per_sample_weights: torch.Tensor) -> torch.Tensor:
        """Int64 [N], int32 [F * B] and float32 [N] to float32 [B, sum(D)]."""
        return self.pool(values, lengths, per_sample_weights)

    @torch.jit.export
    def lookup_checked(
        self, values: torch.Tensor, offsets: torch.Tensor, per_sample_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `Lookup.lookup_checked`, with float32 [N]."""
        return self.pool_checked(values, self.measure(offsets), offsets, per_sample_weights)


class SplicedLookup(Lookup):
    """A `Lookup` whose pooled embeddings go through a surgery."""

    def __init__(self, slots: Sequence[_Slot], weights_bytes: int, surgery: torch.nn.Module) -> None:
        super().__init__(slots, weights_bytes)
        self.surgery = surgery

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Int64 [N] and int32 [F * B] to float32 [B, W], the outputs of the surgery."""
        answer: torch.Tensor = self.surgery(self.pool(values, lengths, None))
        return answer

    @torch.jit.export
    def lookup_checked(self, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """As `Lookup.lookup_checked`, and the surgery."""
        by_feature = self.measure(offsets) if self.any_mean else offsets
        answer: torch.Tensor = self.surgery(self.pool_checked(values, by_feature, offsets, None))
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

    @torch.jit.export
    def lookup_checked(
        self, values: torch.Tensor, offsets: torch.Tensor, per_sample_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `WeightedLookup.lookup_checked`, and the surgery."""
        pooled = self.pool_checked(values, self.measure(offsets), offsets, per_sample_weights)
        answer: torch.Tensor = self.surgery(pooled)
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
