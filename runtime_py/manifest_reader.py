"""Reads a manifest, and refuses figures that contradict one another and paths that leave the artifact."""

import re
import stat
import unicodedata
from collections import Counter
from pathlib import Path, PurePosixPath

from runtime_py.digests import ROWS, SHA256, TABLES, Digest
from runtime_py.documents import decode_document
from runtime_py.errors import ManifestError
from runtime_py.manifest import (
    MANIFEST,
    ROW_FORMATS,
    SLOT_BYTES,
    WEIGHTS,
    Manifest,
    Surgery,
    Table,
    compute_artifact_id,
)
from runtime_py.tensor_file import encode_header

__all__ = ["parse_manifest", "read_manifest"]

_LIBRARY = re.compile(r"[A-Za-z0-9_]+")
_HEX = re.compile(r"[0-9a-f]{64}")
_MOST_DIMS = 64  # as torch


def read_manifest(artifact: Path) -> Manifest:
    """Reads, parses and checks `<artifact>/manifest.json`.

    Raises:
        ManifestError: no manifest (so no artifact), or one of the kinds of `parse_manifest`.
    """
    path = artifact / MANIFEST
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise ManifestError(f"{path}: is a symbolic link; an artifact holds none")
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to read a pipe is to wait for its writer
            raise ManifestError(f"{path}: is no regular file")
        data = path.read_bytes()
    except OSError as error:
        root = (artifact / "current.json").is_file()
        hint = f"; ReloadingArtifact('{artifact}/current.json') serves the version that is current here" if root else ""
        raise ManifestError(
            f"{path}: cannot be read: {error.strerror}; without a manifest there is no artifact{hint}"
        ) from error
    try:
        return parse_manifest(data)
    except ManifestError as error:
        raise type(error)(f"{path}: {error}") from error


def parse_manifest(data: bytes) -> Manifest:
    """Parses the bytes of a manifest.

    Raises:
        UnknownFormatVersionError: `format_version` is not 1.
        UnknownFieldError: a field that version 1 does not define.
        ManifestError: not UTF-8 JSON, a duplicate key, a missing field, a wrong type, a digest that does not match,
            or fields that contradict one another.
    """
    manifest: Manifest = decode_document(Manifest, data)
    _check_consistency(manifest)
    return manifest


def _check_consistency(manifest: Manifest) -> None:
    _check_unique("tables", [table.name for table in manifest.tables])
    _check_unique("features", [feature.name for feature in manifest.features])
    _check_unique("outputs", [output.key for output in manifest.outputs])
    _check_unique("graphs", [f"{graph.backend} for {graph.target}" for graph in manifest.graphs])
    _check_unique("files", [file.path for file in manifest.files])
    for file in manifest.files:
        _check_path(file.path)
        expected = TABLES if file.path in manifest.mapped else SHA256
        if file.digest.algorithm != expected:
            raise ManifestError(f"{file.path}: digest algorithm '{file.digest.algorithm}', expected '{expected}'")
        _check_hex(file.path, file.digest)
    if WEIGHTS not in manifest.file:
        raise ManifestError(f"files: '{WEIGHTS}' is not listed")
    for table in manifest.tables:
        _check_table(table)
    _check_names("a table or a feature", [table.name for table in manifest.tables])
    _check_names("a table or a feature", [feature.name for feature in manifest.features])
    listed = [figures.table for figures in manifest.accuracy]
    if listed != [table.name for table in manifest.tables]:
        raise ManifestError(f"accuracy: expected one entry a table, in their order, got {listed}")
    _check_choices(manifest)
    _check_vocabularies(manifest)
    for snapshot in manifest.provenance.snapshots:
        _check_hex(f"snapshot '{snapshot.uri}'", snapshot.digest)
    for feature in manifest.features:
        if feature.table not in manifest.table:
            raise ManifestError(f"feature '{feature.name}': table '{feature.table}' is not in the manifest")
    for name in ("tables", "features", "graphs"):
        if not getattr(manifest, name):
            raise ManifestError(f"{name}: an artifact has at least one")
    for graph in manifest.graphs:
        for path in graph.files:
            if path not in manifest.file or path in manifest.mapped:
                raise ManifestError(f"graph '{graph.backend}': '{path}' is not among the files")
        for key, value, backend in (("isa", graph.isa, "aot_inductor"), ("opset", graph.opset, "onnx")):
            if (value is not None) != (graph.backend == backend):
                raise ManifestError(
                    f"graph '{graph.backend}': {key} is {value!r}; {backend} graphs have one, others none"
                )
        for library in graph.operator_libraries:
            if not _LIBRARY.fullmatch(library):
                raise ManifestError(f"graph '{graph.backend}': {library!r} is no library name")
    if manifest.weighted != any(feature.weighted for feature in manifest.features):
        raise ManifestError(f"weighted is {manifest.weighted}, and the features say otherwise")
    _check_outputs(manifest)
    size = manifest.weights_offset_bytes + manifest.weights_bytes
    if manifest.file[WEIGHTS].bytes != size:
        raise ManifestError(f"{WEIGHTS}: {manifest.file[WEIGHTS].bytes} bytes, expected {size} (header and data)")
    computed = compute_artifact_id(manifest)
    if computed != manifest.artifact_id:
        raise ManifestError(f"artifact_id is {manifest.artifact_id}, computed {computed}")


