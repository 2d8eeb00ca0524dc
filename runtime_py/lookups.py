"""Runs checked requests: through the graph on the caller's thread, or, a large one, on the threads of a team."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from runtime_py.checks import NONE_REPLACED, Checked, RequestChecker
from runtime_py.errors import GraphError, InvalidInputError
from runtime_py.manifest import Manifest
from runtime_py.team import OVERLAP, Team
from runtime_py.torchscript import last_line

__all__ = ["Lookups"]

# A request is split where both are reached: below, handing over costs more than a second core gains.
SPLIT_IDS = 8192
SPLIT_BYTES = 2**20  # of rows
_COMPARED_BAGS = 32  # of 0 to 31 ids a feature
Graph = Callable[..., torch.Tensor]
_count_modes = torch._C._len_torch_dispatch_stack  # named here for the same reason as in checks.py


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
        self._place = torch.empty(0, dtype=torch.float32, device="cpu")  # whatever the process's defaults
        self._has_surgery = manifest.surgery is not None
        self._lookup_checked: Graph | None = getattr(graph, "lookup_checked", None)

    def compare_with_graph(self, team: Team) -> None:
        """Makes sure that a team answers as the graph does: a few bags that reach the first and the last rows of every table.

        Raises:
            GraphError: it does not.
        """
        lengths = torch.arange(_COMPARED_BAGS, dtype=torch.int32, device="cpu").repeat(self._features)
        count = int(lengths.sum()) // self._features
        last = self.checker.limits.last.repeat_interleave(count)
        values = (torch.arange(count, device="cpu") - count // 2).repeat(self._features).remainder(last + 1)
        weights = (
            torch.linspace(-1, 1, last.numel(), dtype=torch.float32, device="cpu") if self.checker.weighted else None
        )
        checked = self.checker.check(values, lengths, weights)
        expected = self._call(checked)
        pooled = torch.empty_like(expected)
        try:
            done = team.look_up(checked.values, checked.weights, pooled, lengths=lengths)
        except RuntimeError as error:
            raise GraphError(f"several threads cannot look up: {last_line(error)}; load it with threads=1") from error
        if done < 0 or not torch.equal(pooled.view(torch.int32), expected.view(torch.int32)):
            raise GraphError("several threads give another answer than the graph; load it with threads=1")

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
        values, lengths, weights = self.checker.accept(values, lengths, weights)
        if self.team is not None and self._is_large(values.numel()) and lengths.numel() % self._features == 0:
            bags = lengths.numel() // self._features
            try:
                pooled = self._share(self.team, out, bags, values, weights, lengths=lengths)
            except InvalidInputError:  # of `out`
                self.checker.check_accepted(values, lengths, weights)  # what is wrong with the request goes first
                raise
            if pooled is not None:
                return pooled, NONE_REPLACED
        checked = self.checker.check_accepted(values, lengths, weights)  # which says what is wrong
        return self.run(checked, out), checked.replaced

    def run(self, checked: Checked, out: torch.Tensor | None) -> torch.Tensor:
        """Looks up a checked request."""
        values, offsets, weights, _ = checked
        bags = (offsets.numel() - 1) // self._features
        if self.team is not None and self._is_large(values.numel()):
            pooled = self._share(self.team, out, bags, values, weights, offsets=offsets)
            if pooled is not None:
                return pooled
        if out is None:
            return self._call(checked)
        self._check_out(out, bags)
        return out.copy_(self._call(checked))

    def _is_large(self, count: int) -> bool:
        """Whether a team looks so many ids up: not where torch watches its caller, as it would not see helpers.

        (While torch traces, a count is a tensor. Tensors of its transforms have no memory, so that a team does nothing.)
        """
        return (
            type(count) is int and count >= SPLIT_IDS and count * self._row_bytes >= SPLIT_BYTES and not _count_modes()
        )

    def _share(
        self,
        team: Team,
        out: torch.Tensor | None,
        bags: int,
        values: torch.Tensor,
        weights: torch.Tensor | None,
        *,
        lengths: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Has a team look a request up; None where it says that something is wrong with it."""
        if out is not None:
            self._check_out(out, bags)
        if out is not None and out.is_contiguous():
            torch.autograd.graph.increment_version(out)  # as every operator of torch that writes to a tensor
            room = out
        else:
            room = self._place.new_empty(bags, self.width)
        done = team.look_up(values, weights, room, lengths=lengths, offsets=offsets)
        if done == OVERLAP:
            room = self._place.new_empty(bags, self.width)
            done = team.look_up(values, weights, room, lengths=lengths, offsets=offsets)
        if done < 0:
            return None
        return room if out is None or room is out else out.copy_(room)

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
