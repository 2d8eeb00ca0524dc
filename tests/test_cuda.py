"""An artifact on a CUDA device: what is refused where there is none, and, marked `gpu`, what a real one must do.

What is marked so has never run: no machine with a GPU was at hand. The same tests run "dry", with the CPU for the device, so
that they do not rot. `scripts/gpu/check` asks the same and more.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_support import load_on_cpu
from support import make_rows, state_dict, write_config
from test_device_artifact import bad_requests, draw, make_tables, refusal

from export import build_artifact
from runtime_py import Artifact, DeviceMemoryError, InvalidInputError, UnsupportedError, load_artifact
from runtime_py import cuda as runtime_cuda
from runtime_py.device_artifact import DeviceArtifact
from runtime_py.device_inputs import move
from runtime_py.device_rows import padded_rows, strip_rows
from runtime_py.operators import load_operators

NO_GPU = "needs a CUDA device, and torch finds none"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]


# --- Without a GPU -------------------------------------------------------------------------------------------------------


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_where_torch_has_no_cuda_device_that_is_said(built_artifact: Path, device: str) -> None:
    why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device here"
    text = f"device '{device}' was asked for, and {why} (torch {torch.__version__}); use device='cpu'"
    with pytest.raises(UnsupportedError, match=f"^{re.escape(text)}$"):
        load_artifact(built_artifact, device=device)


def test_what_is_for_a_gpu_is_a_mistake_on_a_cpu(built_artifact: Path) -> None:
    for options in ({"placement": "uvm"}, {"device_memory_bytes": 1}):
        with pytest.raises(ValueError, match="placement and device_memory_bytes are for a GPU, and device is 'cpu'"):
            load_artifact(built_artifact, **options)  # type: ignore[arg-type]


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there is one CUDA device with a gigabyte free; nothing may be done with it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 2 << 30))


@pytest.mark.usefixtures("one_device")
def test_a_device_is_found_by_its_number() -> None:
    assert runtime_cuda.find_device("cuda") == runtime_cuda.find_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(UnsupportedError, match=r"^device 'cuda:1' was asked for, and there are 1, from 'cuda:0' on$"):
        runtime_cuda.find_device("cuda:1")
    with pytest.raises(UnsupportedError, match=r"^device 'cuda:x' is none; use 'cuda', 'cuda:0' and so on, or 'cpu'$"):
        runtime_cuda.find_device("cuda:x")


@without_gpu
@pytest.mark.usefixtures("one_device")
def test_an_fbgemm_without_cuda_kernels_is_refused_by_name(built_artifact: Path) -> None:
    text = (
        "the installed FBGEMM has no CUDA kernel of fbgemm::int_nbit_split_embedding_codegen_lookup_function; "
        "install fbgemm-gpu in place of fbgemm-gpu-cpu"
    )
    with pytest.raises(UnsupportedError, match=f"^{re.escape(text)}$"):
        load_artifact(built_artifact, device="cuda")


@pytest.mark.usefixtures("one_device")
def test_another_graph_than_torchscript_is_refused_on_a_gpu(built_artifact: Path) -> None:
    text = "on a GPU the graph 'torchscript' runs, and 'aot_inductor' was asked for; the artifact has: torchscript"
    with pytest.raises(UnsupportedError, match=f"^{re.escape(text)}$"):
        load_artifact(built_artifact, device="cuda", backend="aot_inductor")


@pytest.mark.usefixtures("one_device")
def test_rows_beyond_the_memory_are_refused_before_any_is_taken(
    built_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_cuda, "_check_kernels", lambda operators: None)
    with pytest.raises(
        DeviceMemoryError, match=r"and 1000 are to be used; the largest is table 'user': 4800 \(300 rows x 16"
    ):
        load_artifact(built_artifact, device="cuda", device_memory_bytes=1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (512 << 20, 2 << 30))  # what lookups need
    with pytest.raises(DeviceMemoryError, match=r"and 0 are to be used"):
        load_artifact(built_artifact, device="cuda")


@pytest.mark.usefixtures("one_device")
def test_memory_that_torch_keeps_for_nobody_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an artifact that is gone. What is in use, and what is left of a block that is, stays."""
    current = {"reserved": 700, "active": 100, "inactive_split": 50, "allocated": 90}
    stats = {f"{name}_bytes.all.current": count for name, count in current.items()}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    assert runtime_cuda._free_bytes(torch.device("cuda", 0)) == (1 << 30) + 550


def test_operators_that_the_loader_asks_for_exist() -> None:
    """Their names; that they have CUDA kernels only a CUDA wheel can show."""
    load_operators(["fbgemm_gpu_tbe_inference", "fbgemm_gpu_sparse_async_cumsum", runtime_cuda._UVM_LIBRARY])
    for name in (runtime_cuda._LOOKUP, runtime_cuda._CUMSUM, runtime_cuda._NEW_UVM, "fbgemm::uvm_to_cpu"):
        assert torch._C._dispatch_has_kernel(name), name


# --- With a GPU, or dry on a CPU -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every precision that a GPU takes, odd dims, mean pooling, weights, two features a table."""
    tables = make_tables(weighted=True)
    folder = tmp_path_factory.mktemp("cuda")
    torch.save(state_dict(make_rows(tables)), folder / "snapshot.pt")
    config = write_config(folder / "release.yaml", folder / "snapshot.pt", tables, parity={"batches": 1})
    return build_artifact(config, folder / "artifact", workers=1).artifact


