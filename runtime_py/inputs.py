"""Requests: from what a caller has to the raw signature.

Everything here ends in the raw signature: `values` int64 [N], `lengths` int32 [F * B] (feature-major: all bags of the
first feature, then of the second), and `per_sample_weights` float32 [N] where the artifact is weighted. N is the number
of ids, F of features, B of bags a feature. No check and no conversion ever writes to a caller's tensor.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from runtime_py.checks import check_lengths
from runtime_py.convert import as_floats, as_ids, as_integers, is_sequence
from runtime_py.errors import InvalidInputError
from runtime_py.manifest import Manifest

__all__ = ["ExtraFeatures", "Jagged", "Request", "RequestReader"]

ExtraFeatures = Literal["error", "ignore"]


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
    """Reads the requests of one artifact."""

    def __init__(self, manifest: Manifest) -> None:
        self.features = [feature.name for feature in manifest.features]
        self._known = frozenset(self.features)
        self._weighted = {feature.name for feature in manifest.features if feature.weighted}

    def read(self, features: Any, extra_features: ExtraFeatures = "error") -> Request:
        """A mapping by feature name, or a `KeyedJaggedTensor` in any key order, as a request.

        A mapping's values are one of: a sequence of B bags, each a sequence of ids; a `Jagged`, or torchrec's
        `JaggedTensor` (a plain pair of values and lengths is two bags). `KeyedJaggedTensor` is recognised by its
        methods, so that torchrec need not be imported.

        Raises:
            InvalidInputError: a feature is missing or unknown, batch sizes differ, or something is no id.
        """
        names = self.names(features, extra_features)
        self._check_complete(names)
        if isinstance(features, Mapping):
            return self._read_mapping(features)
        return self._read_keyed_jagged(features)

    def names(self, features: Any, extra_features: ExtraFeatures) -> list[str]:
        """The features that a request names, without extra ones where these are ignored; some may be missing.

        Raises:
            InvalidInputError: it is neither a mapping nor a `KeyedJaggedTensor`, or names something else, or twice.
        """
        if extra_features not in ("error", "ignore"):
            raise ValueError(f"extra_features must be 'error' or 'ignore', got {extra_features!r}")
        if not isinstance(features, Mapping) and not _is_keyed_jagged(features):
            raise InvalidInputError(
                f"expected a mapping by feature name or a KeyedJaggedTensor, got {type(features).__name__}; "
                f"features: {', '.join(self.features)}"
            )
        names = list(features.keys())
        extra = [name for name in names if name not in self._known]
        if extra and extra_features == "error":
            near = difflib.get_close_matches(str(extra[0]), self.features, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"features: {', '.join(self.features)}"
            raise InvalidInputError(f"unknown feature '{extra[0]}'; {hint}")
        names = [name for name in names if name in self._known] if extra else names
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidInputError(f"feature '{twice}' is given twice")
        return names

    def by_feature(self, features: Any, names: Sequence[str]) -> dict[str, Any]:
        """The bags of these features of a request, by name."""
        if isinstance(features, Mapping):
            return {name: features[name] for name in names}
        if not names:
            return {}
        keys, by_key, pieces, weights = self._split_keyed_jagged(features)
        return {
            name: Jagged(pieces[i], by_key[i], weights[i] if weights and name in self._weighted else None)
            for i, name in enumerate(keys)
            if name in names
        }

    def check_form(self, features: Any) -> None:
        """Refuses a `KeyedJaggedTensor` that its values, lengths and weights alone do not describe.

        Raises:
            InvalidInputError: it has a batch size for each key, or inverse indices.
        """
        if getattr(features, "variable_stride_per_key", bool)():
            raise InvalidInputError("the KeyedJaggedTensor has another batch size for each key; give one batch size")
        if getattr(features, "inverse_indices_or_none", lambda: None)() is not None:
            raise InvalidInputError("the KeyedJaggedTensor has inverse indices; give the bags themselves")

    def _check_complete(self, names: Sequence[str]) -> None:
        if len(names) != len(self.features):  # none is unknown, none is there twice
            missing = next(name for name in self.features if name not in names)
            raise InvalidInputError(f"missing feature '{missing}'; give every one of {', '.join(self.features)}")

    def _read_mapping(self, features: Mapping[str, Any]) -> Request:
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

    def _read_feature(self, name: str, bags: Any) -> Jagged:
        if isinstance(bags, Jagged):
            values, lengths, weights = bags
        elif hasattr(bags, "weights_or_none") and hasattr(bags, "lengths"):
            values, lengths, weights = bags.values(), bags.lengths(), bags.weights_or_none()
        else:
            values, lengths, weights = *self._flatten(name, bags), None
        values = as_integers(f"feature '{name}': values", values).to(torch.int64)
        lengths = as_integers(f"feature '{name}': lengths", lengths)
        check_lengths([name], lengths.view(1, -1), len(values))
        lengths = lengths.to(torch.int32)
        if (weights is not None) != (name in self._weighted):
            takes = "takes per-sample weights: give Jagged(values, lengths, per_sample_weights)"
            raise InvalidInputError(f"feature '{name}' {takes if weights is None else 'takes no per-sample weights'}")
        if weights is not None:
            weights = as_floats(f"feature '{name}': per_sample_weights", weights, len(values))
        return Jagged(values, lengths, weights)

    def _flatten(self, name: str, bags: Any) -> tuple[np.ndarray, np.ndarray]:
        if not is_sequence(bags):
            raise InvalidInputError(f"feature '{name}': expected a sequence of bags, got {bags!r:.80}")
        arrays = []
        for position, bag in enumerate(bags):
            if not is_sequence(bag) and not isinstance(bag, torch.Tensor):
                raise InvalidInputError(
                    f"feature '{name}', bag {position}: expected a sequence of ids, got {bag!r:.80}; "
                    "a batch is a list of bags, such as [[3, 5], []]"
                )
            arrays.append(as_ids(f"feature '{name}', bag {position}", bag))
        values = np.concatenate([np.empty(0, np.int64), *arrays])
        return values, np.array([len(array) for array in arrays], np.int32)

    def _read_keyed_jagged(self, features: Any) -> Request:
        if list(features.keys()) == self.features:
            return Request(*self._check_keyed_jagged(features, self.features))
        keys, by_key, pieces, weights = self._split_keyed_jagged(features)
        order = [keys.index(name) for name in self.features]
        return Request(
            torch.cat([pieces[i] for i in order]),
            by_key[order].reshape(-1),
            None if weights is None else torch.cat([weights[i] for i in order]),
        )

    def _check_keyed_jagged(
        self, features: Any, keys: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        self.check_form(features)
        values = as_integers("KeyedJaggedTensor: values", features.values())
        lengths = as_integers("KeyedJaggedTensor: lengths", features.lengths())
        weights = features.weights_or_none()
        wanted = self._weighted.intersection(keys)  # weights of other keys are not read, and may be left out
        if weights is None and wanted:
            raise InvalidInputError(f"KeyedJaggedTensor: features {sorted(wanted)} take per-sample weights")
        if weights is not None:
            if not self._weighted:
                raise InvalidInputError("KeyedJaggedTensor: no feature takes per-sample weights")
            weights = as_floats("KeyedJaggedTensor: weights", weights, values.numel())
        return values, lengths, weights

    def _split_keyed_jagged(
        self, features: Any
    ) -> tuple[list[str], torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor] | None]:
        """By key, in its own order: lengths [keys, B], ids, and weights."""
        keys = list(features.keys())
        values, lengths, weights = self._check_keyed_jagged(features, keys)
        if lengths.numel() % len(keys):
            raise InvalidInputError(f"KeyedJaggedTensor: {lengths.numel()} lengths for {len(keys)} keys")
        by_key = lengths.view(len(keys), -1)
        counts = check_lengths(keys, by_key, values.numel()).tolist()
        return keys, by_key, values.split(counts), None if weights is None else weights.split(counts)


def _is_keyed_jagged(features: Any) -> bool:
    return hasattr(features, "keys") and hasattr(features, "lengths") and hasattr(features, "values")
