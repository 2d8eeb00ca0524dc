"""Lookups of one shape on a GPU, recorded once and launched as a whole (CUDA graph): a small request is all launches."""

from collections.abc import Callable
from typing import Protocol

import torch

from runtime_py.device_stream import Order, Verdict, on_stream, pack
from runtime_py.errors import InvalidInputError
from runtime_py.inputs import Request
from runtime_py.manifest import Manifest

__all__ = ["CapturedLookup"]


class _Lookup(Protocol):
    """What is captured: a `DeviceArtifact`."""

    manifest: Manifest
    device: torch.device

    def is_plain(self, request: Request) -> bool: ...
    def check_on_host(self, request: Request) -> Request: ...
    def check_size(self, lengths: torch.Tensor) -> None: ...
    def inspect(self, request: Request) -> torch.Tensor: ...
    def run_on_device(self, request: Request) -> torch.Tensor: ...
    def raise_if_bad(self, verdict: list[int], request: Request) -> None: ...


class CapturedLookup:
    """A lookup of fixed shape: a request is copied into its buffers, then one launch runs every kernel.

    A request has exactly `bags` bags a feature, and up to `ids` ids. Calls follow one another.
    """

    def __init__(self, artifact: _Lookup, bags: int, ids: int) -> None:
        self._artifact = artifact
        self.bags, self.ids = bags, ids
        device, count = artifact.device, len(artifact.manifest.features) * bags
        weights = torch.zeros(ids, dtype=torch.float32, device=device) if artifact.manifest.weighted else None
        values = torch.zeros(ids, dtype=torch.int64, device=device)
        # int64, as lengths may be: in int32 those that do not fit would become others before they are inspected.
        self._buffers = Request(values, torch.zeros(count, dtype=torch.int64, device=device), weights)
        artifact.check_size(self._buffers.lengths)
        self._order = Order(device)
        self._replay, self._numbers, self._pooled = self._record()

    def _steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._artifact.inspect(self._buffers), self._artifact.run_on_device(self._buffers)

    def _record(self) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor]:
        """What runs the lookup on the buffers, and the two tensors that it writes."""
        device = self._artifact.device
        if device.type != "cuda":  # there are no graphs: the same steps, into the same tensors
            results = self._steps()

            def replay() -> None:
                for old, new in zip(results, self._steps(), strict=True):
                    old.copy_(new)

            return replay, *results
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):  # or libraries would be set up while they are recorded
                self._steps()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # On a stream of ours: torch's own for this is one, of the device that captured first in the process.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
        ):
            results = self._steps()
        return graph.replay, *results

    def __call__(
        self,
        values: torch.Tensor,
        lengths: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
        *,
        stream: "torch.cuda.Stream | None" = None,
    ) -> torch.Tensor:
        """As `DeviceArtifact.lookup`, for the captured shape.

        Raises:
            InvalidInputError: the request does not fit the shape, or as `DeviceArtifact.lookup`.
        """
        artifact, request = self._artifact, Request(values, lengths, per_sample_weights)
        with on_stream(stream, artifact.device, request), self._order:
            there = artifact.is_plain(request)
            if not there:
                request = artifact.check_on_host(request)
            self._check_shape(request)
            self._fill(request if there else pack(request, artifact.device))
            self._replay()
            pooled = self._pooled.clone()
            if there:
                artifact.raise_if_bad(Verdict(self._numbers).wait(), request)
            return pooled

    def _check_shape(self, request: Request) -> None:
        bags = request.lengths.numel() // len(self._artifact.manifest.features)
        if bags != self.bags or request.values.numel() > self.ids:
            raise InvalidInputError(
                f"a request of {bags} bags a feature and {request.values.numel()} ids does not fit a lookup that was "
                f"captured for {self.bags} bags and at most {self.ids} ids"
            )

    def _fill(self, request: Request) -> None:
        count = request.values.numel()
        self._buffers.values[:count].copy_(request.values)
        self._buffers.lengths.copy_(request.lengths)
        if self._buffers.per_sample_weights is not None and request.per_sample_weights is not None:
            self._buffers.per_sample_weights[:count].copy_(request.per_sample_weights.detach())
