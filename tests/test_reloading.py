"""An artifact that follows its pointer: what swaps, what is refused, what goes on meanwhile, what is left of the old one."""

import dataclasses
import errno
import gc
import itertools
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import FEATURES, TABLES, make_rows, run_export, state_dict, with_vocabularies, write_config

from export import build_artifact
from export.versions import publish_version, roll_back
from runtime_py import (
    ArtifactError,
    DigestMismatchError,
    GoldenCaseError,
    IncompatibleError,
    InvalidInputError,
    MissingFileError,
    PointerError,
    ReloadingArtifact,
    UnsupportedError,
    load_artifact,
    reloading,
)
from runtime_py.compatibility import check_compatible
from runtime_py.digests import sha256
from runtime_py.golden import GOLDEN
from runtime_py.manifest import Output
from runtime_py.manifest_reader import read_manifest
from runtime_py.pointer import Pointer, read_pointer

REQUEST = {feature: [[0], []] for feature in FEATURES}
WAIT_S = 60.0


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds an artifact of tables, and rows drawn from a seed; the same one only once."""
    folder, built = tmp_path_factory.mktemp("artifacts"), {}

    def run(name: str, tables: list[dict] = TABLES, seed: int = 1) -> Path:
        if name not in built:
            torch.save(state_dict(make_rows(tables, seed)), folder / f"{name}.pt")
            config = write_config(folder / f"{name}.yaml", folder / f"{name}.pt", tables, parity={"batches": 1})
            built[name] = build_artifact(config, folder / name, workers=1).artifact
        return built[name]

    return run


@pytest.fixture
def first(built_artifact: Path) -> Path:
    return built_artifact


@pytest.fixture
def second(build: Callable[..., Path]) -> Path:
    return build("second")


@pytest.fixture
def root(tmp_path: Path, first: Path) -> Path:
    """A root whose current version is `first`."""
    publish_version(first, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def serving(root: Path) -> Iterator[ReloadingArtifact]:
    """Follows the root when it is told to."""
    with ReloadingArtifact(root / "current.json", interval_s=None) as artifact:
        yield artifact


def artifact_id(artifact: Path) -> str:
    return read_manifest(artifact).artifact_id


def current_folder(root: Path) -> Path:
    return root / "versions" / read_pointer(root / "current.json").version


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def point(root: Path, **changes: object) -> None:
    """Replaces the pointer by one that is whole, and says something else."""
    pointer: Pointer = dataclasses.replace(read_pointer(root / "current.json"), **changes)
    (root / "new.json").write_bytes(pointer.to_bytes())
    (root / "new.json").replace(root / "current.json")


def mapped(name: str) -> int:
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


def wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- Swaps -----------------------------------------------------------------------------------------------------------


def test_it_serves_the_current_version_and_follows_the_pointer(serving, root, first, second):
    before, status = serving(REQUEST), serving.status()
    assert before.artifact_id == artifact_id(first) == status.artifact_id == status.version
    assert (status.sequence, status.swaps, status.refusals, status.refusal) == (1, 0, 0, None)
    assert serving.refresh() is False
    publish_version(second, root)
    assert serving.refresh() is True
    after = serving(REQUEST)
    assert after.artifact_id == artifact_id(second)
    assert torch.equal(after.values, load_artifact(second)(REQUEST).values)
    assert not torch.equal(after.values, before.values)
    assert (serving.status().sequence, serving.status().swaps) == (2, 1)
    assert serving.status().serving_since > status.serving_since
    roll_back(root)
    assert serving.refresh() is True
    assert torch.equal(serving(REQUEST).values, before.values)


def test_raw_lookups_and_vocabularies_are_of_one_version_when_current_is_taken_once(root, serving, second):
    current = serving.current
    publish_version(second, root)
    serving.refresh()
    values, lengths = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int32)
    assert torch.equal(serving.lookup(values, lengths), serving.current.lookup(values, lengths))
    assert not torch.equal(serving.lookup(values, lengths), current.lookup(values, lengths))
    assert current.manifest.artifact_id != serving.current.manifest.artifact_id


def test_a_thread_follows_the_pointer_and_says_so(root, second, caplog):
    caplog.set_level(logging.INFO, "runtime_py.reloading")
    with ReloadingArtifact(root / "current.json", interval_s=0.01) as serving:
        assert serving.status().watching
        publish_version(second, root)
        wait(lambda: serving(REQUEST).artifact_id == artifact_id(second))
    assert not serving.status().watching
    assert serving(REQUEST).artifact_id == artifact_id(second), "what serves goes on after the end"
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.messages[1].endswith(f": serving version {artifact_id(second)}, pointer 2")


def test_requests_that_are_in_flight_end_on_the_version_that_they_began_with(root, serving, first, second, monkeypatch):
    monkeypatch.setattr(reloading, "_DRAIN_S", 30.0)
    begun, go, answers = threading.Event(), threading.Event(), []
    lookups = serving.current._lookups
    graphs = [lookups._lookup_checked]

    def slow(*inputs):
        begun.set()
        go.wait(WAIT_S)
        return graphs.pop()(*inputs)  # and holds it no longer

    lookups._lookup_checked = slow
    del lookups
    request = threading.Thread(target=lambda: answers.append(serving(REQUEST)))
    request.start()
    begun.wait(WAIT_S)
    publish_version(second, root)
    refresh = threading.Thread(target=serving.refresh)
    refresh.start()
    wait(lambda: serving.status().swaps == 1)
    assert serving(REQUEST).artifact_id == artifact_id(second)
    assert refresh.is_alive(), "waits, to unmap what no request should have to"
    assert mapped(f"{artifact_id(first)}/weights") == 1
    go.set()
    request.join()
    refresh.join()
    assert mapped(f"{artifact_id(first)}/weights") == 0
    assert answers[0].artifact_id == artifact_id(first)
    assert torch.equal(answers[0].values, load_artifact(first)(REQUEST).values)


def test_the_old_version_is_unmapped_and_let_go_at_once(root, serving, first, second):
    gc.collect()
    gc.disable()
    try:
        files = len(os.listdir("/proc/self/fd"))
        for artifact in (second, first, second, first, second):
            publish_version(artifact, root)
            serving.refresh()
            assert mapped(f"{root}/versions/{artifact_id(second)}/weights") == (artifact is second)
            assert mapped(f"{root}/versions/{artifact_id(first)}/weights") == (artifact is first)
            assert len(os.listdir("/proc/self/fd")) == files
    finally:
        gc.enable()


def test_a_version_that_serves_is_not_deleted_and_one_that_served_is(root, serving, first, second, build):
    publish_version(second, root)
    third = publish_version(build("third", seed=3), root, keep=2)
    assert third.in_use == [artifact_id(first)], "still serving: nobody has refreshed"
    serving.refresh()
    assert publish_version(build("third"), root, keep=2).deleted == [artifact_id(first)]


def test_answers_are_the_same_after_a_swap_that_keeps_somebody_elses_old_version(root, serving, second, monkeypatch):
    monkeypatch.setattr(reloading, "_DRAIN_S", 0.01)
    old, before = serving.current, serving(REQUEST).values
    publish_version(second, root)
    serving.refresh()
    assert torch.equal(old(REQUEST).values, before)


def test_options_reach_the_loader(root, second):
    with pytest.raises(UnsupportedError, match="has no graph 'aot_inductor'"):
        ReloadingArtifact(root / "current.json", interval_s=None, backend="aot_inductor")
    with ReloadingArtifact(root / "current.json", interval_s=None, invalid_ids="zero", prefault=True) as serving:
        publish_version(second, root)
        assert serving.refresh()
        assert serving(REQUEST | {"user": [[10**9], []]}).values[0, :8].tolist() == [0.0] * 8
    for interval in (0, -1, math.inf, math.nan, 1e10):
        with pytest.raises(
            ValueError, match=rf"^interval_s must be greater than 0 and at most \d+, or None, got {interval}"
        ):
            ReloadingArtifact(root / "current.json", interval_s=interval)


def test_it_follows_a_relative_path_from_another_folder(root, second, monkeypatch):
    monkeypatch.chdir(root)
    with ReloadingArtifact("current.json", interval_s=None) as serving:
        monkeypatch.chdir("/")
        publish_version(second, root)
        assert serving.refresh()


def test_counts_go_on_over_a_swap(root, second):
    with ReloadingArtifact(root / "current.json", interval_s=None, invalid_ids="zero") as serving:
        for number in range(1, 4):
            serving(REQUEST | {"user": [[10**9], []]})
            assert serving.invalid_id_counts["user"] == number
            if number == 1:
                publish_version(second, root)
                assert serving.refresh()
        assert serving.current.invalid_id_counts["user"] == 2
        assert set(serving.unknown_id_counts.values()) == {0}


def test_a_signal_handler_that_interrupts_a_refresh_cannot_ask_for_another(root, serving, second, monkeypatch):
    said = []

    def interrupted(*arguments, **options):
        with pytest.raises(UnsupportedError, match="a refresh is under way in this thread, which a signal handler has"):
            serving.refresh()
        said.append(None)
        return load_artifact(*arguments, **options)

    publish_version(second, root)
    monkeypatch.setattr(reloading, "load_artifact", interrupted)
    assert serving.refresh()
    assert said
    assert not serving.refresh()  # and the next one may


@pytest.mark.parametrize("prefault", [True, False])
def test_prefault_maps_every_page_of_the_rows(prefault, tmp_path, build):
    large = [{"name": "large", "num_embeddings": 500_000, "embedding_dim": 8, "data_type": "fp32"}]
    publish_version(build("large", large), tmp_path / "root")
    with ReloadingArtifact(tmp_path / "root/current.json", interval_s=None, prefault=prefault):
        text = Path("/proc/self/smaps").read_text()
    entry = text[text.index(f"{tmp_path}/root/versions") :]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in entry.splitlines()[1:5]}
    assert kib["Size"] > 7800
    assert (kib["Rss"] == kib["Size"]) == prefault


# --- Refusals --------------------------------------------------------------------------------------------------------


def refused(serving: ReloadingArtifact, kind: type[Exception], message: str) -> None:
    """Refreshing is refused, the version that serves goes on, and the status says so."""
    before, count = serving.status(), serving.status().refusals
    with pytest.raises(kind, match=message):
        serving.refresh()
    status = serving.status()
    assert (status.version, status.swaps, status.refusals) == (before.version, before.swaps, count + 1)
    assert kind is OSError or status.refusal.error
    assert serving(REQUEST).artifact_id == before.artifact_id


def seal(version: Path) -> None:
    """Makes the digests of the small files right again, and the pointer's."""
    manifest = read_manifest(version)
    files = []
    for file in manifest.files:
        data = (version / file.path).read_bytes()
        mapped = file.path in manifest.mapped
        files.append(file if mapped else dataclasses.replace(file, bytes=len(data), digest=sha256(data)))
    (version / "manifest.json").write_bytes(dataclasses.replace(manifest, files=files).to_bytes())
    point(version.parents[1], manifest_digest=read_manifest(version).manifest_digest)


