"""Loads an AOTInductor graph: a shared library, compiled for an instruction set, whose constants lie outside of it.

The rows are one of these constants, fed as they are mapped, without a copy; all others are small, and follow from the
manifest. torch does not check what it is fed: sizes and types are right here or nowhere. The library is opened by its
path, in the folder of the artifact: torch writes nothing to a temporary folder then.

torch holds the interpreter's lock while a compiled graph runs: the process's other Python threads wait for it.
"""

import ctypes
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import torch

from runtime_py.constants import make_constants
from runtime_py.errors import GraphError, UnsupportedError
from runtime_py.manifest import Graph, Manifest
from runtime_py.torchscript import last_line, versions

__all__ = ["ISAS", "check_isa", "load_aot_inductor"]

_MODEL = "model"  # what torch calls the one model of a package
_MOST_RUNNERS = 16  # each serves a thread at a time
_OF_MEANS = "column_features"  # a constant of graphs that pool by mean, and of no others
_LOADS = itertools.count(1)  # of this process

# The flags of /proc/cpuinfo that the levels of the x86-64 psABI add to the one before (v1 and v2 are older than AVX).
_V3 = {
    "avx",
    "avx2",
    "bmi1",
    "bmi2",
    "f16c",
    "fma",
    "abm",
    "movbe",
    "xsave",
    "sse4_1",
    "sse4_2",
    "ssse3",
    "popcnt",
    "cx16",
}
_FLAGS = {
    "x86-64-v3": _V3,
    "x86-64-v4": _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
ISAS = tuple(_FLAGS)  # what `check_isa` knows


def check_isa(isa: str) -> None:
    """Makes sure that this machine has an instruction set, before code that needs it is opened.

    Raises:
        UnsupportedError: it does not, or nobody here knows that set.
    """
    if isa not in _FLAGS:
        raise UnsupportedError(f"instruction set '{isa}' is unknown; known: {', '.join(_FLAGS)}")
    missing = sorted(_FLAGS[isa] - _cpu_flags())
    if missing:
        raise UnsupportedError(f"needs a CPU of {isa}; this one lacks {', '.join(missing)}")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError as error:
        raise UnsupportedError(f"cannot tell what this CPU has: /proc/cpuinfo: {error.strerror}") from error
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _borrow(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a contiguous tensor that does not keep it alive.

    torch never lets go of a constant that it does not manage itself: with the tensors themselves, every load would keep
    its mapping until the process ends.
    """
    size = tensor.numel() * tensor.element_size()
    if not size:
        return torch.empty_like(tensor)
    memory = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def _detour(number: int) -> str:
    """A part of a path that leads nowhere else, another one for every number.

    The dynamic linker takes a path that it has opened before for the library that it opened there, whatever is there now, and
    torch never closes one. Under a new path it compares the files. (torch takes "//" for "/".)
    """
    return "".join("/weights/.." if digit == "1" else "/." for digit in f"{number:b}")


def load_aot_inductor(
    manifest: Manifest, graph: Graph, artifact: Path, weights: torch.Tensor
) -> Callable[..., torch.Tensor]:
    """The graph in its folder of `artifact`, looking rows up in `weights`, uint8.

    Raises:
        UnsupportedError: this machine lacks the instructions.
        GraphError: it cannot be loaded, or has constants that the manifest says nothing of.
    """
    try:
        check_isa(str(graph.isa))
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{graph.path} {error}; use the backend torchscript, or build with another isa"
        ) from None
    constants = make_constants(manifest, weights)
    try:
        # The class that torch's own loader wraps; that one would first import the compiler.
        runners = min(_MOST_RUNNERS, os.cpu_count() or 1)
        folder = f"{artifact}{_detour(next(_LOADS))}/{graph.path}"
        loader = torch._C._aoti.AOTIModelPackageLoader(folder, _MODEL, False, runners, -1)
        names = loader.get_constant_fqns()
        unknown = sorted(set(names) - constants.keys())
        means = any(feature.pooling == "mean" for feature in manifest.features)
        if unknown or "weights" not in names or (_OF_MEANS in names) != means:
            raise GraphError(f"{graph.path} was built for other rows: its constants are {', '.join(sorted(names))}")
        # In use, all, not copied.
        loader.load_constants({name: _borrow(constants[name]) for name in names}, False, True, True)
    except RuntimeError as error:
        raise GraphError(f"{graph.path} cannot be loaded: {last_line(error)}; {versions(graph)}") from error

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 2 and inputs[2].numel() != inputs[0].numel():  # compiled code reads as many as there are ids
            raise ValueError(f"per_sample_weights: {inputs[2].numel()} weights for {inputs[0].numel()} values")
        held = [tensor.contiguous() for tensor in inputs]  # it reads them as if they were
        # Held until it has ended: to free one inside is to give the interpreter's lock away and to wait for it again, while
        # whoever has it waits in there for a runner.
        [pooled] = loader.boxed_run(list(held))
        return pooled

    run.constants = constants  # type: ignore[attr-defined]  # the graph has their addresses, and this keeps them alive
    return run
