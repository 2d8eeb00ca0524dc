"""The TorchScript graph: the plain-op lookup, scripted and saved without a weight byte.

Never frozen: freezing would bake the placeholder in. The debug records that torch adds are left out: they hold paths of
the build machine, and with them the same build would give other bytes elsewhere.
"""

import io
import itertools
import re
from pathlib import Path

import torch

from export.lookup import OPERATOR_LIBRARIES, Lookup, WeightedLookup
from export.publish import write_file
from runtime_py.operators import load_operators

__all__ = ["write_torchscript"]

_WRITER_ADDS = ("version", "byteorder", ".data/")
_CONSTANT = re.compile(rb"  \w+ : Final\[")


def write_torchscript(lookup: Lookup | WeightedLookup, path: Path) -> None:
    """Scripts `lookup` and writes it; a few KB whatever the tables."""
    load_operators(OPERATOR_LIBRARIES)
    scripted, result = io.BytesIO(), io.BytesIO()
    module = torch.jit.script(lookup)
    _empty_parameters(module)
    torch.jit.save(module, scripted)
    scripted.seek(0)
    reader = torch._C.PyTorchFileReader(scripted)
    writer = torch._C.PyTorchFileWriter(result)  # in memory: it aborts the process when the disk is full
    for name in reader.get_all_records():
        if not name.endswith(".debug_pkl") and not name.startswith(_WRITER_ADDS):
            data = _sort_constants(reader.get_record(name)) if name.endswith(".py") else reader.get_record(name)
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    write_file(path, result.getvalue())


def _sort_constants(code: bytes) -> bytes:
    """torch writes a class's constants in the order of a set, which is another one in every process; here by name."""
    runs = itertools.groupby(code.split(b"\n"), key=lambda line: _CONSTANT.match(line) is not None)
    return b"\n".join(line for constants, lines in runs for line in (sorted(lines) if constants else lines))


def _empty_parameters(module: torch.jit.ScriptModule) -> None:
    """Replaces what a surgery has learnt by placeholders, whose values the weight file holds."""
    surgery = getattr(module, "surgery", None)
    for owner in surgery.modules() if surgery is not None else ():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            setattr(owner, name, placeholder(tensor))


def placeholder(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and type whose file form has one value."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
