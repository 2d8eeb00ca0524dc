"""Writes a table's vocabulary: the hash table that finds the row of an entity id.

The file is a function of the mapping alone, whatever the order and partitioning of the parquet files: a first pass over
them notes the entity of each row in a scratch file, and entities are then inserted in the order of their rows. A second
pass looks every id up in the finished file, through the loader's own reader: nothing that was written is believed.

Memory is some batches: scratch and hash table are mapped files, whose pages the kernel writes back as it needs to.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

from export.config import EmbeddingBagConfig, VocabularyConfig
from export.entities import Entities, EntityBatch
from export.errors import GateError, VocabularyError
from export.storage import redact
from runtime_py.digests import ROWS, TABLES, Digest, combine
from runtime_py.manifest import SLOT_BYTES, File, StoredVocabulary
from runtime_py.operators import load_operators
from runtime_py.tensor_file import encode_header
from runtime_py.vocabulary import LIBRARY, Vocabulary, VocabularyFile

__all__ = ["VocabularyFigures", "WrittenVocabulary", "vocabulary_bytes", "vocabulary_path", "write_vocabulary"]

_CHUNK_ROWS = 1 << 16
_SLOTS_PER_ENTITY = 2
_STRANGERS = 1000
_NAME_BYTES = 255  # of a file name, on every file system that we know


@dataclass(frozen=True)
class VocabularyFigures:
    """What a vocabulary covers: `coverage` is the share of the table's `rows` that has an entity, `holes` the rest."""

    table: str
    entities: int
    rows: int
    holes: int
    coverage: float
    capacity: int
    files: list[str]


@dataclass(frozen=True)
class WrittenVocabulary:
    """The finished file as the manifest describes it, and the report's figures."""

    stored: StoredVocabulary
    file: File
    figures: VocabularyFigures


def vocabulary_path(table: str) -> str:
    """The path of a table's vocabulary inside the artifact: every character that is not safe in one is escaped.

    Raises:
        VocabularyError: the name makes a file name of more than 255 bytes.
    """
    name = quote(table, safe="").replace(".", "%2E") + ".safetensors"
    if len(name) > _NAME_BYTES:
        raise VocabularyError(
            f"table '{table}': the name of its vocabulary's file would be {len(name)} bytes long, "
            f"expected at most {_NAME_BYTES}; rename the table"
        )
    return f"vocab/{name}"


def vocabulary_bytes(table: EmbeddingBagConfig, vocab: VocabularyConfig) -> int:
    """What the file of a table's vocabulary will take; raises VocabularyError where its parquet files cannot be read."""
    entities = Entities(table.name, table.num_embeddings, vocab).count()
    draft = StoredVocabulary(
        table.name, vocabulary_path(table.name), entities, _SLOTS_PER_ENTITY * entities, Digest(ROWS, "")
    )
    return len(encode_header([draft])) + draft.bytes


def write_vocabulary(
    table: EmbeddingBagConfig, vocab: VocabularyConfig, artifact: Path, scratch: Path, threads: int
) -> WrittenVocabulary:
    """Writes the vocabulary of one table into a new file of `artifact`, and checks it entity by entity.

    Args:
        table: the table.
        vocab: where its entities are.
        artifact: the folder of the artifact that is being built.
        scratch: an empty folder on a disk with room for 8 bytes a row; left empty.
        threads: how many threads digest the file.

    Raises:
        VocabularyError: the entities are unreadable, contradict one another, or do not fit the table.
        GateError: the vocabulary covers less of the table than `vocab.min_coverage`.
        OSError: a file cannot be written.
    """
    path = artifact / vocabulary_path(table.name)
    source = Entities(table.name, table.num_embeddings, vocab)
    with _entity_of_row(scratch / "entity_of_row", table.num_embeddings) as entity_of_row:
        entities = _note_entities(source, entity_of_row)
        figures = _measure(source, entities)
        if figures.coverage < vocab.min_coverage:
            raise GateError(
                f"table '{table.name}': coverage is {figures.coverage:.6g} ({entities} entities for "
                f"{table.num_embeddings} rows), below min_coverage: {vocab.min_coverage:.6g}"
            )
        path.parent.mkdir(exist_ok=True)
        draft = StoredVocabulary(table.name, vocabulary_path(table.name), entities, figures.capacity, Digest(ROWS, ""))
        _insert_entities(path, draft, entity_of_row)
        strangers = _choose_strangers(entity_of_row)
    with VocabularyFile(artifact, draft) as file:
        _check_entities(source, entities, Vocabulary(file), strangers)
        digest = file.digest_rows(table.name, threads)
        stored = StoredVocabulary(draft.table, draft.path, draft.entities, draft.capacity, digest)
        whole = combine(TABLES, [file.digest_header(), bytes.fromhex(digest.value)])
    return WrittenVocabulary(stored, File(stored.path, path.stat().st_size, whole), figures)


