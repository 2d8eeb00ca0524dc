"""Snapshots behind URLs: a real S3 server, other drivers of fsspec, what a read costs, and how failures read."""

import http.server
import io
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
import torch
import torchsnapshot
from moto.server import ThreadedMotoServer
from safetensors.torch import save_file
from support import TABLES, make_rows, run_export, state_dict, write_config, write_dcp

from export import storage
from export.config import EmbeddingBagConfig, SnapshotConfig
from export.config_file import load_config
from export.errors import SnapshotError
from export.snapshots import TableRows, identify, open_snapshot
from export.snapshots.dcp import METADATA
from export.storage import open_location, open_seekable, read_range, redact
from runtime_py.manifest_reader import read_manifest

USER = EmbeddingBagConfig.model_validate(
    {"name": "user", "num_embeddings": 300, "embedding_dim": 8, "data_type": "fp32"}
)
FORMATS = ["dcp", "torchsnapshot", "safetensors", "safetensors_index", "state_dict"]


# --- Writing the same rows in every format ---------------------------------------------------------------------------


def write_torchsnapshot(path: Path, rows: dict[str, torch.Tensor]) -> Path:
    torchsnapshot.Snapshot.take(str(path), {"model": torchsnapshot.StateDict(**state_dict(rows, "ebc"))})
    return path


def write_safetensors(path: Path, rows: dict[str, torch.Tensor]) -> Path:
    path = path.with_suffix(".safetensors")
    save_file(state_dict(rows), path)
    return path


def write_safetensors_index(path: Path, rows: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    weight_map = {}
    for number, (name, tensor) in enumerate(state_dict(rows).items()):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, path / weight_map[name])
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def write_pt(path: Path, rows: dict[str, torch.Tensor]) -> Path:
    path = path.with_suffix(".pt")
    torch.save(state_dict(rows), path)
    return path


WRITERS: dict[str, Callable[[Path, dict[str, torch.Tensor]], Path]] = {
    "dcp": write_dcp,
    "torchsnapshot": write_torchsnapshot,
    "safetensors": write_safetensors,
    "safetensors_index": write_safetensors_index,
    "state_dict": write_pt,
}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, torch.Tensor]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    return {name: write(folder / name, rows) for name, write in WRITERS.items()}


# --- The server ------------------------------------------------------------------------------------------------------


