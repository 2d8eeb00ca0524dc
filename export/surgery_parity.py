"""Parity of a surgery: what a graph answers, against the module in eager mode over torchrec's quantized embeddings.

A surgery is somebody else's module, and a graph may add a matrix product up in another order than eager torch, fuse a product
and a sum, or take another approximation of a function. How far apart two right answers can be depends on the module, so that
the bound is taken from the module itself, by perturbation. The model is that of backward error analysis (Higham, Accuracy and
Stability of Numerical Algorithms, sections 3.1 and 3.3): what an operator computes is what exact arithmetic gives for
operands, and then a result, that are off by at most k u, u = 2**-24 of float32 (2**-53 of float64). k is the number of
roundings that a value goes through: for a sum or a product over n terms n, whatever the order; for an operator on single
values at most 16, the few units in the last place by which approximations of a function differ (and, of sigmoid and its like,
4 u of 1 or of a larger operand: ONNX Runtime's is that far off where values are tiny).

Numbers of 16 bits are computed with in float32, sums of products too, and the result is rounded once or, where a compiler
fuses operators, not at all. So k is 4 for them, which is enough that the noise is not lost in the rounding, and u is 2**-11
(float16) or 2**-8 (bfloat16), or a step of the type where numbers are tiny. To widen a number is exact.

The module is run again with every operand and every result of every operator off by a random part of that, 16 times, seeded;
where a graph's embeddings are themselves only within a bound (ONNX), they are off by a random part of it, too. Twice the
largest deviation from the plain run is the bound.

Why that is enough: of 16 draws the largest is more than half of the amplitude, but for one value in 65,536, and doubled more
than the whole; and the amplitude is what n roundings could do if all went one way, some sqrt(n) times what they do. Why it
is not too much: a wrong parameter, column or order is off by the size of the values, not by a few units in their last place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from export.errors import GateError
from export.splice import OpenedSurgery
from runtime_py.manifest import Output

__all__ = ["check_answer", "surgery_bound"]

_UNIT = 2.0**-24
_RUNS = 16
_ROUNDINGS = 16  # of an operator on single values
_NARROW_ROUNDINGS = 4  # of any operator on numbers of 16 bits
_FLOOR = 4
_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}  # the operand whose columns are added up
_MOVES = {
    "cat",
    "clone",
    "stack",
    "index",
    "index_select",
    "gather",
    "flip",
    "roll",
    "zeros_like",
    "constant_pad_nd",
}
_COPIES = {"_to_copy", "copy"}  # into another type, perhaps
# Functions that some implementations approximate to a few units of 1, or of their operand, where values are much smaller.
_APPROXIMATED = ("sigmoid", "tanh", "erf", "gelu", "silu", "softplus", "mish", "softmax")


def surgery_bound(
    surgery: OpenedSurgery, pooled: Mapping[str, torch.Tensor], noise: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """The largest distance of two right answers, float64 [B, W].

    A value that is not finite, and stays the same in every run, is at no distance of itself. NaN where some run has a finite
    value and another not: no distance can be told, and only the same value is known to be right.

    Args:
        surgery: the module.
        pooled: its embeddings, float32 [B, D] by feature.
        noise: how far a graph's embeddings may be from these, float64 [B, D] by feature; default: not at all.
    """
    plain = surgery(pooled)
    largest = torch.zeros_like(plain, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_RUNS):
        moved = {
            name: values if noise is None else values + torch.from_numpy(noise[name]) * _draw(values, generator)
            for name, values in pooled.items()
        }
        with _Perturbed(generator):
            answer = surgery({name: values.float() for name, values in moved.items()})
        deviation = torch.where(_same(answer, plain), 0.0, (answer.double() - plain.double()).abs())
        largest = torch.maximum(largest, torch.where(deviation.isfinite(), deviation, torch.nan))
    bound: np.ndarray = (2 * largest).numpy()
    return bound


def check_answer(
    where: str, outputs: Sequence[Output], got: torch.Tensor, wanted: torch.Tensor, bound: np.ndarray
) -> Any:
    """Compares a graph's answer [B, W] with the module's; returns whether it is bit-equal, and figures for the report.

    Raises:
        GateError: naming the output, the bag and the column that is beyond the bound.
    """
    same = _same(got, wanted).numpy()  # a value that is not finite is right where it is the same in both
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(got.double().numpy() - wanted.double().numpy()))
    wrong = ~(same | (error <= bound))
    if wrong.any():
        bag, column = (int(part) for part in np.argwhere(wrong)[0])
        allowed = bound[bag, column]
        said = "there is no bound, as roundings alone make the value infinite or no number"
        key, start = next(
            (output.key, start)
            for output, start in zip(outputs, np.cumsum([0] + [o.dim for o in outputs]), strict=False)
            if column < start + output.dim
        )
        raise GateError(
            f"{where}: output '{key}', bag {bag}, column {column - start}: {got[bag, column].item()!r}, the module in eager "
            f"mode gives {wanted[bag, column].item()!r}, {said if np.isnan(allowed) else f'the bound is {allowed:.6g}'}"
        )
    share = np.divide(error, bound, out=np.zeros_like(error), where=bound > 0)
    return {
        "surgery_bit_equal": bool(same.all()),
        "surgery_max_difference": float(error.max(initial=0.0)),
        "surgery_max_share_of_bound": float(share.max(initial=0.0)),
    }


def _same(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Where two answers have one value, or none is a number."""
    return (left == right) | (left.isnan() & right.isnan())


