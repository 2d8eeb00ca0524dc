"""The surgery of a release: its module found, built, filled from the snapshot, tried out, and made fit for every graph.

Everything that can be wrong with somebody else's class shows here, before a row is read, as one `SurgeryError` that names
the class. What the graphs get is a `Splice`: the pooled embeddings of all features in, by key to the module, and its outputs
side by side out. Its tensors go into the weight file; the graphs hold placeholders.
"""

import copy
import difflib
import hashlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim

from export.config import GraphKind, LargeEmbeddingsConfig, SurgeryConfig
from export.errors import SnapshotError, SurgeryError
from export.snapshots import Snapshot
from export.surgery_errors import quiet, reason
from export.weight_file import PlannedParameter
from runtime_py.digests import SHA256, Digest
from runtime_py.manifest import Output, StoredParameter, Surgery
from runtime_py.tensor_file import ALIGNMENT_BYTES
from runtime_py.weights import TORCH_TYPES

__all__ = ["DictSplice", "OpenedSurgery", "Splice", "TensorSplice", "express", "open_surgery"]

OUTPUT = "output"  # the key of what a module returns as a bare tensor
_BATCHES = (3, 1, 0)  # examples in the batches that a module is tried out on
_MANGLED = re.compile(r"\.?___torch_mangle_\d+")
_FORWARD = "forward(self, pooled: dict[str, torch.Tensor]) -> torch.Tensor, or -> dict[str, torch.Tensor]"


