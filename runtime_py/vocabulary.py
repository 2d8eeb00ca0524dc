"""Vocabularies: which row of a table belongs to an entity, looked up in a mapped hash table.

The hash table is what FBGEMM's `pruned_hashmap_lookup` reads, int64 [capacity, 2] of (entity id, row): 10 million
entities are 320 MB in the page cache, shared by every process, and no private memory.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from runtime_py.convert import as_integers
from runtime_py.digests import Digest
from runtime_py.errors import GraphError, InvalidInputError, VocabularyFileError
from runtime_py.manifest import StoredVocabulary
from runtime_py.operators import load_operators
from runtime_py.tensor_file import TensorFile

__all__ = ["LIBRARY", "Vocabulary", "VocabularyFile"]

LIBRARY = "fbgemm_gpu_tbe_inference"
_SEARCHED_SLOTS = 1 << 14  # at a time: torch divides 32,768 and more among threads, which no fork survives
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class VocabularyFile(TensorFile):
    """The open file of one table's vocabulary, `stored`, which agrees with what a manifest says of it."""

    error = VocabularyFileError
    follows_from = "the manifest's vocabulary"
    contents = "the entries of the vocabulary of table"

    def __init__(self, artifact: Path, stored: StoredVocabulary) -> None:
        """Opens the file and checks its header.

        Raises:
            VocabularyFileError: the header is not the one that follows from `stored`.
        """
        self.stored = stored
        super().__init__(artifact / stored.path, [stored])

    def verify_digests(self, whole: Digest, threads: int) -> None:
        """Compares every slot with the digest of the manifest, and the file with its own, `whole`, on `threads` cores.

        Raises:
            DigestMismatchError: naming the table, or the file, whose bytes differ.
        """
        self.compare_digests({self.stored.table: self.stored.digest}, whole, threads)


class Vocabulary:
    """Entity id to row, for one table. Reading changes nothing, so any number of threads may use one."""

    def __init__(self, file: VocabularyFile) -> None:
        """Maps an open file; the file may be closed afterwards.

        Raises:
            GraphError: FBGEMM's hash table is not there, or hashes otherwise than the format says.
            VocabularyFileError: no slot is empty, so that the search for an unknown id would never end.
        """
        _load_lookup()
        self.table = file.stored.table
        self.entities = file.stored.entities
        self._slots = file.map().view(torch.int64).view(file.stored.shape)
        self._span = _int64([0, file.stored.capacity])
        if not any(bool((keys == -1).any()) for keys in self._slots[:, 0].split(_SEARCHED_SLOTS)):
            raise VocabularyFileError(f"{file.path}: no slot is empty; the file is damaged: restore it or build again")

    def __len__(self) -> int:
        return self.entities

    def __repr__(self) -> str:
        return f"Vocabulary(table={self.table!r}, entities={self.entities})"

    def rows(self, ids: torch.Tensor | np.ndarray | Sequence[int]) -> torch.Tensor:
        """The rows of entities.

        Args:
            ids: int64 [N] on the CPU, entity ids, as a tensor or as numpy or Python has them; narrower integers are widened.

        Returns:
            int64 [N], for each id its row, or -1 where the vocabulary does not have it (it never has the id -1).

        Raises:
            InvalidInputError: `ids` are none.
        """
        if not isinstance(ids, torch.Tensor):
            ids = as_integers(f"vocabulary of table '{self.table}': ids", ids)
        if (
            ids.dim() != 1
            or ids.dtype not in _INTEGERS
            or ids.device.type != "cpu"
            or ids.layout is not torch.strided
            or ids.is_nested
        ):
            raise InvalidInputError(
                f"vocabulary of table '{self.table}': ids are {list(ids.shape)} {ids.dtype} on {ids.device}"
                f"{'' if ids.layout is torch.strided else f', {ids.layout}'}, expected [N] torch.int64 on cpu"
            )
        return _lookup(ids.to(torch.int64).contiguous(), self._slots, self._span)  # of int32 ids FBGEMM finds none


def _int64(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")  # whatever the process's default device


def _lookup(ids: torch.Tensor, slots: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    rows: torch.Tensor = torch.ops.fbgemm.pruned_hashmap_lookup(ids, _int64([0, ids.numel()]), slots, span)
    return rows


@cache
def _load_lookup() -> None:
    """Loads the operator, and asks it for two ids whose slots follow from `artifacts/FORMAT.md`.

    FBGEMM has hashed 64-bit ids in 32 bits before: such a version would find nothing, and say nothing.
    """
    try:
        load_operators([LIBRARY])
    except GraphError as error:
        raise GraphError(f"a vocabulary {error}") from error
    slots = torch.full((11, 2), -1, dtype=torch.int64, device="cpu")
    known = {-2: 8, 12345678901: 5}  # id -> slot
    for row, (entity, slot) in enumerate(known.items()):
        slots[slot] = _int64([entity, row])
    found = _lookup(_int64([*known, 1]), slots, _int64([0, 11])).tolist()
    if found != [0, 1, -1]:
        raise GraphError(
            f"{LIBRARY} of the installed FBGEMM hashes entity ids otherwise than the vocabularies do; install a newer one"
        )
