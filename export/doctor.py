"""Would it run here? What is installed, whether it fits together, and whether an artifact's graphs load.

It exists because the usual failures of this stack explain themselves badly: a triple of versions that do not match ends in an
undefined symbol, and the two FBGEMM wheels own the same folder, so that the one installed last wins and removing either
breaks both. Nothing is guessed: what a wheel owns is compared with the files on disk, operators are loaded, and graphs go
through the real loader, each in a process of its own, since what does not fit may also crash.
"""

import base64
import csv
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path, PurePosixPath

from runtime_py.aot_inductor import ISAS, check_isa
from runtime_py.errors import ArtifactError, UnsupportedError
from runtime_py.manifest import Graph
from runtime_py.verify import verify_artifact
from runtime_py.vocabulary import LIBRARY

__all__ = ["Diagnosis", "GraphCheck", "Wheel", "describe", "diagnose"]

# torch: FBGEMM, torchrec. Each is compiled, or released, for that one version of torch.
_TRIPLES = {"2.13": ("1.8", "1.8"), "2.12": ("1.7", "1.7"), "2.11": ("1.6", "1.6")}
_WHEELS = ("fbgemm-gpu", "fbgemm-gpu-cpu", "fbgemm-gpu-nightly", "fbgemm-gpu-nightly-cpu")
_FOLDER = "fbgemm_gpu"
_TIMEOUT_SECONDS = 300  # a process that looks up a first row takes some seconds

_MACHINE = """
import json, sys
import torch
from runtime_py.errors import ArtifactError
from runtime_py.operators import load_operators
operators = {}
for operator, library in json.loads(sys.argv[1]).items():
    try:
        load_operators([library])
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        kernels = [key for key in ("CPU", "CUDA") if has(f"fbgemm::{operator}", key)]
        operators[operator] = ", ".join(kernels) or "no kernel"
    except (ArtifactError, RuntimeError) as error:
        operators[operator] = str(error).splitlines()[0]
devices = []
if torch.cuda.is_available():
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        devices.append(f"{device.name}, sm{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB")
print(json.dumps({"operators": operators, "cuda": torch.version.cuda, "devices": devices}))
"""
_LOAD = """
import sys
from runtime_py import ArtifactError, load_artifact
try:
    load_artifact(sys.argv[1], backend=sys.argv[2], device=sys.argv[3], verify="sizes")
except ArtifactError as error:
    raise SystemExit(str(error)) from None
"""
_OPEN_ONNX = """
import sys
try:
    import onnxruntime
except ImportError as error:
    raise SystemExit(f"ONNX Runtime cannot be imported: {error}")
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
"""
# The operators that serving calls, and the libraries that the loader opens for them.
_OPERATORS = {
    "int_nbit_split_embedding_codegen_lookup_function": "fbgemm_gpu_tbe_inference",
    "asynchronous_complete_cumsum": "fbgemm_gpu_sparse_async_cumsum",
    "pruned_hashmap_lookup": LIBRARY,
}


@dataclass(frozen=True)
class Wheel:
    """An installed FBGEMM distribution: how many files of `fbgemm_gpu/` it claims, and whether those on disk are its own."""

    name: str
    version: str
    files: int
    owns: bool


@dataclass(frozen=True)
class GraphCheck:
    """A graph of the artifact, and why it would not run here; empty where it does."""

    backend: str
    target: str
    reason: str