def test_a_damaged_version_is_refused_until_the_pointer_moves_on(root, serving, second):
    publish_version(second, root)
    flip(current_folder(root) / "weights/tables.safetensors")
    refused(serving, DigestMismatchError, "rows of table '.*' are not those that were published")
    assert serving.status().refusal.version == artifact_id(second)
    assert "not those that were published" in serving.status().refusal.error
    roll_back(root)
    assert serving.refresh() is False
    status = serving.status()
    assert (status.refusal, status.refusals, status.sequence) == (None, 1, 3)


def test_what_is_refused_is_not_tried_again_until_the_pointer_is_touched(root, second, caplog):
    with ReloadingArtifact(root / "current.json", interval_s=0.005) as serving:
        damaged = root / "damaged"
        shutil.copytree(second, damaged)
        flip(damaged / "weights/tables.safetensors")
        manifest = read_manifest(damaged)
        shutil.move(damaged, root / "versions" / manifest.artifact_id)
        names = {"version": manifest.artifact_id, "artifact_id": manifest.artifact_id}
        point(root, **names, manifest_digest=manifest.manifest_digest)
        wait(lambda: serving.status().refusals == 1)
        checked = serving.status().checked_at
        wait(lambda: serving.status().checked_at > checked + 0.05)  # several looks
        assert serving.status().refusals == 1
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        flip(root / "versions" / manifest.artifact_id / "weights/tables.safetensors")  # mended
        os.utime(root / "current.json")
        wait(lambda: serving.status().swaps == 1)
        assert serving(REQUEST).artifact_id == manifest.artifact_id


