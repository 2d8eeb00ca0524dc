"""Publishing to a root, and rolling back: whole or not at all, one at a time, and nothing deleted that is needed."""

import dataclasses
import errno
import fcntl
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support import TABLES, make_rows, run_export, state_dict, write_config

from export import build_artifact, versions
from export.errors import PublishError
from export.versions import publish_version, roll_back
from runtime_py import (
    ArtifactError,
    DigestMismatchError,
    MissingFileError,
    PointerError,
    load_artifact,
    verify_artifact,
)
from runtime_py.digests import sha256
from runtime_py.manifest_reader import read_manifest
from runtime_py.pointer import hold_version, read_pointer


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, built_artifact: Path) -> list[Path]:
    """Four of one signature with other rows; the first is `built_artifact`."""
    folder = tmp_path_factory.mktemp("artifacts")
    made = [built_artifact]
    for seed in (1, 2, 3):
        torch.save(state_dict(make_rows(TABLES, seed)), folder / f"{seed}.pt")
        config = write_config(folder / f"{seed}.yaml", folder / f"{seed}.pt", parity={"batches": 1})
        made.append(build_artifact(config, folder / str(seed), workers=1).artifact)
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def ids(artifacts: list[Path]) -> list[str]:
    return [read_manifest(artifact).artifact_id for artifact in artifacts]


def current(root: Path) -> str:
    return read_pointer(root / "current.json").version


def listed(root: Path) -> set[str]:
    return set(os.listdir(root / "versions"))


def stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# --- Publishing ------------------------------------------------------------------------------------------------------


def test_what_is_published_is_a_whole_copy_that_the_pointer_names(artifacts, root):
    move = publish_version(artifacts[0], root)
    (artifact_id, *_) = ids(artifacts)
    assert (move.version, move.artifact_id, move.sequence, move.moved, move.copied) == (
        artifact_id,
        artifact_id,
        1,
        True,
        True,
    )
    assert sorted(os.listdir(root)) == [".lock", "current.json", "versions"]
    assert listed(root) == {artifact_id}
    assert verify_artifact(root / "versions" / artifact_id) == read_manifest(artifacts[0])
    pointer = read_pointer(root / "current.json")
    assert (pointer.version, pointer.history) == (artifact_id, [])
    assert pointer.manifest_digest == read_manifest(artifacts[0]).manifest_digest
    assert (root / "current.json").stat().st_mode & 0o777 == 0o666 & ~_umask(), "servers of other users read it"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_version_shares_no_file_with_the_artifact_that_somebody_may_still_write_to(artifact_copy, root):
    move = publish_version(artifact_copy, root)
    for file in artifact_copy.rglob("*"):
        if file.is_file():
            flip(file)
    verify_artifact(root / "versions" / move.version)


def test_graphs_that_are_the_same_in_two_versions_are_one_file(artifacts, root):
    first, second = (publish_version(artifact, root).version for artifact in artifacts[:2])
    files = [root / "versions" / version / "graphs/lookup.torchscript.pt" for version in (first, second)]
    assert files[0].samefile(files[1])
    weights = [root / "versions" / version / "weights/tables.safetensors" for version in (first, second)]
    assert not weights[0].samefile(weights[1])


def test_a_damaged_graph_is_not_shared_with_the_next_version(artifacts, root):
    first = publish_version(artifacts[0], root).version
    flip(root / "versions" / first / "graphs/lookup.torchscript.pt", 1000)
    verify_artifact(root / "versions" / publish_version(artifacts[1], root).version)


