"""Writes one model, sharded as torchrec shards it over two gloo processes, with both libraries that trainers save with.

Run by torchrun: `write_sharded.py ROWS_FILE OUTPUT`, where ROWS_FILE is a torch.save file of rows by table name. Tables
are sharded by their position: row-wise, column-wise, table-wise, data parallel.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torchrec
import torchsnapshot
from torch.distributed import checkpoint
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan

warnings.simplefilter("ignore")


class Model(torch.nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.ebc = torchrec.EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


def fill(module, rows):
    """The rows, after sharding: the wrapper initialises them itself."""
    for name, value in module.state_dict().items():
        full = rows[name.split(".")[-2]]
        if hasattr(value, "local_shards"):
            for shard in value.local_shards():
                row, column = shard.metadata.shard_offsets
                height, width = shard.metadata.shard_sizes
                shard.tensor.copy_(full[row : row + height, column : column + width])
        else:
            value.copy_(full)


def main():
    rows, output = torch.load(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    tables = [
        torchrec.EmbeddingBagConfig(
            name=name, num_embeddings=tensor.shape[0], embedding_dim=tensor.shape[1], feature_names=[name]
        )
        for name, tensor in rows.items()
    ]
    model = Model(tables)
    ways = [row_wise(), column_wise(ranks=[0, 1]), table_wise(rank=1), data_parallel()]
    sharder = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        model.ebc, dict(zip(rows, ways, strict=True)), sharder, local_size=2, world_size=2, device_type="cpu"
    )
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan({"ebc": plan}),
        sharders=[sharder],
        init_data_parallel=True,
    )
    with torch.no_grad():
        fill(sharded, rows)
    state = {"model": sharded.state_dict()}
    checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(output / "dcp"))
    torchsnapshot.Snapshot.take(str(output / "torchsnapshot"), {"model": sharded})
    with torchsnapshot.knobs.override_max_shard_size_bytes(4096):
        torchsnapshot.Snapshot.take(str(output / "split"), {"model": sharded})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