def test_another_answer_to_a_golden_case_is_refused(root, serving, second):
    from safetensors.torch import load_file, save_file

    publish_version(second, root)
    path = current_folder(root) / GOLDEN
    tensors = load_file(path)
    tensors["06 random 0/pooled"].view(torch.int32)[1, 2] ^= 1
    save_file(tensors, path)
    seal(current_folder(root))
    refused(serving, GoldenCaseError, "golden case '06 random 0': output 'user', bag 1: column 2 is ")


def test_a_golden_case_of_another_shape_and_damaged_cases_are_refused(root, serving, second):
    from safetensors.torch import load_file, save_file

    publish_version(second, root)
    path = current_folder(root) / GOLDEN
    tensors = load_file(path)
    tensors["06 random 0/pooled"] = tensors["06 random 0/pooled"][:, :5].contiguous()
    save_file(tensors, path)
    seal(current_folder(root))
    refused(
        serving,
        GoldenCaseError,
        r"golden case '06 random 0': shape \[\d+, 34\], expected \[\d+, 5\]".replace("34", "\\d+"),
    )
    path.write_bytes(b"\x05" + bytes(30))
    seal(current_folder(root))
    refused(serving, Exception, "golden/cases.safetensors: cannot be read: .*; build the artifact again")


CHANGES = {
    "feature names": ([TABLES[0] | {"feature_names": ["visitor"]}, *TABLES[1:]], "features are visitor, item"),
    "feature order": ([TABLES[1], TABLES[0], *TABLES[2:]], "features are item, last_item, user"),
    "pooling": ([TABLES[0] | {"pooling": "mean"}, *TABLES[1:]], "feature 'user' pools by mean, by sum as served"),
    "dim": ([TABLES[0] | {"embedding_dim": 16}, *TABLES[1:]], "output 'user' has dim 16, 8 as served"),
    "fewer rows": ([TABLES[0] | {"num_embeddings": 299}, *TABLES[1:]], "table 'user' has 299 rows, 300 as served"),
    "weights": (
        [TABLES[0] | {"weighted": True}, *TABLES[1:]],
        "feature 'user' takes weights, it takes no weights as served",
    ),
    "table": (
        [TABLES[0] | {"name": "visitor", "feature_names": ["user"]}, *TABLES[1:]],
        "feature 'user' reads table 'visitor', 'user' as served",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_version_that_callers_were_not_written_for_is_refused_by_name(change, root, serving, build):
    tables, message = CHANGES[change]
    publish_version(build(change.replace(" ", "-"), tables), root, allow_signature_change=True)
    refused(serving, IncompatibleError, f"{message}.*; callers count on what is served: publish to another root, or ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda outputs: outputs[::-1],
            "outputs are age, tag, last_item, item, user; user, item, last_item, tag, age as served; ",
        ),
        (
            lambda outputs: [Output("new", 4), *outputs],
            "outputs are new, user, item, last_item, tag, age; user, item, ",
        ),
        (
            lambda outputs: [*outputs, Output("new", 4)],
            "outputs are user, item, last_item, tag, age, new; user, item, ",
        ),
        (lambda outputs: outputs[:2], "outputs are user, item; user, item, last_item, tag, age as served"),
        (lambda outputs: [Output("user", 4), *outputs[1:]], "output 'user' has dim 4, 8 as served"),
    ],
)
def test_outputs_are_the_same_in_the_same_order_or_the_version_is_refused(change, message, first):
    manifest = read_manifest(first)
    check_compatible(manifest, manifest)
    with pytest.raises(IncompatibleError, match=f"^{message}"):
        check_compatible(manifest, dataclasses.replace(manifest, outputs=change(manifest.outputs)))


