"""The golden cases of an artifact, written when it is built; `runtime_py.golden` reads and replays them.

They are the adversarial batches of the parity gate and its first random one.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save

from export.errors import GateError
from export.publish import write_file
from runtime_py import load_artifact
from runtime_py.errors import GoldenCaseError
from runtime_py.golden import GoldenCase, read_cases
from runtime_py.golden import replay_cases as replay_loaded
from runtime_py.manifest import Manifest

__all__ = ["replay_cases", "write_cases"]


def write_cases(path: Path, cases: Mapping[str, GoldenCase]) -> None:
    """Writes a new file, with the folder that it needs; the same bytes for the same cases."""
    tensors = {}
    for name, case in cases.items():
        for part, tensor in [
            *case.request._asdict().items(),
            ("pooled", case.pooled),
            ("tolerance", case.tolerance),
        ]:
            if tensor is not None:
                tensors[f"{name}/{part}"] = tensor.contiguous()
    write_file(path, save(tensors))  # not save_file, which lets nobody else read it


def replay_cases(artifact: Path, manifest: Manifest) -> int:
    """Runs every golden case through the loader, and returns how many there are.

    Raises:
        ArtifactError: the cases cannot be read, or the artifact cannot be loaded here.
        GateError: naming the first case, output, bag and column whose answer is not the same, bit for bit or, after a
            surgery, within the case's tolerance.
    """
    loaded = load_artifact(artifact, verify="sizes")
    cases = read_cases(artifact, manifest)
    try:
        replay_loaded(loaded, cases)
    except GoldenCaseError as error:
        raise GateError(f"{artifact}: {error}") from error
    return len(cases)
