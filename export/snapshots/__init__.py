"""Training snapshots: the only place that reads a checkpoint.

    with_rows = open_snapshot(SnapshotConfig(uri="snapshots/demo")).table(table_config)
    for start, rows in with_rows.chunks(range(0, with_rows.num_embeddings, 4096)): ...

Modules: `source` (finds the snapshot, its format and a table in it), `rows` (a table's rows, read by range), and one
module a format that says which bytes of which file hold which rows: `dcp`, `torchsnapshot`, `safetensors_files` (with
`dcp_sharding_info`), `state_dict`; `torch_files` is shared by two.
"""

from export.snapshots.rows import TableRows, identify
from export.snapshots.source import Snapshot, open_snapshot

__all__ = ["Snapshot", "TableRows", "identify", "open_snapshot"]
