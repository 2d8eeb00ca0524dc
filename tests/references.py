"""What the product must compute, written again in numpy and plain loops, slowly and independently."""

from collections.abc import Mapping, Sequence

import numpy as np


def stored_rows(trained: np.ndarray, precision: str) -> np.ndarray:
    """Canonical rows [E, D] of trained rows [E, D]."""
    return trained.astype({"fp32": np.float32, "fp16": np.float16}[precision])


def hash_entity(entity: int) -> int:
    """MurmurHash3's 64-bit finalizer of an int64, as uint64."""
    mask = 2**64 - 1
    h = entity & mask
    h ^= h >> 33
    h = h * 0xFF51AFD7ED558CCD & mask
    h ^= h >> 33
    h = h * 0xC4CEB9FE1A85EC53 & mask
    return h ^ h >> 33


def vocabulary_slots(entity_of_row: Mapping[int, int], capacity: int) -> np.ndarray:
    """The hash table int64 [capacity, 2] of entities by row: linear probing, in the order of rows."""
    slots = np.full((capacity, 2), -1, np.int64)
    for row, entity in sorted(entity_of_row.items()):
        slot = hash_entity(entity) % capacity
        while slots[slot, 0] != -1:
            slot = (slot + 1) % capacity
        slots[slot] = entity, row
    return slots


def find_row(slots: np.ndarray, entity: int) -> int:
    """The row of an entity in such a hash table, or -1."""
    slot = hash_entity(entity) % len(slots)
    while slots[slot, 0] not in (-1, entity):
        slot = (slot + 1) % len(slots)
    return int(slots[slot, 1])


def pooled_bag(rows: np.ndarray, ids: Sequence[int], pooling: str, weights: Sequence[float] | None) -> np.ndarray:
    """One bag, float32 [D], added up in the order of its ids as FBGEMM does; an id outside the table adds nothing."""
    total = np.zeros(rows.shape[1], np.float32)
    for position, row_id in enumerate(ids):
        if 0 <= row_id < len(rows):
            row = rows[row_id].astype(np.float32)
            # One rounding for the product and the sum together (fused multiply-add), through float64.
            scale = 1.0 if weights is None else float(np.float32(weights[position]))
            total = (total.astype(np.float64) + row.astype(np.float64) * scale).astype(np.float32)
    if pooling == "mean" and len(ids):
        total = total * (np.float32(1.0) / np.float32(len(ids)))
    return total


def pooled_batch(
    features: Sequence[Mapping[str, object]],
    tables: Mapping[str, np.ndarray],
    bags: Mapping[str, Sequence[Sequence[int]]],
) -> np.ndarray:
    """A batch without weights, float32 [B, sum(D)]; features as in the manifest: name, table, pooling."""
    columns = []
    for feature in features:
        rows = tables[str(feature["table"])]
        pooled = [pooled_bag(rows, bag, str(feature["pooling"]), None) for bag in bags[str(feature["name"])]]
        columns.append(np.stack(pooled) if pooled else np.zeros((0, rows.shape[1]), np.float32))
    return np.concatenate(columns, axis=1)
