"""Requests: from what a caller has to the graph's signature, and the checks that stand between the two.

Everything here ends in the raw signature: `values` int64 [N], `lengths` int32 [F * B] (feature-major: all bags of the
first feature, then of the second), and `per_sample_weights` float32 [N] where the artifact is weighted. N is the number
of ids, F of features, B of bags a feature. No check and no conversion ever writes to a caller's tensor.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from runtime_py.errors import InvalidInputError
from runtime_py.manifest import Manifest

__all__ = ["Jagged", "Request", "RequestReader"]


class Jagged(NamedTuple):
    """The bags of one feature: `values` [N], `lengths` [B], and `per_sample_weights` [N] for a weighted feature."""

    values: Any
    lengths: Any
    per_sample_weights: Any = None


class Request(NamedTuple):
    """A batch in the raw signature."""

    values: torch.Tensor
    lengths: torch.Tensor
    per_sample_weights: torch.Tensor | None


class RequestReader:
    """Reads and checks the requests of one artifact."""

    def __init__(self, manifest: Manifest) -> None:
        self.features = [feature.name for feature in manifest.features]
        self._known = frozenset(self.features)
        self._weighted = {feature.name for feature in manifest.features if feature.weighted}
        self._num_embeddings = [manifest.table[feature.table].num_embeddings for feature in manifest.features]
        self._limits = torch.tensor(self._num_embeddings, device="cpu")

    # --- Reading ----------------------------------------------------------------------------------------------------

    def read(self, features: Any) -> Request:
        """A mapping by feature name, or a `KeyedJaggedTensor` in any key order, as a request.

        A mapping's values are one of: a sequence of B bags, each a sequence of ids; a `Jagged`, or torchrec's
        `JaggedTensor` (a plain pair of values and lengths is two bags). `KeyedJaggedTensor` is recognised by its
        methods, so that torchrec need not be imported.

        Raises:
            InvalidInputError: a feature is missing or unknown, batch sizes differ, or something is no id.
        """
        if isinstance(features, Mapping):
            return self._read_mapping(features)
        if hasattr(features, "keys") and hasattr(features, "lengths") and hasattr(features, "values"):
            return self._read_keyed_jagged(features)
        raise InvalidInputError(
            f"expected a mapping by feature name or a KeyedJaggedTensor, got {type(features).__name__}; "
            f"features: {', '.join(self.features)}"
        )

    def _read_mapping(self, features: Mapping[str, Any]) -> Request:
        self._check_names(list(features))
        bags = [self._read_feature(name, features[name]) for name in self.features]
        batch = len(bags[0].lengths)
        for name, jagged in zip(self.features, bags, strict=True):
            if len(jagged.lengths) != batch:
                raise InvalidInputError(
                    f"feature '{name}': {len(jagged.lengths)} bags, and '{self.features[0]}' has {batch}; "
                    "every feature has one bag for each example"
                )
        weights = None
        if self._weighted:
            # A feature without weights takes part with 1.0, which the graph does not read.
            weights = torch.cat(
                [
                    torch.ones(len(jagged.values), dtype=torch.float32, device="cpu")
                    if jagged.per_sample_weights is None
                    else jagged.per_sample_weights
                    for jagged in bags
                ]
            )
        return Request(
            torch.cat([jagged.values for jagged in bags]), torch.cat([jagged.lengths for jagged in bags]), weights
        )

    def _check_names(self, names: Sequence[str]) -> None:
        if len(names) == len(self.features) and set(names) == self._known:
            return
        unknown = [name for name in names if name not in self._known]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), self.features, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"features: {', '.join(self.features)}"
            raise InvalidInputError(f"unknown feature '{unknown[0]}'; {hint}")
        missing = [name for name in self.features if name not in names]
        if missing:
            raise InvalidInputError(f"missing feature '{missing[0]}'; give every one of {', '.join(self.features)}")
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInputError(f"feature '{twice}' is given twice")

    def _read_feature(self, name: str, bags: Any) -> Jagged:
        if isinstance(bags, Jagged):
            values, lengths, weights = bags
        elif hasattr(bags, "weights_or_none") and hasattr(bags, "lengths"):
            values, lengths, weights = bags.values(), bags.lengths(), bags.weights_or_none()
        else:
            values, lengths, weights = *self._flatten(name, bags), None
        values = _integers(f"feature '{name}': values", values).to(torch.int64)
        lengths = _integers(f"feature '{name}': lengths", lengths)
        _check_lengths([name], lengths.view(1, -1), len(values))
        lengths = lengths.to(torch.int32)
        if (weights is not None) != (name in self._weighted):
            takes = "takes per-sample weights: give Jagged(values, lengths, per_sample_weights)"
            raise InvalidInputError(f"feature '{name}' {takes if weights is None else 'takes no per-sample weights'}")
        if weights is not None:
            weights = _floats(f"feature '{name}': per_sample_weights", weights, len(values))
        return Jagged(values, lengths, weights)

    def _flatten(self, name: str, bags: Any) -> tuple[np.ndarray, np.ndarray]:
        if not _is_sequence(bags):
            raise InvalidInputError(f"feature '{name}': expected a sequence of bags, got {bags!r:.80}")
        arrays = []
        for position, bag in enumerate(bags):
            if not _is_sequence(bag) and not isinstance(bag, torch.Tensor):
                raise InvalidInputError(
                    f"feature '{name}', bag {position}: expected a sequence of ids, got {bag!r:.80}; "
                    "a batch is a list of bags, such as [[3, 5], []]"
                )
            arrays.append(_ids(f"feature '{name}', bag {position}", bag))
        values = np.concatenate([np.empty(0, np.int64), *arrays])
        return values, np.array([len(array) for array in arrays], np.int32)

    def _read_keyed_jagged(self, features: Any) -> Request:
        keys = list(features.keys())
        self._check_names(keys)
        if getattr(features, "variable_stride_per_key", bool)():
            raise InvalidInputError("the KeyedJaggedTensor has another batch size for each key; give one batch size")
        if getattr(features, "inverse_indices_or_none", lambda: None)() is not None:
            raise InvalidInputError("the KeyedJaggedTensor has inverse indices; give the bags themselves")
        values = _integers("KeyedJaggedTensor: values", features.values())
        lengths = _integers("KeyedJaggedTensor: lengths", features.lengths())
        weights = features.weights_or_none()
        if (weights is not None) != bool(self._weighted):
            takes = f"features {sorted(self._weighted)} take" if self._weighted else "no feature takes"
            raise InvalidInputError(f"KeyedJaggedTensor: {takes} per-sample weights")
        if weights is not None:
            weights = _floats("KeyedJaggedTensor: weights", weights, values.numel())
        if keys == self.features:
            return Request(values, lengths, weights)
        if lengths.numel() % len(keys):
            raise InvalidInputError(f"KeyedJaggedTensor: {lengths.numel()} lengths for {len(keys)} keys")
        order = [keys.index(name) for name in self.features]
        by_key = lengths.view(len(keys), -1)
        counts = _check_lengths(keys, by_key, values.numel()).tolist()
        pieces = values.split(counts)
        weight_pieces = None if weights is None else weights.split(counts)
        return Request(
            torch.cat([pieces[i] for i in order]),
            by_key[order].reshape(-1),
            None if weight_pieces is None else torch.cat([weight_pieces[i] for i in order]),
        )

    # --- Checking ---------------------------------------------------------------------------------------------------

    def check(self, request: Request, *, ids: bool) -> Request:
        """Checks a request in the raw signature, and returns it with the graph's dtypes.

        Args:
            request: values and lengths of int64 or int32, weights of any float type.
            ids: whether an id outside its table is an error; otherwise the graph makes it a zero vector.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
        """
        values = _integers("values", request.values).to(torch.int64)
        lengths = _integers("lengths", request.lengths)
        weights = request.per_sample_weights
        if (weights is not None) != bool(self._weighted):
            takes = f"features {sorted(self._weighted)} take" if self._weighted else "this artifact takes no"
            raise InvalidInputError(f"per_sample_weights: {takes} per-sample weights")
        if weights is not None:
            weights = _floats("per_sample_weights", weights, values.numel())
        if values.numel() >= 2**31:  # FBGEMM's offsets are int32, as the lengths are
            raise InvalidInputError(f"values: {values.numel()} ids; a request has fewer than 2**31")
        if lengths.numel() % len(self.features):
            raise InvalidInputError(
                f"lengths: {lengths.numel()} do not divide into {len(self.features)} features ({', '.join(self.features)})"
            )
        by_feature = lengths.view(len(self.features), -1)
        counts = _check_lengths(self.features, by_feature, values.numel())
        if ids:
            limits = torch.repeat_interleave(self._limits, counts, output_size=values.numel())
            bad = (values < 0) | (values >= limits)
            if bool(bad.any()):
                raise InvalidInputError("; ".join(self._describe_ids(values, by_feature, bad)))
        return Request(values, lengths.to(torch.int32), weights)

    def _describe_ids(self, values: torch.Tensor, by_feature: torch.Tensor, bad: torch.Tensor) -> Iterator[str]:
        """One part for each feature that has ids outside its table: the first of them, and how many."""
        start = 0
        for name, limit, lengths in zip(self.features, self._num_embeddings, by_feature, strict=True):
            count = int(lengths.sum())
            here = bad[start : start + count]
            if bool(here.any()):
                position = int(here.nonzero()[0])
                ends = lengths.cumsum(0)
                bag = int(torch.searchsorted(ends, position, right=True))
                inside = position - int(ends[bag] - lengths[bag])
                number = int(here.sum())
                more = f" (and {number - 1} more)" if number > 1 else ""
                got = int(values[start + position])
                yield f"feature '{name}', bag {bag}, position {inside}: id {got} is outside [0, {limit - 1}]{more}"
            start += count


def _check_lengths(features: Sequence[str], lengths: torch.Tensor, count: int) -> torch.Tensor:
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


def _is_sequence(data: Any) -> bool:
    if isinstance(data, str | bytes):
        return False
    try:
        len(data)
    except TypeError:  # no length at all, or an array or a tensor of no dimension
        return False
    return True


def _ids(where: str, bag: Any) -> np.ndarray:
    """One bag as int64 [L]."""
    try:
        array = np.asarray(bag.detach() if isinstance(bag, torch.Tensor) else bag)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidInputError(f"{where}: expected ids, got {bag!r:.80}") from error
    if array.ndim != 1:
        raise InvalidInputError(f"{where}: expected a flat sequence of ids, got shape {list(array.shape)}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if (
        array.dtype.kind not in "iu"
        or array.dtype == np.uint64
        or (isinstance(bag, list | tuple) and bool in map(type, bag))
    ):
        wrong = next((item for item in bag if not isinstance(item, int | np.integer) or isinstance(item, bool)), bag)
        raise InvalidInputError(f"{where}: an id is a 64-bit integer, got {wrong!r:.80} ({array.dtype})")
    return array.astype(np.int64)


def _integers(what: str, data: Any) -> torch.Tensor:
    """`data` as a 1-D CPU tensor of int64 or int32; the same tensor where it already is one."""
    tensor = _tensor(what, data, "int64 or int32")
    if tensor.dtype not in (torch.int64, torch.int32):
        if tensor.numel():
            raise InvalidInputError(f"{what}: expected int64 or int32, got {_name(tensor.dtype)}")
        return tensor.to(torch.int64)
    return tensor


def _floats(what: str, data: Any, count: int) -> torch.Tensor:
    tensor = _tensor(what, data, "float32")
    if not tensor.dtype.is_floating_point and tensor.numel():
        raise InvalidInputError(f"{what}: expected float32, got {_name(tensor.dtype)}")
    if tensor.numel() != count:
        raise InvalidInputError(f"{what}: {tensor.numel()} weights for {count} values")
    return tensor.to(torch.float32).contiguous()


def _tensor(what: str, data: Any, expected: str) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        try:
            array = np.array(data)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InvalidInputError(f"{what}: expected {expected}, got {data!r:.80}") from error
        if array.dtype.kind not in "biuf" or array.dtype in (np.uint64, np.longdouble):
            got = array.dtype if array.dtype.kind in "cuf" else f"{data!r:.80}"
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
    tensor: torch.Tensor = data.detach()
    return tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
