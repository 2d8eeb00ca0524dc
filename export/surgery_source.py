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
from torch.nn.parameter import is_lazy

from export.config import LargeEmbeddingsConfig, SurgeryConfig
from export.errors import SnapshotError, SurgeryError
from export.snapshots import Snapshot
from export.splice import OUTPUT, DictSplice, OpenedSurgery, Splice, TensorSplice, all_tensors, named
from export.surgery_errors import reason
from runtime_py.manifest import Output
from runtime_py.weights import TORCH_TYPES

__all__ = ["open_surgery"]

_REGISTERED = ("_parameters", "_buffers", "_modules")
_DEPTH = 10  # of lists in lists
_BATCHES = (3, 1, 0)  # examples in the batches that a module is tried out on


def open_surgery(config: SurgeryConfig, tables: LargeEmbeddingsConfig, snapshot: Snapshot) -> OpenedSurgery:
    """Imports the class, makes the module, fills it from the snapshot and tries it out.

    Raises:
        SurgeryError: any of this fails; one line that names the class.
    """
    with named(config):
        module = _construct(config)
        _check_hidden(module)
        for name, tensor in all_tensors(module).items():
            _check_storable(name, tensor)
        _check_same(module, _construct(config))
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
            module = kind(**copy.deepcopy(config.kwargs)).eval()
            lazy = [name for name, tensor in all_tensors(module).items() if is_lazy(tensor)]
            if not lazy:
                return module.requires_grad_(False)
        except (Exception, SystemExit) as error:  # somebody else's code
            given = json.dumps(config.kwargs, ensure_ascii=False)
            raise SurgeryError(f"its constructor refuses kwargs {given}: {reason(error)}") from error
    raise SurgeryError(f"'{lazy[0]}' has no shape before the first call; give it one, as torch.nn.Linear has")


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
        try:
            filled[name] = snapshot.parameter(name, tensor, config.prefix)
        except SnapshotError as error:
            raise SurgeryError(str(error)) from error
    for name, _ in module.named_parameters(remove_duplicate=False):
        if name not in filled:
            raise SurgeryError(
                f"its state dict has no '{name}', which is a parameter; leave torch's own state_dict as it is"
            )
    try:
        module.load_state_dict(filled)
    except (Exception, SystemExit) as error:  # hooks of somebody else's
        raise SurgeryError(f"its state dict cannot be loaded: {reason(error)}") from error
    now = module.state_dict() | all_tensors(module)
    for name, tensor in filled.items():
        if not _same_bits(now[name], tensor):
            tied = [other for other in filled if other != name and now[other].data_ptr() == now[name].data_ptr()]
            why = f"it is one tensor with '{tied[0]}', of which the snapshot has other values" if tied else "its hooks?"
            raise SurgeryError(f"'{name}' has other values than the snapshot once its state dict is loaded: {why}")


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype is not right.dtype or left.shape != right.shape:
        return False
    first, second = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(first, second)


def _check_hidden(module: torch.nn.Module) -> None:
    """Raises a SurgeryError where a tensor is neither a parameter nor a buffer, also inside lists, tuples and dicts."""
    for owner_name, owner in module.named_modules():
        for name, value in vars(owner).items():
            if name in _REGISTERED:
                continue
            path = f"{owner_name}.{name}" if owner_name else name
            if isinstance(value, torch.Tensor):
                raise SurgeryError(
                    f"'{path}' is a tensor, and neither a parameter nor a buffer; "
                    f"use register_buffer('{name}', ..., persistent=False) for what the snapshot does not have"
                )
            if _has_tensor(value):
                raise SurgeryError(
                    f"'{path}' ({type(owner).__name__}) is a {type(value).__name__} with tensors, which graphs would hold "
                    "beside the weight file; read parameters and buffers by their own names"
                )


def _has_tensor(value: Any, depth: int = 0) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return depth < _DEPTH and any(_has_tensor(item, depth + 1) for item in inner)


def _check_same(module: torch.nn.Module, again: torch.nn.Module) -> None:
    """Raises a SurgeryError where the constructor makes something else when it is called again.

    Other processes of a build, and later builds, call it, too. Values that the snapshot has may differ.
    """
    first, second, filled = all_tensors(module), all_tensors(again), module.state_dict()
    different = sorted(first.keys() ^ second.keys())
    for name, tensor in first.items():
        if name in second and name not in filled and not _same_bits(tensor, second[name]):
            different.append(name)
    for (path, owner), (_, other) in zip(module.named_modules(), again.named_modules(), strict=False):
        for name, value in vars(owner).items():
            if isinstance(value, bool | int | float | str) and repr(value) != repr(vars(other).get(name)):
                different.append(f"{path}.{name}" if path else name)
    if different:
        raise SurgeryError(
            f"its constructor makes another '{different[0]}' when it is called again; draw from torch's default generator, "
            "which is seeded, or give its own a fixed seed"
        )


def _check_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, as they are stored.

    Raises:
        SurgeryError: one is not finite.
    """
    tensors = all_tensors(module)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SurgeryError(f"'{name}' has values that are not finite")
        tensor.data = tensor.data.contiguous()  # as it will be in the file: compiled code takes strides for granted
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_storable(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_inference():
        raise SurgeryError(f"'{name}' was made in torch.inference_mode(); make it outside of that")
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
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    found: list[tuple[bool, list[Output]]] = []
    for batch in _BATCHES:
        pooled = {
            name: torch.randn(batch, dim, generator=generator, dtype=torch.float32) for name, dim in features.items()
        }
        first, again = (_call(module, pooled, batch) for _ in range(2))
        for name, tensor in tensors.items():  # .data has no version, and values may be written over with the same ones
            if tensor._version != versions[name] or not _same_bits(tensor, values[name]):
                raise SurgeryError(f"changes its own '{name}' when it is called; served parameters are read-only")
        (answers, kind), (repeated, other_kind) = (_read_answer(answer, batch) for answer in (first, again))
        if kind != other_kind:
            raise SurgeryError(
                f"gives other outputs when it is called again: {_spell(other_kind[1])}, and {_spell(kind[1])}"
            )
        found.append(kind)
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
    except (Exception, SystemExit) as error:  # somebody else's code
        given = ", ".join(f"'{name}' [{batch}, {tensor.shape[1]}]" for name, tensor in pooled.items())
        raise SurgeryError(f"raises {reason(error)} when it is called with the embeddings {given}") from error


def _read_answer(given: Any, batch: int) -> tuple[dict[str, torch.Tensor], tuple[bool, list[Output]]]:
    """What a module returned, by key; and whether that was a bare tensor, with its outputs."""
    bare = isinstance(given, torch.Tensor)
    answers = {OUTPUT: given} if bare else given
    return answers, (bare, _outputs(answers, batch))


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
