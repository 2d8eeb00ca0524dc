"""Artifacts of random rows, written without the builder: a GPU machine may hold little more than torch and FBGEMM."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from export.lookup import OPERATOR_LIBRARIES, make_lookup
from export.torchscript import write_torchscript
from runtime_py.digests import ROWS, TABLES, Digest, sha256
from runtime_py.inputs import Request
from runtime_py.manifest import (
    ROW_FORMATS,
    WEIGHTS,
    Feature,
    File,
    Graph,
    Manifest,
    Output,
    ParitySummary,
    Provenance,
    ServingPrecision,
    Table,
    TableAccuracy,
    compute_artifact_id,
)
from runtime_py.tensor_file import TensorFile, encode_header, layout_tables

GRAPH = "graphs/lookup.torchscript.pt"
_CHUNK_ROWS = 1 << 16
_NONE = Digest(ROWS, "0" * 64)


@dataclass(frozen=True)
class Spec:
    """One table and the features that read it."""

    name: str
    rows: int
    dim: int
    precision: ServingPrecision
    features: int = 1
    pooling: Literal["sum", "mean"] = "sum"
    weighted: bool = False


def write_artifact(folder: Path, specs: list[Spec], *, digests: bool = True) -> Manifest:
    """An artifact of `specs`; without `digests` it only loads with verify="sizes"."""
    tables = [
        Table(s.name, s.rows, s.dim, s.precision, ROW_FORMATS[s.precision].row_bytes(s.dim), 0, _NONE) for s in specs
    ]
    offsets = layout_tables(tables)
    tables = [replace(table, offset_bytes=offsets[table.name]) for table in tables]
    features = [
        Feature(f"{s.name}.{number}", s.name, s.pooling, s.weighted) for s in specs for number in range(s.features)
    ]
    (folder / "weights").mkdir(parents=True)
    (folder / "graphs").mkdir()
    header = encode_header(tables)
    with open(folder / WEIGHTS, "wb") as file:
        file.write(header)
        for name in offsets:
            for chunk in random_rows(next(table for table in tables if table.name == name)):
                file.write(chunk)
    whole = Digest(TABLES, "0" * 64)
    if digests:
        with TensorFile(folder / WEIGHTS, tables) as stored:
            tables = [replace(table, digest=stored.digest_rows(table.name, 4)) for table in tables]
            by_name = {table.name: bytes.fromhex(table.digest.value) for table in tables}
            whole = Digest(TABLES, sha256(stored.digest_header() + b"".join(by_name[name] for name in offsets)).value)
    write_torchscript(make_lookup(tables, features), folder / GRAPH)
    graph = (folder / GRAPH).read_bytes()
    rows_bytes = sum(table.bytes for table in tables)
    dims = {table.name: table.embedding_dim for table in tables}
    manifest = Manifest(
        format_version=1,
        artifact_id="",
        tables=tables,
        features=features,
        outputs=[Output(feature.name, dims[feature.table]) for feature in features],
        weighted=any(feature.weighted for feature in features),
        weights_offset_bytes=len(header),
        weights_bytes=rows_bytes,
        surgery=None,
        vocabularies=[],
        graphs=[Graph("torchscript", "cpu", GRAPH, OPERATOR_LIBRARIES, torch.__version__, "unknown")],
        files=[File(WEIGHTS, len(header) + rows_bytes, whole), File(GRAPH, len(graph), sha256(graph))],
        accuracy=[_no_figures(table) for table in tables],
        choices=[],
        parity=ParitySummary(0, 0, "none: random rows for a check", 0.0, 0.0),
        provenance=Provenance([], {}, {}, ""),
        manifest_digest=_NONE,
    )
    manifest = replace(manifest, artifact_id=compute_artifact_id(manifest))
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return manifest


def _no_figures(table: Table) -> TableAccuracy:
    counts = (table.num_embeddings, table.num_embeddings, 0, 0)
    return TableAccuracy(
        *(table.name, table.serving_precision, *counts, 16.0, 0.0, 0.0, 0.0),
        *(None, None, None, None, None, 0, 0, 0, None, None),
    )


def random_rows(table: Table) -> Iterator[bytes]:
    """Canonical rows of the table, a chunk at a time: values about normal, codes uniform, scales and biases small."""
    generator = np.random.default_rng(sum(table.name.encode()))
    distinct = min(table.num_embeddings, _CHUNK_ROWS)
    dim, precision = table.embedding_dim, table.serving_precision
    if ROW_FORMATS[precision].scale_bias_bytes:
        rows = generator.integers(0, 256, (distinct, table.row_bytes), np.uint8)
        rows[:, :2] = generator.uniform(0.001, 0.01, (distinct, 1)).astype(np.float16).view(np.uint8)
        rows[:, 2:4] = generator.uniform(-1, 1, (distinct, 1)).astype(np.float16).view(np.uint8)
    else:
        rows = generator.standard_normal((distinct, dim), np.float32)
        rows = rows.astype(np.float16) if precision == "fp16" else rows
    # A large table repeats them, each time begun at another row.
    for number, start in enumerate(range(0, table.num_embeddings, distinct)):
        yield np.roll(rows, number, axis=0)[: table.num_embeddings - start].tobytes()


@dataclass(frozen=True)
class Decoded:
    """The rows of a table as a device decodes them, float64 [E, D].

    `terms` are the sums of the magnitudes of the terms of each value, `unlike_cpu` how far it is from what a CPU decodes.
    """

    values: np.ndarray
    terms: np.ndarray
    unlike_cpu: np.ndarray


def decode(manifest: Manifest, folder: Path, *, in_fp16: bool) -> dict[str, Decoded]:
    """The rows of each table; quantized ones are rounded to fp16 where the device decodes them so (FBGEMM's CUDA kernel)."""
    data = np.fromfile(folder / WEIGHTS, np.uint8, offset=manifest.weights_offset_bytes)
    result = {}
    for table in manifest.tables:
        stored = data[table.offset_bytes : table.offset_bytes + table.bytes].reshape(table.num_embeddings, -1)
        row_format = ROW_FORMATS[table.serving_precision]
        if not row_format.scale_bias_bytes:
            values = stored.view(np.float32 if row_format.bits == 32 else np.float16).astype(np.float64)
            result[table.name] = Decoded(values, np.abs(values), np.zeros_like(values))
            continue
        scale, bias = stored[:, :4].copy().view(np.float16).astype(np.float64).T[:, :, None]
        codes = stored[:, 4:, None] >> np.arange(0, 8, row_format.bits, dtype=np.uint8) & (1 << row_format.bits) - 1
        products = codes.reshape(table.num_embeddings, -1)[:, : table.embedding_dim] * scale
        exact = products + bias
        values = exact.astype(np.float16).astype(np.float64) if in_fp16 else exact
        result[table.name] = Decoded(values, np.abs(products) + np.abs(bias), np.abs(values - exact))
    return result


def draw(manifest: Manifest, seed: int, bags: int, most: int, outside: int = 0) -> Request:
    """A random request of the host: bags of 0 to `most` ids, up to `outside` beyond either end of the table."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, most + 1, len(manifest.features) * bags).astype(np.int32)
    counts = lengths.reshape(len(manifest.features), bags).sum(1)
    parts = [
        generator.integers(-outside, manifest.table[feature.table].num_embeddings + outside, count)
        for feature, count in zip(manifest.features, counts, strict=True)
    ]
    values = np.concatenate([np.empty(0, np.int64), *parts])
    weights = generator.standard_normal(len(values)).astype(np.float32) if manifest.weighted else None
    return Request(
        torch.from_numpy(values), torch.from_numpy(lengths), None if weights is None else torch.from_numpy(weights)
    )


def columns(manifest: Manifest) -> list[tuple[Feature, int, int]]:
    """Each feature with its first output column and the one behind its last."""
    ends = list(itertools.accumulate((output.dim for output in manifest.outputs), initial=0))
    return [(feature, ends[i], ends[i + 1]) for i, feature in enumerate(manifest.features)]
