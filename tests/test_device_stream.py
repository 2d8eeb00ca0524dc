"""In which order streams and events are asked for, told by stand-ins for torch's: there is no GPU to ask."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime_py.captured import CapturedLookup
from runtime_py.device_stream import Order, Verdict, _on_other_stream, on_stream, pack
from runtime_py.inputs import Request

DEVICE = torch.device("cuda", 0)
REQUEST = Request(torch.tensor([1]), torch.tensor([1]), None)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch.cuda was asked for."""
    told: list[str] = []

    class Event:
        def record(self, stream: Any) -> None:
            told.append(f"record on {stream}")

    class Entered:
        def __init__(self, what: str) -> None:
            self.what = what

        def __enter__(self) -> None:
            told.append(f"enter {self.what}")

        def __exit__(self, *_: object) -> None:
            told.append(f"leave {self.what}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"current of {device}", told))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Entered(str(stream)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: Entered(str(device)))
    return told


class Stream:
    def __init__(self, name: str, told: list[str], device: torch.device = DEVICE) -> None:
        self.name, self.told, self.device = name, told, device

    def __str__(self) -> str:
        return self.name

    def wait_stream(self, other: Any) -> None:
        self.told.append(f"{self} waits for {other}")

    def wait_event(self, event: Any) -> None:
        self.told.append(f"{self} waits for the event")


def test_a_section_waits_for_the_one_before_and_says_when_it_is_done(told: list[str]) -> None:
    order = Order(DEVICE)
    with order:
        told.append("work")
    assert told == ["current of cuda:0 waits for the event", "work", "record on current of cuda:0"]
    told.clear()
    with pytest.raises(RuntimeError, match="broken"), order:
        raise RuntimeError("broken")
    assert told == ["current of cuda:0 waits for the event", "record on current of cuda:0"]
    with order:  # it is free again
        pass


@pytest.mark.parametrize("step", ["record", "wait_event"])
def test_a_device_that_is_lost_leaves_no_lock_behind(
    told: list[str], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    order = Order(DEVICE)
    monkeypatch.setattr(torch.cuda.Event if step == "record" else Stream, step, fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="unspecified launch failure"), order:
            told.append("work")
    assert not order._lock.locked()


def test_memory_that_the_work_reads_or_writes_is_kept_for_its_stream(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda part, stream: kept.append((part, stream)))
    meta = torch.device("meta")  # a device that there is
    stream: Any = Stream("mine", told, meta)
    values, out, on_host = torch.empty(3, device=meta), torch.empty(2, device=meta), torch.empty(2)
    with _on_other_stream(stream, meta, (values, on_host, None, out)):
        pass
    assert [(part is values, part is out) for part, _ in kept] == [(True, False), (False, True)]
    assert {stream for _, stream in kept} == {stream}


def test_a_lookup_is_captured_on_a_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own stream for captures is of the device that captured first in the process."""
    told: list[Any] = []

    class Side:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_stream(self, other: Any) -> None:
            told.append("wait")

    graph = nullcontext()
    monkeypatch.setattr(torch.cuda, "Stream", Side)
    monkeypatch.setattr(torch.cuda, "current_stream", Side)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: told.append(("on", stream)) or nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: told.append(("device", device)) or nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", lambda _, **options: told.append(options) or graph)
    captured: Any = CapturedLookup.__new__(CapturedLookup)
    captured._artifact = SimpleNamespace(device=DEVICE)
    captured._steps = lambda: ("numbers", "pooled")
    assert captured._record() == ("replay", "numbers", "pooled")
    (options,) = [each for each in told if isinstance(each, dict)]
    assert options["stream"].device == DEVICE
    assert ("on", options["stream"]) in told
    assert ("device", DEVICE) in told


def test_work_on_another_stream_comes_behind_what_the_current_one_holds(told: list[str]) -> None:
    stream: Any = Stream("mine", told)
    with on_stream(stream, DEVICE, REQUEST):
        told.append("work")
    assert told == ["mine waits for current of cuda:0", "enter mine", "work", "leave mine"]


def test_without_a_stream_work_goes_to_the_current_one_of_the_device(told: list[str]) -> None:
    with on_stream(None, DEVICE, REQUEST):
        told.append("work")
    assert told == ["enter cuda:0", "work", "leave cuda:0"]


def test_a_stream_of_another_device_is_a_mistake_of_the_caller(told: list[str]) -> None:
    stream: Any = Stream("mine", told, torch.device("cuda", 1))
    with (
        pytest.raises(ValueError, match=r"^the stream is of cuda:1, and the artifact lies on cuda:0$"),
        on_stream(stream, DEVICE, REQUEST),
    ):
        pass


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, -1.0, 2.0])])
def test_a_packed_request_is_the_same_request(weights: torch.Tensor | None) -> None:
    request = Request(torch.tensor([2**62, -1, 0]), torch.tensor([1, 2, 0, 0, 0], dtype=torch.int32), weights)
    packed = pack(request, torch.device("cpu"))
    for old, new in zip(request, packed, strict=True):
        assert (old is None) == (new is None)
        if old is not None and new is not None:
            assert torch.equal(old, new)
            assert old.dtype == new.dtype
            assert new.data_ptr() % 16 == packed.values.data_ptr() % 16
    assert packed.values.untyped_storage().data_ptr() == packed.lengths.untyped_storage().data_ptr()  # one copy


def test_numbers_of_a_cpu_are_there_at_once() -> None:
    assert Verdict(torch.tensor([0, 1, 2, 3])).wait() == [0, 1, 2, 3]
