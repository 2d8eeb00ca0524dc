"""The checks that stand between a request and the rows: each id is touched once, and every refusal says where.

Validation must not cost what the lookup costs. One pass copies the ids, one takes the largest of each feature, as
unsigned numbers so that a negative id is a large one; lengths are added up as unsigned numbers, so that sums that end in
the number of ids have no negative part. What is looked up later are these copies: nobody can change an id, or a length,
between its check and its use. Only a request that fails is looked at more closely.

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
from runtime_py.manifest import Manifest, Table

__all__ = ["ZERO", "Checked", "InvalidIds", "RequestChecker", "check_lengths", "count_ids", "describe", "parse_policy"]

InvalidIds = str
"""What becomes of an id that no row has: "error", "zero" (a zero vector), or "row:<k>" (row k in its place)."""

ZERO = -1  # FBGEMM's mark for a row that is not there: a zero vector
_ROW = re.compile(r"row:(0|[1-9][0-9]{0,18})")
_NONE: Mapping[str, int] = MappingProxyType({})  # all answers share it
_INT64, _UINT32, _UINT64 = np.dtype(np.int64), np.dtype(np.uint32), np.dtype(np.uint64)  # a type costs 0.1 us more


class Checked(NamedTuple):
    """A request that may be looked up: private copies, `offsets` int64 [F * B + 1], and the ids replaced, by feature.

    `lengths` are the caller's, int32, for graphs that measure bags themselves.
    """

    values: np.ndarray
    offsets: np.ndarray
    lengths: torch.Tensor
    weights: torch.Tensor | None
    replaced: Mapping[str, int]


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
        self._last = np.array(rows, np.uint64) - np.uint64(1)

    @property
    def refuses_ids(self) -> bool:
        """Whether an id outside its table is an error."""
        return self._replacement is None

    def measure(
        self, values: Any, lengths: Any, weights: Any
    ) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor | None]:
        """Checks all but the ids: values as an array, the offsets [F * B + 1], lengths int32, weights float32.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
        """
        if type(values) is not torch.Tensor or values.dtype is not torch.int64 or not _is_plain(values):
            values = as_integers("values", values)
        # Once: it keeps the memory and has a size of its own, whatever becomes of the caller's tensor from here on.
        array = values.numpy()
        count = array.size
        if type(lengths) is not torch.Tensor or lengths.dtype is not torch.int32 or not _is_plain(lengths):
            lengths = as_integers("lengths", lengths)
            if lengths.dtype is not torch.int32:
                lengths = self._narrow(lengths, count)
        if weights is not None or self.weighted:
            weights = self._check_weights(weights, count)
        if count >= 2**31:  # the graphs' offsets are int32, as the lengths are
            raise InvalidInputError(f"values: {count} ids; a request has fewer than 2**31")
        sizes = lengths.numpy()
        offsets = np.empty(sizes.size + 1, _INT64)
        offsets[0] = 0
        np.add.accumulate(sizes.view(_UINT32), out=offsets[1:], dtype=_INT64)
        if sizes.size % self._count or offsets[-1] != count:
            self._refuse_lengths(lengths, count)
        return array, offsets, lengths, weights

    def check(self, values: Any, lengths: Any, weights: Any) -> Checked:
        """Checks a request in the raw signature on a copy of its ids.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
        """
        array, offsets, lengths, weights = self.measure(values, lengths, weights)
        ids = np.zeros(array.size + 1, _INT64)
        ids[:-1] = array
        return self.check_ids(ids, offsets, lengths, weights)

    def check_ids(
        self, ids: np.ndarray, offsets: np.ndarray, lengths: torch.Tensor, weights: torch.Tensor | None
    ) -> Checked:
        """Checks the ids of a measured request, and replaces those outside their table.

        Args:
            ids: [N + 1], of which nobody else has a view; the last one is 0, the start of a last feature without ids.
            offsets: as `measure` gives them, as well as what follows.
            lengths: of the bags.
            weights: of the ids.

        Raises:
            InvalidInputError: some ids are outside, and they are an error.
        """
        bags = (offsets.size - 1) // self._count
        if bags and not self.inside(ids, offsets[:-1:bags]):
            return self._replace(ids[:-1], offsets, lengths, weights)
        return Checked(ids[:-1], offsets, lengths, weights, _NONE)

    def inside(self, ids: np.ndarray, starts: np.ndarray) -> bool:
        """Whether every id is in its table; `ids` [N + 1] end in a zero, `starts` [F] may be N. False where one may not be.

        (Of a feature without ids it sees the first id of another.)
        """
        outside = np.maximum.reduceat(ids.view(_UINT64), starts) > self._last
        return not outside[outside.argmax()]

    def _replace(
        self, ids: np.ndarray, offsets: np.ndarray, lengths: torch.Tensor, weights: torch.Tensor | None
    ) -> Checked:
        bags = (offsets.size - 1) // self._count
        starts = offsets[:-1:bags]
        outside = ids.view(_UINT64) > np.repeat(self._last, np.diff(offsets[::bags]))
        if not outside.any():
            return Checked(ids, offsets, lengths, weights, _NONE)
        if self._replacement is None:
            last = self._last

            def tell(feature: int, position: int) -> str:
                return f"id {ids[position]} is outside [0, {last[feature]}]"

            raise InvalidInputError(describe(self.features, offsets, outside, tell))
        ids[outside] = self._replacement
        return Checked(ids, offsets, lengths, weights, count_ids(self.features, outside, starts))

    def _check_weights(self, weights: Any, count: int) -> torch.Tensor | None:
        if (weights is not None) != bool(self.weighted):
            takes = f"features {sorted(self.weighted)} take" if self.weighted else "this artifact takes no"
            raise InvalidInputError(f"per_sample_weights: {takes} per-sample weights")
        return as_floats("per_sample_weights", weights, count)

    def _narrow(self, lengths: torch.Tensor, count: int) -> torch.Tensor:
        """Lengths of int64 as int32, where they fit."""
        narrow = lengths.to(torch.int32)
        if not torch.equal(narrow, lengths):
            self._refuse_lengths(lengths, count)
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


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 1 and tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_neg()


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
