"""Finding a snapshot, its format, its step, and each table's tensor in it."""

import difflib
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

import torch

from export.config import DataType, EmbeddingBagConfig, SnapshotConfig, SnapshotFormat
from export.errors import SnapshotError
from export.snapshots.dcp import METADATA, DcpIndex
from export.snapshots.rows import SnapshotIndex, StoredTensor, TableRows
from export.snapshots.safetensors_files import SafetensorsIndex, is_safetensors
from export.snapshots.state_dict import StateDictIndex
from export.snapshots.torchsnapshot import SNAPSHOT_METADATA, TorchsnapshotIndex
from export.storage import (
    Location,
    is_file,
    join,
    list_folder,
    map_files,
    open_location,
    open_seekable,
    redact,
)
from runtime_py.manifest import SnapshotIdentity, table_shape

__all__ = ["Snapshot", "open_snapshot"]

_INDEXES: dict[SnapshotFormat, Callable[[Location], SnapshotIndex]] = {
    SnapshotFormat.DCP: DcpIndex,
    SnapshotFormat.TORCHSNAPSHOT: TorchsnapshotIndex,
    SnapshotFormat.SAFETENSORS: SafetensorsIndex,
    SnapshotFormat.STATE_DICT: StateDictIndex,
}
_BAGS = "embedding_bags."
_STEP = re.compile(
    r"(?:(?:(?:global_?)?step|checkpoint|ckpt|iter)[-_=]?)?([0-9]+)", re.IGNORECASE
)  # of its folder or file
CUT_POINT = "surgery_cut_point"  # of `LargeEmbeddings`
_DTYPES = {DataType.FP32: torch.float32, DataType.FP16: torch.float16}


