"""What callers have, as arrays and tensors: ids, lengths and weights in any usual form, or an error that says where."""

from typing import Any

import numpy as np
import torch

from runtime_py.errors import InvalidInputError

__all__ = ["as_floats", "as_ids", "as_integers", "is_sequence"]


def is_sequence(data: Any) -> bool:
    """Whether it has a length; text has none here."""
    if isinstance(data, str | bytes | bytearray):
        return False
    try:
        len(data)
    except TypeError:  # no length at all, or an array or a tensor of no dimension
        return False
    return True


def as_ids(where: str, bag: Any) -> np.ndarray:
    """One bag as int64 [L]."""
    _refuse_mask(where, bag)
    try:
        array = np.asarray(bag.detach().resolve_neg() if isinstance(bag, torch.Tensor) else bag)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidInputError(f"{where}: expected ids, got {_show(bag)}") from error
    if array.ndim != 1:
        raise InvalidInputError(f"{where}: expected a flat sequence of ids, got shape {list(array.shape)}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.dtype == np.uint64 or _has_booleans(bag):
        wrong = next((item for item in bag if not isinstance(item, int | np.integer) or isinstance(item, bool)), bag)
        raise InvalidInputError(f"{where}: an id is a 64-bit integer, got {_show(wrong)} ({array.dtype})")
    return array.astype(np.int64)


def as_integers(what: str, data: Any) -> torch.Tensor:
    """`data` as a 1-D CPU tensor of int64 or int32; the same tensor where it already is one."""
    tensor = _tensor(what, data, "int64 or int32")
    if tensor.dtype not in (torch.int64, torch.int32):
        if tensor.numel():
            raise InvalidInputError(f"{what}: expected int64 or int32, got {_name(tensor.dtype)}")
        return tensor.to(torch.int64)
    return tensor


def as_floats(what: str, data: Any, count: int) -> torch.Tensor:
    """`data` as a contiguous 1-D CPU tensor of `count` float32 weights; the same tensor where it already is one."""
    tensor = _tensor(what, data, "float32")
    if not tensor.dtype.is_floating_point and tensor.numel():
        raise InvalidInputError(f"{what}: expected float32, got {_name(tensor.dtype)}")
    if tensor.numel() != count:
        raise InvalidInputError(f"{what}: {tensor.numel()} weights for {count} values")
    return tensor.to(torch.float32).contiguous()


def _tensor(what: str, data: Any, expected: str) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        _refuse_mask(what, data)
        try:
            array = np.array(data)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InvalidInputError(f"{what}: expected {expected}, got {_show(data)}") from error
        mixed = array.dtype.kind != "b" and _has_booleans(data)
        if array.dtype.kind not in "biuf" or array.dtype in (np.uint64, np.longdouble) or mixed:
            got = array.dtype if array.dtype.kind in "cuf" else _show(data)
            raise InvalidInputError(f"{what}: expected {expected}, got {got}")
        data = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    if data.layout is not torch.strided or data.is_nested:
        raise InvalidInputError(
            f"{what}: expected a dense tensor, got {'a nested one' if data.is_nested else data.layout}"
        )
    if data.dim() != 1:
        raise InvalidInputError(f"{what}: expected one dimension, got shape {list(data.shape)}")
    if data.device.type != "cpu":
        raise InvalidInputError(f"{what}: expected a tensor on the CPU, got one on {data.device}")
    tensor: torch.Tensor = data.detach().resolve_neg()
    return tensor


def _has_booleans(data: Any) -> bool:
    """Whether there is one among the items, which numpy takes for 0 or 1 beside numbers."""
    if isinstance(data, np.ndarray | torch.Tensor):
        return False
    return not {bool, np.bool_}.isdisjoint(map(type, data)) if is_sequence(data) else isinstance(data, bytearray)


def _show(data: Any) -> str:
    """What came, in one line."""
    return f"{' '.join(repr(data).split()):.80}"


def _refuse_mask(what: str, data: Any) -> None:
    """numpy would pass over the mask, and take what lies under it."""
    subclass = isinstance(data, np.ndarray) and type(data) is not np.ndarray
    if subclass and isinstance(data, np.ma.MaskedArray):  # numpy imports `ma` at its first use, 5 ms
        raise InvalidInputError(f"{what}: got a masked array; give its compressed() values, or filled(…)")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
