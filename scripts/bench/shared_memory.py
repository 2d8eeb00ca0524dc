#!/usr/bin/env python
"""Memory of processes that serve one artifact, each through another graph: all of them together hold one copy of the rows.

It builds an artifact with every graph, starts one process a graph, and has each of them look up every row of every table.
Then it reads /proc/PID/smaps. Of each process it prints the mappings of the weight file, how much of them is resident, how
much of that is anonymous (copied), and its proportional set size (PSS: its own pages, and its share of those that several
processes map), in the weight file and elsewhere, which is the interpreter, torch or ONNX Runtime, and FBGEMM. The same
processes over an artifact of a few rows tell what the rows add.

`onnx one mapping` is ONNX Runtime given views of one mapping (SessionOptions.add_initializer) instead of files to map. With
--cpp-server, the example server of runtime_cpp, the same is measured of two processes without Python.

Exit code 1 where a process has copied rows, or where TorchScript and AOTInductor together grow by more than 1.15 times the
rows.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from export import build_artifact
from runtime_py.manifest import WEIGHTS
from runtime_py.manifest_reader import read_manifest

DIM = 64
TABLES = 4
TORCH = ("torchscript", "aot_inductor")
SERVERS = (*TORCH, "onnx", "onnx one mapping")
CPP = tuple(f"{backend} C++" for backend in TORCH)
LIMIT = 1.15
_ROUNDS = 30

_TORCH_SERVER = """
import torch
from runtime_py import load_artifact
torch.set_num_threads(1)
artifact = load_artifact(folder, backend=server)
def lookup(values, lengths):
    artifact.lookup(torch.from_numpy(values), torch.from_numpy(lengths))
"""
_ONNX_SERVER = """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
if server == "onnx one mapping":
    with open(f"{folder}/weights/tables.safetensors", "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    types = {"fp32": np.float32, "fp16": np.float16}
    kept = []  # ONNX Runtime has their addresses
    for table in manifest["tables"]:
        shape = table["num_embeddings"], table["embedding_dim"]
        start = manifest["weights_offset_bytes"] + table["offset_bytes"]
        rows = np.frombuffer(mapping, types[table["serving_precision"]], shape[0] * shape[1], start).reshape(shape)
        kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(rows))
        options.add_initializer(f"tables/{table['name']}", kept[-1])
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
def lookup(values, lengths):
    session.run(None, {"values": values, "lengths": lengths})
"""
_SERVER = """
import json, mmap, sys
import numpy as np
folder, server = sys.argv[1:]
manifest = json.load(open(f"{folder}/manifest.json"))
%s
while True:
    for start in range(0, max(table["num_embeddings"] for table in manifest["tables"]), 4096):
        ids = [np.arange(start, min(start + 4096, table["num_embeddings"])) for table in manifest["tables"]]
        lookup(np.concatenate(ids), np.array([len(part) for part in ids], np.int32))
    print("ready", flush=True)
    if not sys.stdin.readline():
        break
