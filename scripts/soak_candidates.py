"""What `soak_refresh.py` offers to a server that must refuse it: damaged versions, and pointers that no publisher writes."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from soak_release import Release

from export.versions import publish_version
from runtime_py.digests import sha256
from runtime_py.errors import ManifestError
from runtime_py.manifest_reader import read_manifest
from runtime_py.pointer import read_pointer

WEIGHTS, GOLDEN = "weights/tables.safetensors", "golden/cases.safetensors"


class Root:
    """A root, written as no publisher would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pointer = folder, folder / "current.json"

    def write(self, data: bytes) -> None:
        """Replaces the pointer."""
        fresh = self.folder / "fresh.json"
        fresh.write_bytes(data)
        fresh.replace(self.pointer)

    def point(self, **changes: Any) -> None:
        """Replaces the pointer by one that is whole, and says something else."""
        pointer = dataclasses.replace(read_pointer(self.pointer), history=[], **changes)
        self.write(pointer.to_bytes())

    def offer(self, artifact: Path, damage: Callable[[Path], Any]) -> None:
        """Points to a damaged copy of an artifact, in the name of what its manifest says, as long as that can be read."""
        manifest = read_manifest(artifact)
        version = self.version(artifact)
        shutil.rmtree(version, ignore_errors=True)
        shutil.copytree(artifact, version)
        damage(version)
        digest = manifest.manifest_digest
        with suppress(ManifestError):
            digest = read_manifest(version).manifest_digest
        self.point(version=version.name, artifact_id=version.name, manifest_digest=digest)

    def offer_link(self, artifact: Path) -> None:
        """Points to a link to a good artifact outside of the root."""
        version, manifest = self.version(artifact), read_manifest(artifact)
        shutil.rmtree(version, ignore_errors=True)
        version.symlink_to(artifact)
        self.point(version=version.name, artifact_id=version.name, manifest_digest=manifest.manifest_digest)

    def version(self, artifact: Path) -> Path:
        return self.folder / "versions" / read_manifest(artifact).artifact_id


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _seal(version: Path) -> None:
    """Makes the digests of a changed version right again, but those of the rows: a broken tool's work, or an attacker's."""
    manifest = read_manifest(version)
    files = []
    for file in manifest.files:
        data = (version / file.path).read_bytes()
        mapped = file.path in manifest.mapped
        files.append(file if mapped else dataclasses.replace(file, bytes=len(data), digest=sha256(data)))
    (version / "manifest.json").write_bytes(dataclasses.replace(manifest, files=files).to_bytes())


def _other_answers(version: Path) -> None:
    tensors = load_file(version / GOLDEN)
    tensors["06 random 0/pooled"].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, version / GOLDEN)
    _seal(version)


def _link_file(path: Path, outside: Path) -> None:
    shutil.move(path, outside)
    path.symlink_to(outside)


def _damages(graph: str, other: Path, outside: Path) -> dict[str, Callable[[Path], Any]]:
    """What is done to a version, by name; `other` is an artifact with rows of other sizes."""

    def other_graph(version: Path) -> None:
        shutil.copytree(other / "graphs", version / "graphs", dirs_exist_ok=True)
        _seal(version)

    def other_artifact(version: Path) -> None:
        shutil.rmtree(version)
        shutil.copytree(other, version)

    damages: dict[str, Callable[[Path], Any]] = {
        "a bit of the first row": lambda v: _flip(v / WEIGHTS, 4096),
        "a bit of the last row": lambda v: _flip(v / WEIGHTS, -1),
        "a bit of the weight file's header": lambda v: _flip(v / WEIGHTS, 20),
        "a bit of a vocabulary": lambda v: _flip(next((v / "vocab").iterdir()), -3),
        "a bit of the graph": lambda v: _flip(v / graph, 3000),
        "a bit of the golden cases": lambda v: _flip(v / GOLDEN, -1),
        "a bit of the report": lambda v: _flip(v / "reports/report.html", 100),
        "a bit of the manifest": lambda v: _flip(v / "manifest.json", 500),
        "a truncated weight file": lambda v: os.truncate(v / WEIGHTS, 5000),
        "a truncated graph": lambda v: os.truncate(v / graph, 1000),
        "a truncated manifest": lambda v: os.truncate(v / "manifest.json", 700),
        "no weight file": lambda v: (v / WEIGHTS).unlink(),
        "no graph": lambda v: (v / graph).unlink(),
        "no manifest": lambda v: (v / "manifest.json").unlink(),
        "a file too many": lambda v: (v / "weights/.tables.swp").write_bytes(b""),
        "a link in place of a file": lambda v: _link_file(v / "reports/accuracy.json", outside),
        "other golden answers, digests made right": _other_answers,
        "another artifact under its name": other_artifact,
    }
    if graph.endswith(".torchscript.pt"):  # the compiled graph of other rows is the same file
        damages["the graph of other rows, digests made right"] = other_graph
    return damages


def _bad_pointers(root: Root, victim: Path) -> dict[str, Callable[[], Any]]:
    def other_field() -> None:
        zeros = "0" * 64
        document = json.loads(root.pointer.read_bytes()) | {"note": "x"}
        document["pointer_digest"]["value"] = zeros
        text = json.dumps(document)
        root.write(text.replace(zeros, sha256(text.encode()).value).encode())

    return {
        "garbage in the pointer": lambda: root.write(os.urandom(600)),
        "an empty pointer": lambda: root.write(b""),
        "half a pointer": lambda: root.write(root.pointer.read_bytes()[:200]),
        "a bit of the pointer": lambda: _flip(root.pointer, 90),
        "no pointer": root.pointer.unlink,
        "a pointer with another field": other_field,
        "a pointer of format version 2": lambda: root.point(format_version=2),
        "a pointer to the outside": lambda: root.point(version="../../version-0"),
        "a pointer to a version that is not there": lambda: root.point(version="0" * 64, artifact_id="0" * 64),
        "a version that is a link to the outside": lambda: root.offer_link(victim),
    }


def make_offers(root: Root, release: Release, graph: str) -> dict[str, Callable[[], Any]]:
    """Every candidate by name; to call one is to offer it. The pointer must be a good one before."""
    victim = release.artifacts[1]
    shrunk = release.build_other("shrunk", num_embeddings=50)
    renamed = release.build_other("renamed", feature_names=["visitor"])
    damages = _damages(graph, shrunk, release.folder / "outside")
    return {
        **{name: lambda damage=damage: root.offer(victim, damage) for name, damage in damages.items()},
        "other features": lambda: publish_version(renamed, root.folder, allow_signature_change=True),
        "a table with fewer rows": lambda: publish_version(shrunk, root.folder, allow_signature_change=True),
        **_bad_pointers(root, victim),
    }
