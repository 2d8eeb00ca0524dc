"""A model repository for Triton Inference Server: a model of each graph, over the artifact's one weight file.

Triton's ONNX Runtime backend opens `model.onnx` itself. Its PyTorch backend can do nothing with our TorchScript graph: it
calls `torch.jit.load` and never sets an attribute, so that the rows would have to be copied into the archive, and from there
into the private memory of every instance. TorchScript and AOTInductor are served by the Python backend instead, with a
`model.py` that loads the artifact through `runtime_py`: verified, mapped, and shared by all instances.

    DIR/<name>_onnx/config.pbtxt
    DIR/<name>_onnx/1/…                      the artifact; `verify` takes this folder
    DIR/<name>_torchscript/config.pbtxt
    DIR/<name>_torchscript/1/model.py
    DIR/<name>_torchscript/1/artifact/…      the artifact

The artifact's files are hard links: one file on disk and in the page cache, whatever opens it, and the repository stays
whole when the artifact's own folder is removed. Symbolic links do not serve: ONNX Runtime (1.32) refuses data whose real
path lies outside of the model's folder, and a container that sees only the repository could not follow them.

A model appears whole or not at all. What is there is never changed: a newer artifact becomes the next version of its model,
if clients of the newest one may ask it: they know features and columns by their place alone, which config.pbtxt does not
say, so that manifests are compared. Staging happens beside DIR, since Triton takes every folder in it, hidden ones too, for
a model.
"""

import errno
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from export.errors import ExportError, PublishError
from export.publish import publish, refuse_inside_artifact, staged, write_file
from runtime_py.compatibility import find_differences
from runtime_py.errors import ManifestError
from runtime_py.manifest import MANIFEST, Manifest
from runtime_py.manifest_reader import read_manifest
from runtime_py.verify import verify_artifact

__all__ = ["WrittenModel", "write_repository"]

CONFIG = "config.pbtxt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"[1-9][0-9]*")
_TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32", "tensor(float)": "TYPE_FP32"}
_QUIET = 4  # onnxruntime prints what it raises, unless told not to
_BASIC = -1  # ORT_ENABLE_BASIC, as the parity gate; all take 14 s for 300 features


@dataclass(frozen=True)
class WrittenModel:
    """One version of one model, at `path`, its version folder."""

    name: str
    version: int
    graph: str
    backend: str
    path: Path

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"path": str(self.path)}


def write_repository(
    artifact: Path, repository: Path, *, name: str = "large_embeddings", graphs: Sequence[str] = (), copy: bool = False
) -> list[WrittenModel]:
    """Writes a model of each graph into a model repository, which is made where it is missing.

    Args:
        artifact: the artifact's folder; every digest is compared first.
        repository: the folder that `tritonserver --model-repository` is given.
        name: what the models' names start with; `_` and the graph's backend follow.
        graphs: backends of graphs, such as "onnx"; default: all that the artifact has.
        copy: whether to copy the artifact's files, for a repository on another file system, instead of linking them.

    Raises:
        ArtifactError: the artifact is damaged.
        ExportError: it lacks a graph, or the repository has a model of that name with other inputs or outputs, or whose
            newest version has features and columns that are not this artifact's.
        PublishError: the repository cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ExportError(f"--name: {name!r}: give letters, digits and _ . - only, a letter or a digit first")
    repository = repository.resolve()
    refuse_inside_artifact(repository, "--repository")
    if repository.is_dir() and repository.stat().st_dev != repository.parent.stat().st_dev:
        raise PublishError(
            f"--repository: {repository} is a mount point, and a model is written beside the repository before it appears "
            "there whole; name a folder below the mount point"
        )
    manifest = verify_artifact(artifact)
    chosen = _choose_graphs(manifest, graphs)
    configs = [_make_config(manifest, f"{name}_{graph}", graph) for graph in chosen]
    versions = [
        _next_version(repository / config.name, config, manifest) for config in configs
    ]  # refusals come before any file
    return [
        _write_model(artifact, manifest, repository, graph, config, version, copy=copy)
        for graph, config, version in zip(chosen, configs, versions, strict=True)
    ]


def _choose_graphs(manifest: Manifest, asked: Sequence[str]) -> list[str]:
    has = [graph.backend for graph in manifest.graphs if graph.target == "cpu"]
    unknown = [graph for graph in asked if graph not in has]
    if unknown:
        raise ExportError(
            f"--graph: the artifact has no graph '{unknown[0]}'; it has: {', '.join(has)}; "
            "build it with that graph among serving.graphs"
        )
    return list(dict.fromkeys(asked or has))


def _make_config(manifest: Manifest, name: str, graph: str) -> Any:
    """The ModelConfig of one model: the signature of every graph, which is not batched by Triton."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

    config = ModelConfig(name=name, max_batch_size=0)
    inputs = {"values": "TYPE_INT64", "lengths": "TYPE_INT32"}
    if manifest.weighted:
        inputs["per_sample_weights"] = "TYPE_FP32"
    for key, data_type in inputs.items():
        config.input.add(name=key, data_type=data_type, dims=[-1])
    config.output.add(name="pooled", data_type="TYPE_FP32", dims=[-1, sum(output.dim for output in manifest.outputs)])
    config.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)  # or an instance a GPU, where there are some
    if graph == "onnx":
        config.backend, config.default_model_filename = "onnxruntime", "model.onnx"
        config.optimization.graph.level = _BASIC
    else:
        config.backend, config.default_model_filename = "python", "model.py"
        for key, value in {"graph": graph, "invalid_ids": "error", "verify": "full"}.items():
            config.parameters[key].string_value = value
    return config