"""


def make_artifact(folder: Path, mib: float) -> Path:
    """An artifact with every graph and `mib` MiB of fp16 rows."""
    folder.mkdir()
    rows = int(mib * 2**20 / TABLES / (2 * DIM))
    names = [f"table_{number}" for number in range(TABLES)]
    generator = torch.Generator().manual_seed(0)
    snapshot = {f"embedding_bags.{n}.weight": torch.randn(rows, DIM, generator=generator).half() for n in names}
    save_file(snapshot, folder / "snapshot.safetensors")
    tables = [{"name": n, "num_embeddings": rows, "embedding_dim": DIM, "data_type": "fp16"} for n in names]
    config = folder / "release.yaml"
    config.write_text(
        json.dumps(
            {
                "large_embeddings": {"tables": tables},
                "snapshot": {"uri": str(folder / "snapshot.safetensors")},
                "serving": {"graphs": [*TORCH, "onnx"]},
            }
        )
    )
    artifact = build_artifact(config, folder / "artifact", workers=2).artifact
    (folder / "snapshot.safetensors").unlink()
    return artifact


def read_memory(pid: int, weights: Path) -> dict[str, int]:
    """Of one process: mappings of the weight file, and bytes resident, anonymous and proportional in them and elsewhere."""
    found = {"mappings": 0, "rss": 0, "anonymous": 0, "weights": 0, "elsewhere": 0}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        field, *rest = line.split()
        if not field.endswith(":"):
            inside = line.endswith(str(weights))
            found["mappings"] += inside
        elif field == "Pss:":
            found["weights" if inside else "elsewhere"] += int(rest[0]) * 1024
        elif inside and field in ("Rss:", "Anonymous:"):
            found[field[:-1].lower()] += int(rest[0]) * 1024
    return found


def make_command(artifact: Path, server: str, cpp_server: Path | None) -> list[Any]:
    """What starts one process."""
    if server in CPP:
        operators = Path(sysconfig.get_path("purelib"), "fbgemm_gpu")
        command = [cpp_server, artifact, "--operators", operators, "--backend", server.removesuffix(" C++"), "load"]
        return [*command, "--seconds", 3600, "--bags", 8, "--ids", 240]  # random requests, enough to map every page
    return [sys.executable, "-c", _SERVER % (_TORCH_SERVER if server in TORCH else _ONNX_SERVER), artifact, server]


def serve(artifact: Path, servers: Sequence[str], cpp_server: Path | None = None) -> dict[str, dict[str, int]]:
    """What processes hold that serve the artifact at the same time and have looked up every row, by server."""
    weights = artifact / WEIGHTS
    rows_bytes = read_manifest(artifact).weights_bytes
    with ExitStack() as running:
        children = {}
        for server in servers:
            child = running.enter_context(
                subprocess.Popen(
                    list(map(str, make_command(artifact, server, cpp_server))),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL if server in CPP else None,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            )
            running.callback(child.kill)
            children[server] = child
        waiting = list(servers)
        for _ in range(_ROUNDS):
            for server in waiting:
                _wait(server, children[server])
            memory = {server: read_memory(child.pid, weights) for server, child in children.items()}
            waiting = [server for server in servers if memory[server]["rss"] < rows_bytes]
            if not waiting:
                return memory
            for server in waiting:  # the kernel has taken pages away: once more
                stdin = children[server].stdin
                assert stdin is not None
                stdin.write(b"again\n")
                stdin.flush()
    raise SystemExit(f"error: rows do not stay resident in {', '.join(waiting)}: too little memory")


def _wait(server: str, child: subprocess.Popen[bytes]) -> None:
    """Waits until a process has looked up all rows, or that goes on by itself for a second."""
    assert child.stdout is not None
    if server in CPP:
        time.sleep(1)
    if child.poll() is not None or (server not in CPP and child.stdout.readline() != b"ready\n"):
        raise SystemExit(f"error: the server {server} failed")


def measure(
    folder: Path, mib: float, groups: Sequence[Sequence[str]], cpp_server: Path | None = None
) -> list[dict[str, Any]]:
    """One entry a process of each group, which serves at the same time, beside what it holds with a few rows."""
    artifacts = {"rows": make_artifact(folder / "rows", mib), "few": make_artifact(folder / "few", 0.125)}
    size = (artifacts["rows"] / WEIGHTS).stat().st_size
    entries = []
    for servers in groups:
        few = serve(artifacts["few"], servers, cpp_server)
        for server, memory in serve(artifacts["rows"], servers, cpp_server).items():
            few_bytes = few[server]["weights"] + few[server]["elsewhere"]
            entries.append(
                {"group": "; ".join(servers), "server": server, "size": size, **memory, "few_rows": few_bytes}
            )
    return entries


def describe(entries: list[dict[str, Any]]) -> list[str]:
    """The table, and what it says."""
    lines = []
    for name in dict.fromkeys(entry["group"] for entry in entries):
        group = [entry for entry in entries if entry["group"] == name]
        mib = group[0]["size"] / 2**20
        lines.append(f"{len(group)} processes serve {mib:.1f} MiB of rows (MiB)")
        heads = [f"{head:>9}" for head in ("mappings", "resident", "copied")]
        heads += [f"{head:>10}" for head in ("PSS rows", "elsewhere")]
        lines.append("".join([" " * 17, *heads, *(f"{head:>9}" for head in ("PSS", "few rows", "added"))]))
        total = dict.fromkeys(("weights", "elsewhere", "few_rows"), 0)
        for entry in group:
            for key in total:
                total[key] += entry[key]
            lines.append(f"{entry['server']:<17}{entry['mappings']:>9}" + _columns(entry))
        lines.append(f"{'together':<17}{'':>9}" + _columns(total))
        literal = (total["weights"] + total["elsewhere"]) / group[0]["size"]
        added = literal - total["few_rows"] / group[0]["size"]
        lines.append(f"PSS together: {literal:.3f} times the rows; less what they hold with few rows: {added:.3f}\n")
    return lines


def _columns(entry: dict[str, int]) -> str:
    pss = entry["weights"] + entry["elsewhere"]
    cells = [entry.get("rss"), entry.get("anonymous")]
    text = "".join(f"{'' if cell is None else f'{cell / 2**20:.1f}':>9}" for cell in cells)
    text += "".join(f"{cell / 2**20:>10.1f}" for cell in (entry["weights"], entry["elsewhere"]))
    return text + "".join(f"{cell / 2**20:>9.1f}" for cell in (pss, entry["few_rows"], pss - entry["few_rows"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=float, default=1024, help="bytes of rows (default: 1024)")
    parser.add_argument(
        "--folder", type=lambda text: Path(text).resolve(), help="where to write (default: the temporary folder)"
    )
    parser.add_argument(
        "--cpp-server", type=Path, help="the built example server of runtime_cpp, to measure it as well"
    )
    options = parser.parse_args()
    groups = [TORCH, SERVERS, *([CPP] if options.cpp_server else [])]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        entries = measure(Path(name), options.mib, groups, options.cpp_server)
    environment = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), **environment}), *describe(entries), sep="\n")
    pair = [entry for entry in entries if entry["group"] == "; ".join(TORCH)]
    added = sum(entry["weights"] + entry["elsewhere"] - entry["few_rows"] for entry in pair)
    if added > LIMIT * pair[0]["size"] or any(entry["anonymous"] for entry in entries):
        raise SystemExit("error: the rows are held more than once")


if __name__ == "__main__":
    main()
