"""What a build has finished, piece by piece: for the build that resumes it, and for the process that publishes it.

Each process of a build appends to a file of its own beside the staged artifact, one line for each piece that it has
written: SHA-256 of the line under the plan's fingerprint, then JSON. A line that was cut short, changed, or made for
another plan does not count.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from export.accuracy import ErrorSums

__all__ = ["Journal", "PieceResult", "has_pieces", "read_journals", "set_aside_journals"]

_VERSION = 2  # of the lines: a journal of another one is not read
_NAME = "journal-{}.jsonl"
_EARLIER = "earlier-{}.jsonl"


@dataclass(frozen=True)
class PieceResult:
    """What is known of a piece once it is written.

    `digests` are those of its chunks (SHA-256, 32 raw bytes each), `checksums` their XXH3 (16 each); `trained` float32
    and `stored` [n, D] the rows that were asked for;
    `seconds` by stage.
    """

    digests: bytes
    checksums: bytes
    sums: ErrorSums
    trained: torch.Tensor
    stored: torch.Tensor
    seconds: dict[str, float]


class Journal:
    """The journal of one process."""

    def __init__(self, folder: Path, rank: int, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(folder / _NAME.format(rank), flags, 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def append(self, key: str, result: PieceResult) -> None:
        """Adds a line; the bytes of the piece are in its file already."""
        text = json.dumps({"key": key, **_encode(result)}, separators=(",", ":"))
        line = f"{_digest(self._fingerprint, text)} {text}\n".encode()
        while line:
            line = line[os.write(self._fd, line) :]

    def sync(self) -> None:
        """Makes the lines durable, and visible to other hosts."""
        os.fsync(self._fd)


def set_aside_journals(folder: Path) -> None:
    """Makes the journals in `folder` those of earlier builds, which count less than the ones to come."""
    for number, path in enumerate(_paths(folder)):
        path.rename(folder / f"aside-{number}")
    for number, path in enumerate(sorted(folder.glob("aside-*"), key=lambda path: int(path.name.partition("-")[2]))):
        path.rename(folder / _EARLIER.format(f"{number:04}"))


def read_journals(folder: Path, fingerprint: str) -> dict[str, PieceResult]:
    """The pieces of one plan that the journals in `folder` call finished, by key."""
    finished = {}
    for path in _paths(folder):
        for text in _read_lines(path, fingerprint):
            entry = json.loads(text)
            finished[entry.pop("key")] = _decode(entry)
    return finished


def has_pieces(folder: Path, fingerprint: str) -> bool:
    """Whether the journals in `folder` call any piece of the plan finished."""
    return any(True for path in _paths(folder) for _ in _read_lines(path, fingerprint))


def _paths(folder: Path) -> list[Path]:
    """Oldest first: what is done again overrides what was found wanting."""
    return [*sorted(folder.glob(_EARLIER.format("*"))), *sorted(folder.glob(_NAME.format("*")))]


def _read_lines(path: Path, fingerprint: str) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            digest, _, text = line.removesuffix("\n").partition(" ")
            if digest == _digest(fingerprint, text):
                yield text


def _digest(fingerprint: str, text: str) -> str:
    return hashlib.sha256(f"{_VERSION} {fingerprint} {text}".encode()).hexdigest()


def _encode(result: PieceResult) -> dict[str, Any]:
    return {
        "digests": result.digests.hex(),
        "checksums": result.checksums.hex(),
        "sums": asdict(result.sums),
        "trained": _encode_tensor(result.trained),
        "stored": _encode_tensor(result.stored),
        "seconds": result.seconds,
    }


def _decode(entry: dict[str, Any]) -> PieceResult:
    return PieceResult(
        digests=bytes.fromhex(entry["digests"]),
        checksums=bytes.fromhex(entry["checksums"]),
        sums=ErrorSums(**entry["sums"]),
        trained=_decode_tensor(entry["trained"]),
        stored=_decode_tensor(entry["stored"]),
        seconds=entry["seconds"],
    )


def _encode_tensor(tensor: torch.Tensor) -> list[Any]:
    data = base64.b64encode(tensor.numpy().tobytes()).decode()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), data]


def _decode_tensor(entry: list[Any]) -> torch.Tensor:
    dtype, shape, data = entry
    values = bytearray(base64.b64decode(data))
    tensor = (
        torch.frombuffer(values, dtype=getattr(torch, dtype)) if values else torch.empty(0, dtype=getattr(torch, dtype))
    )
    return tensor.reshape(shape)
