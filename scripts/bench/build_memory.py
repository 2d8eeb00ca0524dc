#!/usr/bin/env python
"""Memory of a build, for tables of several sizes: it must not grow with the table.

For each size it writes a snapshot with one fp32 table, builds an fp16 artifact from it in a process of its own, and
prints the most that the process held above what it held after its imports: anonymous memory (what it allocated),
private memory (that, and pages of the mapped artifact, which count as private while only one process maps it), both
sampled from /proc/PID/smaps_rollup, and VmHWM, the kernel's own peak of everything resident.
"""

import argparse
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint

DIM = 64
LIMIT_MIB = 512

_CHILD = """
import sys
from pathlib import Path
import export.build, export.parity, export.snapshots
print("ready", flush=True)
sys.stdin.readline()
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


def write_snapshot(folder: Path, mib: int, kind: str) -> tuple[Path, int]:
    """One table of `mib` MiB; returns the snapshot and its number of rows. Written with little memory of its own."""
    rows = mib * 2**20 // (4 * DIM)
    tensor = torch.empty(rows, DIM)
    for start in range(0, rows, 65536):
        tensor[start : start + 65536].normal_()
    state = {"model.embedding_bags.table.weight": tensor}
    if kind == "dcp":
        checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(folder / "1"), no_dist=True)
        return folder / "1", rows
    if kind == "state_dict":
        torch.save(state, folder / "snapshot.pt")
        return folder / "snapshot.pt", rows
    save_file(state, folder / "snapshot.safetensors")
    return folder / "snapshot.safetensors", rows


def measure(folder: Path, mib: int, kind: str) -> dict[str, float | int | str]:
    """Builds once and returns the peaks in MiB and the seconds."""
    snapshot, rows = write_snapshot(folder, mib, kind)
    table = {"name": "table", "num_embeddings": rows, "embedding_dim": DIM, "data_type": "fp32"}
    config = folder / "release.yaml"
    config.write_text(json.dumps({"large_embeddings": {"tables": [table]}, "snapshot": {"uri": str(snapshot)}}))
    command = [sys.executable, "-c", _CHILD, str(config), str(folder / "artifact")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise SystemExit("error: the build process could not import export")
        before, peak = _sample(child.pid), _status(child.pid, "status", "VmHWM")
        child.stdin.write("go\n")
        child.stdin.flush()
        start = time.monotonic()
        anonymous, private = before
        while not select.select([child.stdout], [], [], 0.01)[0]:  # until it prints `done`
            now = _sample(child.pid)
            anonymous, private = max(anonymous, now[0]), max(private, now[1])
        if child.stdout.readline().strip() != "done":
            raise SystemExit("error: the build failed")
        seconds = time.monotonic() - start
        result: dict[str, float | int | str] = {
            "kind": kind,
            "table_mib": mib,
            "anonymous_mib": round((anonymous - before[0]) / 2**20, 1),
            "private_mib": round((private - before[1]) / 2**20, 1),
            "vmhwm_mib": round((_status(child.pid, "status", "VmHWM") - peak) / 2**20, 1),
            "seconds": round(seconds, 1),
        }
        child.stdin.write("end\n")
        child.stdin.flush()
    return result


def main() -> None:
    """Prints one JSON line on the machine, then one a build; exit code 1 where private memory is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, nargs="+", default=[256, 2048], help="table sizes (default: 256 2048)")
    parser.add_argument("--kinds", nargs="+", default=["dcp", "safetensors", "state_dict"])
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    options = parser.parse_args()
    environment = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), **environment}), flush=True)
    failed = False
    for kind in options.kinds:
        for mib in options.mib:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                result = measure(Path(folder), mib, kind)
            print(json.dumps(result), flush=True)
            failed |= float(result["private_mib"]) > LIMIT_MIB
    if failed:
        raise SystemExit(f"error: more than {LIMIT_MIB} MiB of private memory")


if __name__ == "__main__":
    main()