def _check_table(table: Table) -> None:
    if table.num_embeddings < 1 or table.embedding_dim < 1:
        raise ManifestError(f"table '{table.name}': shape [{table.num_embeddings}, {table.embedding_dim}] is empty")
    row_format = ROW_FORMATS[table.serving_precision]
    if table.embedding_dim % row_format.dim_divisor:
        raise ManifestError(
            f"table '{table.name}': embedding_dim is {table.embedding_dim}, {table.serving_precision} rows need a "
            f"multiple of {row_format.dim_divisor}"
        )
    expected = row_format.row_bytes(table.embedding_dim)
    if table.row_bytes != expected:
        raise ManifestError(
            f"table '{table.name}': row_bytes is {table.row_bytes}, expected {expected} "
            f"({table.serving_precision}, embedding_dim {table.embedding_dim})"
        )
    if table.digest.algorithm != ROWS:
        raise ManifestError(f"table '{table.name}': digest algorithm '{table.digest.algorithm}', expected '{ROWS}'")
    _check_hex(f"table '{table.name}'", table.digest)


def _check_names(what: str, names: list[str]) -> None:
    for name in names:
        if not name or any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            raise ManifestError(f"{name!r} cannot name {what}: it is empty, or has control characters")


def _check_outputs(manifest: Manifest) -> None:
    if manifest.surgery is not None:
        _check_surgery(manifest.surgery, manifest)
        return
    dims = [(feature.name, manifest.table[feature.table].embedding_dim) for feature in manifest.features]
    if [(output.key, output.dim) for output in manifest.outputs] != dims:
        raise ManifestError(f"outputs do not follow from the features, whose dims are {dict(dims)}")


def _check_surgery(surgery: Surgery, manifest: Manifest) -> None:
    if not manifest.outputs or any(output.dim < 1 for output in manifest.outputs):
        raise ManifestError(f"outputs of surgery '{surgery.module}': expected one or more, of at least one column each")
    _check_names("an output", [output.key for output in manifest.outputs])
    for text in (surgery.module, surgery.kwargs):
        _check_names("a surgery", [text])
    if surgery.code.algorithm != SHA256:
        raise ManifestError(f"surgery: digest algorithm '{surgery.code.algorithm}', expected '{SHA256}'")
    _check_hex("surgery", surgery.code)
    _check_names("a parameter", [parameter.parameter for parameter in surgery.parameters])
    _check_unique("tables and parameters", [tensor.name for tensor in manifest.stored_tensors])
    for parameter in surgery.parameters:
        where = f"parameter '{parameter.parameter}'"
        if len(parameter.dims) > _MOST_DIMS or any(dim < 1 for dim in parameter.dims):
            raise ManifestError(f"{where}: shape {parameter.dims} is empty, or has more than {_MOST_DIMS} dimensions")
        if parameter.bytes >= 2**63:
            raise ManifestError(f"{where}: more bytes than 64 bits can count")
        if parameter.digest.algorithm != ROWS:
            raise ManifestError(f"{where}: digest algorithm '{parameter.digest.algorithm}', expected '{ROWS}'")
        _check_hex(where, parameter.digest)


