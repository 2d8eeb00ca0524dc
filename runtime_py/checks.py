"""The checks that stand between a request and the rows: each id is touched once, and every refusal says where.

Validation must not cost what the lookup costs: lengths are added up in one pass, ids copied and checked in another
(`jagged.py`), and what is looked up later are these copies. Only a request that fails is looked at more closely.

N ids, F features, B bags a feature.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from runtime_py.convert import as_floats, as_integers
from runtime_py.errors import InvalidInputError
from runtime_py.jagged import Limits, add_lengths
from runtime_py.manifest import Manifest, Table

__all__ = [
    "NONE_REPLACED",
    "ZERO",
    "Checked",
    "InvalidIds",
    "RequestChecker",
    "check_lengths",
    "count_ids",
    "describe",
    "parse_policy",
]

InvalidIds = str
"""What becomes of an id that no row has: "error", "zero" (a zero vector), or "row:<k>" (row k in its place)."""

ZERO = -1  # FBGEMM's mark for a row that is not there: a zero vector
_ROW = re.compile(r"row:(0|[1-9][0-9]{0,18})")
NONE_REPLACED: Mapping[str, int] = MappingProxyType({})  # all answers share it
# Named here, as each dot costs a request a look into a dictionary that the lookup before has put out of the caches.
_TENSOR, _STRIDED, _INT32, _INT64 = torch.Tensor, torch.strided, torch.int32, torch.int64
_UINT64 = np.dtype(np.uint64)


class Checked(NamedTuple):
    """A request that may be looked up: private copies of the ids, int64 [N], and how many were replaced, by feature.

    `offsets` are int64 [F * B + 1].
    """

    values: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor | None
    replaced: Mapping[str, int]

    @property
    def lengths(self) -> torch.Tensor:
        """int32 [F * B], for graphs that measure bags themselves: not the caller's, which may have changed meanwhile."""
        return self.offsets.diff().to(torch.int32)


def parse_policy(name: str, policy: object, tables: Sequence[Table]) -> int | None:
    """The row of `tables` that takes the place of an id under the `policy` of the option `name`: None for "error".

    Raises:
        ValueError: it is no policy, or names a row that a table does not have.
    """
    if policy == "error":
        return None
    if policy == "zero":
        return ZERO
    match = _ROW.fullmatch(policy) if isinstance(policy, str) else None
    if match is None:
        raise ValueError(f"{name} must be 'error', 'zero' or 'row:<k>' with a row k, got {policy!r}")
    row = int(match[1])
    for table in tables:
        if row >= table.num_embeddings:
            raise ValueError(f"{name} is {policy!r}, and table '{table.name}' has rows [0, {table.num_embeddings - 1}]")
    return row


def count_ids(features: Sequence[str], marks: np.ndarray, starts: np.ndarray) -> dict[str, int]:
    """How many ids of each feature are marked, where some are: bool [N], and where each feature's ids start [F]."""
    marked = np.diff(np.concatenate([[0], np.cumsum(marks)])[[*starts, len(marks)]])
    return {name: int(number) for name, number in zip(features, marked, strict=True) if number}


