"""Canonical rows to padded ones, chunk by chunk, on their way to a GPU.

The rows come from the read-only mapping. To the device they go through page-locked buffers, a fixed number of them, each
filled by one thread while the device copies others; where the device shares memory with the host, threads pad them right
into it. Memory stays bounded: buffers are used again, and pages of the mapping are let go.

FBGEMM's CUDA kernels decode int8 and int4 rows in fp16: `fma(code * 2**-9, scale * 512, bias)`, rounded once
(`dequantize_permuted_int8` and `_int4` in its vecn.cuh). Rows whose numbers are beyond that are refused on their way.

Nothing here needs a GPU: a destination on the CPU is filled the same way, and tests read it back.
"""

import mmap
from collections.abc import Iterator, Mapping
from queue import SimpleQueue

import numpy as np
import torch

from runtime_py.device_layout import DeviceLayout, PlacedTable
from runtime_py.errors import UnsupportedError
from runtime_py.manifest import ROW_FORMATS, Table
from runtime_py.parallel import map_ordered

__all__ = ["CHUNK_BYTES", "check_decodable", "copy_rows", "pad_rows", "padded_rows", "strip_rows"]

CHUNK_BYTES = 4 << 20
_RELEASE_BYTES = 256 << 20
_BUFFERS_A_THREAD = 2  # one is filled while the device copies the other
_FP16_MOST = 65504.0
_MOST_SCALE = _FP16_MOST / 512


def pad_rows(rows: torch.Tensor, padded: torch.Tensor) -> None:
    """Writes uint8 [n, R] into uint8 [n, R'], zeros behind each row; both on the CPU.

    By numpy, whose copies run on one thread and leave the interpreter to others: the chunks are what runs in parallel.
    """
    source, target = rows.numpy(), padded.numpy()
    target[:, : source.shape[1]] = source
    target[:, source.shape[1] :] = 0


def check_decodable(table: Table, rows: torch.Tensor, first: int) -> None:
    """Refuses quantized rows that a GPU would decode to something else than a number.

    Args:
        table: what `rows` are of.
        rows: canonical, uint8 [n, R], on the CPU.
        first: the number of the first of them.

    Raises:
        UnsupportedError: naming the row.
    """
    row_format = ROW_FORMATS[table.serving_precision]
    if not row_format.scale_bias_bytes:
        return
    halves = rows[:, : row_format.scale_bias_bytes].contiguous().numpy().view(np.float16)
    scale, bias = halves.T.astype(np.float64)  # in which `top` is exact
    with np.errstate(invalid="ignore"):
        top = bias + scale * ((1 << row_format.bits) - 1)
    fine = (np.abs(scale) <= _MOST_SCALE) & (np.abs(bias) <= _FP16_MOST) & (np.abs(top) <= _FP16_MOST)  # no NaN, either
    if not fine.all():
        row = int(np.flatnonzero(~fine)[0])
        raise UnsupportedError(
            f"table '{table.name}', row {first + row}: {table.serving_precision} with scale {scale[row]:g} and bias "
            f"{bias[row]:g}, which FBGEMM's CUDA kernel cannot decode, as it does so in fp16 (a scale up to "
            f"{_MOST_SCALE:g}, values up to {_FP16_MOST:g}); use device='cpu', or build it with serving_precision fp32"
        )


def padded_rows(memory: torch.Tensor, placed: PlacedTable) -> torch.Tensor:
    """uint8 [E, R'], a view of a table's padded rows in the memory that holds them."""
    end = placed.offset_bytes + placed.bytes
    return memory[placed.offset_bytes : end].view(placed.table.num_embeddings, placed.row_bytes)


def strip_rows(padded: torch.Tensor, row_bytes: int) -> torch.Tensor:
    """The canonical rows uint8 [n, R] of padded ones, a copy."""
    return padded[:, :row_bytes].contiguous()


class _Buffer:
    """Host memory that is filled again and again, page-locked where it feeds a GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self.memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Returns when the device has read what it was sent."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, filled: torch.Tensor, destination: torch.Tensor) -> None:
        """Copies `filled`, a part of this buffer, without waiting for it."""
        if self.device.type != "cuda":
            destination.copy_(filled)
            return
        with torch.cuda.device(self.device):
            destination.copy_(filled, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()


def copy_rows(
    data: torch.Tensor,
    mapping: mmap.mmap | None,
    layout: DeviceLayout,
    memories: Mapping[str, torch.Tensor],
    threads: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> int:
    """Copies and pads every table of `layout`, and returns the bytes that were written.

    On a GPU the copies have ended when this returns.

    Args:
        data: uint8, the mapped canonical rows.
        mapping: what `data` is in, whose pages are let go now and then.
        layout: where the tables go.
        memories: by location, uint8: "device" on the device, "uvm" and "uvm_cache" a view of shared memory on the CPU.
        threads: how many read and pad.
        chunk_bytes: the largest part that is copied at a time; a row may be larger.

    Raises:
        UnsupportedError: a row cannot be decoded there (`check_decodable`).
    """
    device = memories["device"].device
    total = released = 0
    buffers: SimpleQueue[_Buffer] = SimpleQueue()
    largest = max((placed.row_bytes for placed in layout.tables.values()), default=0)
    if any(placed.location == "device" for placed in layout.tables.values()):
        for _ in range(_BUFFERS_A_THREAD * threads):
            buffers.put(_Buffer(max(chunk_bytes, largest), device))

    for placed in layout.tables.values():
        rows = _canonical_rows(data, placed.table)
        destination = padded_rows(memories[placed.location], placed)
        staged = placed.location == "device"

        def copy(
            piece: slice,
            table: Table = placed.table,
            rows: torch.Tensor = rows,
            destination: torch.Tensor = destination,
            staged: bool = staged,
        ) -> int:
            target = destination[piece]
            check_decodable(table, rows[piece], piece.start)
            if staged:
                buffer = buffers.get()
                buffer.wait()
                filled = buffer.memory[: target.numel()].view(target.shape)
                pad_rows(rows[piece], filled)
                buffer.send(filled, target)
                buffers.put(buffer)
            else:
                pad_rows(rows[piece], target)
            return target.numel()

        for copied in map_ordered(copy, _pieces(placed, chunk_bytes), threads):
            total += copied
            if mapping is not None and total >= released + _RELEASE_BYTES:
                mapping.madvise(mmap.MADV_DONTNEED)
                released = total
    if mapping is not None:
        mapping.madvise(mmap.MADV_DONTNEED)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return total


def _canonical_rows(data: torch.Tensor, table: Table) -> torch.Tensor:
    return data[table.offset_bytes : table.offset_bytes + table.bytes].view(table.num_embeddings, table.row_bytes)


def _pieces(placed: PlacedTable, chunk_bytes: int) -> Iterator[slice]:
    rows = max(1, chunk_bytes // placed.row_bytes)
    for start in range(0, placed.table.num_embeddings, rows):
        yield slice(start, min(start + rows, placed.table.num_embeddings))
