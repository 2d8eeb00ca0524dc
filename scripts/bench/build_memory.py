#!/usr/bin/env python
"""Memory of a build, for tables of several sizes and every kind of snapshot: it must not grow with the table.

For each it writes a snapshot with one fp32 table, builds an artifact from it in a process of its own, and prints the
most that the process held above what it held after its imports: anonymous memory (what it allocated), private memory
(that, and pages of the mapped artifact, which count as private while only one process maps it), both sampled from
/proc/PID/smaps_rollup, and VmHWM, the kernel's own peak of everything resident.

The kind `sparse` is a safetensors file that is one hole: it may be larger than the disk and the memory together. With
--limit-mib the kernel refuses the building process any private memory beyond that (RLIMIT_DATA: all writable private
memory that it reserves, stacks of threads included).
"""

import argparse
import itertools
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint

DIM = 64
LIMIT_MIB = 300
KINDS = ["dcp", "dcp_safetensors", "torchsnapshot", "safetensors", "state_dict", "s3"]
NAME = "model.embedding_bags.table.weight"

_CHILD = """
import resource, sys
from pathlib import Path
import export.build, export.page, export.parity, export.snapshots, scipy.optimize
print("ready", flush=True)
limit = int(sys.stdin.readline())
if limit:
    used = sum(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
export.build.build_artifact(sys.argv[1], sys.argv[2], workers=2)
print("done", flush=True)
sys.stdin.readline()
"""


