"""What a lookup gives: one tensor, and views of it by output key."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from runtime_py.errors import UnsupportedError

__all__ = ["Pooled"]


@dataclass(frozen=True, eq=False)
class Pooled:
    """The pooled embeddings of one batch: `values` float32 [B, sum(D)], and a view of them by output key.

    `artifact_id` says which artifact gave them. `invalid_ids` and `unknown_ids` say, by feature, how many rows that no table
    has and how many entities that no vocabulary has were given, where these are no error; features without any are left out.
    """

    values: torch.Tensor
    columns: Mapping[str, tuple[int, int]]
    artifact_id: str
    invalid_ids: Mapping[str, int] = field(default_factory=dict)
    unknown_ids: Mapping[str, int] = field(default_factory=dict)

    def keys(self) -> list[str]:
        """The output keys, in column order."""
        return list(self.columns)

    def __getitem__(self, key: str) -> torch.Tensor:
        """float32 [B, D] of one output key."""
        if key not in self.columns:
            raise KeyError(f"no output '{key}'; outputs: {', '.join(self.columns)}")
        start, end = self.columns[key]
        return self.values[:, start:end]

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy, which know no read-only mappings."""
        return Pooled, (
            self.values,
            dict(self.columns),
            self.artifact_id,
            dict(self.invalid_ids),
            dict(self.unknown_ids),
        )

    def to_dict(self) -> dict[str, torch.Tensor]:
        """float32 [B, D] by output key."""
        return {key: self[key] for key in self.columns}

    def to_keyed_tensor(self) -> Any:
        """A torchrec `KeyedTensor` over the same memory.

        Raises:
            UnsupportedError: torchrec is not installed; nothing else here needs it.
        """
        try:
            from torchrec.sparse.jagged_tensor import KeyedTensor
        except ImportError as error:
            raise UnsupportedError(
                f"a KeyedTensor needs torchrec, which cannot be imported: {error}; to_dict() does without"
            ) from error
        dims = [end - start for start, end in self.columns.values()]
        return KeyedTensor(keys=self.keys(), length_per_key=dims, values=self.values)