def test_a_table_may_not_shrink_where_only_the_new_version_has_a_vocabulary(root, serving, build, tmp_path):
    tables = with_vocabularies(tmp_path / "entities")
    pruned = build("pruned", [tables[0] | {"num_embeddings": 260}, *tables[1:]])
    publish_version(pruned, root, allow_signature_change=True)
    refused(serving, IncompatibleError, "table 'user' has 260 rows, 300 as served")


def test_a_signature_may_change_where_that_is_allowed(root, build):
    with ReloadingArtifact(root / "current.json", interval_s=None, allow_signature_change=True) as serving:
        publish_version(build("feature-names", CHANGES["feature names"][0]), root, allow_signature_change=True)
        assert serving.refresh()
        with pytest.raises(InvalidInputError, match="unknown feature 'user'"):
            serving(REQUEST)


def test_tables_may_grow_and_types_may_change(root, serving, build):
    tables = [TABLES[0] | {"num_embeddings": 400, "serving_precision": "int8"}, *TABLES[1:]]
    publish_version(build("grown", tables), root)
    assert serving.refresh()
    assert serving(REQUEST | {"user": [[399], []]}).values.shape[0] == 2


def test_a_table_may_shrink_where_ids_come_from_its_vocabulary_and_a_vocabulary_may_not_vanish(
    root, build, second, tmp_path
):
    tables = with_vocabularies(tmp_path / "entities")
    publish_version(build("vocabularies", tables), root)
    with ReloadingArtifact(root / "current.json", interval_s=None) as serving:
        publish_version(build("pruned", [tables[0] | {"num_embeddings": 260}, *tables[1:]]), root)
        assert serving.refresh()
        publish_version(second, root, allow_signature_change=True)
        refused(serving, IncompatibleError, "table 'user' has no vocabulary, it has one as served")


