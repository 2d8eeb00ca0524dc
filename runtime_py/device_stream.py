"""The steps of a lookup that are of CUDA itself: streams, events and page-locked memory.

On a device that is none of CUDA's each does the same in its plain form, so that tests run what stands around them on a CPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch

from runtime_py.inputs import Request

__all__ = ["Order", "Verdict", "on_stream", "pack"]

_PART_ALIGNMENT = 16


class Verdict:
    """A few numbers on their way from the device to the host."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))
        else:
            self._numbers = numbers

    def wait(self) -> list[int]:
        """The numbers, when they are there; what was put on the stream after them may still run."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[int] = self._numbers.tolist()
        return numbers


class Order:
    """A section that one thread at a time enters, and whose work on the device is done in the order of entering."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = Lock()
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            if self._done is not None:
                torch.cuda.current_stream(self._device).wait_event(self._done)
        except BaseException:  # a device that is lost must not make the others wait for ever
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            if self._done is not None:
                self._done.record(torch.cuda.current_stream(self._device))
        finally:
            self._lock.release()


def pack(request: Request, device: torch.device) -> Request:
    """A checked request of the host, on the device: one copy of all its parts."""
    parts = [part for part in request if part is not None]
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        end += -(-part.numel() * part.element_size() // _PART_ALIGNMENT) * _PART_ALIGNMENT
    host = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")

    def place(memory: torch.Tensor, part: torch.Tensor, start: int) -> torch.Tensor:
        return memory[start : start + part.numel() * part.element_size()].view(part.dtype)

    for part, start in zip(parts, starts, strict=True):
        place(host, part, start).copy_(part)
    there = host.to(device, non_blocking=True)
    sent = [place(there, part, start) for part, start in zip(parts, starts, strict=True)]
    return Request(sent[0], sent[1], sent[2] if len(sent) > 2 else None)


def on_stream(
    stream: "torch.cuda.Stream | None", device: torch.device, parts: Sequence[Any]
) -> AbstractContextManager[object]:
    """Work on `stream`, after what the caller's current one holds by now; or on the device's current stream.

    `parts` are what the work reads and writes: the tensors among them that lie on the device may be dropped before its end.
    """
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.device(device) if stream is None else _on_other_stream(stream, device, parts)


@contextmanager
def _on_other_stream(stream: "torch.cuda.Stream", device: torch.device, parts: Sequence[Any]) -> Iterator[None]:
    if stream.device != device:
        raise ValueError(f"the stream is of {stream.device}, and the artifact lies on {device}")
    stream.wait_stream(torch.cuda.current_stream(device))
    for part in parts:
        if isinstance(part, torch.Tensor) and part.device == device:
            part.record_stream(stream)  # or its memory could go to others before
    with torch.cuda.stream(stream):
        yield