def test_where_there_are_no_links_and_no_range_copies_bytes_are_copied(artifacts, root, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    for artifact in artifacts[:2]:
        verify_artifact(root / "versions" / publish_version(artifact, root).version)


def test_publishing_what_is_current_changes_nothing(artifacts, root):
    publish_version(artifacts[0], root)
    before = stamp(root / "current.json")
    again = publish_version(artifacts[0], root)
    assert (again.moved, again.copied, again.sequence) == (False, False, 1)
    assert stamp(root / "current.json") == before


def test_publishing_an_earlier_version_only_moves_the_pointer(artifacts, root):
    a, b = (publish_version(artifact, root).version for artifact in artifacts[:2])
    inode = (root / "versions" / a).stat().st_ino
    again = publish_version(artifacts[0], root)
    assert (again.version, again.moved, again.copied, again.history) == (a, True, False, [b])
    assert (root / "versions" / a).stat().st_ino == inode


def with_another_graph_file(artifact: Path) -> Path:
    """The artifact, changed to one of the same id whose graph file is another."""
    manifest = read_manifest(artifact)
    graph = manifest.graphs[0].path
    with (artifact / graph).open("ab") as file:
        file.write(b"\0")
    data = (artifact / graph).read_bytes()
    files = [
        dataclasses.replace(file, bytes=len(data), digest=sha256(data)) if file.path == graph else file
        for file in manifest.files
    ]
    (artifact / "manifest.json").write_bytes(dataclasses.replace(manifest, files=files).to_bytes())
    return artifact


def test_what_servers_would_refuse_is_not_made_current(artifacts, root, rebuild):
    """A pointer that nobody follows, and a server that takes it when it starts again: two signatures at once."""
    before = publish_version(artifacts[0], root)
    renamed = rebuild([TABLES[0] | {"feature_names": ["visitor"]}, *TABLES[1:]], make_rows(TABLES))
    text = f"servers that follow it would refuse this artifact, as their callers count on version {before.version}: features"
    with pytest.raises(
        PublishError, match=f"^{root}: {text} are visitor, .*; publish it to another root, or give --allow-"
    ):
        publish_version(renamed, root)
    done = run_export("publish", renamed, "--to", root)
    assert done.returncode == 1
    assert text in done.stderr
    assert (current(root), listed(root)) == (before.version, {before.version})
    done = run_export("publish", renamed, "--to", root, "--allow-signature-change")
    assert done.returncode == 0, done.stderr
    assert current(root) == read_manifest(renamed).artifact_id


def test_a_rollback_that_servers_would_refuse_says_so(artifacts, root, rebuild):
    """A table has grown since: the version before has fewer rows than callers may ask for."""
    before = publish_version(artifacts[0], root).version
    tables = [TABLES[0] | {"num_embeddings": 400}, *TABLES[1:]]
    grown = publish_version(rebuild(tables, make_rows(tables)), root).version
    done = run_export("rollback", "--to", root)
    assert done.returncode == 1
    assert "table 'user' has 300 rows, 400 as served" in done.stderr
    assert current(root) == grown
    done = run_export("rollback", "--to", root, "--allow-signature-change")
    assert (done.returncode, current(root)) == (0, before), done.stderr


def test_a_pointer_that_moves_while_a_version_is_copied_is_compared_again(artifacts, root, rebuild, monkeypatch):
    publish_version(artifacts[0], root)
    renamed = rebuild([TABLES[0] | {"feature_names": ["visitor"]}, *TABLES[1:]], make_rows(TABLES))
    copy = versions._copy_artifact

    def copy_slowly(*arguments):
        monkeypatch.undo()
        copy(*arguments)
        publish_version(renamed, root, allow_signature_change=True)

    monkeypatch.setattr(versions, "_copy_artifact", copy_slowly)
    with pytest.raises(PublishError, match=r"features are user, .*; visitor, "):
        publish_version(artifacts[1], root)
    assert current(root) == read_manifest(renamed).artifact_id
    assert listed(root) == {ids(artifacts)[0], current(root)}


@pytest.mark.parametrize("inside", ["", "versions-here", "graphs/a/b"])
def test_a_root_inside_an_artifact_is_refused(artifact_copy, inside):
    before = sorted(artifact_copy.rglob("*"))
    text = f"--to: {artifact_copy / inside} is inside the artifact {artifact_copy}, which never changes; name another place"
    with pytest.raises(PublishError, match=f"^{re.escape(text)}$"):
        publish_version(artifact_copy, artifact_copy / inside)
    assert sorted(artifact_copy.rglob("*")) == before


def test_the_same_rows_with_other_graph_files_are_a_version_of_their_own(artifacts, artifact_copy, root):
    """A lookup that was mended and built anew must not be mistaken for the one before, which has its id."""
    first = publish_version(artifacts[0], root).version
    second = publish_version(with_another_graph_file(artifact_copy), root)
    digest = read_manifest(artifact_copy).manifest_digest.value
    assert second.version == f"{first}-{digest[:12]}"
    assert (second.artifact_id, second.copied, current(root)) == (first, True, second.version)
    assert roll_back(root).version == first
    assert publish_version(artifact_copy, root).copied is False


@pytest.mark.parametrize("same", [False, True])
def test_a_publisher_of_the_same_id_that_was_faster_does_not_take_the_place_of_other_files(
    same, artifacts, artifact_copy, root, monkeypatch
):
    mine = artifact_copy if same else with_another_graph_file(artifact_copy)
    copy = versions._copy_artifact

    def copy_slowly(*arguments):
        monkeypatch.undo()
        copy(*arguments)
        publish_version(artifacts[0], root)

    monkeypatch.setattr(versions, "_copy_artifact", copy_slowly)
    move = publish_version(mine, root)
    assert (move.copied, move.moved) == (not same, not same)
    assert read_pointer(root / "current.json").manifest_digest == read_manifest(mine).manifest_digest
    assert len(listed(root)) == (1 if same else 2)
    assert verify_artifact(root / "versions" / move.version) == read_manifest(mine)


def test_a_version_that_was_replaced_by_other_files_before_it_was_held_is_not_made_current(
    artifacts, artifact_copy, root, monkeypatch
):
    a = publish_version(artifacts[0], root).version
    b = publish_version(artifacts[1], root).version
    other = with_another_graph_file(artifact_copy)

    class HoldTooLate(versions._Hold):
        def __init__(self, version: Path) -> None:
            shutil.rmtree(version)
            shutil.copytree(other, version)
            super().__init__(version)

    with monkeypatch.context() as context:
        context.setattr(versions, "_Hold", HoldTooLate)
        with pytest.raises(PublishError, match=f"{a}: was replaced meanwhile; publish again"):
            publish_version(artifacts[0], root)
    assert current(root) == b
    digest = read_manifest(artifacts[0]).manifest_digest.value
    assert publish_version(artifacts[0], root).version == f"{a}-{digest[:12]}"


def test_the_same_rows_built_again_are_the_version_that_is_there(artifacts, root, tmp_path, dcp_snapshot):
    first = publish_version(artifacts[0], root)
    again = build_artifact(write_config(tmp_path / "r.yaml", dcp_snapshot), tmp_path / "again", workers=1).artifact
    assert read_manifest(again).manifest_digest != read_manifest(artifacts[0]).manifest_digest
    assert publish_version(again, root).version == first.version
    assert listed(root) == {first.version}


@pytest.mark.parametrize("path", ["weights/tables.safetensors", "graphs/lookup.torchscript.pt", "manifest.json"])
def test_a_damaged_artifact_is_refused_by_its_own_name_and_leaves_nothing(path, artifacts, artifact_copy, root):
    publish_version(artifacts[1], root)
    flip(artifact_copy / path, -200)
    with pytest.raises(ArtifactError, match=str(artifact_copy)):
        publish_version(artifact_copy, root)
    assert listed(root) == {ids(artifacts)[1]}
    assert current(root) == ids(artifacts)[1]


def test_a_copy_that_went_wrong_is_noticed(artifacts, root, monkeypatch):
    copy = versions._copy_file

    def miscopy(source: Path, target: Path) -> None:
        copy(source, target)
        if target.name == "tables.safetensors":
            flip(target)

    monkeypatch.setattr(versions, "_copy_file", miscopy)
    with pytest.raises(DigestMismatchError, match=r"staging-.*not those that were published"):
        publish_version(artifacts[0], root / "below")
    assert not root.exists()
    (root / "versions").mkdir(parents=True)  # what was there before stays
    with pytest.raises(DigestMismatchError, match=r"staging-.*not those that were published"):
        publish_version(artifacts[0], root)
    assert [path.name for path in root.rglob("*")] == ["versions"]


def test_a_version_that_was_damaged_since_is_not_made_current_again(artifacts, root):
    a, b = (publish_version(artifact, root).version for artifact in artifacts[:2])
    flip(root / "versions" / a / "weights/tables.safetensors")
    with pytest.raises(PublishError, match="it was published before, and has been damaged since: delete "):
        publish_version(artifacts[0], root)
    with pytest.raises(DigestMismatchError, match="not those that were published"):
        roll_back(root)
    assert current(root) == b


def test_a_full_disk_is_said_and_leaves_nothing(artifacts, root, monkeypatch):
    publish_version(artifacts[0], root)
    before = (root / "current.json").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(versions, "_copy_file", full)
    with pytest.raises(PublishError, match="the disk is full"):
        publish_version(artifacts[1], root)
    assert (root / "current.json").read_bytes() == before
    assert listed(root) == {ids(artifacts)[0]}


def test_a_version_whose_manifest_was_damaged_since_is_named(artifacts, root):
    a = publish_version(artifacts[0], root).version
    publish_version(artifacts[1], root)
    flip(root / "versions" / a / "manifest.json", 500)
    with pytest.raises(PublishError, match="it was published before, and has been damaged since: delete "):
        publish_version(artifacts[0], root)
    shutil.rmtree(root / "versions" / a)
    assert publish_version(artifacts[0], root).copied


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"garbage"), "is damaged: not UTF-8 JSON"),
        (lambda path: flip(path, 90), "is damaged: its digest is "),
    ],
)
def test_a_damaged_pointer_is_left_for_somebody_to_look_at(damage, message, artifacts, root):
    a = publish_version(artifacts[0], root).version
    damage(root / "current.json")
    for act in (lambda: publish_version(artifacts[1], root), lambda: roll_back(root), lambda: roll_back(root, a)):
        with pytest.raises(PointerError, match=f"{message}.*; restore it, or remove it and publish again"):
            act()
    (root / "current.json").unlink()
    assert publish_version(artifacts[1], root).sequence == 1