class Requests:
    """What a server was asked for: (method, path with query, bytes asked for by Range, bytes sent)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int | None, int]] = []

    def around(self, app: Callable[..., Any]) -> Callable[..., Any]:
        def counted(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            body = list(app(environ, start_response))
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", ""))
            wanted = int(asked[2]) - int(asked[1]) + 1 if asked else None
            path = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
            self.seen.append((environ["REQUEST_METHOD"], path, wanted, sum(map(len, body))))
            return body

        return counted

    @property
    def ranges(self) -> list[int]:
        return [wanted for _, _, wanted, _ in self.seen if wanted is not None]


@pytest.fixture(scope="module")
def server() -> Iterator[Requests]:
    """An S3 server with the bucket `snapshots`; this process and its children are configured for it."""
    requests = Requests()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line to stderr for every request
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    moto._server.app = requests.around(moto._server.app)
    host, port = moto.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("snapshots")
        yield requests
    s3fs.S3FileSystem.clear_instance_cache()
    moto.stop()


@pytest.fixture
def bucket(server: Requests, request: pytest.FixtureRequest) -> str:
    """An empty place in the bucket."""
    return f"snapshots/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}"


def upload(local: Path, place: str) -> str:
    """The URL of a copy of a file or folder."""
    files = [local] if local.is_file() else [path for path in local.rglob("*") if path.is_file()]
    for path in files:
        s3fs.S3FileSystem().pipe_file(f"{place}/{path.relative_to(local.parent)}", path.read_bytes())
    return f"s3://{place}/{local.name}"


def read(uri: Path | str, **options: Any) -> Any:
    """The rows of table `user`, and the identity of the snapshot that they come from."""
    snapshot = open_snapshot(SnapshotConfig.model_validate({"uri": str(uri), **options}))
    return read_all(snapshot.table(USER)), snapshot.identity


def read_all(table: TableRows) -> torch.Tensor:
    out = torch.empty(table.num_embeddings, table.embedding_dim, dtype=table.dtype)
    table.read(0, out)
    return out


def refusal(uri: Path | str, **options: Any) -> str:
    with pytest.raises(SnapshotError) as caught:
        read(uri, **options)
    return str(caught.value)


# --- Formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_build_from_s3_gives_the_artifact_of_the_local_snapshot(
    snapshots: dict[str, Path], bucket: str, built_artifact: Path, tmp_path: Path, name: str
) -> None:
    uri = upload(snapshots[name], bucket)
    done = run_export("build", "--config", write_config(tmp_path / "r.yaml", uri), "--output", tmp_path / "a", "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 7, f"the phases, and nothing else: {done.stderr}"
    assert json.loads(done.stdout)["artifact_id"] == read_manifest(built_artifact).artifact_id
    assert read_manifest(tmp_path / "a").provenance.snapshots[0].uri == uri


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_s3_as_from_disk(snapshots: dict[str, Path], bucket: str, name: str) -> None:
    there, identity = read(upload(snapshots[name], bucket))
    here, local = read(snapshots[name])
    assert torch.equal(there, here)
    assert (identity.format, identity.digest) == (local.format, local.digest)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chain", ["simplecache::", "filecache::"])
def test_a_chained_url_keeps_a_copy_on_disk_and_reads_the_same(
    snapshots: dict[str, Path], bucket: str, rows: dict[str, torch.Tensor], chain: str, name: str
) -> None:
    uri = chain + upload(snapshots[name], bucket)
    there, identity = read(uri)
    assert torch.equal(there, rows["user"])
    assert identity.uri == uri


def test_threads_that_read_one_file_through_a_cache_wait_until_it_is_there(
    snapshots: dict[str, Path], bucket: str, rows: dict[str, torch.Tensor]
) -> None:
    table = open_snapshot(SnapshotConfig(uri="simplecache::" + upload(snapshots["torchsnapshot"], bucket))).table(USER)
    read_at_once = storage.map_files(lambda _: read_all(table), range(8), [open_location("memory://any")])
    assert all(torch.equal(found, rows["user"]) for found in read_at_once)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_memory(
    snapshots: dict[str, Path], rows: dict[str, torch.Tensor], memory: str, name: str
) -> None:
    path = snapshots[name]
    fsspec.filesystem("memory").put(str(path), f"/{memory}/{path.name}", recursive=path.is_dir())
    assert torch.equal(read(f"memory://{memory}/{path.name}")[0], rows["user"])


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name)
    yield name
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(f"/{name}"):
        filesystem.rm(f"/{name}", recursive=True)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_url_is_a_local_path(snapshots: dict[str, Path], rows: dict[str, torch.Tensor], name: str) -> None:
    uri = f"file://{snapshots[name]}"
    location = open_location(uri)
    assert isinstance(location, Path)
    assert location == snapshots[name]
    found, identity = read(uri)
    assert torch.equal(found, rows["user"])
    assert identity.uri == uri


def test_urls_of_a_configuration_are_left_as_they_are(tmp_path: Path) -> None:
    for uri in ("simplecache::s3://bucket/run", "file:///run/7", "zip://run::gs://bucket/run.zip", "memory://x/../y"):
        assert load_config(write_config(tmp_path / "release.yaml", uri)).snapshot.uri == uri


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges, as web servers do and the one of the standard library does not."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not asked or not path.is_file():
            super().do_GET()
            return
        part = path.read_bytes()[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def web(snapshots: dict[str, Path]) -> Iterator[str]:
    folder = snapshots["dcp"].parent
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chain", ["", "simplecache::"])
def test_every_format_is_read_over_http(
    snapshots: dict[str, Path], rows: dict[str, torch.Tensor], web: str, chain: str, name: str
) -> None:
    assert torch.equal(read(f"{chain}{web}/{snapshots[name].name}")[0], rows["user"])


def test_a_web_server_that_ignores_ranges_is_refused_with_what_to_do(
    snapshots: dict[str, Path], rows: dict[str, torch.Tensor], web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Handler, "do_GET", http.server.SimpleHTTPRequestHandler.do_GET)
    uri = f"{web}/{snapshots['safetensors'].name}"
    message = refusal(uri)
    assert message.startswith(f"{uri}: cannot be read: the server sent ")
    assert message.endswith("put simplecache:: before the URL")
    assert torch.equal(read(f"simplecache::{uri}")[0], rows["user"])


# --- Steps -----------------------------------------------------------------------------------------------------------


def test_the_newest_complete_step_on_s3_is_taken_with_few_requests(
    server: Requests, bucket: str, tmp_path: Path
) -> None:
    s3 = s3fs.S3FileSystem()
    for step in (9, 80, 700):
        upload(write_dcp(tmp_path / str(step), {"user": torch.full((300, 8), float(step))}), bucket)
    for step in range(100, 160):
        s3.pipe_file(f"{bucket}/{step}/__0_0.distcp", b"no commit mark")
    s3.pipe_file(f"{bucket}/5000/__0_0.distcp", b"no commit mark")
    s3.pipe_file(f"{bucket}/latest.txt", b"700")
    s3.pipe_file(f"{bucket}/", b"")  # how some tools make a folder
    server.seen.clear()
    rows, identity = read(f"s3://{bucket}")
    assert identity.step == 700
    assert torch.equal(rows, torch.full((300, 8), 700.0))
    assert len(server.seen) < 30
    assert read(f"s3://{bucket}/", step=9)[1].step == 9
    s3.pipe_file(f"{bucket}/700/{METADATA}.tmp", b"")
    assert refusal(f"s3://{bucket}", step=10).startswith(
        f"s3://{bucket}: no complete step 10; complete steps: 9, 80, 700; incomplete (without a commit mark, "
    )


def test_a_step_that_was_written_after_an_earlier_look_is_seen(bucket: str, tmp_path: Path) -> None:
    upload(write_dcp(tmp_path / "9", {"user": torch.zeros(300, 8)}), bucket)
    assert read(f"s3://{bucket}")[1].step == 9
    path = write_dcp(tmp_path / "80", {"user": torch.ones(300, 8)})
    other = s3fs.S3FileSystem(skip_instance_cache=True)  # another process: our driver's listing is not told
    for file in path.iterdir():
        other.pipe_file(f"{bucket}/80/{file.name}", file.read_bytes())
    assert read(f"s3://{bucket}")[1].step == 80


def test_a_step_that_cannot_be_looked_at_is_not_passed_over_for_an_older_one(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (9, 80):
        path = write_safetensors(tmp_path / "model", {"user": torch.zeros(300, 8)})
        fsspec.filesystem("memory").put(str(path), f"/{memory}/{step}/{path.name}")
    assert read(f"memory://{memory}")[1].step == 80
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", fail_with(TimeoutError("too slow")))
    file = f"memory://{memory}/80/model.safetensors"
    assert refusal(f"memory://{memory}") == f"{file}: cannot be read: TimeoutError: too slow"


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


# --- What a read costs -----------------------------------------------------------------------------------------------

MIB = 1 << 20


@pytest.mark.parametrize("name", FORMATS)
def test_the_rows_alone_are_fetched_and_a_range_of_them_in_one_request(
    server: Requests, bucket: str, tmp_path: Path, name: str
) -> None:
    big = EmbeddingBagConfig.model_validate(
        {"name": "big", "num_embeddings": 100_000, "embedding_dim": 64, "data_type": "fp32"}
    )
    tensors = {"big": torch.randn(100_000, 64), "other": torch.zeros(200_000, 16)}
    uri = upload(WRITERS[name](tmp_path / "snapshot", tensors), bucket)
    server.seen.clear()
    table = open_snapshot(SnapshotConfig(uri=uri)).table(big)
    assert sum(sent for *_, sent in server.seen) < MIB // 4, "the structure, not the values"
    assert len(server.seen) < 25
    assert max(server.ranges, default=0) <= 64 << 10

    server.seen.clear()
    part = torch.empty(1000, 64)
    table.read(41_000, part)
    assert torch.equal(part, tensors["big"][41_000:42_000])
    assert server.ranges == [1000 * 64 * 4]
    assert len(server.seen) == 1
    assert server.seen[0][3] == 1000 * 64 * 4

    server.seen.clear()
    for start, rows in table.chunks(range(0, table.num_embeddings, 8192)):
        assert torch.equal(rows, tensors["big"][start : start + 8192])
    assert sum(sent for *_, sent in server.seen) == table.bytes
    assert max(server.ranges) <= 2 * MIB


def test_the_headers_of_a_state_dict_of_many_tensors_are_fetched_at_once(
    server: Requests, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    torch.save(
        state_dict({str(number): torch.zeros(300, 64) for number in range(40)} | {"user": torch.ones(300, 8)}), path
    )
    uri = upload(path, bucket)
    threads = set()
    fetch = storage.RemoteFile._fetch
    monkeypatch.setattr(
        storage.RemoteFile, "_fetch", lambda *args: (threads.add(threading.get_ident()), fetch(*args))[1]
    )
    server.seen.clear()
    assert torch.equal(read(uri)[0], torch.ones(300, 8))
    assert len(threads) > 2, "one request after the other"
    assert len(server.ranges) < 60


def test_the_shards_of_a_dcp_table_are_located_at_once(server: Requests, bucket: str, tmp_path: Path) -> None:
    path = write_dcp(tmp_path / "7", make_rows(TABLES))
    uri = upload(path, bucket)
    index = open_snapshot(SnapshotConfig(uri=uri))._index
    server.seen.clear()
    for name in index.tensors:
        if name.endswith(".weight"):
            index.locate(name)
    gets = [path for method, path, *_ in server.seen if method == "GET"]
    assert len(gets) <= 2 * len(TABLES), "the block before the values and the one after them"


def test_a_remote_file_reads_as_a_local_one(memory: str, tmp_path: Path) -> None:
    content = bytes(range(256)) * 400
    (tmp_path / "file").write_bytes(content)
    fsspec.filesystem("memory").pipe(f"/{memory}/file", content)
    with open_seekable(open_location(f"memory://{memory}/file")) as there, (tmp_path / "file").open("rb") as here:
        for offset, whence, count in [
            (0, io.SEEK_SET, 8),
            (-22, io.SEEK_END, 100),
            (16_380, io.SEEK_SET, 50_000),
            (5, io.SEEK_CUR, 3),
            (200_000, io.SEEK_SET, 10),
            (0, io.SEEK_END, 1),
            (0, io.SEEK_SET, -1),
        ]:
            assert there.seek(offset, whence) == here.seek(offset, whence)
            assert there.read(count) == here.read(count)
            assert there.tell() == here.tell()


def test_a_range_past_the_end_gives_what_there_is(memory: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    fsspec.filesystem("memory").pipe(f"/{memory}/file", b"0123456789")
    for uri in (str(tmp_path / "file"), f"memory://{memory}/file"):
        out = bytearray(8)
        assert read_range(open_location(uri), 7, memoryview(out)) == 3
        assert out[:3] == b"789"
        assert read_range(open_location(uri), 7, memoryview(bytearray())) == 0


# --- Failures --------------------------------------------------------------------------------------------------------


def fail(config: Path, output: Path, **environment: str) -> str:
    """The one line that a build ends with."""

    began = time.monotonic()
    done = run_export("build", "--config", config, "--output", output, env={**os.environ, **environment})
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - began < 40
    phase, *errors = done.stderr.splitlines()
    assert phase.endswith(" snapshot")
    assert len(errors) == 1, done.stderr
    assert not output.exists()
    return errors[0].removeprefix("error: ")


def test_a_server_that_is_down_is_one_line(server: Requests, tmp_path: Path) -> None:
    config = write_config(tmp_path / "release.yaml", "s3://snapshots/any")
    message = fail(config, tmp_path / "a", AWS_ENDPOINT_URL="http://127.0.0.1:1", AWS_MAX_ATTEMPTS="1")
    assert message.startswith("s3://snapshots/any: cannot be read: EndpointConnectionError: Could not connect")


def test_credentials_that_are_missing_are_one_line(server: Requests, tmp_path: Path) -> None:
    config = write_config(tmp_path / "release.yaml", "s3://snapshots/any")
    message = fail(config, tmp_path / "a", AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert message == "s3://snapshots/any: cannot be read: NoCredentialsError: Unable to locate credentials"


def test_credentials_that_are_wrong_are_refused(
    server: Requests, snapshots: dict[str, Path], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.core import set_initial_no_auth_action_count

    uri = upload(snapshots["dcp"], bucket)
    fsspec.filesystem("s3").invalidate_cache()
    refused = set_initial_no_auth_action_count(0)(refusal)(uri)
    assert refused == f"{uri}: cannot be read: PermissionError: Forbidden"


@pytest.mark.parametrize("uri", ["s3://snapshots/absent/key", "s3://absent-bucket/run", "s3://absent-bucket"])
def test_nothing_there_is_refused(server: Requests, uri: str) -> None:
    message = refusal(uri)
    assert message.startswith(uri)
    assert ": no such file or folder" in message
    assert message.endswith("; see snapshot.uri in the configuration")


def test_nothing_there_over_http_is_refused(web: str) -> None:
    uri = f"{web}/absent.pt"
    assert refusal(uri) == f"{uri}: no such file or folder; see snapshot.uri in the configuration"
    assert "cannot be read: ClientConnectorError: " in refusal("http://127.0.0.1:1/model.pt")


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for uri in ("gs://bucket/run", "simplecache::gs://bucket/run"):
        assert refusal(uri).startswith(f"{uri}: the driver for this URL is not installed: ImportError: ")
        assert "install gcsfs" in refusal(uri)


@pytest.mark.parametrize("uri", ["nope://bucket/run", "simplecache::nope://bucket/run"])
def test_an_unknown_protocol_is_refused(uri: str) -> None:
    message = refusal(uri)
    assert message.startswith(f"{uri}: cannot be opened: ValueError: ")
    assert "nope" in message


@pytest.mark.parametrize("name", FORMATS)
def test_an_object_that_was_cut_short_is_refused(
    snapshots: dict[str, Path], bucket: str, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / snapshots[name].name
    (shutil.copytree if snapshots[name].is_dir() else shutil.copy)(snapshots[name], copy)
    files = [copy] if copy.is_file() else [path for path in copy.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:500])
    uri = upload(copy, bucket)
    message = refusal(uri)
    place = str(largest.relative_to(copy)) if copy.is_dir() else ""
    assert message.startswith(f"{uri}/{place}: ".replace("/: ", ": "))
    assert "truncated" in message or "is no snapshot of a known format" in message
    if name == "state_dict":
        assert "truncated" in refusal(uri, format="state_dict")


def test_an_object_that_became_shorter_after_it_was_opened_is_refused(bucket: str, tmp_path: Path) -> None:
    uri = upload(write_torchsnapshot(tmp_path / "snapshot", {"user": torch.ones(300, 8)}), bucket)
    table = open_snapshot(SnapshotConfig(uri=uri)).table(USER)
    file = str(table._blobs[0].path)
    for kept, problem in [(600, "ends within the rows of"), (0, "cannot be read: ")]:
        s3fs.S3FileSystem().pipe_file(file, b"x" * kept)
        out = torch.empty(300, 8)
        with pytest.raises(SnapshotError, match=f"^{file}: {problem}"):
            table.read(0, out)
    s3fs.S3FileSystem().rm_file(file)
    with pytest.raises(SnapshotError, match=f"^{file}: cannot be read: no such file or folder"):
        table.read(0, torch.empty(300, 8))


@pytest.mark.parametrize("name", FORMATS)
def test_a_failure_while_the_structure_is_read_is_not_called_damage(
    snapshots: dict[str, Path], memory: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = snapshots[name]
    fsspec.filesystem("memory").put(str(path), f"/{memory}/{path.name}", recursive=path.is_dir())
    ask = storage._ask
    answered = 0

    def sometimes(location: Any, method: str, **options: Any) -> Any:
        nonlocal answered
        answered += 1
        if answered == failing:
            raise OSError(5, "ReadTimeoutError: too slow", str(location))
        return ask(location, method, **options)

    monkeypatch.setattr(storage, "_ask", sometimes)
    total = 0
    for failing in range(10_000):  # 0: none, to count
        answered = 0
        if failing == 0:
            read(f"memory://{memory}/{path.name}")
            total = answered
        elif failing > total:
            break
        else:
            message = refusal(f"memory://{memory}/{path.name}")
            assert message.startswith(f"memory://{memory}/{path.name}")
            assert "ReadTimeoutError: too slow" in message
            assert "damaged" not in message
            assert "\n" not in message
    assert total > 5


# --- Fingerprints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_fingerprint_of_a_table_changes_when_its_file_is_written_again(
    snapshots: dict[str, Path], bucket: str, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / snapshots[name].name
    (shutil.copytree if snapshots[name].is_dir() else shutil.copy)(snapshots[name], copy)
    for uri in (str(copy), upload(copy, bucket)):
        table = open_snapshot(SnapshotConfig(uri=uri)).table(USER)
        before = identify(table.locations)
        read_all(table)
        assert before == identify(table.locations)
        assert [file for file, _ in before] == sorted({str(blob.path) for blob in table._blobs})
        file = before[0][0]
        other = fsspec.filesystem("s3", skip_instance_cache=True) if "://" in uri else fsspec.filesystem("file")
        content = other.cat_file(file)
        other.pipe_file(file, content[:-1] + bytes([content[-1] ^ 1]))
        assert before != identify(table.locations)
        other.rm_file(file)
        with pytest.raises(SnapshotError, match=f"^{re.escape(file)}: holds rows, and cannot be read: "):
            identify(table.locations)


@pytest.mark.parametrize(
    ("uri", "published"),
    [
        ("s3://bucket/run/300", "s3://bucket/run/300"),
        ("https://user:secret@host/a?X-Amz-Signature=abc", "https://host/a"),
        ("simplecache::ftp://user:p%40ss@host:21/a/b", "simplecache::ftp://host:21/a/b"),
        ("/data/run?/300@2", "/data/run?/300@2"),
        ("ftp://user:p@ss@host/a", "ftp://host/a"),
        ("https://user:se?cret@host/a#part", "https://host/a"),
    ],
)
def test_what_is_published_of_a_url_holds_no_secret(uri, published):
    assert redact(uri) == published


@pytest.mark.parametrize("content", [b"", b"notes"])
def test_a_stray_file_that_is_named_like_a_step_is_none(
    snapshots: dict[str, Path], memory: str, content: bytes
) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(snapshots["dcp"]), f"{memory}/9", recursive=True)
    fs.pipe_file(f"{memory}/10.txt", content)
    assert open_snapshot(SnapshotConfig(uri=f"memory://{memory}")).identity.step == 9