class RequestChecker:
    """Checks the requests of one artifact in the raw signature."""

    def __init__(self, manifest: Manifest, invalid_ids: InvalidIds) -> None:
        """Ids outside their table are treated as `invalid_ids` says.

        Raises:
            ValueError: it is no policy.
        """
        self.features = [feature.name for feature in manifest.features]
        self.weighted = {feature.name for feature in manifest.features if feature.weighted}
        self._replacement = parse_policy("invalid_ids", invalid_ids, manifest.tables)
        self._count = len(self.features)
        rows = [manifest.table[feature.table].num_embeddings for feature in manifest.features]
        self.limits = Limits(torch.tensor(rows, dtype=torch.int64, device="cpu") - 1)

    @property
    def refuses_ids(self) -> bool:
        """Whether an id outside its table is an error."""
        return self._replacement is None

    def accept(self, values: Any, lengths: Any, weights: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Values int64 [N], lengths int32 [F * B] and weights float32 [N], all contiguous; what they say is not checked.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
        """
        if type(values) is not _TENSOR or values.dtype is not _INT64 or not _is_plain(values):
            values = as_integers("values", values)
            if values.numel() >= 2**31:  # before a copy is made
                raise _too_many(values.numel())
            values = _to_plain("values", values.to(torch.int64))
        if type(lengths) is not _TENSOR or lengths.dtype is not _INT32 or not _is_plain(lengths):
            lengths = _to_plain("lengths", self._narrow(as_integers("lengths", lengths), values))
        if weights is not None or self.weighted:
            weights = self._check_weights(weights, values.numel())
            if type(weights) is not _TENSOR and weights is not None:
                weights = _to_plain("per_sample_weights", weights)
        count = values.numel()  # now: what turns weights into a tensor may be anybody's code
        if weights is not None and weights.numel() != count:
            raise InvalidInputError(f"per_sample_weights: {weights.numel()} weights for {count} values")
        if count >= 2**31:  # the graphs' offsets are int32, as the lengths are
            raise _too_many(count)
        return values, lengths, weights

    def measure(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Adds up what `accept` has returned: where bags begin, int64 [F * B + 1].

        Raises:
            InvalidInputError: naming the feature, and what its lengths are.
        """
        count, bags = values.numel(), lengths.numel()
        offsets = values.new_empty(bags + 1)
        if add_lengths(lengths, offsets) != count or bags % self._count:
            self._refuse_lengths(lengths, count)
        return offsets

    def check(self, values: Any, lengths: Any, weights: Any) -> Checked:
        """Checks a request in the raw signature, and copies its ids.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
        """
        values, lengths, weights = self.accept(values, lengths, weights)
        return self.check_accepted(values, lengths, weights)

    def check_accepted(self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None) -> Checked:
        """As `check`, of what `accept` has returned."""
        offsets = self.measure(values, lengths)
        ids = values.new_empty(values.numel())
        if self.limits.copy_ids(values, offsets, ids):
            return Checked(ids, offsets, weights, NONE_REPLACED)
        return self._replace(ids, offsets, weights)

    def check_own(self, ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None) -> Checked:
        """As `check_accepted`, of `ids` [N] that nobody else has a view of, and their offsets: they need no copy."""
        if self.limits.has(ids, offsets):
            return Checked(ids, offsets, weights, NONE_REPLACED)
        return self._replace(ids, offsets, weights)

    def _replace(self, ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None) -> Checked:
        ends = offsets.numpy()
        bags = (ends.size - 1) // self._count
        array, last = ids.numpy(), self.limits.last.numpy()
        outside = array.view(_UINT64) > np.repeat(last.view(_UINT64), np.diff(ends[::bags]))  # -1 is a large one
        if self._replacement is None:

            def tell(feature: int, position: int) -> str:
                return f"id {array[position]} is outside [0, {last[feature]}]"

            raise InvalidInputError(describe(self.features, ends, outside, tell))
        array[outside] = self._replacement
        return Checked(ids, offsets, weights, count_ids(self.features, outside, ends[:-1:bags]))

    def _check_weights(self, weights: Any, count: int) -> torch.Tensor | None:
        if (weights is not None) != bool(self.weighted):
            takes = f"features {sorted(self.weighted)} take" if self.weighted else "this artifact takes no"
            raise InvalidInputError(f"per_sample_weights: {takes} per-sample weights")
        return as_floats("per_sample_weights", weights, count)

    def _narrow(self, lengths: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Lengths as int32, where they fit."""
        narrow = lengths.to(torch.int32)
        if narrow is not lengths and not torch.equal(narrow, lengths):
            self._refuse_lengths(lengths, values.numel())
        return narrow

    def _refuse_lengths(self, lengths: torch.Tensor, count: int) -> NoReturn:
        if lengths.numel() % self._count:
            raise InvalidInputError(
                f"lengths: {lengths.numel()} do not divide into {self._count} features ({', '.join(self.features)})"
            )
        check_lengths(self.features, lengths.view(self._count, -1), count)
        raise InvalidInputError(
            "lengths changed while they were checked; a request must be left alone until it is answered"
        )


def _too_many(count: int) -> InvalidInputError:
    return InvalidInputError(f"values: {count} ids; a request has fewer than 2**31")


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether what `data_ptr` points to is what a flat tensor on the CPU holds, element by element."""
    return (
        tensor.is_cpu
        and tensor.layout is _STRIDED
        and tensor.dim() == 1
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def _to_plain(what: str, tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor of the same numbers: a subclass may have no memory behind its address."""
    try:
        return torch.from_numpy(np.ascontiguousarray(tensor.numpy()))
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(f"{what}: expected a tensor with memory, got a {type(tensor).__name__}") from error


def check_lengths(features: Sequence[str], lengths: torch.Tensor, count: int) -> torch.Tensor:
    """The number of ids of each feature, int64 [F], from `lengths` [F, B] of bags that hold `count` ids in all."""
    if lengths.numel():
        low, high = (int(bound) for bound in torch.aminmax(lengths))
        if low < 0:
            feature, bag = (lengths < 0).nonzero()[0].tolist()
            got = int(lengths[feature, bag])
            raise InvalidInputError(
                f"feature '{features[feature]}': length of bag {bag} is {got}; a length is 0 or more"
            )
        if high >= 2**31:
            feature = int((lengths == high).nonzero()[0, 0])
            raise InvalidInputError(f"feature '{features[feature]}': lengths: {high} does not fit int32")
    counts = lengths.sum(1)
    total = int(counts.sum())
    if total != count:
        if len(features) == 1:
            raise InvalidInputError(f"feature '{features[0]}': lengths add up to {total}, and there are {count} values")
        by_name = ", ".join(f"{name} {number}" for name, number in zip(features, counts.tolist(), strict=True))
        raise InvalidInputError(f"lengths add up to {total} ({by_name}), and there are {count} values")
    return counts


def describe(features: Sequence[str], offsets: np.ndarray, marks: np.ndarray, tell: Callable[[int, int], str]) -> str:
    """What is wrong with the marked ids: for each feature that has some the first of them, and how many.

    `offsets` are of the bags, `marks` bool [N]; `tell` says of a feature's number and an id's position what is wrong.
    """
    bags = (offsets.size - 1) // len(features)
    parts = []
    for number, name in enumerate(features):
        ends = offsets[number * bags : (number + 1) * bags + 1]
        marked = np.flatnonzero(marks[ends[0] : ends[-1]]) + ends[0]
        if marked.size:
            position = int(marked[0])
            bag = int(np.searchsorted(ends, position, side="right")) - 1
            more = f" (and {marked.size - 1} more)" if marked.size > 1 else ""
            where = f"feature '{name}', bag {bag}, position {position - int(ends[bag])}"
            parts.append(f"{where}: {tell(number, position)}{more}")
    return "; ".join(parts)
