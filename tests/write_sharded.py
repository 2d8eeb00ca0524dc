"""Writes one model as two gloo processes hold it, with the libraries that trainers save with.

Run by torchrun: `write_sharded.py ROWS_FILE OUTPUT`, where ROWS_FILE is a torch.save file of rows by table name.
torchrec shards the tables by their names; DTensor shards all in one way, each.
"""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torchrec
import torchsnapshot
from support import state_dict
from torch.distributed import checkpoint
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import DataType

warnings.simplefilter("ignore")

WAYS = {
    "by_row": row_wise(),
    "by_column": column_wise(ranks=[0, 1]),
    "by_table": table_wise(rank=1),
    "everywhere": data_parallel(),
    "by_host": table_row_wise(host_index=0),
    "grid": grid_shard(host_indexes=[0, 0]),
}
TYPES = {torch.float32: DataType.FP32, torch.float16: DataType.FP16}


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


def sharded_model(rows):
    tables = [
        torchrec.EmbeddingBagConfig(
            name=name,
            num_embeddings=tensor.shape[0],
            embedding_dim=tensor.shape[1],
            feature_names=[name],
            data_type=TYPES[tensor.dtype],
        )
        for name, tensor in rows.items()
    ]
    model = Model(tables)
    sharder = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        model.ebc, {name: WAYS[name] for name in rows}, sharder, local_size=2, world_size=2, device_type="cpu"
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
    return sharded


def save_dcp(state, folder):
    checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(folder))


def save_safetensors(state, folder, **options):
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True, **options)
    checkpoint.save(state, storage_writer=writer)


def write_torchrec(rows, output):
    sharded = sharded_model(rows)
    save_dcp({"model": sharded.state_dict()}, output / "dcp_torchrec")
    torchsnapshot.Snapshot.take(str(output / "torchsnapshot_torchrec"), {"model": sharded})
    with torchsnapshot.knobs.override_max_shard_size_bytes(4096):
        torchsnapshot.Snapshot.take(str(output / "torchsnapshot_split"), {"model": sharded})
    # Of the two parts of the grid that each process has, torch's safetensors writer would keep one.
    state = {name: rows["grid"] if ".grid." in name else value for name, value in sharded.state_dict().items()}
    save_safetensors(state, output / "safetensors_torchrec")


def write_dtensor(rows, output):
    mesh = init_device_mesh("cpu", (2,))
    placements = {"shard_0": Shard(0), "shard_1": Shard(1), "replicate": Replicate()}
    states = {
        way: state_dict({name: distribute_tensor(tensor, mesh, [placement]) for name, tensor in rows.items()})
        for way, placement in placements.items()
    }
    for way, state in states.items():
        save_dcp({"model": state, "step": 3}, output / f"dcp_dtensor_{way}")
        save_safetensors(state, output / f"safetensors_dtensor_{way}")
    state = states["shard_0"]
    numbers = {name: number % 2 + 1 for number, name in enumerate(state)}
    save_safetensors(state, output / "safetensors_mapped", fqn_to_index_mapping=numbers)
    save_safetensors(
        state, output / "safetensors_consolidated", fqn_to_index_mapping=numbers, enable_consolidation=True
    )


def main():
    rows, output = torch.load(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    write_torchrec(rows, output)
    write_dtensor(rows, output)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends as usual


if __name__ == "__main__":
    main()
