"""What TorchScript made of a surgery's code: whether every server can run it, and its digest.

A build has operators and Python that a server has not: a module that uses them answers here, passes every gate, and cannot be
loaded there. So the graph itself is read, with all that it calls, also where no example leads to.
"""

import enum
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import torch

from export.errors import SurgeryError
from runtime_py.digests import SHA256, Digest

__all__ = ["check_operators", "digest_code"]

_OURS = ("aten::", "prim::")  # what torch brings itself
_MANGLED = re.compile(r"\.?___torch_mangle_\d+")
_SOURCE = re.compile(r' # [^#"\n]*:\d+:\d+$', re.MULTILINE)  # torch's own switch leaves them in inner blocks
_NOT_ANSWERED_FROM = {"training", "_is_full_backward_hook"}
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, enum.Enum)


def check_operators(scripted: Any) -> None:
    """Makes sure that torch alone can run the module.

    Raises:
        SurgeryError: naming the operator or the Python function that only this process has.
    """
    for node in _nodes(scripted.inlined_graph):
        kind = node.kind()
        if kind == "prim::Print":
            raise SurgeryError("torchscript: it prints when it is called, and would to a server's stdout; remove that")
        if kind == "prim::PythonOp":
            raise SurgeryError(
                f"torchscript: it calls the Python function '{node.pyname()}', which no server has; "
                "write it in what TorchScript knows, without @torch.jit.ignore"
            )
        if kind == "prim::CallMethod":
            raise SurgeryError(
                "torchscript: it calls a method of an interface or of a custom class, in which operators cannot be seen; "
                "call modules and functions"
            )
        if any(node.kindOf(name) == "g" for name in node.attributeNames()):
            raise SurgeryError(
                f"torchscript: it runs a part of itself as a task ('{kind}'), which cannot be seen into; call it directly"
            )
        if not kind.startswith(_OURS):
            raise SurgeryError(
                f"torchscript: it uses the operator '{kind}', which a server does not have; use torch's own operators"
            )


def digest_code(scripted: Any) -> Digest:
    """Of the module's graph and of the plain values that it reads, which the graph has by name only.

    Neither the numbers that TorchScript gives types within a process are in it, nor where the source is.

    Raises:
        SurgeryError: a value has no text that is the same in every process.
    """
    graph = scripted.inlined_graph
    parts = [_SOURCE.sub("", _MANGLED.sub("", graph.str(False)))]
    for node in _nodes(graph):
        if node.kind() == "prim::Constant" and node.hasAttribute("value") and node.kindOf("value") == "t":
            tensor = node.t("value")  # in the graph's text, a large one has no values
            parts.append(f"{tensor.dtype} {list(tensor.shape)} {tensor.tolist()!r}")
    parts += sorted(_plain_values(scripted))
    return Digest(SHA256, hashlib.sha256("\n".join(parts).encode()).hexdigest())


def _plain_values(scripted: Any) -> Iterator[str]:
    for path, owner in scripted.named_modules():
        for name in owner._concrete_type.get_attributes():
            value = getattr(owner, name)
            if name in _NOT_ANSWERED_FROM or isinstance(value, torch.Tensor):  # parameters have digests of their own
                continue
            where = f"{path}.{name}" if path else name
            if not _is_plain(value):
                raise SurgeryError(
                    f"torchscript: keeps a {type(value).__name__} in '{where}'; expected numbers, text, booleans, and lists, "
                    "tuples and dicts of these"
                )
            yield f"{where} = {value!r}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, _PLAIN)


def _nodes(block: Any) -> Iterator[Any]:
    """All nodes of a graph, those of inner blocks included; inner graphs are refused."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)