class _Splice(torch.nn.Module):
    """What both kinds of answer share. B examples; D columns of a feature, W of all outputs."""

    feature_names: list[str]
    feature_dims: list[int]
    output_keys: list[str]

    def __init__(self, module: torch.nn.Module, features: Mapping[str, int], output_keys: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.feature_names = list(features)
        self.feature_dims = list(features.values())
        self.output_keys = list(output_keys)

    def by_key(self, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
        parts: dict[str, torch.Tensor] = {}
        for name, part in zip(self.feature_names, pooled.split(self.feature_dims, dim=1)):  # noqa: B905  (TorchScript)
            parts[name] = part  # noqa: PERF403
        return parts


class TensorSplice(_Splice):
    """A module that returns one tensor."""

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Float32 [B, sum(D)] to float32 [B, W], never a view of a parameter."""
        return torch.cat([self.module(self.by_key(pooled))], dim=1)


class DictSplice(_Splice):
    """A module that returns tensors by key."""

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Float32 [B, sum(D)] to float32 [B, W], the outputs side by side."""
        outputs: dict[str, torch.Tensor] = self.module(self.by_key(pooled))
        return torch.cat([outputs[key] for key in self.output_keys], dim=1)


Splice = TensorSplice | DictSplice


@dataclass(frozen=True)
class OpenedSurgery:
    """A surgery that was found, filled and tried out: `tensors` are all its parameters and buffers, by name."""

    config: SurgeryConfig
    splice: Splice
    outputs: list[Output]
    tensors: dict[str, torch.Tensor]

    def parameters(self) -> list[PlannedParameter]:
        """What the weight file is to hold."""
        types = {torch_type: name for name, torch_type in TORCH_TYPES.items()}
        return [
            PlannedParameter(name, types[tensor.dtype], tensor.contiguous()) for name, tensor in self.tensors.items()
        ]

    def describe(self, stored: list[StoredParameter]) -> Surgery:
        """The surgery as the manifest has it, with its parameters as the weight file has them."""
        kwargs = json.dumps(self.config.kwargs, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return Surgery(self.config.module, kwargs, _digest_code(self.splice), stored)

    def place_like(self, stored: Sequence[StoredParameter]) -> None:
        """Moves every tensor to an address as aligned as the mapped one: matrix products are added up by alignment."""
        tensors = _tensors(self.splice.module)
        for parameter in stored:
            tensor, start = tensors[parameter.parameter], parameter.offset_bytes % ALIGNMENT_BYTES
            data = torch.empty(ALIGNMENT_BYTES + start + parameter.bytes, dtype=torch.uint8)
            start += -data.data_ptr() % ALIGNMENT_BYTES
            tensor.data = data[start : start + parameter.bytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def __call__(self, pooled: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The module in eager mode: float32 [B, D] by feature to float32 [B, W], the outputs side by side."""
        with torch.no_grad():
            given = self.splice.module({name: tensor.clone() for name, tensor in pooled.items()})
            outputs = {OUTPUT: given} if isinstance(given, torch.Tensor) else given
            return torch.cat([outputs[output.key] for output in self.outputs], dim=1)


def open_surgery(config: SurgeryConfig, tables: LargeEmbeddingsConfig, snapshot: Snapshot) -> OpenedSurgery:
    """Imports the class, makes the module, fills it from the snapshot and tries it out.

    Raises:
        SurgeryError: any of this fails; one line that names the class.
    """
    with _named(config):
        module = _construct(config)
        _fill(module, config, snapshot)
        tensors = _check_tensors(module)
        features = {feature: table.embedding_dim for table in tables.tables for feature in table.features}
        kind, outputs = _try_out(module, features, tensors)
        splice = kind(module, features, [output.key for output in outputs])
    return OpenedSurgery(config, splice, outputs, tensors)


@contextmanager
def _named(config: SurgeryConfig) -> Iterator[None]:
    """Every error names the class; what the module prints goes to stderr, as stdout is the build's result."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SurgeryError as error:
        raise SurgeryError(f"surgery '{config.module}': {error}") from error.__cause__


# --- The module ------------------------------------------------------------------------------------------------------


def _construct(config: SurgeryConfig) -> torch.nn.Module:
    kind = _import(config.module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what it draws is the same in every process and build
        try:
            module: torch.nn.Module = kind(**copy.deepcopy(config.kwargs))
        except Exception as error:  # somebody else's code
            given = json.dumps(config.kwargs, ensure_ascii=False)
            raise SurgeryError(f"its constructor refuses kwargs {given}: {reason(error)}") from error
    return module.eval().requires_grad_(False)


def _import(path: str) -> type[torch.nn.Module]:
    package, _, name = path.partition(":")
    try:
        found = importlib.import_module(package)
    except (Exception, SystemExit) as error:
        raise SurgeryError(
            f"cannot import '{package}': {reason(error)}; install it, or add its folder to PYTHONPATH"
        ) from error
    kind = getattr(found, name, None)
    if kind is None:
        classes = [
            key for key, value in vars(found).items() if inspect.isclass(value) and issubclass(value, torch.nn.Module)
        ]
        near = difflib.get_close_matches(name, classes, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"its modules: {', '.join(classes) or 'none'}"
        raise SurgeryError(f"'{package}' has no '{name}'; {hint}")
    if not inspect.isclass(kind) or not issubclass(kind, torch.nn.Module):
        what = f"the class {kind.__name__}" if inspect.isclass(kind) else f"a {type(kind).__name__}"
        raise SurgeryError(f"is {what}, expected a subclass of torch.nn.Module")
    return kind


def _fill(module: torch.nn.Module, config: SurgeryConfig, snapshot: Snapshot) -> None:
    """Gives every parameter and persistent buffer the snapshot's values; other buffers keep what the constructor made."""
    state = module.state_dict()
    filled = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise SurgeryError(
                f"has the extra state '{name}', a {type(tensor).__name__}; keep it in parameters or buffers"
            )
        _check_storable(name, tensor)
        try:
            filled[name] = snapshot.parameter(name, tensor, config.prefix)
        except SnapshotError as error:
            raise SurgeryError(str(error)) from error
    module.load_state_dict(filled)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _check_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As `_tensors`, where all of them can be stored.

    Raises:
        SurgeryError: one is of a kind that cannot be stored, or not finite; or a tensor is neither of both.
    """
    for owner_name, owner in module.named_modules():
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor):
                path = f"{owner_name}.{name}" if owner_name else name
                raise SurgeryError(
                    f"'{path}' is a tensor, and neither a parameter nor a buffer; "
                    f"use register_buffer('{name}', ..., persistent=False) for what the snapshot does not have"
                )
    tensors = _tensors(module)
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
        if not bool(torch.isfinite(tensor).all()):
            raise SurgeryError(f"'{name}' has values that are not finite")
        tensor.data = tensor.data.contiguous()  # as it will be in the file: compiled code takes strides for granted
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_storable(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in TORCH_TYPES.values() or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise SurgeryError(
            f"'{name}' is {tensor.dtype} {tensor.layout} on {tensor.device}; expected a dense tensor on the CPU, of one of "
            f"{', '.join(TORCH_TYPES)}"
        )
    if tensor.numel() == 0:
        raise SurgeryError(f"'{name}' of shape {list(tensor.shape)} is empty")


# --- Trying it out ---------------------------------------------------------------------------------------------------


def _try_out(
    module: torch.nn.Module, features: Mapping[str, int], tensors: Mapping[str, torch.Tensor]
) -> tuple[Callable[..., Splice], list[Output]]:
    """Calls the module with batches of several sizes; returns what fits its kind of answer, and its outputs.

    Raises:
        SurgeryError: it raises, changes its parameters, is not reproducible, or returns what the graphs cannot.
    """
    generator = torch.Generator().manual_seed(0)
    versions = {name: tensor._version for name, tensor in tensors.items()}
    found: list[tuple[bool, list[Output]]] = []
    for batch in _BATCHES:
        pooled = {
            name: torch.randn(batch, dim, generator=generator, dtype=torch.float32) for name, dim in features.items()
        }
        first, again = (_call(module, pooled, batch) for _ in range(2))
        for name, tensor in tensors.items():
            if tensor._version != versions[name]:
                raise SurgeryError(f"changes its own '{name}' when it is called; served parameters are read-only")
        answers = {OUTPUT: first} if isinstance(first, torch.Tensor) else first
        found.append((isinstance(first, torch.Tensor), _outputs(answers, batch)))
        repeated = {OUTPUT: again} if isinstance(again, torch.Tensor) else again
        for key, answer in answers.items():
            if not torch.equal(answer.nan_to_num(), repeated[key].nan_to_num()):
                raise SurgeryError(f"gives another '{key}' when it is called again with the same embeddings")
        if found[-1] != found[0]:
            raise SurgeryError(
                f"gives other outputs for a batch of {batch} than for one of {_BATCHES[0]}: "
                f"{_spell(found[-1][1])}, and {_spell(found[0][1])}"
            )
    bare, outputs = found[0]
    return TensorSplice if bare else DictSplice, outputs


def _call(module: torch.nn.Module, pooled: Mapping[str, torch.Tensor], batch: int) -> Any:
    try:
        with torch.no_grad():
            return module({name: tensor.clone() for name, tensor in pooled.items()})
    except Exception as error:  # somebody else's code
        given = ", ".join(f"'{name}' [{batch}, {tensor.shape[1]}]" for name, tensor in pooled.items())
        raise SurgeryError(f"raises {reason(error)} when it is called with the embeddings {given}") from error


def _outputs(answers: Any, batch: int) -> list[Output]:
    if not isinstance(answers, dict) or not answers:
        got = "an empty dict" if isinstance(answers, dict) else f"a {type(answers).__name__}"
        raise SurgeryError(f"returns {got}, expected a tensor or a dict of tensors")
    outputs = []
    for key, tensor in answers.items():
        if not isinstance(key, str) or not key or not key.isprintable():
            raise SurgeryError(f"returns the key {key!r}; a key is printable text, and not empty")
        if not isinstance(tensor, torch.Tensor):
            raise SurgeryError(f"returns a {type(tensor).__name__} for '{key}', expected a tensor")
        if tensor.dtype is not torch.float32:
            raise SurgeryError(f"returns {tensor.dtype} for '{key}', expected torch.float32; end with .float()")
        if tensor.dim() != 2 or tensor.shape[0] != batch or tensor.shape[1] < 1:
            raise SurgeryError(
                f"returns the shape {list(tensor.shape)} for '{key}' of {batch} examples, expected [{batch}, columns]"
            )
        outputs.append(Output(key, tensor.shape[1]))
    return outputs


def _spell(outputs: Sequence[Output]) -> str:
    return ", ".join(f"{output.key} [B, {output.dim}]" for output in outputs)


# --- What the graphs can express -------------------------------------------------------------------------------------


def express(surgery: OpenedSurgery, graphs: Sequence[GraphKind]) -> None:
    """Makes sure that every graph asked for can hold the module.

    Raises:
        SurgeryError: naming the class, the graph, and what its exporter says.
    """
    with _named(surgery.config):
        _script(surgery.splice)
        if GraphKind.AOT_INDUCTOR in graphs:
            _check_exportable(surgery)
        if GraphKind.ONNX in graphs:
            from export.onnx_surgery import export_onnx  # onnx only where there is such a graph

            export_onnx(surgery)


def _script(splice: Splice) -> torch.jit.ScriptModule:
    try:
        with quiet():
            scripted: torch.jit.ScriptModule = torch.jit.script(splice)
            return scripted
    except Exception as error:  # torch raises nearly anything here
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else " ".join(lines[:1])
        raise SurgeryError(f"torchscript cannot express it: {said}; expected {_FORWARD}") from error


def _check_exportable(surgery: OpenedSurgery) -> None:
    splice = surgery.splice
    example = torch.zeros(_BATCHES[0], sum(splice.feature_dims))
    shapes = {"pooled": {0: Dim("bags", min=1, max=2**20)}}
    try:
        with quiet():
            exported = torch.export.export(splice, (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch raises nearly anything here
        raise SurgeryError(f"aot_inductor: torch.export cannot express it: {reason(error)}") from error
    made = sorted(exported.constants.keys() - {f"module.{name}" for name in surgery.tensors})
    if made:
        raise SurgeryError(
            f"aot_inductor: it makes the constant tensors {', '.join(made)} when it is called; "
            "make them in the constructor, with register_buffer(..., persistent=False)"
        )


def _digest_code(splice: Splice) -> Digest:
    """Of what TorchScript made of the module's source, without the numbers that it gives types within a process."""
    graph: Any = _script(splice).module.inlined_graph
    text = _MANGLED.sub("", graph.str(False))
    return Digest(SHA256, hashlib.sha256(text.encode()).hexdigest())