def _draw(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Uniform in [-1, 1), float64."""
    return torch.rand(like.shape, generator=generator, dtype=torch.float64) * 2 - 1


class _Perturbed(TorchDispatchMode):
    """Every operator's floating operands and results are off by a random part of k u."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returns = func._schema.returns
        if any(value.alias_info is not None and not value.alias_info.is_write for value in returns):
            return func(*args, **kwargs)  # a view
        roundings = _count_roundings(func, args, kwargs)
        if not roundings:
            return func(*args, **kwargs)
        written = {position for position, value in enumerate(func._schema.arguments) if value.alias_info is not None}
        given = [
            value if position in written else _map(value, lambda tensor: self._move(tensor, roundings))
            for position, value in enumerate(args)
        ]
        result = func(*given, **kwargs)
        floor = _floor(func, args, result)
        if written:
            for tensor in _floating([result]):
                tensor.copy_(self._move(tensor, roundings, floor))
            return result
        return _map(result, lambda tensor: self._move(tensor, roundings, floor))

    def _move(self, tensor: torch.Tensor, roundings: int, floor: torch.Tensor | None = None) -> torch.Tensor:
        kind = torch.finfo(tensor.dtype)
        narrow = kind.bits < 32
        share = (min(roundings, _NARROW_ROUNDINGS) if narrow else roundings) * kind.eps / 2
        moved = tensor.double() * (1 + share * _draw(tensor, self._generator))
        if narrow:  # small ones have steps that shrink no further
            moved = moved + _NARROW_ROUNDINGS * _step(tensor.dtype) * (tensor != 0) * _draw(tensor, self._generator)
        if floor is not None:
            moved = moved + floor * _draw(tensor, self._generator)
        return moved.to(tensor.dtype)


def _count_roundings(func: Any, args: Any, kwargs: Any) -> int:
    """How many roundings a value goes through in one call, at most; 0 where none is computed."""
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    if name in _COPIES:
        source, target = _copied(name, args, kwargs)
        return 0 if torch.promote_types(source, target) is target else _ROUNDINGS
    if name in _MOVES:
        return 0
    if torch.Tag.pointwise in func.tags:
        return _ROUNDINGS
    if name in _PRODUCTS:
        return max(_ROUNDINGS, int(args[_PRODUCTS[name]].shape[-1]) + 1)
    return max([_ROUNDINGS, *(max(tensor.shape, default=1) for tensor in _floating(args))])


def _floor(func: Any, args: Any, result: Any) -> torch.Tensor | None:
    """How far a function may be off however small its value is: some units of 1, or of a larger operand.

    What a narrower type turns into zero is off by a step of that type.
    """
    if func._schema.name == "aten::_to_copy" and args[0].is_floating_point():
        lost: torch.Tensor = _NARROW_ROUNDINGS * _step(result.dtype) * (args[0] != 0)
        return lost
    if not any(name in func._schema.name for name in _APPROXIMATED) or not isinstance(result, torch.Tensor):
        return None
    operand: torch.Tensor = args[0].double().abs().clamp(min=1.0)
    if operand.shape != result.shape:
        operand = operand.new_ones(())
    return _FLOOR * _UNIT * operand


def _copied(name: str, args: Any, kwargs: Any) -> tuple[torch.dtype, torch.dtype]:
    """The types from which and to which a copy takes its values."""
    if name == "copy":
        return args[1].dtype, args[0].dtype
    return args[0].dtype, kwargs.get("dtype") or args[0].dtype


def _step(dtype: torch.dtype) -> float:
    """The distance of a type's smallest numbers."""
    kind = torch.finfo(dtype)
    return kind.smallest_normal * kind.eps


def _floating(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    return [tensor for item in value for tensor in _floating(item)] if isinstance(value, list | tuple) else []


def _map(value: Any, move: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return move(value) if value.is_floating_point() else value
    return type(value)(_map(item, move) for item in value) if isinstance(value, list | tuple) else value
