"""Runs checked requests through a graph: on the caller's thread, or a large one in pieces on the threads of a team.

Bags are independent, so that a request may be cut between any two examples; every piece is copied, checked and looked up
by one thread, and its rows of the result lie side by side. Pieces have about the same number of ids each.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from runtime_py.checks import Checked, RequestChecker
from runtime_py.errors import InvalidInputError
from runtime_py.jagged import Piece, plan_pieces
from runtime_py.manifest import Manifest
from runtime_py.team import Team

__all__ = ["Lookups"]

# A request is split where both are reached: below, handing over costs more than a second core gains.
SPLIT_IDS = 8192
SPLIT_BYTES = 2 * 2**20  # of rows
_AHEAD_BYTES = 3 * 2**18  # of rows that the caller looks up before a thread that slept has begun
_PIECE_IDS = 65536  # where there is more than one piece for a thread; a busy core holds others up for one piece
Graph = Callable[..., torch.Tensor]


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
        self._ahead = int(_AHEAD_BYTES / self._row_bytes)
        self._has_surgery = manifest.surgery is not None
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
        values, offsets, weights = self.checker.measure(values, lengths, weights)
        if self.team is not None and self._is_large(values.numel()):
            request = Checked(values, offsets, weights, {})
            pooled = self._run_pieces(self.team, request, out, check=True)
            if pooled is not None:
                return pooled, request.replaced
        checked = self.checker.check_measured(values, offsets, weights)
        return self.run(checked, out), checked.replaced

    def run(self, checked: Checked, out: torch.Tensor | None) -> torch.Tensor:
        """Looks up a checked request."""
        if self.team is not None and self._is_large(checked.values.numel()):
            pooled = self._run_pieces(self.team, checked, out, check=False)
            if pooled is not None:  # always: nothing is checked
                return pooled
        if out is None:
            return self._call(checked)
        self._check_out(out, (checked.offsets.numel() - 1) // self._features)
        return out.copy_(self._call(checked))

    def _is_large(self, count: int) -> bool:
        return count >= SPLIT_IDS and count * self._row_bytes >= SPLIT_BYTES

    def _call(self, checked: Checked) -> torch.Tensor:
        if self._has_surgery and torch.is_autocast_enabled("cpu"):  # which would change what the module computes
            with torch.autocast("cpu", enabled=False):
                return self._call(checked)
        values, offsets, weights, _ = checked
        if self._lookup_checked is None:
            lengths = checked.lengths
            return self.graph(values, lengths) if weights is None else self.graph(values, lengths, weights)
        if weights is None:
            return self._lookup_checked(values, offsets)
        return self._lookup_checked(values, offsets, weights)

    def _run_pieces(
        self, team: Team, request: Checked, out: torch.Tensor | None, *, check: bool
    ) -> torch.Tensor | None:
        """None where `check` is asked, and some ids are outside."""
        values, offsets, weights, _ = request
        features, count = self._features, values.numel()
        bags = (offsets.numel() - 1) // features
        if out is not None:
            self._check_out(out, bags)
        if out is None or _overlaps(out, request):  # a piece must not write what another still reads
            pooled = torch.empty(bags, self.width, dtype=torch.float32, device="cpu")
        else:
            pooled = out
        outside: list[Piece] = []

        def run_piece(piece: Piece) -> None:
            if outside:
                return
            cut = self.checker.limits.cut_piece(values, offsets, weights, piece)
            if check and not cut.inside:
                outside.append(piece)
                return
            pooled[piece.first : piece.end].copy_(self._call(Checked(cut.values, cut.offsets, cut.weights, {})))

        def run_piece_in_inference_mode(piece: Piece) -> None:
            with torch.inference_mode():
                run_piece(piece)

        # A mode is its thread's, and `pooled` may be a tensor of it.
        run = run_piece_in_inference_mode if torch.is_inference_mode_enabled() else run_piece
        number = team.threads * max(1, count // (_PIECE_IDS * team.threads))
        team.run(run, plan_pieces(offsets, features, number, self._ahead))
        if outside:
            return None
        return pooled if out is None or pooled is out else out.copy_(pooled)

    def _check_out(self, out: torch.Tensor, bags: int) -> None:
        if type(out) is not torch.Tensor or out.dtype is not torch.float32 or out.device.type != "cpu":
            got = f"{out.dtype} on {out.device}" if type(out) is torch.Tensor else type(out).__name__
            raise InvalidInputError(f"out: expected a float32 tensor on the CPU, got {got}")
        if out.shape != (bags, self.width):
            raise InvalidInputError(f"out: expected shape [{bags}, {self.width}], got {list(out.shape)}")
        if out.requires_grad or out.layout is not torch.strided or out.is_neg():
            raise InvalidInputError("out: expected a dense tensor without a gradient")
        if out.is_inference() and not torch.is_inference_mode_enabled():
            raise InvalidInputError("out: a tensor of torch.inference_mode can only be written in it")
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
    start, end = _span(out)
    parts = [request.values, *([] if request.weights is None else [request.weights])]
    return any(start < part_end and part_start < end for part_start, part_end in map(_span, parts))


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses between which the elements lie, whatever lies between them."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