@pytest.fixture(scope="module")
def here(folder: Path) -> Artifact:
    return load_artifact(folder)


def load(folder: Path, placement: str) -> DeviceArtifact:
    """On a GPU; "dry" on the CPU. Shared memory takes about half of the tables, where it takes any."""
    if placement == "dry":
        return load_on_cpu(folder)
    options: dict[str, Any] = {} if placement == "device" else {"device_memory_bytes": 40_000}
    artifact = load_artifact(folder, device="cuda", placement=placement, **options)  # type: ignore[arg-type]
    assert isinstance(artifact, DeviceArtifact)
    return artifact


@pytest.fixture(
    scope="module", params=["dry", *(pytest.param(each, marks=gpu) for each in ("device", "uvm", "uvm_cache"))]
)
def there(request: pytest.FixtureRequest, folder: Path) -> DeviceArtifact:
    return load(folder, request.param)


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def check_close(got: torch.Tensor, expected: torch.Tensor, there: DeviceArtifact) -> None:
    """Within float32 sums of a few rows. A GPU decodes int8 and int4 in fp16: 2**-11 of a value, of 4 values of up to 5 with
    weights up to 4; another row would be off by about 1.
    """
    assert got.device == there.device
    dims = {output.key: output.dim for output in there.manifest.outputs}
    quantized = [there.manifest.table[f.table].serving_precision in ("int8", "int4") for f in there.manifest.features]
    loose = np.repeat(quantized, [dims[f.name] for f in there.manifest.features]) & (there.device.type == "cuda")
    for columns, atol in ((~loose, 1e-5), (loose, 4 * 5 * 4 * 2.0**-11)):
        np.testing.assert_allclose(got.cpu().numpy()[:, columns], expected.numpy()[:, columns], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("batch", [0, 1, 2, 257])
def test_answers_are_those_of_the_cpu_from_either_side(here: Artifact, there: DeviceArtifact, batch: int) -> None:
    for seed in range(3):
        request = draw(here, seed, batch)
        expected = here.lookup(*request)
        check_close(there.lookup(*request), expected, there)
        check_close(there.lookup(*move(request, there.device)), expected, there)


@pytest.mark.parametrize("placement", ["dry", pytest.param("device", marks=gpu)])
def test_rows_that_are_read_back_are_the_canonical_ones(folder: Path, placement: str) -> None:
    there = load(folder, placement)
    weights = there.graph.scripted.weights  # type: ignore[attr-defined]
    data = np.frombuffer(there._mapping, np.uint8, offset=there.manifest.weights_offset_bytes)
    for placed in there.layout.tables.values():
        table = placed.table
        found = strip_rows(padded_rows(weights, placed), table.row_bytes).cpu().view(-1).numpy()
        assert np.array_equal(found, data[table.offset_bytes : table.offset_bytes + table.bytes]), table.name


def test_bad_requests_raise_the_words_of_the_cpu_and_the_device_goes_on(here: Artifact, there: DeviceArtifact) -> None:
    good = draw(here, 0, 3)
    for request in bad_requests(here).values():
        expected = refusal(here, request)
        assert refusal(there, request) == expected
        if all(isinstance(part, torch.Tensor) for part in request[:2]):
            assert refusal(there, move(request, there.device)) == expected
        check_close(there.lookup(*move(good, there.device)), here.lookup(*good), there)


def test_ids_outside_their_table_give_zero_where_they_may(here: Artifact, there: DeviceArtifact) -> None:
    request = draw(here, 1, 9, -20, 70)
    expected = here.with_invalid_ids("zero").lookup(*request)
    check_close(there.with_invalid_ids("zero").lookup(*move(request, there.device)), expected, there)


def test_another_stream_gives_the_same(here: Artifact, there: DeviceArtifact) -> None:
    stream = new_stream(there.device)
    for seed in range(20):
        request = draw(here, seed, 64)
        pooled = there.lookup(*move(request, there.device), stream=stream)
        if stream is not None:
            torch.cuda.current_stream(there.device).wait_stream(stream)
        check_close(pooled, here.lookup(*request), there)


def test_threads_may_share_it(here: Artifact, there: DeviceArtifact) -> None:
    def ask(seed: int) -> None:
        request, stream = draw(here, seed, 16), new_stream(there.device)
        pooled = there.lookup(*move(request, there.device), stream=stream)
        if stream is not None:
            stream.synchronize()
        check_close(pooled, here.lookup(*request), there)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(200)))


@pytest.mark.parametrize("placement", ["dry", *(pytest.param(each, marks=gpu) for each in ("device", "uvm"))])
def test_a_captured_lookup_gives_the_same(here: Artifact, folder: Path, placement: str) -> None:
    there = load(folder, placement)
    captured = there.capture(bags=16, ids=4000)
    for seed in range(20):
        request = draw(here, seed, 16)
        for asked in (request, move(request, there.device)):
            check_close(captured(*asked), here.lookup(*request), there)
    with pytest.raises(InvalidInputError, match=r"is outside \[0, 49\]"):
        captured(*move(draw(here, 1, 16, 50, 51), there.device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_memory_goes_back_when_the_artifact_goes(folder: Path) -> None:
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        artifact = load(folder, "device")
        assert torch.cuda.memory_allocated() >= before + artifact.layout.device_bytes
        del artifact
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
