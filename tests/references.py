"""What the product must compute, written again in numpy and plain loops, slowly and independently."""

from collections.abc import Mapping, Sequence

import numpy as np

BITS = {"int8": 8, "int4": 4, "int2": 2}


def stored_rows(trained: np.ndarray, precision: str) -> np.ndarray:
    """Canonical rows [E, D], or [E, R] of bytes where they are quantized, of trained rows [E, D]."""
    if precision in BITS:
        rows = [quantized_row(row.astype(np.float32), BITS[precision]) for row in trained]
        return np.array([list(row) for row in rows], np.uint8)
    return trained.astype({"fp32": np.float32, "fp16": np.float16}[precision])


def quantized_row(row: np.ndarray, bits: int) -> bytes:
    """fp16 scale, fp16 bias, and the codes of a float32 row, the first in the lowest bits of the first byte."""
    top = 2**bits - 1
    low, high = min(row), max(row)
    bias = np.float16(low)
    spread = np.float32(high - np.float32(bias))
    scale = np.float16(1.0) if spread == 0 else np.float16(spread / np.float32(top))
    if scale == 0:
        scale = np.float16(1.0)
    inverse = np.float32(1.0) / np.float32(scale)
    packed = [0] * (len(row) * bits // 8)
    for column, value in enumerate(row):
        position = np.float32(np.float32(value - np.float32(bias)) * inverse)
        code = min(max(round(float(position)), 0), top)  # Python rounds ties to even, too
        packed[column * bits // 8] |= code << (column * bits % 8)
    return scale.tobytes() + bias.tobytes() + bytes(packed)


def dequantized_rows(stored: np.ndarray, precision: str, dim: int) -> np.ndarray:
    """What stored rows mean, float32 [E, D]."""
    if precision not in BITS:
        return stored.astype(np.float32)
    bits = BITS[precision]
    values = np.zeros((len(stored), dim), np.float32)
    for number, row in enumerate(stored):
        scale, bias = np.frombuffer(row[:4].tobytes(), np.float16).astype(np.float64)
        for column in range(dim):
            code = row[4 + column * bits // 8] >> (column * bits % 8) & (2**bits - 1)
            values[number, column] = np.float32(float(code) * scale + bias)  # the product is exact
    return values


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