POINTERS = {
    "garbage": (lambda root: (root / "current.json").write_bytes(b"\xff\x00"), "is damaged: not UTF-8 JSON"),
    "empty": (lambda root: (root / "current.json").write_bytes(b""), "is damaged: not UTF-8 JSON"),
    "a flipped bit": (lambda root: flip(root / "current.json", 90), "is damaged: its digest is "),
    "gone": (lambda root: (root / "current.json").unlink(), "cannot be read: No such file or directory"),
    "outside": (lambda root: point(root, version="../../etc"), "'../../etc' is no version"),
    "a newer format": (lambda root: point(root, format_version=2), "format_version is 2, this reader knows 1"),
    "no sequence": (lambda root: point(root, sequence=0), "sequence: expected at least 1, got 0"),
    "two ids": (lambda root: point(root, artifact_id="0" * 64), "artifact_id is '0000.*', and the version is "),
    "history of itself": (
        lambda root: point(root, history=[read_pointer(root / "current.json").version]),
        "history names a version twice",
    ),
    "history of what is none": (lambda root: point(root, history=["x"]), "'x' is no version"),
    "a wrong type": (lambda root: point(root, sequence=True), "sequence: expected int, got True"),
}


@pytest.mark.parametrize("name", POINTERS)
def test_a_pointer_that_no_publisher_writes_is_refused(name, root, serving):
    damage, message = POINTERS[name]
    good = (root / "current.json").read_bytes()
    damage(root)
    refused(serving, PointerError, message)
    assert serving.status().refusal.version is None
    (root / "current.json").write_bytes(good)
    assert serving.refresh() is False
    assert serving.status().refusal is None


