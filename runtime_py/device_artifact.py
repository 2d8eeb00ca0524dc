"""An artifact whose rows lie on a GPU: the requests of `Artifact`, with streams, and lookups of fixed shape in one launch.

Requests on the host are checked there, and copied to the device at once. Requests on the device are checked there, beside the
lookup (`device_inputs`). Either way a bad one raises what it raises on a CPU, and leaves the device usable.
"""

import mmap
from collections.abc import Callable, Mapping
from typing import Any

import torch

from runtime_py.artifact import Artifact
from runtime_py.captured import CapturedLookup
from runtime_py.checks import Checked, InvalidIds
from runtime_py.device_inputs import inspect_request, is_plain, move, raise_if_bad
from runtime_py.device_layout import DeviceLayout
from runtime_py.device_stream import Order, Verdict, on_stream, pack
from runtime_py.errors import GraphError, InvalidInputError, UnsupportedError
from runtime_py.inputs import ExtraFeatures, Request
from runtime_py.manifest import Manifest
from runtime_py.pooled import Pooled
from runtime_py.torchscript import last_line
from runtime_py.vocabulary import Vocabulary

__all__ = ["DeviceArtifact"]

_MOST_OUTPUTS = 2**31 - 1  # FBGEMM's kernels address the output in int32


class DeviceArtifact(Artifact):
    """A loaded artifact on a GPU. `layout` says where its tables lie.

    Any number of threads may use one. With a cache of rows their lookups follow one another, on whatever streams.
    """

    def __init__(
        self,
        manifest: Manifest,
        graph: Callable[..., torch.Tensor],
        invalid_ids: InvalidIds,
        vocabularies: Mapping[str, Vocabulary],
        mapping: mmap.mmap,
        device: torch.device,
        layout: DeviceLayout,
        cache_order: Order | None = None,
    ) -> None:
        if invalid_ids not in ("error", "zero"):
            raise ValueError(f"invalid_ids must be 'error' or 'zero' on a GPU, got {invalid_ids!r}")
        super().__init__(manifest, "torchscript", graph, invalid_ids, vocabularies, mapping)
        self.device = device
        self.layout = layout
        self._order = cache_order or Order(device)
        self._width = sum(output.dim for output in manifest.outputs)
        rows = [manifest.table[feature.table].num_embeddings for feature in manifest.features]
        self._num_embeddings = torch.tensor(rows, dtype=torch.int64, device=device)

    def __repr__(self) -> str:
        return f"DeviceArtifact({self.manifest.artifact_id[:12]}, device='{self.device}')"

    def __call__(
        self,
        features: Any,
        *,
        extra_features: ExtraFeatures = "error",
        out: torch.Tensor | None = None,
        stream: "torch.cuda.Stream | None" = None,
    ) -> Pooled:
        """As `Artifact`'s; a `KeyedJaggedTensor` may lie on the device, and stays there if its keys are in our order.

        Ids that are replaced are not counted.
        """
        if hasattr(features, "weights_or_none") and hasattr(features, "keys") and hasattr(features, "to"):
            self._reader.check_form(features)
            request = Request(features.values(), features.lengths(), features.weights_or_none())
            if list(features.keys()) == self._reader.features and self.is_plain(request):
                return self._named(self.lookup(*request, out=out, stream=stream))
            features = features.to(torch.device("cpu"))
        request = self._reader.read(features, extra_features)
        return self._named(self.lookup(*request, out=out, stream=stream))

    def pool(self, *_: object, **__: object) -> torch.Tensor:
        """Not on a GPU.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"pool is for a CPU, and the rows are on {self.device}; load the artifact there, too")

    def lookup_entities(
        self,
        features: Any,
        *,
        rows: Mapping[str, Any] | None = None,
        unknown_ids: InvalidIds = "error",
        extra_features: ExtraFeatures = "error",
        out: torch.Tensor | None = None,
        stream: "torch.cuda.Stream | None" = None,
    ) -> Pooled:
        """As `Artifact`'s, which looks the entities up on the host."""
        checked, unknown = self._entities.read(features, rows, unknown_ids, extra_features)
        request = _as_request(checked)
        with on_stream(stream, self.device, (*request, out)):
            pooled = self._give(self._look_up_from_host(request), out)
        self._unknown.add(unknown)
        return Pooled(pooled, self._columns, self.manifest.artifact_id, {}, unknown)

    def _named(self, pooled: torch.Tensor) -> Pooled:
        return Pooled(pooled, self._columns, self.manifest.artifact_id)

    def lookup(
        self,
        values: torch.Tensor,
        lengths: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        stream: "torch.cuda.Stream | None" = None,
    ) -> torch.Tensor:
        """Looks up one batch in the raw signature, and returns float32 [B, sum(D)] on the device.

        Args:
            values: int64 [N], the ids, feature after feature in the manifest's order; on the host or the device.
            lengths: int32 [F * B], feature-major, where `values` are.
            per_sample_weights: float32 [N] where the artifact is weighted, else None.
            out: float32 [B, sum(D)] on the device, where the embeddings are written; by default a new tensor. After an
                error its contents are undefined.
            stream: where the lookup runs, after what the caller's current stream holds by now; by default on that stream.
                The answer is ready for what is put on the same stream after it.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
        """
        request = Request(values, lengths, per_sample_weights)
        with on_stream(stream, self.device, (*request, out)):
            if self.is_plain(request) and values.numel() and lengths.numel():
                return self._give(self._look_up_there(request), out)
            return self._give(self._look_up_from_host(self.check_on_host(request)), out)

    def _look_up_from_host(self, request: Request) -> torch.Tensor:
        """A request of the host that was checked."""
        self.check_size(request.lengths)
        if not request.values.numel() or not request.lengths.numel():
            bags = request.lengths.numel() // len(self.manifest.features)
            return torch.zeros(bags, self._width, dtype=torch.float32, device=self.device)
        return self.run_on_device(pack(request, self.device))

    def _give(self, pooled: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if out is None:
            return pooled
        if out.dtype is not torch.float32 or out.device != self.device or out.shape != pooled.shape:
            raise InvalidInputError(
                f"out: expected float32 {list(pooled.shape)} on {self.device}, "
                f"got {out.dtype} {list(out.shape)} on {out.device}"
            )
        return out.copy_(pooled)

    def capture(self, *, bags: int, ids: int) -> CapturedLookup:
        """A lookup of `bags` bags a feature and at most `ids` ids, recorded once and then launched as a whole.

        Raises:
            UnsupportedError: the artifact has a cache of rows, which the host steers at every lookup.
        """
        if self.layout.cache is not None:
            raise UnsupportedError(
                "a lookup through a cache of rows cannot be captured; load with placement='device' or 'uvm'"
            )
        if bags < 1 or ids < 1:
            raise ValueError(f"bags and ids must be 1 or more, got {bags} and {ids}")
        return CapturedLookup(self, bags, ids)

    def with_invalid_ids(self, invalid_ids: InvalidIds) -> "DeviceArtifact":
        """The same artifact over the same rows and graph, that treats ids outside their table in this way."""
        base = super().with_invalid_ids(invalid_ids)
        return DeviceArtifact(
            base.manifest,
            self.graph,
            invalid_ids,
            self.vocabularies,
            self._mapping,
            self.device,
            self.layout,
            self._order,
        )

    def warm_up(self, path: str) -> None:
        """Runs the graph once, and waits for it.

        Raises:
            GraphError: the graph, which `path` names, does not take or give what the manifest says.
        """
        count = len(self.manifest.features)
        values = torch.zeros(count, dtype=torch.int64, device="cpu")
        lengths = torch.ones(count, dtype=torch.int32, device="cpu")
        weights = torch.ones(count, dtype=torch.float32, device="cpu") if self.manifest.weighted else None
        try:
            pooled = self.run_on_device(move(Request(values, lengths, weights), self.device)).cpu()
        except RuntimeError as error:
            raise GraphError(f"{path} does not run on {self.device}: {last_line(error)}") from error
        if pooled.shape != (1, self._width) or pooled.dtype is not torch.float32:
            raise GraphError(f"{path} gives {list(pooled.shape)} {pooled.dtype}, expected [1, {self._width}] float32")

    # --- Steps that a captured lookup takes, too ------------------------------------------------------------------------

    def is_plain(self, request: Request) -> bool:
        """Whether the request has the graph's types and shapes, and lies on the device."""
        return is_plain(request, len(self.manifest.features), self.manifest.weighted, self.device)

    def check_on_host(self, request: Request) -> Request:
        """A request that is not plain, moved to the host where it is not there, and checked."""
        return _as_request(
            self._checker.check(*(part.cpu() if isinstance(part, torch.Tensor) else part for part in request))
        )

    def check_size(self, lengths: torch.Tensor) -> None:
        """Refuses a batch whose answer the kernels cannot address."""
        bags = lengths.numel() // len(self.manifest.features)
        if bags * self._width > _MOST_OUTPUTS:
            raise InvalidInputError(
                f"lengths: {bags} bags of {self._width} values are more than a lookup on a GPU gives (2**31 - 1 values); "
                "split the batch"
            )

    def inspect(self, request: Request) -> torch.Tensor:
        """The numbers that tell a bad request (`inspect_request`), on the device."""
        return inspect_request(request.values, request.lengths, self._num_embeddings)

    def run_on_device(self, request: Request) -> torch.Tensor:
        """The graph, on a request of its types and shapes that lies on the device; safe whatever the request holds."""
        inputs = request[:2] if request.per_sample_weights is None else request
        if self.layout.cache is None:
            return self.graph(*inputs)
        with self._order:
            return self.graph(*inputs)

    def raise_if_bad(self, verdict: list[int], request: Request) -> None:
        """Raises what the request would raise on a CPU, where the numbers of `inspect` say so."""
        raise_if_bad(verdict, request, self._checker)

    def _look_up_there(self, request: Request) -> torch.Tensor:
        values, lengths, weights = request
        self.check_size(lengths)
        verdict = Verdict(self.inspect(request))
        weights = None if weights is None else weights.detach().to(torch.float32)
        pooled = self.run_on_device(Request(values.to(torch.int64), lengths.to(torch.int32), weights))
        self.raise_if_bad(verdict.wait(), request)
        return pooled


def _as_request(checked: Checked) -> Request:
    return Request(checked.values, checked.lengths, checked.weights)
