"""Somebody else's module, found, built, filled from the snapshot and tried out.

Everything that can be wrong with it shows here, before a row is read, as one `SurgeryError` that names the class.
"""

import copy
import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from export.config import LargeEmbeddingsConfig, SurgeryConfig
from export.errors import SnapshotError, SurgeryError
from export.snapshots import Snapshot
from export.splice import OUTPUT, DictSplice, OpenedSurgery, Splice, TensorSplice, all_tensors, named
from export.surgery_errors import reason
from runtime_py.manifest import Output
from runtime_py.weights import TORCH_TYPES

__all__ = ["open_surgery"]

_BATCHES = (3, 1, 0)  # examples in the batches that a module is tried out on


def open_surgery(config: SurgeryConfig, tables: LargeEmbeddingsConfig, snapshot: Snapshot) -> OpenedSurgery:
    """Imports the class, makes the module, fills it from the snapshot and tries it out.

    Raises:
        SurgeryError: any of this fails; one line that names the class.
    """
    with named(config):
        module = _construct(config)
        _fill(module, config, snapshot)
        tensors = _check_tensors(module)
        features = {feature: table.embedding_dim for table in tables.tables for feature in table.features}
        kind, outputs = _try_out(module, features, tensors)
        splice = kind(module, features, [output.key for output in outputs])
    return OpenedSurgery(config, splice, outputs, tensors)


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
    tensors = all_tensors(module)
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
