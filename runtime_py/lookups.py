"""Runs checked requests through a graph: on the caller's thread, or a large one in pieces on the threads of a team.

Bags are independent, so that a request may be cut between any two examples; every piece is copied, checked and looked up
by one thread, and its rows of the result lie side by side. Pieces have about the same number of ids each.
"""

import threading
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from runtime_py.checks import Checked, RequestChecker
from runtime_py.errors import InvalidInputError
from runtime_py.manifest import Manifest
from runtime_py.team import Team

__all__ = ["Lookups"]

# A request is split where both are reached: below, handing over costs more than a second core gains.
SPLIT_IDS = 8192
SPLIT_BYTES = 4 * 2**20  # of rows
_PIECE_IDS = 65536  # where there is more than one piece for a thread; a busy core holds others up for one piece
_SCRATCH_IDS = 2**20  # at most, 8 MiB a thread
_INT64 = np.dtype(np.int64)
Graph = Callable[..., torch.Tensor]


class _Scratch(threading.local):
    """Room for ids, kept by each thread: new memory of that size can cost a page fault for every 4 KiB.

    Taken and given back, so that a signal handler that looks something up in between has room of its own.
    """

    def __init__(self) -> None:
        self._room: np.ndarray | None = None

    def take(self, count: int) -> np.ndarray:
        """int64 of at least `count`."""
        room, self._room = self._room, None
        if room is None or count > room.size:
            return np.empty(1 << count.bit_length(), _INT64)
        return room

    def give(self, room: np.ndarray) -> None:
        """Keeps it for the next one, unless it is large."""
        if room.size <= _SCRATCH_IDS:
            self._room = room


