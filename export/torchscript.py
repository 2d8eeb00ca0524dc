"""The TorchScript graph: the plain-op lookup, scripted and saved without a weight byte.

Never frozen: freezing would bake the placeholder in.
"""

from pathlib import Path

import torch

from export.lookup import Lookup, WeightedLookup

__all__ = ["write_torchscript"]


def write_torchscript(lookup: Lookup | WeightedLookup, path: Path) -> None:
    """Scripts `lookup` and writes it; some 10 KB whatever the tables."""
    torch.jit.save(torch.jit.script(lookup), path)
