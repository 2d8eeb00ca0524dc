"""Rows on their way to a GPU: padded chunk by chunk, in bounded memory; read back, they are the canonical ones."""

import mmap
import tempfile

import numpy as np
import pytest
import torch
from device_support import describe
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime_py import UnsupportedError, device_rows
from runtime_py.device_layout import DeviceLayout, plan_layout
from runtime_py.device_rows import check_decodable, copy_rows, pad_rows, padded_rows, strip_rows
from runtime_py.manifest import ROW_FORMATS, Manifest

TABLES = {
    "fp32": (37, 3, "fp32"),
    "fp16": (1001, 33, "fp16"),
    "int8": (64, 66, "int8"),
    "int4": (5, 12, "int4"),
    "odd": (99, 20, "int4"),
    "aligned": (300, 16, "fp16"),
    "one": (1, 1, "fp16"),
}


def random_data(manifest: Manifest) -> torch.Tensor:
    """Random bytes; of a quantized row scale and bias are small."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, 256, manifest.weights_bytes, np.uint8)
    for table in manifest.tables:
        if ROW_FORMATS[table.serving_precision].scale_bias_bytes:
            rows = drawn[table.offset_bytes : table.offset_bytes + table.bytes].reshape(table.num_embeddings, -1)
            rows[:, :4] = generator.uniform(0, 1, (table.num_embeddings, 2)).astype(np.float16).view(np.uint8)
    return torch.from_numpy(drawn)


def check_read_back(manifest: Manifest, data: torch.Tensor, layout: DeviceLayout, memories: dict) -> None:
    for name, placed in layout.tables.items():
        table = placed.table
        padded = padded_rows(memories[placed.location], placed)
        assert padded.shape == (table.num_embeddings, placed.row_bytes)
        canonical = data[table.offset_bytes : table.offset_bytes + table.bytes].view(table.num_embeddings, -1)
        assert torch.equal(strip_rows(padded, table.row_bytes), canonical), name
        assert not padded[:, table.row_bytes :].any(), name


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [1, 100, 1000, 1 << 20])
def test_rows_that_are_read_back_are_the_canonical_ones(threads: int, chunk_bytes: int) -> None:
    manifest = describe(TABLES)
    layout = plan_layout(manifest, "device", 1 << 30)
    data = random_data(manifest)
    memory = torch.full((layout.device_bytes,), 0xAA, dtype=torch.uint8)
    written = copy_rows(data, None, layout, {"device": memory}, threads, chunk_bytes)
    assert written == sum(placed.bytes for placed in layout.tables.values())
    check_read_back(manifest, data, layout, {"device": memory})
    outside = torch.ones(layout.device_bytes, dtype=torch.bool)
    for placed in layout.tables.values():
        outside[placed.offset_bytes : placed.offset_bytes + placed.bytes] = False
    assert torch.equal(memory[outside], torch.full_like(memory[outside], 0xAA))  # nothing is written between tables


@pytest.mark.parametrize("placement", ["uvm", "uvm_cache"])
def test_shared_memory_is_filled_in_its_own_tensor(placement) -> None:
    manifest = describe(TABLES)
    layout = plan_layout(manifest, placement, 60_000)
    assert {placed.location for placed in layout.tables.values()} == {"device", placement}
    data = random_data(manifest)
    memories = {"device": torch.zeros(layout.device_bytes, dtype=torch.uint8)}
    memories[placement] = torch.zeros(layout.uvm_bytes, dtype=torch.uint8)
    copy_rows(data, None, layout, memories, 2, 500)
    check_read_back(manifest, data, layout, memories)


def test_no_more_buffers_are_made_than_threads_need_whatever_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(device_rows._Buffer):
        def __init__(self, size: int, device: torch.device) -> None:
            made.append(size)
            super().__init__(size, device)

    monkeypatch.setattr(device_rows, "_Buffer", Counted)
    manifest = describe({"large": (100_000, 33, "fp16")})
    layout = plan_layout(manifest, "device", 1 << 30)
    data = random_data(manifest)
    memory = torch.empty(layout.device_bytes, dtype=torch.uint8)
    copy_rows(data, None, layout, {"device": memory}, 2, 1000)
    assert made == [1000] * 4
    check_read_back(manifest, data, layout, {"device": memory})


def decode_as_cuda(codes: np.ndarray, scale: np.float16, bias: np.float16) -> np.ndarray:
    """`dequantize_permuted_int8` of FBGEMM's vecn.cuh: fma(code * 2**-9, scale * 512, bias) in fp16, rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):
        factor = np.float64(np.float16(scale * np.float16(512)))
        return (codes * 2.0**-9 * factor + np.float64(bias)).astype(np.float16)


