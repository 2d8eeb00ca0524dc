"""The surgery of a release, fit for every graph.

What the graphs get is a `Splice`: the pooled embeddings of all features in, by key to the module, and its outputs side by
side out. Its tensors go into the weight file; the graphs hold placeholders.
"""

import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

import torch
from torch.export import Dim

from export.config import GraphKind, SurgeryConfig
from export.errors import SurgeryError
from export.surgery_code import check_operators, digest_code
from export.surgery_errors import quiet, reason
from export.surgery_writes import check_writes
from export.weight_file import PlannedParameter
from runtime_py.manifest import Output, StoredParameter, Surgery
from runtime_py.tensor_file import ALIGNMENT_BYTES
from runtime_py.weights import TORCH_TYPES

__all__ = ["OUTPUT", "DictSplice", "OpenedSurgery", "Splice", "TensorSplice", "all_tensors", "express", "named"]

OUTPUT = "output"  # the key of what a module returns as a bare tensor
_EXAMPLES = 3
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
        return Surgery(self.config.module, kwargs, digest_code(_script(self.splice).module), stored)

    def place_like(self, stored: Sequence[StoredParameter]) -> None:
        """Moves every tensor to an address as aligned as the mapped one: matrix products are added up by alignment."""
        tensors = all_tensors(self.splice.module)
        for parameter in stored:
            tensor, start = tensors[parameter.parameter], parameter.offset_bytes % ALIGNMENT_BYTES
            data = torch.empty(ALIGNMENT_BYTES + start + parameter.bytes, dtype=torch.uint8)
            start += -data.data_ptr() % ALIGNMENT_BYTES
            tensor.data = data[start : start + parameter.bytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def __call__(self, pooled: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The module in eager mode: float32 [B, D] by feature to float32 [B, W], the outputs side by side."""
        with torch.no_grad(), named(self.config):
            try:
                given = self.splice.module({name: tensor.clone() for name, tensor in pooled.items()})
                outputs = {OUTPUT: given} if isinstance(given, torch.Tensor) else given
                return torch.cat([outputs[output.key] for output in self.outputs], dim=1)
            except (Exception, SystemExit) as error:  # somebody else's code
                bags = len(next(iter(pooled.values())))
                raise SurgeryError(f"raises {reason(error)} for a batch of {bags}") from error


def all_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


@contextmanager
def named(config: SurgeryConfig) -> Iterator[None]:
    """Every error names the class; what the module prints goes to stderr, as stdout is the build's result."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SurgeryError as error:
        raise SurgeryError(f"surgery '{config.module}': {error}") from error.__cause__


# --- What the graphs can express -------------------------------------------------------------------------------------


def express(surgery: OpenedSurgery, graphs: Sequence[GraphKind]) -> None:
    """Makes sure that every graph asked for can hold the module.

    Raises:
        SurgeryError: naming the class, the graph, and what its exporter says.
    """
    with named(surgery.config):
        scripted = _script(surgery.splice)
        check_operators(scripted)
        check_writes(scripted)
        _try_scripted(scripted, surgery.splice)
        digest_code(scripted.module)
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
    except (Exception, SystemExit) as error:  # torch raises nearly anything here
        raise SurgeryError(f"torchscript cannot express it: {_said(error)}; expected {_FORWARD}") from error


def _said(error: BaseException) -> str:
    """What TorchScript complains of; its heading alone says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else " ".join(lines[:1])


def _try_scripted(scripted: torch.jit.ScriptModule, splice: Splice) -> None:
    """Writes it, and calls it once: TorchScript also compiles what it can do neither with."""
    try:
        with quiet(), torch.no_grad():
            torch.jit.save(scripted, io.BytesIO())
            scripted(_example(splice))
    except (Exception, SystemExit) as error:  # torch raises nearly anything here
        said = str(error).strip().splitlines()[-1:] or [type(error).__name__]  # what was raised is below its trace
        raise SurgeryError(f"torchscript compiles it, and cannot write or run it: {said[0]}") from error


def _example(splice: Splice) -> torch.Tensor:
    return torch.zeros(_EXAMPLES, sum(splice.feature_dims))


def _check_exportable(surgery: OpenedSurgery) -> None:
    splice = surgery.splice
    example = _example(splice)
    shapes = {"pooled": {0: Dim("bags", min=1, max=2**20)}}
    try:
        with quiet():
            exported = torch.export.export(splice, (example,), dynamic_shapes=shapes)
    except (Exception, SystemExit) as error:  # torch raises nearly anything here
        raise SurgeryError(f"aot_inductor: torch.export cannot express it: {reason(error)}") from error
    made = sorted(exported.constants.keys() - {f"module.{name}" for name in surgery.tensors})
    if made:
        raise SurgeryError(
            f"aot_inductor: it makes the constant tensors {', '.join(made)} when it is called; "
            "make them in the constructor, with register_buffer(..., persistent=False)"
        )
