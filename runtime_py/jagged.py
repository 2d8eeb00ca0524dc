"""Passes over a jagged request: adding its lengths up, and copying ids while they are checked.

They are compiled (`_jagged.c`), and this module alone gives them addresses. All tensors are contiguous and on the CPU. What
is looked up later are the copies: nobody can change an id, or a length, between its check and its use. (A tensor that another
thread resizes while an operator of torch or of ours reads it is nobody's to check.)

N ids, F features, B bags a feature.
"""

import torch

from runtime_py.errors import InvalidInputError

try:
    from runtime_py import _jagged
except ImportError as error:
    raise ImportError(
        f"runtime_py's compiled part cannot be imported ({error}); install the project with pip, which compiles it"
    ) from error

__all__ = ["Limits", "add_lengths"]


def add_lengths(lengths: torch.Tensor, offsets: torch.Tensor) -> int:
    """Writes the sums of int32 [F * B] to int64 [F * B + 1], and returns the last one: -1 where a length is negative.

    Raises:
        InvalidInputError: a tensor has no memory.
    """
    try:
        return _jagged.add_lengths(lengths.data_ptr(), offsets.numel() - 1, offsets.data_ptr())
    except (ValueError, RuntimeError) as error:
        raise _refused(error) from error


class Limits:
    """The last row of each feature's table, int64 [F]: no id may be behind it. `offsets` are int64 [F * B + 1] below.

    They begin with 0, never fall and end with N.
    """

    def __init__(self, last: torch.Tensor) -> None:
        self.last = last
        self._address = last.data_ptr()  # a request has a microsecond or two for all its Python
        self._features = last.numel()

    def copy_ids(self, values: torch.Tensor, offsets: torch.Tensor, ids: torch.Tensor) -> bool:
        """Copies int64 [N] to `ids` [N], which nobody else has a view of, and returns whether each is in its table.

        Raises:
            InvalidInputError: `ids` has another size than the offsets say, or `values` has no memory.
        """
        features = self._features
        bags = (offsets.numel() - 1) // features
        try:
            return _jagged.copy_ids(
                values.data_ptr(), offsets.data_ptr(), self._address, features, bags, ids.data_ptr(), ids.numel()
            )
        except (ValueError, RuntimeError) as error:
            raise _refused(error) from error

    def has(self, ids: torch.Tensor, offsets: torch.Tensor) -> bool:
        """Whether each of int64 [N] is in its table; they are written back, so that nobody else may have a view of them."""
        return self.copy_ids(ids, offsets, ids)


def _refused(error: Exception) -> InvalidInputError:
    """A tensor without memory, which `_jagged` refuses, or torch when it is asked for the address."""
    return InvalidInputError(str(error).splitlines()[0])
