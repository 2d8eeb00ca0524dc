"""`LargeEmbeddings`, the model that is exported: one torchrec `EmbeddingBagCollection` and a cut point.

It has the shape of twitter/the-algorithm-ml's `common/modules/embedding`, so that a state dict of that project fits it.
It is the eager side of every parity check; what is shipped is the plain-op module of `export.lookup`.
"""

import logging
from collections.abc import Mapping

import torch
import torchrec
from torchrec.modules import embedding_configs
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from export.config import DataType, LargeEmbeddingsConfig, Pooling

__all__ = ["LargeEmbeddings", "torchrec_tables"]

_DATA_TYPES = {DataType.FP32: embedding_configs.DataType.FP32, DataType.FP16: embedding_configs.DataType.FP16}
_POOLINGS = {Pooling.SUM: torchrec.PoolingType.SUM, Pooling.MEAN: torchrec.PoolingType.MEAN}


def torchrec_tables(config: LargeEmbeddingsConfig) -> list[torchrec.EmbeddingBagConfig]:
    """The tables as torchrec describes them, in configuration order."""
    return [
        torchrec.EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=list(table.features),
            pooling=_POOLINGS[table.pooling],
            data_type=_DATA_TYPES[table.data_type],
        )
        for table in config.tables
    ]


def _is_no_tracing_notice(record: logging.LogRecord) -> bool:
    """Drops one line that torchrec's forward makes torch log, about tracing, where nothing is traced."""
    return "is_fx_tracing will return true" not in str(record.msg)


class LargeEmbeddings(torch.nn.Module):
    """Pooled embeddings of every feature, then the cut point.

    The collection is created on `meta`, as upstream does: `fill` gives it rows before it is called.
    `surgery_cut_point` is an identity, and the place where serving-time post-processing is spliced in.
    """

    def __init__(self, config: LargeEmbeddingsConfig) -> None:
        super().__init__()
        logging.getLogger("torch.fx._symbolic_trace").addFilter(_is_no_tracing_notice)
        self.ebc = torchrec.EmbeddingBagCollection(
            tables=torchrec_tables(config), is_weighted=config.weighted, device=torch.device("meta")
        )
        self.surgery_cut_point = torch.nn.Identity()

    def fill(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Makes `rows` (table name to [E, D]) the tables' parameters, without a copy.

        Raises:
            RuntimeError: a table is missing or unknown, or has another shape (from `load_state_dict`).
        """
        state = {f"ebc.embedding_bags.{name}.weight": tensor for name, tensor in rows.items()}
        self.load_state_dict(state, assign=True)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """F features of B bags to float32 [B, sum(D)], keyed by feature in table order."""
        pooled: KeyedTensor = self.surgery_cut_point(self.ebc(features))
        return pooled
