"""Verification: every kind of damage to every file is noticed, named, and noticed before anything is executed."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime_py import (
    ArtifactError,
    DigestMismatchError,
    ExtraFileError,
    ManifestError,
    MissingFileError,
    SizeMismatchError,
    VocabularyFileError,
    WeightFileError,
    load_artifact,
    verify_artifact,
)
from runtime_py.manifest_reader import read_manifest
from runtime_py.verify import Verify, open_verified

MANIFEST = "manifest.json"
WEIGHTS = "weights/tables.safetensors"
GRAPH = "graphs/lookup.torchscript.pt"
USERS = "vocab/user.safetensors"
ITEMS = "vocab/item.safetensors"
MAPPED = [WEIGHTS, USERS, ITEMS]
REPORTS = [
    f"reports/{name}"
    for name in ("accuracy.json", "parity.json", "vocabulary.json", "build.json", "report.html", "summary.md")
]
FILES = [MANIFEST, *MAPPED, GRAPH, "golden/cases.safetensors", *REPORTS]
HEADER_BYTES = 4096


@pytest.fixture(scope="module")
def built_artifact(vocabulary_artifact: Path) -> Path:
    return vocabulary_artifact


def flip(position: Callable[[int], int]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position(len(data))] ^= 0x10
        path.write_bytes(data)

    return damage


def replace_by_link(path: Path) -> None:
    copy = path.parents[2] / f"copy of {path.name}"  # outside of the artifact
    path.rename(copy)
    path.symlink_to(copy)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte flipped": flip(lambda size: 0),
    "middle byte flipped": flip(lambda size: size // 2),
    "last byte but one flipped": flip(lambda size: size - 2),
    "last byte flipped": flip(lambda size: size - 1),
    "truncated by one byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "grown by one byte": grow,
    "removed": Path.unlink,
    "replaced by a link to an identical file": replace_by_link,
    "replaced by a folder": lambda path: (path.unlink(), path.mkdir()),
}


def in_header(name: str, damage: str) -> bool:
    """Whether a flipped byte of a mapped file is before its data; the vocabulary of `item` is smaller than its header."""
    return damage == "first byte flipped" or (damage == "middle byte flipped" and name == ITEMS)


def expected_refusal(name: str, damage: str) -> tuple[type[ArtifactError], str]:
    """The class and the start of the text, after the artifact's path, that a damage of a file must give."""
    if name == MANIFEST:
        if damage == "removed":
            return (
                ManifestError,
                "/manifest.json: cannot be read: No such file or directory; without a manifest there is",
            )
        if "link" in damage:
            return ManifestError, "/manifest.json: is a symbolic link; an artifact holds none"
        if "folder" in damage:
            return ManifestError, "/manifest.json: cannot be read: Is a directory"
        return ManifestError, "/manifest.json: is damaged: "
    if "link" in damage or "folder" in damage:
        return ExtraFileError, f": not in the manifest, or no regular file: {name}; an artifact is never changed"
    if damage == "removed":
        return MissingFileError, f": missing: {name}; restore the files or build again"
    if "flipped" not in damage:
        return SizeMismatchError, rf": {name} is \d+ bytes, expected \d+; restore the files or build again"
    if name not in MAPPED:
        return DigestMismatchError, rf": {name}: digest sha256:\w+, expected sha256:\w+; restore the files"
    if in_header(name, damage) and name != WEIGHTS:
        text = f"/{name}: the header is not the one that follows from the manifest's vocabulary"
        return VocabularyFileError, text
    if in_header(name, damage):
        return WeightFileError, f"/{name}: the header is not the one that follows from the manifest's tables"
    if name != WEIGHTS:
        table = Path(name).stem
        what = f"/{name}: the entries of the vocabulary of table '{table}' are not those that were published: digest"
        return DigestMismatchError, what
    table = "user" if "middle" in damage else "item"  # the last bytes are those of the table with the shortest rows
    return (
        DigestMismatchError,
        f"/{name}: the rows of table '{table}' are not those that were published: digest sha256-rows",
    )


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, built_artifact: Path) -> dict[tuple[str, str], Path]:
    """One damaged copy of the artifact for every file and every damage."""
    folder = tmp_path_factory.mktemp("damaged")
    copies = {}
    for i, (name, damage) in enumerate((name, damage) for name in FILES for damage in DAMAGES):
        copies[name, damage] = folder / str(i) / "artifact"
        shutil.copytree(built_artifact, copies[name, damage])
        DAMAGES[damage](copies[name, damage] / name)
    return copies


