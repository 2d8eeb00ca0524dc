"""Publishing: whole or not at all, beside other builds, after killed ones, and on disks that fail."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.errors import PublishError
from export.publish import publish, staged, write_file

# Stages something for its argument, says where, and waits.
STAGE_AND_WAIT = """
import sys, time
from pathlib import Path
from export.publish import staged

with staged(Path(sys.argv[1])) as made:
    staging = made.folder
    (staging / "weights").mkdir()
    (staging / "weights" / "half").write_bytes(b"half")
    print(staging, flush=True)
    sys.stdin.read()
"""


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones too, with the bytes of files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def fill(staging: Path) -> None:
    write_file(staging / "weights" / "tables", b"rows")
    write_file(staging / "manifest.json", b"{}")


FILLED = {"weights": None, "weights/tables": b"rows", "manifest.json": b"{}"}


# Stages for its argument again and again, for a second.
STAGE_OFTEN = """
import sys, time
from pathlib import Path
from export.publish import staged

end = time.monotonic() + 1
while time.monotonic() < end:
    with staged(Path(sys.argv[1])) as made:
        staging = made.folder
        (staging / "half").write_bytes(b"half")
"""


class Build:
    """Another process that stages an artifact and waits."""

    def __init__(self, target: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", STAGE_AND_WAIT, str(target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        assert self._process.stdout is not None
        self.staging = Path(self._process.stdout.readline().strip())

    def kill(self) -> None:
        """SIGKILL: no clean-up runs."""
        self._process.kill()
        self._process.communicate()

    def end(self) -> int:
        """Lets it leave its staging folder without publishing."""
        self._process.communicate()
        return self._process.returncode


# --- Published -----------------------------------------------------------------------------------------------------


def test_what_was_staged_is_published_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with staged(target) as made:
        staging = made.folder
        assert staging.parent.parent == tmp_path
        assert staging.parent.name.startswith(".artifact.staging-")
        assert tree(staging) == {}
        fill(staging)
        assert not target.exists()
        publish(staging, target)
        assert tree(target) == FILLED
        assert not staging.exists()
    assert tree(tmp_path) == {"artifact": None, **{f"artifact/{path}": data for path, data in FILLED.items()}}


def test_the_artifact_may_be_read_by_everybody(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with staged(tmp_path / "artifact") as made:
            staging = made.folder
            fill(staging)
            publish(staging, tmp_path / "artifact")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE((tmp_path / "artifact" / path).stat().st_mode) for path in ("", *FILLED)}
    assert modes == {"": 0o755, "weights": 0o755, "weights/tables": 0o644, "manifest.json": 0o644}


def test_the_folders_above_the_artifact_are_made(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "artifact"
    with staged(target) as made:
        staging = made.folder
        fill(staging)
        publish(staging, target)
    assert tree(target) == FILLED


def test_a_failure_after_the_artifact_was_published_leaves_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "artifact"
    with pytest.raises(RuntimeError, match="later"), staged(target) as made:
        staging = made.folder
        fill(staging)
        publish(staging, target)
        raise RuntimeError("later")
    assert tree(target) == FILLED


def test_write_file_makes_folders_and_never_writes_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_file(path, b"first")
    with pytest.raises(FileExistsError):
        write_file(path, b"second")
    assert path.read_bytes() == b"first"


# --- Nothing published ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(143)], ids=["error", "^C", "TERM"]
)
def test_a_build_that_stops_leaves_nothing_and_its_error_is_its_own(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "new" / "deeper" / "artifact"
    with pytest.raises(type(error)) as caught, staged(target) as made:
        staging = made.folder
        fill(staging)
        raise error
    assert caught.value is error
    assert tree(tmp_path) == {}


def test_a_build_that_publishes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with staged(tmp_path / "new" / "artifact") as made:
        staging = made.folder
        fill(staging)
    assert tree(tmp_path) == {}


def test_folders_that_were_there_or_that_others_use_meanwhile_stay(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(RuntimeError), staged(tmp_path / "old" / "new" / "deeper" / "artifact"):
        write_file(tmp_path / "old" / "new" / "other", b"of somebody else")
        raise RuntimeError
    assert tree(tmp_path) == {"old": None, "old/new": None, "old/new/other": b"of somebody else"}


# --- The target exists ---------------------------------------------------------------------------------------------


def occupy(target: Path, kind: str) -> None:
    if kind == "file":
        target.write_bytes(b"precious")
    elif kind == "folder":
        write_file(target / "manifest.json", b"precious")
    elif kind == "empty folder":
        target.mkdir()
    elif kind == "symlink to a folder":
        (target.parent / "elsewhere").mkdir()
        target.symlink_to("elsewhere")
    else:
        target.symlink_to("nowhere")


KINDS = ["file", "folder", "empty folder", "symlink to a folder", "dangling symlink"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_existing_target_is_refused_before_anything_is_done(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "artifact"
    occupy(target, kind)
    before = tree(tmp_path)
    with pytest.raises(PublishError) as caught, staged(target):
        pytest.fail("the build ran")
    assert str(caught.value) == f"{target}: exists already; what is published is never changed, choose another name"
    assert tree(tmp_path) == before
    assert target.is_symlink() == ("symlink" in kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_appears_while_the_artifact_is_built_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "artifact"
    with pytest.raises(PublishError) as caught, staged(target) as made:
        staging = made.folder
        fill(staging)
        occupy(target, kind)
        hidden = staging.relative_to(tmp_path).parts[0]
        before = {path: data for path, data in tree(tmp_path).items() if not path.startswith(hidden)}
        publish(staging, target)
    assert str(caught.value) == f"{target}: exists already; what is published is never changed, choose another name"
    assert tree(tmp_path) == before
    assert target.is_symlink() == ("symlink" in kind)


# --- Other builds --------------------------------------------------------------------------------------------------


def test_the_next_build_removes_what_a_killed_one_left_and_spares_a_live_one(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    killed, live = Build(target), Build(target)
    killed.kill()
    assert (killed.staging / "weights" / "half").read_bytes() == b"half"
    with staged(target) as made:
        staging = made.folder
        assert not killed.staging.exists()
        assert (live.staging / "weights" / "half").read_bytes() == b"half"
        assert len({killed.staging, live.staging, staging}) == 3
        fill(staging)
        publish(staging, target)
    assert (live.staging / "weights" / "half").read_bytes() == b"half"
    assert live.end() == 0
    assert tree(tmp_path) == {"artifact": None, **{f"artifact/{path}": data for path, data in FILLED.items()}}


def test_the_empty_container_of_a_build_that_was_killed_before_it_had_its_lock_goes_too(tmp_path: Path) -> None:
    (tmp_path / ".artifact.staging-abcd_123").mkdir()
    with staged(tmp_path / "artifact"):
        pass
    assert tree(tmp_path) == {}


def test_a_removal_takes_the_lock_last_so_that_one_that_is_killed_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree, left = shutil.rmtree, []

    def remove(path: Path, **options: bool) -> None:
        left.append(sorted(entry.name for entry in Path(path).iterdir()))
        rmtree(path, **options)

    with staged(tmp_path / "artifact") as made:
        fill(made.folder)
        write_file(made.container / "journal", b"")
        monkeypatch.setattr(shutil, "rmtree", remove)
    assert left == [["manifest.json", "weights"], ["export.lock"]]
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["artifact[1]", "*", "a?c", "[!x]", "[", "two words", "-x", "ünï"])
def test_what_a_killed_build_left_is_found_under_any_name(tmp_path: Path, name: str) -> None:
    killed = Build(tmp_path / name)
    killed.kill()
    assert killed.staging.exists()
    with staged(tmp_path / name) as made:
        staging = made.folder
        assert not killed.staging.exists()
        assert os.listdir(tmp_path) == [staging.relative_to(tmp_path).parts[0]]


def test_what_only_looks_like_a_staging_folder_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    write_file(precious / "file", b"precious")
    write_file(tmp_path / ".artifact.staging-file", b"a file")
    (tmp_path / ".artifact.staging-link").symlink_to(precious)
    write_file(tmp_path / ".other.staging-x" / "half", b"of another artifact")
    write_file(tmp_path / "artifact.staging-x" / "file", b"not hidden")
    write_file(tmp_path / ".artifact.staging-notes" / "file", b"without the lock that every staging has")
    before = tree(tmp_path)
    with staged(tmp_path / "artifact"):
        pass
    assert tree(tmp_path) == before
    assert (tmp_path / ".artifact.staging-link").is_symlink()


def test_two_builds_of_one_target_do_not_meet_until_the_second_publishes(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with pytest.raises(PublishError, match="exists already"), staged(target) as slow:
        fill(slow.folder)
        with staged(target) as fast:
            write_file(fast.folder / "manifest.json", b"the first to publish")
            publish(fast.folder, target)
        assert tree(slow.folder) == FILLED
        publish(slow.folder, target)
    assert tree(tmp_path) == {"artifact": None, "artifact/manifest.json": b"the first to publish"}


def test_builds_that_begin_at_the_same_moment_do_not_take_each_other_for_abandoned(tmp_path: Path) -> None:
    builds = [
        subprocess.Popen(
            [sys.executable, "-c", STAGE_OFTEN, str(tmp_path / "artifact")],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        for _ in range(3)
    ]
    errors = [build.communicate()[1] for build in builds]
    assert errors == ["", "", ""]
    assert tree(tmp_path) == {}


# --- Disks that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, number: int) -> None:
    with pytest.raises(PublishError) as caught, staged(tmp_path / "new" / "artifact"):
        raise OSError(number, os.strerror(number))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'new'}: the disk is full (")
    assert message.endswith(" bytes free); free some space and try again")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO, errno.EMFILE])
def test_any_other_failure_of_the_system_names_the_file_and_the_reason(tmp_path: Path, number: int) -> None:
    with pytest.raises(PublishError) as caught, staged(tmp_path / "artifact") as made:
        staging = made.folder
        path = staging / "weights"
        raise OSError(number, os.strerror(number), str(path))
    assert str(caught.value) == f"{path}: cannot be written: {os.strerror(number)}"
    assert isinstance(caught.value.__cause__, OSError)
    assert tree(tmp_path) == {}


def test_a_failure_without_a_file_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(PublishError) as caught, staged(tmp_path / "artifact"):
        raise OSError("something odd")
    assert str(caught.value) == f"{tmp_path}: cannot be written: something odd"


def test_a_target_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    for target in (tmp_path / "file" / "artifact", tmp_path / "file" / "deeper" / "artifact"):
        with pytest.raises(PublishError) as caught, staged(target):
            pytest.fail("the build ran")
        assert str(caught.value).startswith(f"{tmp_path / 'file'}")
        assert "cannot be written: " in str(caught.value)
    assert tree(tmp_path) == {"file": b"precious"}


@pytest.mark.parametrize(
    "path", [["x" * 300], ["x" * 250], ["new", "x" * 300, "artifact"]], ids=["name", "long", "parent"]
)
def test_a_name_that_the_file_system_does_not_take_is_refused_and_leaves_nothing(
    tmp_path: Path, path: list[str]
) -> None:
    with pytest.raises(PublishError, match="File name too long"), staged(tmp_path.joinpath(*path)):
        pytest.fail("the build ran")
    assert tree(tmp_path) == {}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command to make a full disk with")
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a full disk needs the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_during_the_build_leaves_nothing_on_it(tiny_disk: Path) -> None:
    with pytest.raises(PublishError) as caught, staged(tiny_disk / "new" / "artifact") as made:
        staging = made.folder
        for number in range(100):
            write_file(staging / str(number), bytes(4096))
    assert str(caught.value).endswith("the disk is full (0 bytes free); free some space and try again")
    assert tree(tiny_disk) == {}


def test_a_read_only_disk_is_refused(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(PublishError) as caught, staged(tiny_disk / "artifact"):
        pytest.fail("the build ran")
    assert str(caught.value).startswith(f"{tiny_disk}")
    assert str(caught.value).endswith("cannot be written: Read-only file system")


def test_the_target_of_another_file_system_is_staged_there(tmp_path: Path, tiny_disk: Path) -> None:
    target = tiny_disk / "artifact"
    with staged(target) as made:
        staging = made.folder
        assert staging.stat().st_dev == tiny_disk.stat().st_dev != tmp_path.stat().st_dev
        fill(staging)
        publish(staging, target)
    assert tree(target) == FILLED


def test_the_lock_is_released_and_no_file_stays_open(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with staged(tmp_path / "artifact") as made:
        staging = made.folder
        fill(staging)
        publish(staging, tmp_path / "artifact")
    with pytest.raises(RuntimeError), staged(tmp_path / "other"):
        raise RuntimeError
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("published", [False, True])
def test_what_may_be_gone_on_with_stays_unless_it_is_published(tmp_path: Path, published: bool) -> None:
    target = tmp_path / "artifact"
    with pytest.raises(RuntimeError) as ended, staged(target, adopt=lambda _: True) as made:
        fill(made.folder)
        if published:
            publish(made.folder, target)
        raise RuntimeError("later")
    assert os.path.exists(made.container) != published
    assert hasattr(ended.value, "__notes__") != published
    if not published:
        with staged(target, adopt=lambda _: True) as again:
            assert again == made
            assert tree(again.folder) == FILLED


@pytest.mark.parametrize("name", ["export.lock", "scratch-1", "journal-0.jsonl", "aside-0", "artifact"])
def test_a_target_may_have_the_name_of_what_lies_beside_its_staging_folder(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    with staged(target) as made:
        assert made.folder.name == "artifact"
        fill(made.folder)
        publish(made.folder, target)
    assert tree(target) == FILLED


def test_a_signal_that_arrives_during_the_clean_up_does_not_cut_it_short(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt("stopped")

    def remove(path: str, **options: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        rmtree(path, **options)

    rmtree = shutil.rmtree
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(KeyboardInterrupt, match="stopped"),
            staged(tmp_path / "artifact") as made,
        ):
            fill(made.folder)
            patch.setattr(shutil, "rmtree", remove)
            raise RuntimeError("the failure of another process")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert tree(tmp_path) == {}


def test_a_container_that_is_in_use_is_not_taken_over(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with pytest.raises(RuntimeError), staged(target, adopt=lambda _: True) as first:
        with staged(target, adopt=lambda _: True) as second:
            assert second.container != first.container
        raise RuntimeError("later")
    assert first.container.exists()