# --- Rolling back ----------------------------------------------------------------------------------------------------


def test_rolling_back_goes_back_one_version_at_a_time(artifacts, root):
    a, b, c = (publish_version(artifact, root).version for artifact in artifacts[:3])
    assert [roll_back(root).version, roll_back(root).version] == [b, a]
    with pytest.raises(PublishError, match=f"nothing was current before {a}; name one of: "):
        roll_back(root)
    assert read_pointer(root / "current.json").sequence == 5
    forward = roll_back(root, c[:9])
    assert (forward.version, forward.history) == (c, [a])


def test_rolling_back_to_a_named_version_skips_those_between(artifacts, root):
    a, b, c, d = (publish_version(artifact, root).version for artifact in artifacts)
    assert roll_back(root, b).history == [a]
    assert roll_back(root, b).moved is False
    assert {c, d} < listed(root)


def test_a_version_that_is_published_during_a_rollback_is_not_taken_back(artifacts, root, monkeypatch):
    a, b = (publish_version(artifact, root).version for artifact in artifacts[:2])
    verify = versions.verify_artifact
    others = [artifacts[2], artifacts[3]]

    def verify_slowly(version):
        monkeypatch.undo()
        publish_version(others.pop(0), root)
        return verify(version)

    monkeypatch.setattr(versions, "verify_artifact", verify_slowly)
    with pytest.raises(PublishError, match=r"current\.json: was moved meanwhile; look what is current, and run again"):
        roll_back(root)
    pointer = read_pointer(root / "current.json")
    assert (pointer.version, pointer.history) == (ids(artifacts)[2], [b, a])
    monkeypatch.setattr(versions, "verify_artifact", verify_slowly)
    assert roll_back(root, a).version == a, "who names one means it, whatever is current"
    assert others == []


