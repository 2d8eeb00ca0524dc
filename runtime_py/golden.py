"""The golden cases: requests, and what the artifact answered when it was built, replayed through a loaded artifact.

One safetensors file with `<case>/values`, `<case>/lengths`, `<case>/per_sample_weights` (where the artifact is weighted)
and `<case>/pooled`. Cases run in the order of their names. They hold ids outside of their tables, which are told to
contribute zero.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime_py.artifact import Artifact
from runtime_py.digests import sha256
from runtime_py.errors import ArtifactError, DigestMismatchError, GoldenCaseError
from runtime_py.inputs import Request
from runtime_py.manifest import Manifest

__all__ = ["GOLDEN", "GoldenCase", "read_cases", "replay_cases"]

GOLDEN = "golden/cases.safetensors"
_PREFIX = struct.Struct("<Q")
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


@dataclass(frozen=True)
class GoldenCase:
    """A request in the raw signature, and the answer, float32 [B, sum(D)].

    `tolerance` [B, sum(D)] is how far from it another right answer may be; None where every bit is the same. With it, one
    value that is no number is as right as another, and where it is none itself, only the same value is right.
    """

    request: Request
    pooled: torch.Tensor
    tolerance: torch.Tensor | None = None

    def differs(self, pooled: torch.Tensor) -> torch.Tensor:
        """Where an answer of the same shape is not right, bool."""
        different = pooled.view(torch.int32) != self.pooled.view(torch.int32)
        if self.tolerance is None:
            return different
        # Not `>`: a value that is no number is within nothing.
        near = (pooled.double() - self.pooled.double()).abs() <= self.tolerance.double()
        return different & ~(near | (pooled.isnan() & self.pooled.isnan()))


def read_cases(artifact: Path, manifest: Manifest) -> dict[str, GoldenCase]:
    """The cases of an artifact, by name in order.

    Raises:
        ArtifactError: it has none, or they are not those of its manifest.
    """
    path = artifact / GOLDEN
    if GOLDEN not in manifest.file:
        raise ArtifactError(f"{path}: the artifact has no golden cases; build it again")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}; restore it or build again") from error
    digest = sha256(data)
    if digest != manifest.file[GOLDEN].digest:
        raise DigestMismatchError(
            f"{path}: digest {digest}, expected {manifest.file[GOLDEN].digest}; restore it or build again"
        )
    try:
        tensors = _parse(data)
        names = sorted({name.rpartition("/")[0] for name in tensors})
        return {
            name: GoldenCase(
                Request(
                    tensors[f"{name}/values"], tensors[f"{name}/lengths"], tensors.get(f"{name}/per_sample_weights")
                ),
                tensors[f"{name}/pooled"],
                tensors.get(f"{name}/tolerance"),
            )
            for name in names
        }
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ArtifactError(f"{path}: cannot be read: {error!r}; build the artifact again") from error


def _parse(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, as copies: dull on purpose, the bytes are those that were published."""
    (length,) = _PREFIX.unpack_from(data)
    header: dict[str, Any] = json.loads(data[_PREFIX.size : _PREFIX.size + length])
    start = _PREFIX.size + length
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            array = np.frombuffer(data[start + begin : start + end], _TYPES[entry["dtype"]])
            tensors[name] = torch.from_numpy(array.reshape(entry["shape"]).copy())
    return tensors


def replay_cases(artifact: Artifact, cases: Mapping[str, GoldenCase]) -> None:
    """Asks a loaded artifact every case, and compares the answers: bit for bit or, after a surgery, within the tolerance.

    Raises:
        GoldenCaseError: naming the first case, output, bag and column whose answer is another.
    """
    asked = artifact.with_invalid_ids("zero")
    for name, case in cases.items():
        pooled = asked.lookup(*case.request)
        if pooled.shape != case.pooled.shape:
            raise GoldenCaseError(
                f"golden case '{name}': shape {list(pooled.shape)}, expected {list(case.pooled.shape)}"
            )
        different = case.differs(pooled).nonzero()
        if len(different):
            bag, column = different[0].tolist()
            raise GoldenCaseError(
                f"golden case '{name}': output '{_output_of(artifact.manifest, column)}', bag {bag}: column {column} is "
                f"{pooled[bag, column].item()!r}, and was {case.pooled[bag, column].item()!r} when the artifact was built; "
                "compare the versions in its manifest with those installed"
            )


def _output_of(manifest: Manifest, column: int) -> str:
    end = 0
    for output in manifest.outputs:
        end += output.dim
        if column < end:
            return output.key
    return "none"
