"""A `DeviceArtifact` whose device is the CPU: everything of a GPU's lookup but CUDA itself, and small manifests to place."""

import itertools
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from runtime_py import cuda, load_artifact
from runtime_py.device_artifact import DeviceArtifact
from runtime_py.device_layout import LOCATIONS, DeviceLayout
from runtime_py.digests import Digest
from runtime_py.manifest import ROW_FORMATS, Feature, Graph, Manifest, Output, ParitySummary, Provenance, Table
from runtime_py.tensor_file import layout_tables

CPU = torch.device("cpu")
HOST = 3  # FBGEMM's number: its CPU kernel refuses those of a GPU


def load_on_cpu(path: Path, **options: Any) -> DeviceArtifact:
    """`load_artifact` onto a GPU, step by step, with a CPU for the device; only where all rows lie on the device."""
    with (
        patch.object(cuda, "find_device", lambda name: CPU),
        patch.object(cuda, "_check_kernels", lambda operators: None),
        patch.object(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40)),
        patch.dict(LOCATIONS, device=HOST),
    ):
        loaded = load_artifact(path, device="cuda", **options)
    assert isinstance(loaded, DeviceArtifact)
    return loaded


def describe(tables: dict[str, tuple[int, int, str]], features: dict[str, str] | None = None) -> Manifest:
    """A manifest of tables by name, (rows, dim, precision), and features by name; there are no files."""
    digest = Digest("sha256-rows-1048576", "0" * 64)
    made = [
        Table(name, rows, dim, precision, ROW_FORMATS[precision].row_bytes(dim), 0, digest)  # type: ignore[arg-type, index]
        for name, (rows, dim, precision) in tables.items()
    ]
    offsets = layout_tables(made)
    made = [Table(*(*vars(table).values(),)[:5], offsets[table.name], digest) for table in made]
    features = features if features is not None else {name: name for name in tables}
    return Manifest(
        format_version=1,
        artifact_id="0" * 64,
        tables=made,
        features=[Feature(name, table, "sum", False) for name, table in features.items()],
        outputs=[Output(name, tables[table][1]) for name, table in features.items()],
        weighted=False,
        weights_offset_bytes=4096,
        weights_bytes=sum(table.bytes for table in made),
        surgery=None,
        vocabularies=[],
        graphs=[Graph("torchscript", "cpu", "graphs/lookup.torchscript.pt", [], "2", "1")],
        files=[],
        accuracy=[],
        choices=[],
        parity=ParitySummary(0, 0, "", 0.0, 0.0),
        provenance=Provenance([], {}, {}, ""),
        manifest_digest=digest,
    )


def check_layout(manifest: Manifest, layout: DeviceLayout) -> None:
    """What must hold of every layout: tables aligned, apart, inside their memory; every feature's table placed."""
    assert set(layout.tables) == {feature.table for feature in manifest.features}
    for memory, size in (("device", layout.device_bytes), ("uvm", layout.uvm_bytes)):
        placed = [each for each in layout.tables.values() if (each.location == "device") == (memory == "device")]
        spans = sorted((each.offset_bytes, each.offset_bytes + each.bytes) for each in placed)
        assert all(start % 128 == 0 for start, _ in spans)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert not spans or 0 <= size - spans[-1][1] < 128
        assert spans or size == 0
    for placed_table in layout.tables.values():
        assert placed_table.row_bytes % 16 == 0
        assert 0 <= placed_table.row_bytes - placed_table.table.row_bytes < 16