class Lookups:
    """The lookups of one artifact: any number of threads may run them at once."""

    def __init__(self, manifest: Manifest, graph: Graph, checker: RequestChecker, team: Team | None) -> None:
        """A graph may have a `lookup_checked`, which takes offsets and leaves out the checks of its own."""
        self.graph = graph
        self.checker = checker
        self.width = sum(output.dim for output in manifest.outputs)
        self.team = team
        self._features = len(checker.features)
        self._row_bytes = sum(manifest.table[feature.table].row_bytes for feature in manifest.features) / self._features
        self._scratch = _Scratch()
        self._lookup_checked: Graph | None = getattr(graph, "lookup_checked", None)

    def look_up(
        self, values: Any, lengths: Any, weights: Any, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, Mapping[str, int]]:
        """Checks and looks up a request in the raw signature; the result is in `out` where one is given.

        After an error what `out` holds is undefined: a piece may have been done before another was refused.

        Returns:
            float32 [B, width], and how many ids were replaced, by feature.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
        """
        array, offsets, lengths, weights = self.checker.measure(values, lengths, weights)
        if self.team is not None and self._is_large(array.size):
            request = Checked(array, offsets, lengths, weights, {})
            pooled = self._run_pieces(self.team, request, out, check=True)
            if pooled is not None:
                return pooled, request.replaced
        count = array.size
        room = self._scratch.take(count + 1)
        ids = room[: count + 1]
        ids[count] = 0  # see `check_ids`
        ids[:count] = array
        checked = self.checker.check_ids(ids, offsets, lengths, weights)
        pooled = self.run(checked, out)
        self._scratch.give(room)
        return pooled, checked.replaced

    def run(self, checked: Checked, out: torch.Tensor | None) -> torch.Tensor:
        """Looks up a checked request."""
        if self.team is not None and self._is_large(checked.values.size):
            pooled = self._run_pieces(self.team, checked, out, check=False)
            if pooled is not None:  # always: nothing is checked
                return pooled
        if out is not None:
            self._check_out(out, (checked.offsets.size - 1) // self._features)
        pooled = self._call(checked.values, checked.offsets, checked.lengths, checked.weights)
        return pooled if out is None else out.copy_(pooled)

    def _is_large(self, count: int) -> bool:
        return count >= SPLIT_IDS and count * self._row_bytes >= SPLIT_BYTES

    def _call(
        self, ids: np.ndarray, offsets: np.ndarray, lengths: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        values = torch.from_numpy(ids)
        if self._lookup_checked is None:
            return self.graph(values, lengths) if weights is None else self.graph(values, lengths, weights)
        if weights is None:
            return self._lookup_checked(values, torch.from_numpy(offsets))
        return self._lookup_checked(values, torch.from_numpy(offsets), weights)

    def _run_pieces(
        self, team: Team, request: Checked, out: torch.Tensor | None, *, check: bool
    ) -> torch.Tensor | None:
        """None where `check` is asked, and ids may be outside."""
        count, offsets = self._features, request.offsets
        bags = (offsets.size - 1) // count
        if out is not None:
            self._check_out(out, bags)
        if out is None or _overlaps(out, request):  # a piece must not write what another still reads
            pooled = torch.empty(bags, self.width, dtype=torch.float32, device="cpu")
        else:
            pooled = out
        outside: list[int] = []
        inference = torch.is_inference_mode_enabled()  # a mode is its thread's, and `out` may be a tensor of it

        def run_piece(piece: tuple[int, int]) -> None:
            first, end = piece
            room, ids, cut, starts, weights = self._cut(request, bags, first, end)
            if check and not self.checker.inside(ids, starts):
                outside.append(first)
            elif not outside:
                lengths = request.lengths
                if self._lookup_checked is None:
                    lengths = lengths.view(count, bags)[:, first:end].reshape(-1)
                with torch.inference_mode(inference):
                    pooled[first:end].copy_(self._call(ids[:-1], cut, lengths, weights))
            self._scratch.give(room)

        team.run(run_piece, self._choose_pieces(team, offsets, bags))
        if outside:
            return None
        return pooled if out is None or pooled is out else out.copy_(pooled)

    def _choose_pieces(self, team: Team, offsets: np.ndarray, bags: int) -> list[tuple[int, int]]:
        """Ranges of bags with about the same work: a bag of a feature counts as an id, too, since its result is written."""
        ids = int(offsets[-1])
        pieces = team.threads * max(1, ids // (_PIECE_IDS * team.threads))
        by_feature = offsets[:-1].reshape(self._features, bags)
        work = (by_feature - by_feature[:, :1]).sum(0) + np.arange(bags) * self._features
        total = ids + bags * self._features
        cuts = np.searchsorted(work, np.arange(1, pieces) * (total / pieces)).tolist()
        edges = sorted({0, *cuts, bags})
        return list(pairwise(edges))

    def _cut(
        self, request: Checked, bags: int, first: int, end: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, torch.Tensor | None]:
        """Bags from `first` to before `end` of every feature: room, and in it ids and a zero; offsets, starts, weights."""
        count, offsets = self._features, request.offsets
        starts, ends = offsets[first::bags][:count], offsets[end::bags][:count]
        moved = np.zeros(count + 1, np.int64)
        np.cumsum(ends - starts, out=moved[1:])
        ranges = list(zip(starts.tolist(), ends.tolist(), strict=True))
        room = self._scratch.take(int(moved[-1]) + 1)
        ids = room[: moved[-1] + 1]
        ids[-1] = 0
        np.concatenate([request.values[start:stop] for start, stop in ranges], out=ids[:-1])
        cut = np.empty(count * (end - first) + 1, np.int64)
        cut[-1] = moved[-1]
        by_feature = offsets[:-1].reshape(count, bags)[:, first:end]
        np.subtract(by_feature, (starts - moved[:-1])[:, None], out=cut[:-1].reshape(count, end - first))
        weights = request.weights
        if weights is not None:
            weights = torch.cat([weights[start:stop] for start, stop in ranges])
        return room, ids, cut, moved[:-1], weights

    def _check_out(self, out: torch.Tensor, bags: int) -> None:
        if not isinstance(out, torch.Tensor) or out.dtype is not torch.float32 or out.device.type != "cpu":
            got = f"{out.dtype} on {out.device}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise InvalidInputError(f"out: expected a float32 tensor on the CPU, got {got}")
        if out.shape != (bags, self.width):
            raise InvalidInputError(f"out: expected shape [{bags}, {self.width}], got {list(out.shape)}")
        if out.requires_grad or out.layout is not torch.strided or out.is_neg():
            raise InvalidInputError("out: expected a dense tensor without a gradient")
        if not out.is_contiguous() and not _has_memory_for_each(out):
            raise InvalidInputError(
                f"out: expected elements with memory of their own, got strides {list(out.stride())}"
            )


def _has_memory_for_each(out: torch.Tensor) -> bool:
    """Whether every stride reaches over all that lies within the smaller ones: then no two elements share memory."""
    reach = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(out.stride(), out.shape, strict=True) if size > 1
    ):
        if stride < reach:
            return False
        reach += (size - 1) * stride
    return True


def _overlaps(out: torch.Tensor, request: Checked) -> bool:
    """Whether the two may have memory in common."""
    answer = out.detach().numpy()
    parts = [request.values, request.lengths.numpy(), *([] if request.weights is None else [request.weights.numpy()])]
    return any(np.may_share_memory(answer, part) for part in parts)