@pytest.mark.parametrize(
    ("name", "message"), [("zz", "no version starts with 'zz'"), ("", "no version starts with ''")]
)
def test_a_version_that_is_not_there_is_refused_with_those_that_are(name, message, artifacts, root):
    a = publish_version(artifacts[0], root).version
    with pytest.raises(PublishError, match=f"{message}; there are: {a}"):
        roll_back(root, name)


def test_a_start_that_several_versions_share_is_refused(artifacts, root):
    a = publish_version(artifacts[0], root).version
    shutil.copytree(root / "versions" / a, root / "versions" / f"{a}-{'0' * 12}")
    with pytest.raises(PublishError, match="several versions start with"):
        roll_back(root, a[:10])
    assert roll_back(root, a).version == a, "the whole name is its own start"


def test_a_folder_that_is_no_root_is_said(tmp_path):
    with pytest.raises(PublishError, match="give the folder that 'export publish' has written to"):
        roll_back(tmp_path / "nothing")


# --- Deleting --------------------------------------------------------------------------------------------------------


def test_keep_deletes_the_oldest_but_neither_the_current_nor_the_one_before(artifacts, root):
    a, b, c = (publish_version(artifact, root).version for artifact in artifacts[:3])
    last = publish_version(artifacts[3], root, keep=3)
    assert (last.deleted, last.in_use) == ([a], [])
    assert listed(root) == {b, c, last.version}
    again = publish_version(artifacts[3], root, keep=1)  # less than two it never keeps
    assert again.deleted == [b]
    assert roll_back(root).version == c