scales_and_biases = st.tuples(*[st.floats(width=16)] * 2)


@given(pair=scales_and_biases, precision=st.sampled_from(["int8", "int4"]), bad_row=st.integers(0, 4))
@example(pair=(127.9375, 0.0), precision="int8", bad_row=0)
@example(pair=(128.0, 0.0), precision="int8", bad_row=1)
@example(pair=(128.0, -1920.0), precision="int4", bad_row=2)
@example(pair=(1.0, 65504.0), precision="int4", bad_row=3)
@example(pair=(-(2.0**-14), -65504.0), precision="int4", bad_row=0)  # beyond it by less than a step of float32
@settings(max_examples=300, deadline=None)
def test_what_a_gpu_decodes_to_no_number_is_refused_and_nothing_else(pair, precision, bad_row) -> None:
    (table,) = describe({"t": (5, 8, precision)}).tables
    row_format = ROW_FORMATS[precision]
    rows = np.zeros((5, table.row_bytes), np.uint8)
    rows[bad_row, :4] = np.array(pair, np.float16).view(np.uint8)
    scale, bias = np.array(pair, np.float16)
    decoded = decode_as_cuda(np.arange(1 << row_format.bits), scale, bias)
    fits = (
        abs(float(scale) * ((1 << row_format.bits) - 1) + float(bias)) <= 65504
    )  # beyond it by less than half a step rounds
    if np.isfinite(decoded).all() and fits:
        check_decodable(table, torch.from_numpy(rows), 1000)
    else:
        with pytest.raises(
            UnsupportedError, match=rf"^table 't', row {1000 + bad_row}: {precision} with scale .* use device="
        ):
            check_decodable(table, torch.from_numpy(rows), 1000)


def test_a_row_that_cannot_be_decoded_ends_the_copy_with_its_number() -> None:
    manifest = describe(TABLES)
    layout = plan_layout(manifest, "device", 1 << 30)
    data = random_data(manifest)
    table = manifest.table["int8"]
    start = table.offset_bytes + 41 * table.row_bytes
    data[start : start + 4] = torch.from_numpy(np.array([156.9, -20000], np.float16).view(np.uint8))
    text = r"^table 'int8', row 41: int8 with scale 156\.875 and bias -20000, which FBGEMM's CUDA kernel cannot decode"
    with pytest.raises(UnsupportedError, match=text):
        copy_rows(data, None, layout, {"device": torch.empty(layout.device_bytes, dtype=torch.uint8)}, 2, 1000)


def test_a_row_longer_than_a_chunk_is_copied_alone() -> None:
    rows, padded = torch.arange(20, dtype=torch.uint8).view(2, 10), torch.full((2, 16), 7, dtype=torch.uint8)
    pad_rows(rows, padded)
    assert padded.tolist() == [[*range(10), *[0] * 6], [*range(10, 20), *[0] * 6]]


def test_pages_of_the_mapping_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rows, "_RELEASE_BYTES", 1 << 20)
    manifest = describe({"large": (1 << 18, 33, "fp16")})
    layout = plan_layout(manifest, "device", 1 << 30)
    with tempfile.TemporaryFile() as file:
        file.write(random_data(manifest).numpy().tobytes())
        file.flush()
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data = torch.frombuffer(mapping, dtype=torch.uint8)
        memory = torch.zeros(layout.device_bytes, dtype=torch.uint8)
        before = resident_file_bytes()
        copy_rows(data, mapping, layout, {"device": memory}, 1)
        assert resident_file_bytes() < before + (2 << 20)
        check_read_back(manifest, data, layout, {"device": memory})
        assert resident_file_bytes() > before + (10 << 20)  # what reading it without letting go takes


def resident_file_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssFile"))