def _status(pid: int, file: str, *names: str) -> int:
    """Sum of some fields of /proc/PID/<file>, in bytes."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.split(":")[0] in names)


def _sample(pid: int) -> tuple[int, int]:
    """Anonymous and private bytes."""
    return _status(pid, "smaps_rollup", "Anonymous"), _status(pid, "smaps_rollup", "Private_Clean", "Private_Dirty")


def write_snapshot(folder: Path, mib: int, kind: str) -> tuple[str, int]:
    """One table of `mib` MiB; returns the snapshot's uri and its number of rows."""
    rows = mib * 2**20 // (4 * DIM)
    if kind == "sparse":
        header = json.dumps(
            {NAME: {"dtype": "F32", "shape": [rows, DIM], "data_offsets": [0, rows * DIM * 4]}}
        ).encode()
        with (folder / "snapshot.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + rows * DIM * 4)
        return str(folder / "snapshot.safetensors"), rows
    tensor = torch.empty(rows, DIM)
    for start in range(0, rows, 65536):
        tensor[start : start + 65536].normal_()
    state = {NAME: tensor}
    if kind in ("dcp", "dcp_safetensors"):
        writer = checkpoint.FileSystemWriter if kind == "dcp" else checkpoint.HuggingFaceStorageWriter
        options = {} if kind == "dcp" else {"save_distributed": True}
        checkpoint.save(state, storage_writer=writer(str(folder / "1"), **options), no_dist=True)
        return str(folder / "1"), rows
    if kind == "torchsnapshot":
        import torchsnapshot

        torchsnapshot.Snapshot.take(str(folder / "1"), {"model": torchsnapshot.StateDict(**state)})
        return str(folder / "1"), rows
    if kind == "state_dict":
        torch.save(state, folder / "snapshot.pt")
        return str(folder / "snapshot.pt"), rows
    save_file(state, folder / "snapshot.safetensors")
    return str(folder / "snapshot.safetensors"), rows


# Two calls of S3, object and listing, over the files of a folder. moto, with which the tests build from S3, holds objects in
# memory and takes minutes for the ranges of 2 GiB.
_S3 = """
import sys, xml.sax.saxutils
from pathlib import Path
from aiohttp import web

folder = Path(sys.argv[1])

async def list_objects(request):
    prefix = request.query.get("prefix", "")
    entries = "".join(
        f"<Contents><Key>{xml.sax.saxutils.escape(path.name)}</Key><Size>{path.stat().st_size}</Size>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;e&quot;</ETag></Contents>"
        for path in sorted(folder.iterdir()) if path.name.startswith(prefix)
    )
    text = f"<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    return web.Response(text=text, content_type="application/xml")

async def read_object(request):
    path = folder / request.match_info["key"]
    if not path.is_file():
        return web.Response(status=404, text="<Error><Code>NoSuchKey</Code></Error>", content_type="application/xml")
    return web.FileResponse(path)

async def start():
    app = web.Application()
    app.add_routes([web.get("/bucket", list_objects), web.get("/bucket/{key:.+}", read_object)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)

import asyncio
loop = asyncio.new_event_loop()
loop.run_until_complete(start())
loop.run_in_executor(None, lambda: (sys.stdin.read(), loop.call_soon_threadsafe(loop.stop)))
loop.run_forever()
"""


@contextmanager
def served_by_s3(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A server in a process of its own that has the file as an object of S3; its uri, and the environment to reach it."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with subprocess.Popen(
        [sys.executable, "-c", _S3, str(file.parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        environment = keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}"}
        yield f"s3://bucket/{file.name}", environment
        server.communicate()


def measure(folder: Path, mib: int, kind: str, precision: str, limit_mib: int) -> dict[str, float | int | str]:
    """Builds once and returns the peaks in MiB and the seconds."""
    uri, rows = write_snapshot(folder, mib, kind)
    if kind != "s3":
        return _measure(folder, mib, kind, precision, limit_mib, uri, rows, {})
    with served_by_s3(Path(uri)) as (remote, environment):
        return _measure(folder, mib, kind, precision, limit_mib, remote, rows, environment)


def _measure(
    folder: Path,
    mib: int,
    kind: str,
    precision: str,
    limit_mib: int,
    uri: str,
    rows: int,
    environment: dict[str, str],
) -> dict[str, float | int | str]:
    table = {"name": "table", "num_embeddings": rows, "embedding_dim": DIM, "data_type": "fp32"}
    config = folder / "release.yaml"
    serving: dict[str, object] = {"precision": precision}
    if precision == "auto":
        serving["auto"] = {"max_bytes": 2 * rows * DIM}
    document = {"large_embeddings": {"tables": [table]}, "snapshot": {"uri": uri}, "serving": serving}
    config.write_text(json.dumps(document))
    command = [sys.executable, "-c", _CHILD, str(config), str(folder / "artifact")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise SystemExit("error: the build process could not import export")
        before, peak = _sample(child.pid), _status(child.pid, "status", "VmHWM")
        child.stdin.write(f"{limit_mib << 20}\n")
        child.stdin.flush()
        start = time.monotonic()
        anonymous, private = before
        while not select.select([child.stdout], [], [], 0.01)[0]:  # until it prints `done`
            try:
                now = _sample(child.pid)
            except (FileNotFoundError, ProcessLookupError):
                break  # it failed
            anonymous, private = max(anonymous, now[0]), max(private, now[1])
        if child.stdout.readline().strip() != "done":
            raise SystemExit(f"error: the build from {kind} of {mib} MiB failed")
        seconds = time.monotonic() - start
        result: dict[str, float | int | str] = {
            "kind": kind,
            "precision": precision,
            "table_mib": mib,
            "limit_mib": limit_mib,
            "anonymous_mib": round((anonymous - before[0]) / 2**20, 1),
            "private_mib": round((private - before[1]) / 2**20, 1),
            "vmhwm_mib": round((_status(child.pid, "status", "VmHWM") - peak) / 2**20, 1),
            "seconds": round(seconds, 1),
        }
        child.stdin.write("end\n")
        child.stdin.flush()
    return result


def main() -> None:
    """Prints one JSON line on the machine, then one a build; exit code 1 where a peak is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, nargs="+", default=[256, 2048], help="table sizes (default: 256 2048)")
    parser.add_argument(
        "--kinds", nargs="+", default=KINDS, help=f"of {', '.join(KINDS)}, sparse (default: all but sparse)"
    )
    parser.add_argument("--precisions", nargs="+", default=["fp16"], help="of the stored rows, or auto (default: fp16)")
    parser.add_argument("--limit-mib", type=int, default=0, help="private memory that the kernel allows the build")
    parser.add_argument(
        "--folder", type=lambda text: Path(text).resolve(), help="where to write (default: the temporary folder)"
    )
    options = parser.parse_args()
    environment = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), **environment}), flush=True)
    failed = False
    for kind, precision, mib in itertools.product(options.kinds, options.precisions, options.mib):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            result = measure(Path(folder), mib, kind, precision, options.limit_mib)
        print(json.dumps(result), flush=True)
        # Of a sparse table the kernel's own limit is the judge: VmHWM has pages of the mapped artifact, too.
        failed |= kind != "sparse" and float(result["vmhwm_mib"]) > LIMIT_MIB
    if failed:
        raise SystemExit(f"error: more than {LIMIT_MIB} MiB")


if __name__ == "__main__":
    main()