def test_versions_that_are_not_what_the_pointer_says_are_refused(root, serving, first, second):
    version = current_folder(root)
    point(root, version="0" * 64, artifact_id="0" * 64)  # with the digest of what serves
    refused(serving, MissingFileError, "0000: no such version: manifest.json: No such file or directory; roll back")
    other = artifact_id(second)
    point(root, version=other, artifact_id=other)
    (root / "versions" / other).symlink_to(version)
    refused(serving, MissingFileError, "is a symbolic link; a version is a folder")
    (root / "versions" / other).unlink()
    shutil.copytree(second, root / "versions" / other)
    refused(serving, PointerError, "is not the version that .* names: its manifest is another")


def test_a_version_that_is_being_deleted_is_refused(root, serving, second):
    import fcntl

    publish_version(second, root)
    with (current_folder(root) / "manifest.json").open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(serving, MissingFileError, "is being deleted; roll back to another version")
    assert serving.refresh()


def test_a_defect_while_loading_is_a_refusal_too_and_keeps_its_traceback(root, second, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no room")

    with ReloadingArtifact(root / "current.json", interval_s=0.01) as serving:
        monkeypatch.setattr(reloading, "load_artifact", fail)
        publish_version(second, root)
        wait(lambda: serving.status().refusals == 1)
        assert serving.status().watching, "no error ends the thread"
        assert serving.status().refusal.error == "RuntimeError: no room"
        assert caplog.records[0].exc_info
        for _ in range(100):
            serving._look()
        assert serving.status().refusals == 1, "a defect of the candidate is not tried again"
        monkeypatch.undo()
        assert serving.refresh(), "asked for by hand, it is tried again"


def wrapped(error: OSError) -> ArtifactError:
    made = ArtifactError(f"cannot be read: {error}")
    made.__cause__ = error
    return made


PASSING = {
    "no file descriptor": OSError(errno.EMFILE, "Too many open files"),
    "no memory": MemoryError(),
    "a file server that is away": wrapped(OSError(errno.ESTALE, "Stale file handle")),
    "a disk that does not answer": wrapped(OSError(errno.EIO, "Input/output error")),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_by_itself_is_tried_again_at_longer_and_longer_intervals(
    name, root, serving, second, monkeypatch
):
    load, looks, attempts = reloading.load_artifact, 0, []

    def fail(*arguments, **options):
        attempts.append(looks)
        if len(attempts) < 10:
            raise PASSING[name]
        return load(*arguments, **options)

    monkeypatch.setattr(reloading, "load_artifact", fail)
    publish_version(second, root)
    while serving.status().swaps == 0 and looks < 1000:
        serving._look()
        looks += 1
    gaps = [after - before for before, after in itertools.pairwise(attempts)]
    assert gaps == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert serving.status().refusal is None
    assert serving(REQUEST).artifact_id == artifact_id(second)


def test_a_pointer_that_moves_is_followed_at_once_whatever_passes(root, serving, first, second, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as context:
        context.setattr(reloading, "load_artifact", fail)
        publish_version(second, root)
        for _ in range(20):
            serving._look()
        assert serving.status().refusals == 5
    os.utime(root / "current.json")
    serving._look()
    assert serving(REQUEST).artifact_id == artifact_id(second)


def test_a_file_of_the_version_that_is_missing_is_not_tried_again(root, serving, second):
    publish_version(second, root)
    shutil.rmtree(current_folder(root))
    for _ in range(20):
        serving._look()
    assert serving.status().refusals == 1


def test_a_fork_says_that_it_does_not_refresh_while_a_load_of_its_parent_was_under_way(root):
    done = subprocess.run(
        [sys.executable, "-c", FORK_DURING_A_LOAD, root / "current.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r".*/current\.json: a ReloadingArtifact made in process (\d+) does not refresh in its fork (?!\1)\d+; "
        r"make one in each worker, after the fork\nNone\n",
        done.stdout,
    )


FORK_DURING_A_LOAD = """
import os, signal, sys
from runtime_py import ReloadingArtifact, UnsupportedError

serving = ReloadingArtifact(sys.argv[1], interval_s=None)
serving._loading.acquire()  # as a load does
child = os.fork()
if not child:
    signal.alarm(20)
    try:
        serving.refresh()
    except UnsupportedError as error:
        print(error, serving.status().refusal, sep="\\n", flush=True)
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


def test_a_process_that_ends_during_a_reload_refuses_nothing(root, second):
    with subprocess.Popen(
        [sys.executable, "-c", END_DURING_A_LOAD, root / "current.json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout.readline() == "ready\n"
        publish_version(second, root)
        out, errors = server.communicate()
    assert (server.returncode, out, errors) == (
        0,
        "RuntimeError: cannot schedule new futures after interpreter shutdown\n",
        "",
    )


END_DURING_A_LOAD = """
import atexit, sys, threading
from concurrent.futures import ThreadPoolExecutor
from runtime_py import ReloadingArtifact, reloading

begun, ended = threading.Event(), threading.Event()

def load(*arguments, **options):
    begun.set()
    try:
        while True:  # until Python shuts its executors down
            with ThreadPoolExecutor(1) as pool:
                pool.submit(int).result()
    except RuntimeError as error:
        print(f"RuntimeError: {error}", flush=True)
        raise

look = ReloadingArtifact._look

def look_and_tell(self):
    look(self)
    if begun.is_set():
        ended.set()

ReloadingArtifact._look = look_and_tell
serving = ReloadingArtifact(sys.argv[1], interval_s=0.01)
atexit.register(ended.wait, 20)  # before what sets the stop event: the last that is registered is the first to run
reloading.load_artifact = load
print("ready", flush=True)
begun.wait(20)
"""


def test_once_it_is_stopped_its_thread_refuses_nothing(root, second, monkeypatch, caplog):
    begun = threading.Event()
    with ReloadingArtifact(root / "current.json", interval_s=0.01) as serving:

        def fail(*_, **__):
            begun.set()
            serving._stop.wait(WAIT_S)
            raise OSError(errno.EBADF, "closed")

        monkeypatch.setattr(reloading, "load_artifact", fail)
        publish_version(second, root)
        assert begun.wait(WAIT_S)
    assert (serving.status().refusal, serving.status().refusals, caplog.records) == (None, 0, [])
    monkeypatch.undo()
    assert serving.refresh(), "by hand it goes on"


def test_a_gpu_is_refused_in_one_line(root):
    with pytest.raises(
        UnsupportedError, match=r"^device 'cuda:1': a ReloadingArtifact serves from a CPU; on a GPU, .*\.json"
    ):
        ReloadingArtifact(root / "current.json", device="cuda:1")


def test_nothing_to_serve_at_the_start_is_an_error(tmp_path, root):
    with pytest.raises(PointerError, match=r"give the current\.json that 'export publish' wrote"):
        ReloadingArtifact(tmp_path)
    flip(current_folder(root) / "weights/tables.safetensors")
    with pytest.raises(DigestMismatchError):
        ReloadingArtifact(root / "current.json")
    assert mapped(f"{root}/versions") == 0
    assert [thread.name for thread in threading.enumerate() if thread.name == "refresh"] == []


def test_one_that_nobody_uses_any_more_goes_with_its_thread(root):
    serving = ReloadingArtifact(root / "current.json", interval_s=0.01)
    thread = serving._thread
    del serving
    wait(lambda: not thread.is_alive())
    assert mapped(f"{root}/versions") == 0


# --- Load ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_soak_keeps_every_promise():
    script = Path(__file__).parents[1] / "scripts/soak_refresh.py"
    command = [sys.executable, script, "--swaps", "9", "--rows", "4000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed           0 \nmixed or wrong   0\n" in done.stdout
    assert "31 of 31 candidates refused while serving went on" in done.stdout


def test_a_published_root_is_served_as_the_commands_left_it(tmp_path, first, second):
    for artifact in (first, second):
        assert run_export("publish", artifact, "--to", tmp_path / "root").returncode == 0
    with ReloadingArtifact(str(tmp_path / "root/current.json")) as serving:
        assert serving(REQUEST).artifact_id == artifact_id(second)
        assert run_export("rollback", "--to", tmp_path / "root").returncode == 0
        assert serving.refresh()
        assert serving(REQUEST).artifact_id == artifact_id(first)
