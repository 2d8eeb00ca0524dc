"""What the product must compute, written again in numpy and plain loops, slowly and independently."""

from collections.abc import Mapping, Sequence

import numpy as np


def stored_rows(trained: np.ndarray, precision: str) -> np.ndarray:
    """Canonical rows [E, D] of trained rows [E, D]."""
    return trained.astype({"fp32": np.float32, "fp16": np.float16}[precision])


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
