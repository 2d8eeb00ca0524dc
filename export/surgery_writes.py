"""Where a surgery's graph may write to its own parameters, on any path that serving can take.

Served parameters are mapped read-only: such a write ends the process. Examples show only what happens to them, so that the
graph is followed instead, from each parameter through views, lists and branches to the operators that write. A branch on what
is constant, such as batch norm's on `training`, is followed on one side only.
"""

from collections.abc import Sequence
from typing import Any

import torch

from export.errors import SurgeryError

__all__ = ["check_writes"]

_SPLICED = "module."  # where the module is in the splice
_NO_CONTAINER = {"Tensor", "int", "float", "bool", "str", "Device", "NoneType", "Scalar", "complex"}


def check_writes(scripted: Any) -> None:
    """Makes sure that the module writes neither to its tensors nor to its other attributes.

    Its operators were checked before (`export.surgery_code`): there is no inner graph, and no call of a method.

    Raises:
        SurgeryError: naming what it writes to.
    """
    graph = scripted.inlined_graph
    _Walk(next(iter(graph.inputs())).debugName(), scripted).block(graph)


class _Walk:
    """One walk along a graph; values are known by their names, which no other has."""

    def __init__(self, this: str, scripted: Any) -> None:
        self._modules = {this: ("", scripted)}  # value to path and module
        self._owned: dict[
            str, str
        ] = {}  # a tensor that may be of a parameter's memory, or a container of some: to its path
        self._known: dict[str, bool] = {}

    def block(self, block: Any) -> None:
        for node in block.nodes():
            kind = node.kind()
            if kind == "prim::GetAttr":
                self._read(node)
            elif kind == "prim::SetAttr":
                self._assign(node)
            elif kind == "prim::Constant":
                if str(node.output().type()) == "bool":
                    self._known[node.output().debugName()] = bool(node.output().toIValue())
            elif kind == "prim::If":
                self._branch(node)
            elif kind == "prim::Loop":
                self._loop(node)
            else:
                self._operator(node)

    def _read(self, node: Any) -> None:
        """An attribute: a module, a tensor of its own, or a value that never changes."""
        path, module = self._modules.get(node.input().debugName(), ("", None))
        if module is None:  # of an object that the graph has made
            self._hand_on([node.input()], [node.output()])
            return
        name, output = node.s("name"), node.output().debugName()
        value, path = getattr(module, name), self._path(path, name)
        if isinstance(value, torch.nn.Module):
            self._modules[output] = (path, value)
        elif isinstance(value, torch.Tensor):
            self._owned[output] = path
        elif isinstance(value, bool):
            self._known[output] = value

    def _assign(self, node: Any) -> None:
        target, value = (part.debugName() for part in node.inputs())
        if target in self._modules:
            name = self._path(self._modules[target][0], node.s("name")).removeprefix(_SPLICED)
            raise SurgeryError(
                f"torchscript: it may assign its own '{name}' when it is called; requests share it, and run at once"
            )
        if value in self._owned:
            self._owned.setdefault(target, self._owned[value])

    @staticmethod
    def _path(path: str, name: str) -> str:
        return f"{path}.{name}" if path else name

    def _branch(self, node: Any) -> None:
        known = self._known.get(node.input().debugName())
        blocks = [block for number, block in enumerate(node.blocks()) if known is None or known == (number == 0)]
        for block in blocks:
            self.block(block)
            self._hand_on(block.outputs(), node.outputs())
        for number, output in enumerate(node.outputs()):
            values = {self._known.get(list(block.outputs())[number].debugName()) for block in blocks}
            if len(values) == 1 and None not in values:
                self._known[output.debugName()] = bool(values.pop())

    def _loop(self, node: Any) -> None:
        (body,) = node.blocks()
        carried = list(body.inputs())[1:]
        self._hand_on(list(node.inputs())[2:], carried)
        while True:
            before = len(self._owned)
            self.block(body)
            self._hand_on(list(body.outputs())[1:], carried)
            if len(self._owned) == before:
                break
        self._hand_on(carried, node.outputs())

    def _hand_on(self, values: Any, to: Any) -> None:
        for value, other in zip(values, to, strict=False):
            if value.debugName() in self._owned:
                self._owned.setdefault(other.debugName(), self._owned[value.debugName()])

    def _operator(self, node: Any) -> None:
        inputs = list(node.inputs())
        owned = [self._owned.get(value.debugName()) for value in inputs]
        if node.kind() == "aten::__not__" and inputs[0].debugName() in self._known:
            self._known[node.output().debugName()] = not self._known[inputs[0].debugName()]
        if not any(owned):
            return
        schema = _schema(node)
        written = _written(schema, len(inputs))
        for value, path, write in zip(inputs, owned, written, strict=True):
            if write and path and (_is_tensor(value) or node.kind().startswith("aten::_foreach_")):
                name = path.removeprefix(_SPLICED)
                raise SurgeryError(
                    f"torchscript: it may write to its own '{name}' when it is called; served parameters are read-only"
                )
            if write and not _is_tensor(value):  # a list or a dict that something is put into
                self._owned.setdefault(value.debugName(), next(path for path in owned if path))
        shared = [
            path
            for number, (value, path) in enumerate(zip(inputs, owned, strict=True))
            if path and (schema is None or not _is_tensor(value) or schema.arguments[number].alias_info is not None)
        ]
        for number, output in enumerate(node.outputs()):
            made = schema is not None and schema.returns[number].alias_info is None
            if shared and not (made and str(output.type()) in _NO_CONTAINER):
                self._owned.setdefault(output.debugName(), shared[0])


def _schema(node: Any) -> Any:
    text = node.schema()
    return None if text == "(no schema)" else torch._C.parse_schema(text)


def _written(schema: Any, count: int) -> Sequence[bool]:
    arguments = schema.arguments if schema is not None else []
    marks = [argument.alias_info is not None and argument.alias_info.is_write for argument in arguments]
    return [*marks, *[False] * count][:count]


def _is_tensor(value: Any) -> bool:
    return str(value.type()) in ("Tensor", "Tensor?", "Optional[Tensor]")
