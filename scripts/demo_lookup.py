#!/usr/bin/env python
"""What a serving process does: loads an artifact, looks up one request, and shows what a bad request gets."""

import sys
import time
from pathlib import Path

import torch

from runtime_py import InvalidInputError, load_artifact


def main() -> None:
    torch.set_num_threads(1)  # as a server with a process a core: a small request gains nothing from waiting for others
    start = time.perf_counter()
    artifact = load_artifact(Path(sys.argv[1]))
    print(f"loaded and verified in {(time.perf_counter() - start) * 1e3:.0f} ms: {artifact}")

    request = {
        "user_id": [[3], [149_999]],  # two examples, one bag of ids each
        "item_id": [[7, 11, 13], []],
        "author_id": [[1], [2]],
        "country": [[49], [49]],
        "category": [[12], [12, 700]],
        "last_category": [[], [5]],
    }
    pooled = artifact(request)
    print(f"pooled.values: {list(pooled.values.shape)} {pooled.values.dtype}; keys: {', '.join(pooled.keys())}")
    print(f"pooled['country']: {[[round(value, 4) for value in row] for row in pooled['country'].tolist()]}")

    rounds = 2_000
    start = time.perf_counter()
    for _ in range(rounds):
        artifact(request)
    print(f"one request by name, checked: {(time.perf_counter() - start) / rounds * 1e6:.0f} us")
    try:
        artifact(request | {"country": [[49], [250]]})
    except InvalidInputError as error:
        print(f"a bad request: InvalidInputError: {error}")


if __name__ == "__main__":
    main()
