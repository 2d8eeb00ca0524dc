"""Requests of entity ids: read, and turned into requests of rows by the vocabularies of the artifact.

A feature is given as entities or as rows, and the caller says which: nothing here guesses from the numbers. A table
without a vocabulary has rows only.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from runtime_py.checks import ZERO, Checked, RequestChecker, count_ids, describe, parse_policy
from runtime_py.errors import InvalidInputError, VocabularyFileError
from runtime_py.inputs import ExtraFeatures, RequestReader
from runtime_py.manifest import Manifest
from runtime_py.vocabulary import Vocabulary

__all__ = ["EntityReader", "Translated"]


class Translated(NamedTuple):
    """A request that may be looked up, and how many entities of it were unknown, by feature."""

    checked: Checked
    unknown: Mapping[str, int]


class EntityReader:
    """Reads requests of entity ids for one artifact."""

    def __init__(
        self,
        manifest: Manifest,
        vocabularies: Mapping[str, Vocabulary],
        reader: RequestReader,
        checker: RequestChecker,
    ) -> None:
        self._reader = reader
        self._checker = checker
        self._tables = {feature.name: feature.table for feature in manifest.features}
        self._rows = {table.name: table.num_embeddings for table in manifest.tables}
        self._vocabularies = vocabularies
        self._with_vocabulary = [table for table in manifest.tables if table.name in vocabularies]
        self._replacements: dict[str, int | None] = {}

    def read(
        self, features: Any, rows: Mapping[str, Any] | None, unknown_ids: str, extra_features: ExtraFeatures
    ) -> Translated:
        """A checked request of rows: `features` hold entity ids, `rows` are of features that are given as rows.

        Raises:
            InvalidInputError: naming feature, position, value and what is allowed.
            ValueError: `unknown_ids` is no policy.
            VocabularyFileError: a vocabulary gives a row that its table does not have.
        """
        replacement = self._parse(unknown_ids)
        if rows is not None and not isinstance(rows, Mapping):
            raise InvalidInputError(f"rows: expected a mapping by feature name, got {type(rows).__name__}")
        names = self._reader.names(features, extra_features)
        for name in names:
            table = self._tables[name]
            if table not in self._vocabularies:
                raise InvalidInputError(
                    f"feature '{name}': table '{table}' has no vocabulary, so that its ids are rows: "
                    f"give them as rows={{'{name}': …}}"
                )
            if rows is not None and name in rows:
                raise InvalidInputError(f"feature '{name}' is given twice, as entities and as rows")
        if rows:
            by_name = self._reader.by_feature(features, names)
            request = self._reader.read({**by_name, **rows}, extra_features)
        else:
            request = self._reader.read(features, extra_features)
        given, lengths, weights = self._checker.accept(*request)
        offsets_of_bags = self._checker.measure(given, lengths)
        values, offsets = given.numpy(), offsets_of_bags.numpy()
        ids, unknown = self._find(values, offsets, set(names))
        counts: dict[str, int] = {}
        if unknown.any():
            if replacement is None:
                raise InvalidInputError(self._describe(values, offsets, unknown))
            bags = (offsets.size - 1) // len(self._tables)
            counts = count_ids(self._reader.features, unknown, offsets[:-1:bags])
            ids[unknown] = max(replacement, 0)  # any row that each table has, as the others are still to be checked
        checked = self._checker.check_own(torch.from_numpy(ids), offsets_of_bags, weights)
        if counts:
            ids[unknown] = replacement  # of `checked`, too
        return Translated(checked, counts)

    def _parse(self, unknown_ids: str) -> int | None:
        if not isinstance(unknown_ids, str) or unknown_ids not in self._replacements:
            self._replacements[unknown_ids] = parse_policy("unknown_ids", unknown_ids, self._with_vocabulary)
        return self._replacements[unknown_ids]

    def _find(self, values: np.ndarray, offsets: np.ndarray, entities: set[str]) -> tuple[np.ndarray, np.ndarray]:
        """Rows [N], and which of them are of entities that are unknown."""
        ids = np.empty(values.size, np.int64)
        unknown = np.zeros(values.size, np.bool_)
        bags = (offsets.size - 1) // len(self._tables)
        edges = offsets[::bags].tolist() if bags else [0] * (len(self._tables) + 1)
        for (name, table), start, end in zip(self._tables.items(), edges, edges[1:], strict=False):
            if name in entities:
                found = self._vocabularies[table].rows(torch.from_numpy(np.array(values[start:end], np.int64)))
                ids[start:end] = found.numpy()
                unknown[start:end] = ids[start:end] == ZERO
                self._check_found(ids[start:end], table)
            else:
                ids[start:end] = values[start:end]
        return ids, unknown

    def _check_found(self, rows: np.ndarray, table: str) -> None:
        """A wrong row is the file's fault, not the caller's: its digest is not compared with verify="sizes"."""
        most = self._rows[table] - 1
        wrong = rows[(rows < ZERO) | (rows > most)]
        if wrong.size:
            raise VocabularyFileError(
                f"vocabulary of table '{table}': gives row {wrong[0]}, outside [0, {most}]; the file is damaged: restore it "
                "or build again"
            )

    def _describe(self, values: np.ndarray, offsets: np.ndarray, unknown: np.ndarray) -> str:
        tables = list(self._tables.values())

        def tell(feature: int, position: int) -> str:
            table = tables[feature]
            return (
                f"entity {values[position]} is not in the vocabulary of table '{table}', "
                f"which has {len(self._vocabularies[table])} entities"
            )

        return describe(self._reader.features, offsets, unknown, tell)