def _encode_config(config: Any) -> bytes:
    """The text of config.pbtxt, which is parsed again: what Triton reads must be what was meant."""
    from google.protobuf import text_format

    # Its printer leaves the 0 out, as the field's default; whoever reads the file should see that Triton must not batch.
    text: str = text_format.MessageToString(config) + "max_batch_size: 0\n"
    if text_format.Parse(text, type(config)()) != config:
        raise ExportError(f"model '{config.name}': its {CONFIG} does not say what it should; this is a defect")
    return text.encode()


def _next_version(folder: Path, config: Any, manifest: Manifest) -> int:
    """The number of the version to write: 1, or the one after the newest of a model that answers the same requests.

    That of the newest itself where it is this very artifact.
    """
    from google.protobuf import text_format

    if not os.path.lexists(folder):
        return 1
    path = folder / CONFIG
    try:
        found = text_format.Parse(path.read_bytes(), type(config)())
        versions = sorted(int(entry) for entry in os.listdir(folder) if _VERSION.fullmatch(entry))
    except (OSError, text_format.ParseError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ExportError(f"{path}: cannot be read: {reason}; choose another --name, or mend the model") from error
    for what in ("name", "backend", "default_model_filename", "max_batch_size", "graph", "input", "output"):
        ours, theirs = _describe_field(config, what), _describe_field(found, what)
        if ours != theirs:
            raise ExportError(
                f"{path}: a version of this model must have {what} {ours}, the file says {theirs}; "
                "choose another --name for another interface"
            )
    for version in reversed(versions):
        place = folder / str(version) / ("artifact" if config.backend == "python" else "")
        if (place / MANIFEST).exists():
            if _check_clients(place, manifest) and version == versions[-1]:
                return version
            break
    else:
        raise ExportError(
            f"{folder}: no version of it holds an artifact to compare this one with; choose another --name"
        )
    return versions[-1] + 1


def _check_clients(newest: Path, manifest: Manifest) -> bool:
    """Refuses what clients of the newest version do not ask for: ids and columns are known by their place alone.

    Returns:
        Whether the newest version holds the artifact of `manifest`.
    """
    try:
        served = read_manifest(newest)
    except ManifestError as error:
        raise ExportError(f"{error}; choose another --name, or mend the model") from error
    problems = find_differences(served, manifest)
    if problems:
        raise ExportError(
            f"{newest}: clients of this version would be failed by the artifact: {'; '.join(problems)}; "
            "choose another --name for another interface"
        )
    return served.manifest_digest == manifest.manifest_digest


def _describe_field(config: Any, name: str) -> str:
    """What one field of a ModelConfig says, for comparisons and messages."""
    from tritonclient.grpc.model_config_pb2 import DataType

    if name == "graph":
        return repr(config.parameters[name].string_value) if name in config.parameters else "none"
    value = getattr(config, name)
    if isinstance(value, str | int):
        return repr(value)
    return ", ".join(f"{entry.name} {DataType.Name(entry.data_type)} {list(entry.dims)}" for entry in value)


def _write_model(
    artifact: Path, manifest: Manifest, repository: Path, graph: str, config: Any, version: int, *, copy: bool
) -> WrittenModel:
    model = repository / config.name
    target = model if version == 1 and not model.exists() else model / str(version)
    written = WrittenModel(config.name, version, graph, config.backend, model / str(version))
    if target != model and target.exists():
        return written  # as before
    with staged(target, place=repository.parent) as staging:
        folder = staging.folder
        if target == model:
            write_file(folder / CONFIG, _encode_config(config))
            folder = folder / "1"
            folder.mkdir()
        if config.backend == "python":
            write_file(
                folder / "model.py", resources.files("export").joinpath("templates/triton_model.py").read_bytes()
            )
        place = folder / "artifact" if config.backend == "python" else folder
        _take_files(artifact, manifest, place, copy=copy)
        verify_artifact(place, "full" if copy else "sizes")
        if graph == "onnx":
            _check_onnx(place, config)
        publish(staging.folder, target)
    return written


def _take_files(artifact: Path, manifest: Manifest, folder: Path, *, copy: bool) -> None:
    """The artifact's files in `folder`: the same files by another name, or copies."""
    for name in (MANIFEST, *(file.path for file in manifest.files)):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copyfile(artifact / name, target)
            continue
        try:
            os.link(artifact / name, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
            size = sum(file.bytes for file in manifest.files)
            raise PublishError(
                f"--repository: {artifact / name} cannot be hard-linked there: {error.strerror}; name a folder on the "
                f"artifact's file system, or give --copy, which takes {size:,} bytes on disk and in memory again"
            ) from error


def _check_onnx(folder: Path, config: Any) -> None:
    """Opens the model as Triton's backend will, so that its rows are found, and compares what goes in and out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = onnxruntime.InferenceSession(
            folder / config.default_model_filename, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own have no base class in common
        raise ExportError(f"ONNX Runtime cannot open the model: {str(error).splitlines()[0]}") from error
    found = type(config)()
    for values, field in ((session.get_inputs(), found.input), (session.get_outputs(), found.output)):
        for value in values:
            dims = [size if isinstance(size, int) else -1 for size in value.shape]
            field.add(name=value.name, data_type=_TYPES.get(value.type, "TYPE_INVALID"), dims=dims)
    for what in ("input", "output"):
        ours, theirs = _describe_field(config, what), _describe_field(found, what)
        if ours != theirs:
            raise ExportError(f"model.onnx has {what} {theirs}, the manifest says {ours}; build the artifact again")