def test_a_version_that_was_rolled_back_goes_before_those_that_served_before_it(artifacts, root):
    a, b, c = (publish_version(artifact, root).version for artifact in artifacts[:3])
    roll_back(root)
    d = publish_version(artifacts[3], root, keep=3)
    assert d.deleted == [c]
    assert listed(root) == {a, b, d.version}


def test_a_version_that_a_server_holds_is_spared_until_it_lets_go(artifacts, root):
    a, b = (publish_version(artifact, root).version for artifact in artifacts[:2])
    held = hold_version(root / "versions" / a)
    move = publish_version(artifacts[2], root, keep=2)
    assert (move.deleted, move.in_use) == ([], [a])
    os.close(held)
    assert publish_version(artifacts[2], root, keep=2).deleted == [a]
    assert listed(root) == {b, move.version}
    with pytest.raises(MissingFileError, match="no such version"):
        hold_version(root / "versions" / a)


@pytest.mark.parametrize("call", ["open", "flock", "rename"])
def test_a_version_that_cannot_be_deleted_is_kept_with_the_reason_and_what_is_published_is(
    call, artifacts, root, monkeypatch
):
    a, b = (publish_version(artifact, root).version for artifact in artifacts[:2])
    (root / "versions" / ("0" * 64)).write_bytes(b"no folder")
    happen = {"open": os.open, "flock": fcntl.flock, "rename": Path.rename}[call]

    def refuse(target, *arguments, **options):
        path = os.readlink(f"/proc/self/fd/{target}") if call == "flock" else str(target)
        if f"versions/{a}" in path and (call != "open" or arguments[0] & os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return happen(target, *arguments, **options)

    place = {"open": os, "flock": fcntl, "rename": Path}[call]
    with monkeypatch.context() as context:
        context.setattr(place, call, refuse)
        move = publish_version(artifacts[2], root, keep=2)
    assert move.kept == {"0" * 64: "Not a directory", a: "Read-only file system"}
    assert (move.moved, move.deleted, move.in_use) == (True, [], [])
    assert current(root) == move.version
    done = run_export("publish", artifacts[2], "--to", root, "--keep", "2")
    lines = [f"deleted    {a}", f"kept       {'0' * 64}: cannot be deleted: Not a directory"]
    assert (done.returncode, done.stdout.splitlines()[2:], done.stderr) == (0, lines, "")
    assert listed(root) == {"0" * 64, b, move.version}


@pytest.mark.parametrize("anew", [False, True])
def test_what_is_held_is_the_version_that_is_there_not_one_that_was_deleted_meanwhile(
    anew, artifacts, root, monkeypatch
):
    version = root / "versions" / publish_version(artifacts[0], root).version
    lock = fcntl.flock

    def delete_first(fd, operation):
        monkeypatch.undo()
        shutil.move(version, root / "deleted")
        if anew:
            shutil.copytree(root / "deleted", version)
        lock(fd, operation)

    files = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", delete_first)
    if anew:
        held = hold_version(version)
        assert os.path.samestat(os.fstat(held), (version / "manifest.json").stat())
        os.close(held)
    else:
        with pytest.raises(MissingFileError, match=r"no such version: manifest\.json: No such file or directory"):
            hold_version(version)
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_loaded_artifact_answers_after_its_files_are_gone(artifacts, root):
    a = publish_version(artifacts[0], root).version
    loaded = load_artifact(root / "versions" / a, invalid_ids="zero")
    request = {feature.name: [[0], [1]] for feature in loaded.manifest.features}
    before = loaded(request).values
    loaded.release_pages()
    shutil.rmtree(root / "versions" / a)
    assert torch.equal(loaded(request).values, before)


# --- Several publishers, and killed ones -----------------------------------------------------------------------------


def test_publishers_at_the_same_time_lose_no_move(artifacts, root):
    errors: list[Exception] = []

    def run(seed: int) -> None:
        chooser = random.Random(seed)
        try:
            for _ in range(6):
                publish_version(artifacts[chooser.randrange(4)], root, keep=chooser.choice([None, 2, 4]))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    pointer = read_pointer(root / "current.json")
    for version in (pointer.version, *pointer.history[:1]):
        verify_artifact(root / "versions" / version)
    assert {name for name in listed(root) if name.startswith(".")} == set()


def test_a_version_that_others_delete_before_it_is_held_is_published_again(artifacts, root, monkeypatch):
    a = publish_version(artifacts[0], root).version
    publish_version(artifacts[1], root)
    times = []

    class HoldOfWhatIsGone(versions._Hold):
        def __init__(self, version: Path) -> None:
            if version.name == a:
                times.append(version)
                shutil.rmtree(version)
            super().__init__(version)

    monkeypatch.setattr(versions, "_Hold", HoldOfWhatIsGone)
    move = publish_version(artifacts[0], root)
    assert (move.version, move.copied, len(times)) == (a, True, 1)
    verify_artifact(root / "versions" / a)


# Forks a publisher that never stops, and kills it, for every number of seconds that comes.
KILL_PUBLISHERS = """
import itertools, os, signal, sys, time
from pathlib import Path
from export.versions import publish_version

root, *artifacts = map(Path, sys.argv[1:])
for line in sys.stdin:
    child = os.fork()
    if not child:
        for artifact in itertools.cycle(artifacts):
            publish_version(artifact, root, keep=2)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_publisher_that_is_killed_leaves_a_pointer_to_a_whole_version(artifacts, root):
    chooser, sequences = random.Random(5), []
    begin = time.perf_counter()
    for artifact in artifacts[:2]:
        publish_version(artifact, root)
    most = 1.5 * (
        time.perf_counter() - begin
    )  # so that some publish one or two versions first, however busy the machine
    with subprocess.Popen(
        [sys.executable, "-c", KILL_PUBLISHERS, root, *artifacts[:3]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as killer:
        for _ in range(20):
            print(chooser.uniform(0, most), file=killer.stdin, flush=True)
            assert killer.stdout.readline() == "9\n", "killed by SIGKILL, not gone by itself"
            pointer = read_pointer(root / "current.json")
            sequences.append(pointer.sequence)
            whole = {name for name in listed(root) if not name.startswith(".")}
            for version in whole:
                verify_artifact(root / "versions" / version)
            assert {pointer.version, *pointer.history[:1]} <= whole
        killer.stdin.close()
    assert len(set(sequences)) > 2, "some were killed after they had published"
    publish_version(artifacts[3], root, keep=2)
    assert {name for name in (*listed(root), *os.listdir(root)) if name.startswith(".")} == {".lock"}
    assert len([name for name in listed(root) if not name.startswith(".")]) == 2


# --- The command line ------------------------------------------------------------------------------------------------


def test_the_commands_say_what_is_current(artifacts, root):
    a, b = ids(artifacts)[:2]
    done = run_export("publish", artifacts[0], "--to", root)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"current    {a}\n", "")
    document = json.loads(run_export("publish", artifacts[1], "--to", root, "--keep", "2", "--json").stdout)
    expected = {"root": str(root), "version": b, "artifact_id": b, "sequence": 2, "moved": True, "copied": True}
    assert document == expected | {"history": [a], "deleted": [], "in_use": [], "kept": {}}
    assert run_export("rollback", "--to", root).stdout == f"current    {a}\n"
    done = run_export("rollback", "--to", root, b[:12])
    assert done.stdout == f"current    {b}\nbefore     {a}\n"


def test_a_refusal_is_one_line_and_an_exit_code(artifacts, root, tmp_path):
    done = run_export("publish", tmp_path, "--to", root)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert not root.exists()
    assert run_export("publish", artifacts[0], "--to", root, "--keep", "1").returncode == 2
    assert run_export("rollback", "--to", root).returncode == 1