@dataclass
class Diagnosis:
    """What is here. `problems` are reasons not to serve or build here, `notes` are worth knowing."""

    python: str
    platform: str
    versions: dict[str, str | None]
    wheels: list[Wheel]
    cpu: str
    isas: dict[str, str]  # of each known, what the CPU lacks for it; empty where it has all
    operators: dict[str, str] = field(default_factory=dict)
    cuda: str | None = None  # what torch was built for
    devices: list[str] = field(default_factory=list)
    artifact: str | None = None
    artifact_id: str | None = None
    graphs: list[GraphCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def diagnose(artifact: Path | None = None) -> Diagnosis:
    """Looks at this machine and, where it is given, at an artifact; raises nothing for what it finds."""
    installed = {_normalize(found.name): found for found in reversed(list(distributions())) if found.name}
    wheels = [_read_wheel(name, installed[name]) for name in _WHEELS if name in installed]
    versions = {name: _version(installed, name) for name in ("torch", "torchrec", "onnxruntime")}
    owners = [wheel for wheel in wheels if wheel.owns]
    versions["fbgemm"] = owners[0].version if owners else None
    isas = {isa: _lacks(isa) for isa in ISAS}
    result = Diagnosis(platform.python_version(), platform.platform(), versions, wheels, _cpu_name(), isas)
    _check_wheels(result)
    _check_triple(result)
    _check_machine(result)
    if artifact is not None:
        _check_artifact(result, artifact)
    return result


def _normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(installed: dict[str, Distribution], name: str) -> str | None:
    return installed[name].version if name in installed else None


def _read_wheel(name: str, found: Distribution) -> Wheel:
    # Not `found.files`, which from Python 3.12 on, or once importlib_metadata is imported, leaves out what is missing.
    rows = [row for row in csv.reader((found.read_text("RECORD") or "").splitlines()) if len(row) == 3]
    files = [row for row in rows if row[0].startswith(f"{_FOLDER}/")]
    same = []
    for file, digest, size in files:
        if PurePosixPath(file).name.removesuffix(".so") in _OPERATORS.values():
            path = Path(str(found.locate_file(file)))
            # Sizes first: the libraries of a CUDA wheel are large.
            same.append(path.is_file() and str(path.stat().st_size) == size and _is_recorded(path, digest))
    return Wheel(name, found.version, len(files), bool(same) and all(same))


def _is_recorded(path: Path, recorded: str) -> bool:
    """Whether a file has the digest that RECORD says; a file without one counts as equal."""
    algorithm, _, value = recorded.partition("=")
    if not value:
        return True
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == value


def _lacks(isa: str) -> str:
    try:
        check_isa(isa)
    except UnsupportedError as error:
        return str(error)
    return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _check_wheels(result: Diagnosis) -> None:
    claiming = [wheel for wheel in result.wheels if wheel.files]
    named = " and ".join(f"{wheel.name} {wheel.version}" for wheel in claiming)
    if not claiming:
        result.problems.append("FBGEMM is not installed; install fbgemm-gpu-cpu or fbgemm-gpu")
    elif len(claiming) > 1:
        owners = [f"{wheel.name} {wheel.version}" for wheel in claiming if wheel.owns]
        whose = f"the files are those of {' and '.join(owners)}" if owners else "the files are those of neither"
        result.problems.append(
            f"{named} own the same folder, {_FOLDER}/: {whose}; uninstall both, then install the one for this machine"
        )
    elif not claiming[0].owns:
        result.problems.append(
            f"{named}: its libraries in {_FOLDER}/ are not those that it was installed with; install it again"
        )


def _check_triple(result: Diagnosis) -> None:
    versions = result.versions
    if versions["torch"] is None:
        result.problems.append("torch is not installed as a package, so that its version is unknown")
        return
    if versions["torchrec"] is None:
        result.notes.append("torchrec is not installed: artifacts can be served here, and not built")
    release = _release(versions["torch"])
    if release not in _TRIPLES:
        known = ", ".join(reversed(_TRIPLES))
        result.problems.append(f"torch {versions['torch']}: expected one of {known}, with FBGEMM and torchrec to match")
        return
    for name, expected in zip(("fbgemm", "torchrec"), _TRIPLES[release], strict=True):
        version = versions[name]
        if version is not None and _release(version) != expected:
            result.problems.append(f"{name} {version} does not fit torch {versions['torch']}, which needs {expected}")


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _check_machine(result: Diagnosis) -> None:
    output, reason = _run_probe(_MACHINE, json.dumps(_OPERATORS))
    if reason:
        result.problems.append(f"torch and FBGEMM's operators cannot be loaded: {reason}")
        return
    found = json.loads(output.splitlines()[-1])
    result.operators, result.cuda, result.devices = found["operators"], found["cuda"], found["devices"]
    for operator, kernels in result.operators.items():
        if "CPU" not in kernels.split(", "):
            result.problems.append(f"operator fbgemm::{operator}: {kernels}")


def _check_artifact(result: Diagnosis, artifact: Path) -> None:
    result.artifact = str(artifact)
    try:
        manifest = verify_artifact(artifact)
    except ArtifactError as error:
        result.problems.append(str(error))
        return
    result.artifact_id = manifest.artifact_id
    for graph in manifest.graphs:
        reason = _try_graph(artifact, graph)
        result.graphs.append(GraphCheck(graph.backend, graph.target, reason))
        if reason:
            result.problems.append(
                f"{artifact}: its graph {graph.backend} for {graph.target} does not run here: {reason}"
            )
        torch = result.versions["torch"]
        if graph.backend != "onnx" and torch is not None and _release(graph.torch) != _release(torch):
            result.notes.append(f"{graph.path} was built with torch {graph.torch}, here is {torch}")


def _try_graph(artifact: Path, graph: Graph) -> str:
    if graph.backend == "onnx":
        return _run_probe(_OPEN_ONNX, str(artifact / graph.path))[1]
    return _run_probe(_LOAD, str(artifact), graph.backend, graph.target)[1]


def _run_probe(code: str, *arguments: str) -> tuple[str, str]:
    """Runs a program in a process of its own; its stdout, and why it failed: empty where it did not."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {_TIMEOUT_SECONDS} s"
    if done.returncode < 0:
        return done.stdout, f"the process was ended by {signal.Signals(-done.returncode).name}"
    said = done.stderr.strip().splitlines()
    return done.stdout, (said[-1] if said else f"exit code {done.returncode}") if done.returncode else ""


def describe(diagnosis: Diagnosis) -> str:
    """The diagnosis as lines of text, problems left out."""
    versions = diagnosis.versions
    lines = [("python", f"{diagnosis.python}, {diagnosis.platform}")]
    lines += [(name, versions[name] or "not installed") for name in ("torch", "torchrec", "onnxruntime")]
    for wheel in diagnosis.wheels:
        state = (
            "owns the files" if wheel.owns else f"claims {wheel.files} files, of another" if wheel.files else "no files"
        )
        lines.append(("fbgemm", f"{wheel.name} {wheel.version}: {state}"))
    lines += [("operator", f"fbgemm::{operator}: {kernels}") for operator, kernels in diagnosis.operators.items()]
    isas = [f"{isa}: {'no' if lacks else 'yes'}" for isa, lacks in diagnosis.isas.items()]
    lines.append(("cpu", f"{diagnosis.cpu}; {', '.join(isas)}"))
    lines.append(("cuda", "; ".join(diagnosis.devices) or f"no device; torch is built for {diagnosis.cuda or 'CPU'}"))
    if diagnosis.artifact_id is not None:
        lines.append(("artifact", f"{diagnosis.artifact}: intact, {diagnosis.artifact_id}"))
    for graph in diagnosis.graphs:
        lines.append(("graph", f"{graph.backend} for {graph.target}: {'does not run' if graph.reason else 'runs'}"))
    lines += [("note", note) for note in diagnosis.notes]
    return "".join(f"{label:<12}{text}\n" for label, text in lines)
