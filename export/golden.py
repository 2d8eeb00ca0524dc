"""The golden cases: requests, and what the artifact answered when it was built, for any loader to replay.

One safetensors file with `<case>/values`, `<case>/lengths`, `<case>/per_sample_weights` (where the artifact is weighted),
`<case>/pooled` and, where the artifact has a surgery, `<case>/tolerance`: the adversarial batches of the parity gate and
its first random one. Cases run in the order of their names. They hold ids outside of their tables, so that a loader must
be told to let these contribute zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from export.errors import GateError
from runtime_py import load_artifact
from runtime_py.errors import ArtifactError
from runtime_py.inputs import Request
from runtime_py.manifest import Manifest

__all__ = ["GOLDEN", "GoldenCase", "replay_cases", "write_cases"]

GOLDEN = "golden/cases.safetensors"


@dataclass(frozen=True)
class GoldenCase:
    """A request in the raw signature, and the answer, float32 [B, sum(D)].

    `tolerance` [B, sum(D)] is how far from it another right answer may be; None where every bit is the same.
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
        return different & ~((pooled.double() - self.pooled.double()).abs() <= self.tolerance.double())


def write_cases(path: Path, cases: Mapping[str, GoldenCase]) -> None:
    """Writes a new file, with the folder that it needs; the same bytes for the same cases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, case in cases.items():
        for part, tensor in [
            *case.request._asdict().items(),
            ("pooled", case.pooled),
            ("tolerance", case.tolerance),
        ]:
            if tensor is not None:
                tensors[f"{name}/{part}"] = tensor.contiguous()
    save_file(tensors, path)


def read_cases(artifact: Path) -> dict[str, GoldenCase]:
    """The cases of an artifact whose files were verified, by name.

    Raises:
        ArtifactError: it has none, or the file is damaged.
    """
    path = artifact / GOLDEN
    try:
        tensors = load_file(path)
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
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: the artifact has no golden cases; build it again") from error
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}; restore it or build again") from error


def replay_cases(artifact: Path, manifest: Manifest) -> int:
    """Runs every golden case through the loader, and returns how many there are.

    Raises:
        ArtifactError: the cases cannot be read, or the artifact cannot be loaded here.
        GateError: naming the first case, output, bag and column whose answer is not the same, bit for bit or, after a
            surgery, within the case's tolerance.
    """
    loaded = load_artifact(artifact, verify="sizes", invalid_ids="zero")
    cases = read_cases(artifact)
    for name, case in cases.items():
        pooled = loaded.lookup(*case.request)
        if pooled.shape != case.pooled.shape:
            raise GateError(
                f"{artifact}: golden case '{name}': shape {list(pooled.shape)}, expected {list(case.pooled.shape)}"
            )
        different = case.differs(pooled).nonzero()
        if len(different):
            bag, column = different[0].tolist()
            raise GateError(
                f"{artifact}: golden case '{name}': output '{_output_of(manifest, column)}', bag {bag}: column {column} is "
                f"{pooled[bag, column].item()!r}, and was {case.pooled[bag, column].item()!r} when the artifact was built; "
                "compare the versions in its manifest with those installed"
            )
    return len(cases)


def _output_of(manifest: Manifest, column: int) -> str:
    end = 0
    for output in manifest.outputs:
        end += output.dim
        if column < end:
            return output.key
    return "none"