def _check_choices(manifest: Manifest) -> None:
    chosen = [choice.table for choice in manifest.choices]
    _check_unique("choices", chosen)
    if chosen != [table.name for table in manifest.tables if table.name in chosen]:
        raise ManifestError(f"choices: expected tables of the manifest, in their order, got {chosen}")
    said = [(figures.table, figures.serving_precision) for figures in manifest.accuracy]
    said += [(choice.table, choice.serving_precision) for choice in manifest.choices]
    for name, precision in said:
        stored = manifest.table[name].serving_precision
        if precision != stored:
            raise ManifestError(f"table '{name}': is stored as {stored}, and elsewhere said to be {precision}")


def _check_vocabularies(manifest: Manifest) -> None:
    names = [vocabulary.table for vocabulary in manifest.vocabularies]
    _check_unique("vocabularies", names)
    _check_unique("vocabularies", [vocabulary.path for vocabulary in manifest.vocabularies])
    for vocabulary in manifest.vocabularies:
        where = f"vocabulary of table '{vocabulary.table}'"
        if vocabulary.table not in manifest.table:
            raise ManifestError(f"{where}: the table is not in the manifest")
        if vocabulary.path not in manifest.file or vocabulary.path == WEIGHTS:
            raise ManifestError(f"{where}: '{vocabulary.path}' is not among the files")
        rows = manifest.table[vocabulary.table].num_embeddings
        if not 1 <= vocabulary.entities <= rows:
            raise ManifestError(f"{where}: {vocabulary.entities} entities, expected 1 to {rows}, the table's rows")
        # At least one slot is empty: it is what ends the search for an unknown id.
        if not vocabulary.entities < vocabulary.capacity < 2**63 // SLOT_BYTES:
            raise ManifestError(
                f"{where}: capacity is {vocabulary.capacity}, expected more than its {vocabulary.entities} entities, "
                "and less than 2**59"
            )
        if vocabulary.digest.algorithm != ROWS:
            raise ManifestError(f"{where}: digest algorithm '{vocabulary.digest.algorithm}', expected '{ROWS}'")
        _check_hex(where, vocabulary.digest)
        size = len(encode_header([vocabulary])) + vocabulary.bytes
        if manifest.file[vocabulary.path].bytes != size:
            raise ManifestError(
                f"{vocabulary.path}: {manifest.file[vocabulary.path].bytes} bytes, expected {size} "
                f"(header and {vocabulary.capacity} slots)"
            )
    if names != [table.name for table in manifest.tables if table.name in names]:
        raise ManifestError("vocabularies are not in the order of the tables")


def _check_unique(what: str, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ManifestError(f"{what}: '{name}' is listed {count} times")


def _check_hex(where: str, digest: Digest) -> None:
    if not _HEX.fullmatch(digest.value):
        raise ManifestError(f"{where}: digest value must be 64 lower-case hexadecimal digits, got {digest.value!r}")


def _check_path(path: str) -> None:
    parts = PurePosixPath(path).parts
    if (
        not parts
        or path.startswith("/")
        or ".." in parts
        or "\\" in path
        or "\0" in path
        or str(PurePosixPath(path)) != path
    ):
        raise ManifestError(f"files: path {path!r} must be relative, POSIX and inside the artifact")
    if path == MANIFEST:
        raise ManifestError(f"files: '{MANIFEST}' must not list itself")