def test_the_list_of_files_here_is_complete(built_artifact: Path) -> None:
    assert sorted(FILES) == sorted(
        str(path.relative_to(built_artifact)) for path in built_artifact.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_refused_by_name(
    damaged: dict[tuple[str, str], Path], name: str, damage: str
) -> None:
    artifact = damaged[name, damage]
    kind, text = expected_refusal(name, damage)
    for threads in (1, 4):
        with pytest.raises(ArtifactError, match=re.escape(str(artifact)) + text) as caught:
            verify_artifact(artifact, threads=threads)
        assert caught.type is kind


def test_damage_is_refused_before_any_graph_or_library_is_loaded(
    damaged: dict[tuple[str, str], Path], built_artifact: Path
) -> None:
    """In a fresh process, in which to load a graph or a library of operators is to die."""
    program = """
import json, os, sys
import torch
from runtime_py import ArtifactError, load_artifact

def die(*_, **__):
    print("loaded", flush=True)
    os._exit(9)

torch.jit.load = torch.ops.load_library = die
folders = json.loads(sys.stdin.readline())
for folder in folders:
    try:
        load_artifact(folder)
    except ArtifactError as error:
        print(type(error).__name__, flush=True)
print(any("fbgemm" in line for line in open("/proc/self/maps")), flush=True)
load_artifact(sys.stdin.readline().strip())
"""
    child = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([str(path) for path in damaged.values()]) + f"\n{built_artifact}\n",
        capture_output=True,
        text=True,
        check=False,
    )
    *refusals, any_library, last = child.stdout.split()
    assert refusals == [expected_refusal(*key)[0].__name__ for key in damaged], child.stderr
    assert any_library == "False"
    # The intact artifact gets as far as loading: the test could have failed.
    assert (last, child.returncode) == ("loaded", 9)


# --- What is too much, and what else is wrong with the folder --------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ("notes.txt", "file"),
        (".hidden", "file"),
        ("manifest.json.bak", "file"),
        ("weights/tables.safetensors.tmp", "file"),
        ("weights/manifest.json", "file"),
        ("reports/.nfs0001", "file"),
        ("empty", "folder"),
        ("weights/empty", "folder"),
        (".hidden", "folder"),
        ("notes.txt", "pipe"),
        ("graphs/lookup.cpu.pt2", "dangling link"),
        ("vocabulary", "link to a folder"),
        ("vocab/tag.safetensors", "file"),
    ],
)
def test_whatever_the_manifest_does_not_list_is_refused(artifact_copy: Path, extra: str, kind: str) -> None:
    path = artifact_copy / extra
    {
        "file": lambda: path.write_bytes(b""),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "dangling link": lambda: path.symlink_to("nowhere"),
        "link to a folder": lambda: path.symlink_to(artifact_copy.parent),
    }[kind]()
    text = f"{artifact_copy}: not in the manifest, or no regular file: {extra}; an artifact is never changed after"
    for verify in ("full", "sizes"):
        with pytest.raises(ExtraFileError, match=re.escape(text)):
            verify_artifact(artifact_copy, verify)


def test_a_folder_of_the_artifact_that_is_a_link_is_refused(artifact_copy: Path) -> None:
    (artifact_copy / "weights").rename(artifact_copy.parent / "elsewhere")
    (artifact_copy / "weights").symlink_to(artifact_copy.parent / "elsewhere")
    with pytest.raises(ExtraFileError, match="no regular file: weights;"):
        verify_artifact(artifact_copy)


def test_a_listed_file_that_is_a_pipe_is_refused_and_not_waited_for(artifact_copy: Path) -> None:
    (artifact_copy / GRAPH).unlink()
    os.mkfifo(artifact_copy / GRAPH)
    with pytest.raises(ExtraFileError, match=f"no regular file: {GRAPH};"):
        verify_artifact(artifact_copy)


def test_the_message_names_every_file_of_the_first_kind_that_applies(artifact_copy: Path) -> None:
    accuracy, parity, graph = (artifact_copy / name for name in ("reports/accuracy.json", "reports/parity.json", GRAPH))
    flip(lambda size: 0)(accuracy)
    flip(lambda size: 0)(parity)
    with pytest.raises(DigestMismatchError, match=r"reports/accuracy.json: digest .*; reports/parity.json: digest "):
        verify_artifact(artifact_copy)
    grow(graph)
    grow(accuracy)
    with pytest.raises(SizeMismatchError, match=rf"{GRAPH} is \d+ bytes, .*; reports/accuracy.json is \d+ bytes"):
        verify_artifact(artifact_copy)
    parity.unlink()
    graph.unlink()
    with pytest.raises(MissingFileError, match=f"missing: {GRAPH}, reports/parity.json;"):
        verify_artifact(artifact_copy)
    (artifact_copy / "b").touch()
    (artifact_copy / "a").touch()
    with pytest.raises(ExtraFileError, match="no regular file: a, b;"):
        verify_artifact(artifact_copy)
    (artifact_copy / MANIFEST).write_bytes(b"{}")
    with pytest.raises(ManifestError, match="format_version is None"):
        verify_artifact(artifact_copy)


