#!/usr/bin/env python
"""Time of our ONNX graph beside what `torch.onnx.export` makes of the same `nn.EmbeddingBag`s, both in ONNX Runtime.

Every round runs each graph once, one after the other, so that all see the same machine; the figures are medians. The
exported graphs get the ids of each table and its offsets apart, so that they are spared what ours does to find bags. The
TorchScript graph is there for orientation. `dynamo=True` needs onnxscript (`pip install onnxscript`); without it that line
says so. fp16 modules look rows up and add them in fp16.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime
import torch

from export.lookup import OPERATOR_LIBRARIES, make_lookup
from export.onnx_graph import write_onnx
from runtime_py.digests import ROWS, Digest
from runtime_py.manifest import ROW_FORMATS, WEIGHTS, Feature, ServingPrecision, Table
from runtime_py.operators import load_operators
from runtime_py.tensor_file import encode_header, layout_tables

DIM = 64
WARM_UP = 2  # rounds; TorchScript's first two calls are slow
Run = Callable[[], np.ndarray]


class Bags(torch.nn.Module):
    """The same lookup as users have it: an EmbeddingBag a table."""

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.bags = torch.nn.ModuleList(
            torch.nn.EmbeddingBag.from_pretrained(table, mode="sum", include_last_offset=True) for table in rows
        )

    def forward(self, values: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        parts = zip(self.bags, values, offsets, strict=True)
        return torch.cat([bag(ids, starts) for bag, ids, starts in parts], dim=1)


def make_tables(count: int, rows: int, precision: ServingPrecision) -> list[Table]:
    def table(number: int, offset: int) -> Table:
        row_bytes = ROW_FORMATS[precision].row_bytes(DIM)
        return Table(f"t{number:03}", rows, DIM, precision, row_bytes, offset, Digest(ROWS, "0" * 64))

    offsets = list(layout_tables([table(number, 0) for number in range(count)]).values())
    return [table(number, offset) for number, offset in enumerate(offsets)]  # by name, as they lie in the file


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # the exported models come with warnings
    return onnxruntime.InferenceSession(path, options)


def export_bags(
    rows: Sequence[torch.Tensor], values: list[torch.Tensor], offsets: list[torch.Tensor], path: Path, *, dynamo: bool
) -> list[str]:
    """Exports `Bags`; returns the names of its inputs, first the values of all tables, then the offsets."""
    names = [f"{kind}{number}" for kind in ("values", "offsets") for number in range(len(rows))]
    dynamic = [{0: torch.export.Dim.DYNAMIC}] * len(rows)
    options = {"dynamic_axes": {name: {0: name} for name in names}, "opset_version": 18}
    if dynamo:
        options = {"dynamic_shapes": {"values": dynamic, "offsets": dynamic}, "external_data": False, "verbose": False}
    torch.onnx.export(
        Bags(rows).eval(), (values, offsets), path, dynamo=dynamo, input_names=names, output_names=["pooled"], **options
    )
    return names


def contenders(
    tables: Sequence[Table], batch: int, mean_length: int, threads: int, folder: Path
) -> dict[str, Run | str]:
    """By name: what runs one batch, or why there is nothing to run."""
    rng = np.random.default_rng(0)
    dtype = {"fp32": np.float32, "fp16": np.float16}[tables[0].serving_precision]
    rows = [rng.standard_normal((table.num_embeddings, DIM)).astype(dtype) for table in tables]
    lengths = rng.integers(0, 2 * mean_length + 1, (len(tables), batch)).astype(np.int32)
    ids = [rng.integers(0, tables[0].num_embeddings, count) for count in lengths.sum(1)]
    values, flat = np.concatenate(ids), lengths.reshape(-1)
    torch_ids = [torch.from_numpy(part) for part in ids]
    offsets = [torch.from_numpy(np.concatenate([[0], np.cumsum(part)])) for part in lengths]
    features = [Feature(table.name, table.name, "sum", False) for table in tables]

    header, data = encode_header(tables), b"".join(table.tobytes() for table in rows)
    (folder / WEIGHTS).parent.mkdir()
    (folder / WEIGHTS).write_bytes(header + data)
    write_onnx(tables, features, len(header), folder / "model.onnx")
    session = open_session(folder / "model.onnx", threads)
    ours = {"values": values, "lengths": flat}
    lookup = make_lookup(tables, features)
    lookup.weights = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    scripted = torch.jit.script(lookup)
    inputs = torch.from_numpy(values), torch.from_numpy(flat)
    runs: dict[str, Run | str] = {
        "this project's ONNX graph": lambda: cast(np.ndarray, session.run(None, ours)[0]),
        "TorchScript graph": lambda: scripted(*inputs).numpy(),
    }
    for dynamo in (False, True):
        name = f"torch.onnx.export(dynamo={dynamo})"
        path = folder / f"exported_{dynamo}.onnx"
        try:
            names = export_bags([torch.from_numpy(table) for table in rows], torch_ids, offsets, path, dynamo=dynamo)
            exported = open_session(path, threads)
            feed = dict(zip(names, [*ids, *(part.numpy() for part in offsets)], strict=True))
            exported.run(None, feed)
        except Exception as error:  # whatever it is, it is that line's result
            runs[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        else:
            runs[name] = lambda exported=exported, feed=feed: exported.run(None, feed)[0]  # type: ignore[misc]
    return runs


def compare(title: str, runs: dict[str, Run | str], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name, run in runs.items() if callable(run)}
    outputs: dict[str, np.ndarray] = {}
    for number in range(rounds + WARM_UP):
        for name in seconds:
            run = cast(Run, runs[name])
            start = time.perf_counter()
            outputs[name] = run()
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    print(f"\n{title}\n{'':32}{'median ms':>10}{'min':>9}{'max':>9}{'x ours':>8}  largest difference from TorchScript")
    ours = statistics.median(seconds["this project's ONNX graph"])
    for name, run in runs.items():
        if isinstance(run, str):
            print(f"{name:32}{run}")
            continue
        median = statistics.median(seconds[name])
        difference = np.abs(outputs[name].astype(np.float64) - outputs["TorchScript graph"]).max()
        figures = [f"{1000 * value:9.2f}" for value in (median, min(seconds[name]), max(seconds[name]))]
        print(f"{name:32} {''.join(figures)}{median / ours:8.2f}  {difference:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, nargs="+", default=[26, 1], help="numbers of tables (default: 26 1)")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "fp16"], default=["fp32", "fp16"])
    parser.add_argument("--rows", type=int, default=20_000, help="rows of a table (default: 20000)")
    parser.add_argument("--batch", type=int, default=4096, help="bags of each table (default: 4096)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 1], help="mean ids in a bag (default: 10 1)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of every graph (default: 1)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # torch, about its exporters
    torch.set_num_threads(arguments.threads)
    load_operators(OPERATOR_LIBRARIES)
    for count in arguments.tables:
        for precision in arguments.precisions:
            for length in arguments.lengths:
                with tempfile.TemporaryDirectory() as folder:
                    tables = make_tables(count, arguments.rows, cast(ServingPrecision, precision))
                    runs = contenders(tables, arguments.batch, length, arguments.threads, Path(folder))
                    title = (
                        f"{count} tables x {arguments.rows} {precision} rows x {DIM}, {arguments.batch} bags each, "
                        f"0 to {2 * length} ids in a bag, {arguments.threads} thread(s)"
                    )
                    compare(title, runs, arguments.rounds)


if __name__ == "__main__":
    main()