def _measure(source: Entities, entities: int) -> VocabularyFigures:
    capacity = _SLOTS_PER_ENTITY * entities
    return VocabularyFigures(
        table=source.table,
        entities=entities,
        rows=source.num_embeddings,
        holes=source.num_embeddings - entities,
        coverage=entities / source.num_embeddings,
        capacity=capacity,
        files=[redact(str(path)).rpartition("/")[2] for path in source.files],
    )


# --- The first pass: which entity has a row ------------------------------------------------------------------------


@contextmanager
def _entity_of_row(path: Path, rows: int) -> Iterator[np.ndarray]:
    """int64 [rows], all -1, in a mapped file that is removed at the end."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        path.unlink()  # the open file stays, and goes with the process, however it ends
        os.posix_fallocate(fd, 0, rows * 8)
        array = np.frombuffer(mmap.mmap(fd, rows * 8), np.int64)
        array.fill(-1)
        yield array
    finally:
        os.close(fd)


def _note_entities(source: Entities, entity_of_row: np.ndarray) -> int:
    """Notes the entity of each row, and returns how many there are.

    Raises:
        VocabularyError: a row has two entities, or there is none at all.
    """
    count = 0
    for batch in source.batches():
        taken = entity_of_row[batch.indices]
        if (taken != -1).any():
            position = int(np.argmax(taken != -1))
            raise _index_used_twice(source, batch, position, int(taken[position]))
        # Which of this batch's entities a row keeps: another than itself, where two name the row.
        order = np.arange(len(batch.ids))
        entity_of_row[batch.indices] = order
        kept = entity_of_row[batch.indices]
        if (kept != order).any():
            position = int(np.argmax(kept != order))
            raise _index_used_twice(source, batch, position, int(batch.ids[kept[position]]))
        entity_of_row[batch.indices] = batch.ids
        count += len(batch.ids)
    if not count:
        raise VocabularyError(
            f"table '{source.table}': the vocabulary has no entity ({len(source.files)} files without rows); "
            "write its files again, or remove the key 'vocab'"
        )
    return count


def _index_used_twice(source: Entities, batch: EntityBatch, position: int, other: int) -> VocabularyError:
    entity, index = int(batch.ids[position]), int(batch.indices[position])
    if entity == other:
        return _entity_given_twice(source, entity)
    return VocabularyError(
        f"table '{source.table}': {batch.place(position)}: index {index} of entity {entity} is also that of entity {other}; "
        "every row has at most one entity"
    )


def _entity_given_twice(source: Entities, entity: int) -> VocabularyError:
    """Finds both places by reading once more, since nothing remembers them; there may be only one by now."""
    places = []
    for batch in source.batches():
        found = np.flatnonzero(batch.ids == entity)[:2].tolist()
        places += [f"{batch.place(position)} (index {batch.indices[position]})" for position in found]
        if len(places) > 1:
            break
    if len(places) < 2:
        return VocabularyError(
            f"table '{source.table}': entity {entity} is no longer given as it was when its files were first read; "
            "they have changed during the build, or this is a defect: build again"
        )
    return VocabularyError(
        f"table '{source.table}': entity {entity} is given twice: {'; '.join(places[:2])}; every entity has one row"
    )


# --- The hash table ------------------------------------------------------------------------------------------------


def _insert_entities(path: Path, vocabulary: StoredVocabulary, entity_of_row: np.ndarray) -> None:
    """Writes the file: the header, and every entity in the order of rows, which decides who yields in a collision."""
    load_operators([LIBRARY])
    header = encode_header([vocabulary])
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        size = len(header) + vocabulary.capacity * SLOT_BYTES
        os.posix_fallocate(fd, 0, size)
        mapping = mmap.mmap(fd, size)
        mapping[: len(header)] = header
        slots = torch.frombuffer(mapping, dtype=torch.int64, offset=len(header)).view(vocabulary.shape)
        slots.fill_(-1)
        span = torch.tensor([0, vocabulary.capacity], device="cpu")
        for start in range(0, len(entity_of_row), _CHUNK_ROWS):
            chunk = entity_of_row[start : start + _CHUNK_ROWS]
            rows = np.flatnonzero(chunk != -1)
            if len(rows):  # FBGEMM refuses an empty batch
                ids = torch.from_numpy(chunk[rows])
                count = torch.tensor([0, len(rows)], device="cpu")
                torch.ops.fbgemm.pruned_hashmap_insert(ids, torch.from_numpy(rows + start), count, slots, span)
        os.fsync(fd)
    finally:
        os.close(fd)


# --- The second pass: nothing is believed --------------------------------------------------------------------------


def _choose_strangers(entity_of_row: np.ndarray) -> np.ndarray:
    """Ids, ascending, most of which no entity has: the extremes, random ones, and neighbours of some entities."""
    limits = np.iinfo(np.int64)
    rng = np.random.default_rng(0)
    random = rng.integers(limits.min, limits.max, _STRANGERS, endpoint=True)
    near = entity_of_row[rng.integers(0, len(entity_of_row), _STRANGERS)]
    with np.errstate(over="ignore"):
        candidates = [random, near + 1, near - 1, np.array([limits.min, -2, -1, 0, 1, limits.max])]
    return np.unique(np.concatenate(candidates))


def _check_entities(source: Entities, entities: int, vocabulary: Vocabulary, strangers: np.ndarray) -> None:
    """Looks every entity up, and the ids that no entity has.

    Raises:
        VocabularyError: an entity is given twice (the later one wins in FBGEMM), its files have changed since the first
            pass, or the file does not hold the mapping.
    """
    count = 0
    known = np.zeros(len(strangers), bool)
    for batch in source.batches():
        count += len(batch.ids)
        found = vocabulary.rows(torch.from_numpy(batch.ids)).numpy()
        wrong = found != batch.indices
        if wrong.any():
            position = int(np.argmax(wrong))
            entity, row = int(batch.ids[position]), int(found[position])
            if row != -1:
                raise _entity_given_twice(source, entity)
            raise VocabularyError(
                f"table '{source.table}': {batch.place(position)}: entity {entity} is not found in what was written; "
                "its files have changed during the build, or this is a defect: build again"
            )
        places = np.searchsorted(strangers, batch.ids).clip(max=len(strangers) - 1)
        known[places[strangers[places] == batch.ids]] = True
    if count != entities:
        raise VocabularyError(
            f"table '{source.table}': the vocabulary had {entities} entities, and then {count}: "
            "its files have changed during the build; build again"
        )
    unknown = torch.from_numpy(strangers[~known])
    rows = vocabulary.rows(unknown)
    if (rows != -1).any():
        entity = int(unknown[rows != -1][0])
        raise VocabularyError(
            f"table '{source.table}': entity {entity} is in none of the files, and is found in what was written; "
            "they have changed during the build, or this is a defect: build again"
        )
