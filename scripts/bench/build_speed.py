#!/usr/bin/env python
"""Time of a build beside `cp`, for one fp32 table that lies in the page cache, in each precision and number of workers.

Each round copies the snapshot (`cp SNAPSHOT COPY && sync COPY`) and builds from it in every way, one after the other, so that
all see the same machine. What counts of a build is rows (reading, all checks of values, the comparison with the independent
derivation and the accuracy figures of every row, digests, writing, fsync), the reading that compares the finished file's
digests, and publishing; graph export and the parity of lookups are left out.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from build_memory import DIM, write_snapshot

from export import build_artifact, load_config
from export.config import Precision, ReleaseConfig

COUNTED = ("rows", "digests", "publish")


def copy_seconds(snapshot: Path, copy: Path) -> float:
    """`cp SNAPSHOT COPY && sync COPY`, and the copy removed."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", snapshot, copy], check=True)
    files = [path for path in copy.rglob("*") if path.is_file()] if copy.is_dir() else [copy]
    subprocess.run(["sync", *files], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
    return seconds


def build_seconds(
    config: ReleaseConfig, output: Path, precision: str, workers: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by phase, and of the rows phase by stage (summed over workers); the artifact is removed."""
    serving = config.serving.model_copy(update={"precision": Precision(precision)})
    result = build_artifact(config.model_copy(update={"serving": serving}), output, workers=workers)
    shutil.rmtree(output)
    return result.seconds, result.stage_seconds


def _without_examine(seconds: dict[str, float], stages: dict[str, float]) -> float:
    """What a build would take without parity question 1 and the accuracy figures, by their share of the workers' time."""
    share = stages["examine"] / sum(stages.values())
    return sum(seconds[phase] for phase in COUNTED) - share * seconds["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=2048, help="table size (default: 2048)")
    parser.add_argument(
        "--kind", default="dcp", help="dcp, dcp_safetensors, torchsnapshot, safetensors or state_dict (default: dcp)"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precisions", nargs="+", default=["fp16"], help="the first is what others are compared with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=lambda text: Path(text).resolve(), help="where to write (default: the temporary folder)"
    )
    options = parser.parse_args()
    environment = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), **environment, "mib": options.mib, "kind": options.kind}))
    copies: list[float] = []
    kinds = [(precision, count) for precision in options.precisions for count in options.workers]
    builds: dict[tuple[str, int], list[tuple[dict[str, float], dict[str, float]]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        uri, rows = write_snapshot(folder, options.mib, options.kind)
        snapshot = Path(uri)
        os.sync()
        table = {"name": "table", "num_embeddings": rows, "embedding_dim": DIM, "data_type": "fp32"}
        path = folder / "release.yaml"
        path.write_text(json.dumps({"large_embeddings": {"tables": [table]}, "snapshot": {"uri": str(snapshot)}}))
        config = load_config(path)
        build_seconds(config, folder / "artifact", *kinds[0])  # warms caches and imports; not counted
        for _ in range(options.rounds):
            copies.append(copy_seconds(snapshot, folder / "copy"))
            for precision, count in kinds:
                builds[precision, count].append(build_seconds(config, folder / "artifact", precision, count))
    copy = statistics.median(copies)
    print(f"cp and sync: median {copy:.2f} s of {', '.join(f'{seconds:.2f}' for seconds in copies)}")
    rows_seconds = {kind: statistics.median(seconds["rows"] for seconds, _ in runs) for kind, runs in builds.items()}
    for (precision, count), runs in builds.items():
        totals = [sum(seconds[phase] for phase in COUNTED) for seconds, _ in runs]
        median = statistics.median(totals)
        listed = ", ".join(f"{seconds:.2f}" for seconds in totals)
        print(f"build, {precision}, workers {count}: median {median:.2f} s of {listed}: {median / copy:.2f} of cp")
        without = statistics.median(_without_examine(*run) for run in runs)
        print(
            f"  without the comparison of rows and the figures (examine): {without:.2f} s: {without / copy:.2f} of cp"
        )
        for phase in COUNTED:
            print(f"  {phase:<10} {statistics.median(seconds[phase] for seconds, _ in runs):6.2f} s")
        stages = {stage: statistics.median(each[stage] for _, each in runs) for stage in runs[0][1]}
        share = sum(stages.values())
        speed = rows_seconds[options.precisions[0], count] / rows_seconds[precision, count]
        rate = options.mib / 1024 / rows_seconds[precision, count]
        print(f"  rows at {rate:.2f} GiB/s of fp32, {speed:.2f} of the speed of {options.precisions[0]}")
        print("  of the workers' time in rows: " + ", ".join(f"{s} {t / share:.0%}" for s, t in stages.items()))


if __name__ == "__main__":
    main()
