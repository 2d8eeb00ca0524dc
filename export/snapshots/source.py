"""Finding a snapshot, its format, its step, and each table's tensor in it."""

import difflib
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from export.config import DataType, EmbeddingBagConfig, SnapshotConfig, SnapshotFormat
from export.errors import SnapshotError
from export.snapshots.dcp import METADATA, DcpIndex
from export.snapshots.rows import SnapshotIndex, StoredTensor, TableRows
from export.snapshots.safetensors_files import SafetensorsIndex, is_safetensors
from export.snapshots.state_dict import StateDictIndex
from export.snapshots.torchsnapshot import SNAPSHOT_METADATA, TorchsnapshotIndex
from runtime_py.manifest import SnapshotIdentity

__all__ = ["Snapshot", "open_snapshot"]

_INDEXES: dict[SnapshotFormat, Callable[[Path], SnapshotIndex]] = {
    SnapshotFormat.DCP: DcpIndex,
    SnapshotFormat.TORCHSNAPSHOT: TorchsnapshotIndex,
    SnapshotFormat.SAFETENSORS: SafetensorsIndex,
    SnapshotFormat.STATE_DICT: StateDictIndex,
}
_BAGS = "embedding_bags."
_DTYPES = {DataType.FP32: torch.float32, DataType.FP16: torch.float16}


class Snapshot:
    """An opened snapshot: its identity, and the rows of a table by the table's name."""

    def __init__(self, config: SnapshotConfig, path: Path, step: int | None, index: SnapshotIndex) -> None:
        self._path = path
        self._prefix = config.prefix
        self._index = index
        self._by_end: dict[str, list[str]] = {}
        for name in index.tensors:
            before, bags, after = name.rpartition(_BAGS)
            if bags and (not before or before.endswith(".")):
                self._by_end.setdefault(bags + after, []).append(name)
        self.identity = SnapshotIdentity(config.uri, index.format, step, index.digest)

    def table(self, table: EmbeddingBagConfig, stored_name: str | None = None) -> TableRows:
        """The rows of `table`, which the snapshot may know by another name.

        Raises:
            SnapshotError: the table is missing or ambiguous, has another shape or type than the configuration says,
                or its files are incomplete.
        """
        tensor = self._find(table.name, stored_name or table.name)
        expected = (table.num_embeddings, table.embedding_dim)
        if tensor.shape != expected:
            raise SnapshotError(
                f"table '{table.name}': {self._path} has '{tensor.name}' of shape {list(tensor.shape)}, the configuration "
                f"says {list(expected)} (num_embeddings, embedding_dim); correct one of them"
            )
        if tensor.dtype != _DTYPES[table.data_type]:
            raise SnapshotError(
                f"table '{table.name}': {self._path} has '{tensor.name}' of type {tensor.dtype}, the configuration says "
                f"data_type: {table.data_type}; correct one of them"
            )
        return TableRows(tensor, self._index.locate(tensor.name))

    def _find(self, table: str, stored_name: str) -> StoredTensor:
        end = f"{_BAGS}{stored_name}.weight"
        names = self._index.tensors
        if self._prefix is not None:
            wanted = f"{self._prefix.rstrip('.')}.{end}" if self._prefix else end
            found = [wanted] if wanted in names else []
        else:
            wanted = f"…{end}"
            found = self._by_end.get(end, [])
        if len(found) > 1:
            raise SnapshotError(
                f"table '{table}': {self._path} has {len(found)} candidates: {', '.join(found)}; "
                "say which with snapshot.prefix (what stands before 'embedding_bags')"
            )
        if not found:
            tables = [name for name in names if name.endswith(".weight") and "embedding_bags." in name]
            near = difflib.get_close_matches(end, tables or list(names), n=10, cutoff=0.0)
            raise SnapshotError(
                f"table '{table}': {self._path} has no tensor '{wanted}'; it has: {', '.join(near) or 'no tensor at all'}"
            )
        return names[found[0]]


def open_snapshot(config: SnapshotConfig) -> Snapshot:
    """Opens the snapshot at `config.uri`, or the chosen step of a folder of step-numbered ones.

    Raises:
        SnapshotError: nothing is there, no step is complete, or the format is unknown.
    """
    if "://" in config.uri:
        raise SnapshotError(f"{config.uri}: this version reads local paths only; copy or mount the snapshot")
    root = Path(config.uri)
    if not root.exists():
        raise SnapshotError(f"{root}: no such file or folder; see snapshot.uri in the configuration")
    path, step = _choose_step(root, config.step)
    kind = config.format
    if kind is SnapshotFormat.AUTO:
        kind = _detect(path)
    return Snapshot(config, path, step, _INDEXES[kind](path))


def _choose_step(root: Path, step: int | None) -> tuple[Path, int | None]:
    if root.is_file() or _format_of(root) is not None:
        if step is not None:
            raise SnapshotError(f"{root}: is one snapshot, not a folder of step-numbered ones; remove snapshot.step")
        return root, None
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise SnapshotError(f"{root}: cannot be read: {error.strerror}") from error
    numbered = [
        (int(name), path) for path in entries if (name := path.stem if path.is_file() else path.name).isdecimal()
    ]
    steps: dict[int, Path] = {}
    incomplete = []
    for number, path in sorted(numbered):
        if not _is_complete(path):
            incomplete.append(path.name)
        elif number in steps:
            raise SnapshotError(
                f"{root}: '{steps[number].name}' and '{path.name}' are the same step; remove one of them"
            )
        else:
            steps[number] = path
    have = f"complete steps: {', '.join(map(str, steps)) or 'none'}"
    if any(path.suffix == ".distcp" for path in entries):
        have += f"; it has shards itself, and no commit mark ({METADATA})"
    if incomplete:
        marks = f"{METADATA}, {SNAPSHOT_METADATA}"
        have += f"; incomplete (without a commit mark, {marks}, or with files cut short): {', '.join(incomplete)}"
    if step is None and steps:
        step = max(steps)
    if step is None or step not in steps:
        wanted = "snapshot" if step is None else f"step {step}"
        raise SnapshotError(f"{root}: no complete {wanted}; {have}")
    return steps[step], step


def _is_complete(path: Path) -> bool:
    """Whether a step was written to its end: its commit mark is there or, of files that have none, all their bytes."""
    kind = _format_of(path)
    if kind is SnapshotFormat.SAFETENSORS:
        try:
            SafetensorsIndex(path)
        except SnapshotError:
            return False
    return kind is not None


def _detect(path: Path) -> SnapshotFormat:
    kind = _format_of(path)
    if kind is None:
        raise SnapshotError(
            f"{path}: is no snapshot of a known format (DCP folder, torchsnapshot, safetensors, torch.save in its zip form)"
        )
    return kind


def _format_of(path: Path) -> SnapshotFormat | None:
    """The format of a complete snapshot, or None."""
    try:
        if (path / SNAPSHOT_METADATA).is_file():
            return SnapshotFormat.TORCHSNAPSHOT
        if (path / METADATA).is_file():
            return SnapshotFormat.DCP
        if is_safetensors(path):
            return SnapshotFormat.SAFETENSORS
        if path.is_file() and zipfile.is_zipfile(path):
            return SnapshotFormat.STATE_DICT
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be read: {error.strerror}") from error
    return None