class Snapshot:
    """An opened snapshot: its identity, the rows of a table by the table's name, and the parameters of a surgery."""

    def __init__(
        self,
        config: SnapshotConfig,
        path: Location,
        step: int | None,
        index: SnapshotIndex,
        passed_over: Sequence[str] = (),
    ) -> None:
        """`passed_over` are newer steps beside it that are not complete, by their paths."""
        self._path = path
        self.passed_over = list(passed_over)
        self._prefix = config.prefix
        self._index = index
        self._homes: dict[str, str] = {}  # what stands before tables that are no pretrained ones, and one table of each
        self._by_end: dict[str, list[str]] = {}
        for name in index.tensors:
            before, bags, after = name.rpartition(_BAGS)
            if bags and (not before or before.endswith(".")):
                self._by_end.setdefault(bags + after, []).append(name)
        self.identity = SnapshotIdentity(redact(config.uri), index.format, step, index.digest)

    def table(self, table: EmbeddingBagConfig, stored_name: str | None = None) -> TableRows:
        """The rows of `table`, which the snapshot may know by another name.

        Raises:
            SnapshotError: the table is missing or ambiguous, has another shape or type than the configuration says,
                or its files are incomplete.
        """
        if table.pretrained is None:
            prefix, key = self._prefix, "snapshot.prefix"
        else:
            prefix, key = table.pretrained.prefix, "pretrained.prefix"
        tensor = self._find(table.name, stored_name or table.name, prefix, key)
        if table.pretrained is None:
            home = tensor.name.removesuffix(f"{_BAGS}{table.name}.weight").rstrip(".")
            self._homes.setdefault(home, table.name)
        expected = (table.num_embeddings, table.embedding_dim)
        if tensor.shape != expected:
            hint = ", or bring back a missing shard file" if tensor.inferred else ""
            raise SnapshotError(
                f"table '{table.name}': {self._path} has '{tensor.name}' of shape {list(tensor.shape)}, the configuration "
                f"says {list(expected)} (num_embeddings, embedding_dim); correct one of them{hint}"
            )
        if tensor.dtype != _DTYPES[table.data_type]:
            remedy = "correct one of them"
            if tensor.dtype not in _DTYPES.values():
                remedy = f"rows are read from {' or '.join(map(str, _DTYPES.values()))}: save them as one of these"
            raise SnapshotError(
                f"table '{table.name}': {self._path} has '{tensor.name}' of type {tensor.dtype}, the configuration says "
                f"data_type: {table.data_type}; {remedy}"
            )
        return TableRows(tensor, self._index.locate(tensor.name))

    def check_one_collection(self) -> None:
        """Makes sure that the tables that were found, but for pretrained ones, are of one model.

        Raises:
            SnapshotError: naming the places.
        """
        if len(self._homes) > 1:
            places = ", ".join(
                f"'{home}' has '{table}'" if home else f"the top has '{table}'"
                for home, table in sorted(self._homes.items())
            )
            raise SnapshotError(
                f"{self._path}: the tables are in several collections: {places}; say with snapshot.prefix which one is "
                "released, and take tables of another one with pretrained (its embedding_snapshot_uri may be this snapshot)"
            )

    def parameter(self, name: str, like: torch.Tensor, prefix: str | None) -> torch.Tensor:
        """The values of a surgery's parameter or buffer, which `prefix` and `name` name.

        Args:
            name: what the module calls it.
            like: of the shape and the type that the module expects.
            prefix: what stands before; by default `surgery_cut_point` beside the collection of the tables that were found
                so far, which are all of a release when this is called.

        Raises:
            SnapshotError: it is not there, or it is not clear where; it has another shape or type, or its files are
                incomplete.
        """
        tensor = self._find_parameter(name, prefix)
        if (tensor.shape, tensor.dtype) != (tuple(like.shape), like.dtype):
            raise SnapshotError(
                f"{self._path} has '{tensor.name}' of shape {list(tensor.shape)} and type {tensor.dtype}, the module's "
                f"'{name}' is {list(like.shape)} {like.dtype}; correct kwargs or the module"
            )
        shape = table_shape(tensor.shape)
        rows = TableRows(replace(tensor, shape=shape), self._index.locate(tensor.name))
        values = torch.empty(shape, dtype=tensor.dtype)
        rows.read(0, values)
        return values.view(tensor.shape)

    def _find_parameter(self, name: str, prefix: str | None) -> StoredTensor:
        names = self._index.tensors
        wanted = f"{self._cut_point(name) if prefix is None else prefix.rstrip('.')}.{name}"
        if wanted not in names:
            others = [other for other in names if _BAGS not in other]
            near = difflib.get_close_matches(wanted, others, n=10, cutoff=0.0)
            raise SnapshotError(
                f"{self._path} has no tensor '{wanted}' for '{name}'; beside tables it has: {', '.join(near) or 'nothing'}; "
                "correct the module, or say with surgery.prefix where its parameters are"
            )
        return names[wanted]

    def _cut_point(self, name: str) -> str:
        """Where all parameters are by default: at the cut point of the model that has the tables."""
        if not self._homes:
            raise SnapshotError(
                f"{self._path}: '{name}' is looked for beside the tables, and no table is read from it; say with "
                "surgery.prefix where the parameters are"
            )
        parent = next(iter(self._homes)).rpartition(".")[0]
        return f"{parent}.{CUT_POINT}" if parent else CUT_POINT

    def _find(self, table: str, stored_name: str, prefix: str | None, key: str) -> StoredTensor:
        """The table's tensor; `key` is where the configuration says what stands before it."""
        end = f"{_BAGS}{stored_name}.weight"
        names = self._index.tensors
        if prefix is not None:
            wanted = f"{prefix.rstrip('.')}.{end}" if prefix else end
            found = [wanted] if wanted in names else []
        else:
            wanted = f"…{end}"
            found = self._by_end.get(end, [])
        if len(found) > 1:
            raise SnapshotError(
                f"table '{table}': {self._path} has {len(found)} candidates: {', '.join(found)}; "
                f"say which with {key} (what stands before 'embedding_bags')"
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
    path, step, passed_over = _choose_step(open_location(config.uri), config.step)
    kind = config.format
    if kind is SnapshotFormat.AUTO:
        kind = _detect(path)
    return Snapshot(config, path, step, _INDEXES[kind](path), passed_over)


def _choose_step(root: Location, step: int | None) -> tuple[Location, int | None, list[str]]:
    """The snapshot, its step, and newer steps that are not complete."""
    entries = _entries(root)
    if entries is None:
        if step is not None:
            raise SnapshotError(f"{root}: is one snapshot, not a folder of step-numbered ones; remove snapshot.step")
        return root, None, []
    steps: dict[int, list[Location]] = {}
    for name, file in entries.items():
        match = _STEP.fullmatch(PurePosixPath(name).stem if file else name)
        if match:
            steps.setdefault(int(match[1]), []).append(join(root, name))
    passed_over: list[str] = []
    # From the newest on, and no further than needed: a step costs some requests where it is remote.
    for candidate in sorted(steps, reverse=True) if step is None else [step]:
        complete = [path for path in steps.get(candidate, []) if _is_complete(path)]
        if len(complete) > 1:
            raise SnapshotError(
                f"{root}: '{complete[0].name}' and '{complete[1].name}' are the same step; remove one of them"
            )
        if complete:
            return complete[0], candidate, passed_over
        passed_over += [redact(str(path)) for path in steps.get(candidate, [])]
    wanted = "snapshot" if step is None else f"step {step}"
    raise SnapshotError(f"{root}: no complete {wanted}; {_what_there_is(root, entries, steps)}")


def _entries(root: Location) -> dict[str, bool] | None:
    """The names in a folder of steps, and whether each is a file; None where `root` is a snapshot itself."""
    try:
        if is_file(root) or _format_of(root) is not None:
            return None
        return list_folder(root)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = "no such file or folder" if isinstance(root, Path) else error.strerror
        raise SnapshotError(f"{root}: {reason}; see snapshot.uri in the configuration") from error
    except OSError as error:
        raise SnapshotError(f"{root}: cannot be read: {error.strerror}") from error


def _what_there_is(root: Location, entries: dict[str, bool], steps: dict[int, list[Location]]) -> str:
    paths = [(number, path) for number in sorted(steps) for path in steps[number]]
    found = map_files(_is_complete, [path for _, path in paths], [root])
    complete = {str(number): None for (number, _), whole in zip(paths, found, strict=True) if whole}
    have = f"complete steps: {', '.join(complete) or 'none'}"
    if not steps:
        names = sorted(entries)
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        have += f"; a step is called 30, step_30, step-30, checkpoint-30 or the like, and here is: {shown or 'nothing'}"
    if any(name.endswith(".distcp") for name in entries):
        have += f"; it has shards itself, and no commit mark ({METADATA})"
    incomplete = [path.name for (_, path), whole in zip(paths, found, strict=True) if not whole]
    if incomplete:
        marks = f"{METADATA}, {SNAPSHOT_METADATA}"
        have += f"; incomplete (without a commit mark, {marks}, or with files cut short or missing): {', '.join(incomplete)}"
    return have


def _is_complete(path: Location) -> bool:
    """Whether a step was written to its end: its commit mark is there or, of files that have none, all their bytes."""
    kind = _format_of(path)
    if kind is SnapshotFormat.SAFETENSORS:
        try:
            SafetensorsIndex(path)
        except SnapshotError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise  # it may be complete: an older step is not taken instead
            return False
    return kind is not None


def _detect(path: Location) -> SnapshotFormat:
    kind = _format_of(path)
    with _reading(path):
        both = kind is SnapshotFormat.TORCHSNAPSHOT and is_file(join(path, METADATA))
        cut = kind is None and _begins_as_zip(path)
    if both:
        raise SnapshotError(
            f"{path}: has the commit marks of two formats, {METADATA} (dcp) and {SNAPSHOT_METADATA} (torchsnapshot); say "
            "with snapshot.format which one to read"
        )
    if kind is None:
        raise SnapshotError(
            f"{path}: is no snapshot of a known format (DCP folder, torchsnapshot, safetensors, torch.save in its zip form)"
            f"{'; it begins as a torch.save file, and its end is missing: it was cut short' if cut else ''}"
        )
    return kind


@contextmanager
def _reading(path: Location) -> Iterator[None]:
    """Makes an OSError of the body a SnapshotError."""
    try:
        yield
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be read: {error.strerror}") from error


def _is_torch_file(path: Location) -> bool:
    """Whether a file is a zip that torch.save has written, to its end; its pickle is called so in all of them."""
    with open_seekable(path) as file:
        if not zipfile.is_zipfile(file):
            return False
        try:
            with zipfile.ZipFile(file) as archive:
                return any(PurePosixPath(name).name == "data.pkl" for name in archive.namelist())
        except zipfile.BadZipFile:
            return True  # torch says what is wrong with it


def _begins_as_zip(path: Location) -> bool:
    if not is_file(path):
        return False
    with open_seekable(path) as file:
        return file.read(4) == b"PK\x03\x04"


def _format_of(path: Location) -> SnapshotFormat | None:
    """The format of a complete snapshot, or None."""
    with _reading(path):
        if is_file(join(path, SNAPSHOT_METADATA)):
            return SnapshotFormat.TORCHSNAPSHOT
        if is_file(join(path, METADATA)):
            return SnapshotFormat.DCP
        if is_safetensors(path):
            return SnapshotFormat.SAFETENSORS
        if is_file(path) and _is_torch_file(path):
            return SnapshotFormat.STATE_DICT
    return None