def test_what_is_no_folder_is_refused(tmp_path: Path, built_artifact: Path) -> None:
    with pytest.raises(MissingFileError, match=f"{tmp_path}/none: no such folder; give the folder that 'export build'"):
        verify_artifact(tmp_path / "none")
    with pytest.raises(MissingFileError, match=f"{built_artifact}/manifest.json: is no folder"):
        verify_artifact(built_artifact / MANIFEST)


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(
        ManifestError, match=f"{tmp_path}/manifest.json: cannot be read: .*without a manifest there is no"
    ):
        verify_artifact(tmp_path)


def test_a_manifest_that_is_a_pipe_is_refused_and_not_read(artifact_copy: Path) -> None:
    """To open a pipe that nobody writes to is to wait forever; here somebody does, so that the test ends."""
    pipe = artifact_copy / MANIFEST
    pipe.unlink()
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: os.close(os.open(pipe, os.O_WRONLY)))
    writer.start()
    try:
        with pytest.raises(ManifestError, match=r"manifest\.json: .*regular file"):
            verify_artifact(artifact_copy)
    finally:
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        writer.join()
        os.close(reader)


# --- What is fine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["full", "sizes"])
def test_an_intact_artifact_gives_its_manifest(built_artifact: Path, verify: Verify) -> None:
    assert verify_artifact(built_artifact, verify) == read_manifest(built_artifact)
    assert verify_artifact(str(built_artifact), verify) == read_manifest(built_artifact)


def test_an_artifact_may_be_reached_through_a_link(built_artifact: Path, tmp_path: Path) -> None:
    """As `current -> 2026-11-23`, which releases move."""
    (tmp_path / "current").symlink_to(built_artifact)
    assert verify_artifact(tmp_path / "current").artifact_id == read_manifest(built_artifact).artifact_id
    load_artifact(tmp_path / "current")


def test_an_artifact_may_be_named_relative_to_the_working_folder(
    built_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(built_artifact)
    assert verify_artifact(".") == verify_artifact(built_artifact)


def test_the_number_of_threads_makes_no_difference(built_artifact: Path) -> None:
    results = [verify_artifact(built_artifact, threads=threads) for threads in (None, 1, 2, 4, 64)]
    assert all(result == results[0] for result in results)


# --- Sizes only ------------------------------------------------------------------------------------------------------


def changed_rows(name: str, damage: str) -> bool:
    return name in MAPPED and damage.endswith("flipped") and not in_header(name, damage)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_sizes_notice_everything_but_rows_of_the_same_size(
    damaged: dict[tuple[str, str], Path], name: str, damage: str
) -> None:
    if changed_rows(name, damage):
        verify_artifact(damaged[name, damage], "sizes")
        return
    kind, text = expected_refusal(name, damage)
    with pytest.raises(ArtifactError, match=text) as caught:
        verify_artifact(damaged[name, damage], "sizes")
    assert caught.type is kind


@pytest.mark.parametrize("verify", ["none", "Full", "", None, True])
def test_another_kind_of_verification_is_refused(built_artifact: Path, verify: object) -> None:
    for check in (verify_artifact, load_artifact):
        with pytest.raises(ValueError, match=re.escape(f"verify must be 'full' or 'sizes', got {verify!r}")):
            check(built_artifact, verify=verify)  # type: ignore[operator]


# --- What a loader goes on from --------------------------------------------------------------------------------------


@pytest.fixture
def verified_bytes(artifact_copy: Path) -> Iterator[dict[str, bytes]]:
    with open_verified(artifact_copy, "full") as verified:
        shutil.rmtree(artifact_copy)
        yield verified.contents


def test_what_was_verified_is_handed_over_as_bytes_not_as_paths(
    verified_bytes: dict[str, bytes], built_artifact: Path
) -> None:
    assert verified_bytes == {
        name: (built_artifact / name).read_bytes() for name in FILES if name not in (MANIFEST, *MAPPED)
    }
