"""Pages at the start: brought in, kept, and let go of."""

import mmap
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from runtime_py import UnsupportedError, load_artifact, residency

PROGRAM = """
import re, sys
from pathlib import Path
from runtime_py import load_artifact
def figure(name):
    text = Path("/proc/self/smaps").read_text()
    ours = text[text.index("weights/tables.safetensors"):]
    return int(re.search(name + r":\\s+(\\d+) kB", ours)[1])
options = dict.fromkeys(sys.argv[2:], True)
artifact = load_artifact(sys.argv[1], verify="sizes", **options)
print(figure("Size"), figure("Rss"), figure("Locked"))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of 4 MiB, more than the kernel maps around a page that is read."""
    import torch
    from support import state_dict, write_config

    from export import build_artifact

    folder = tmp_path_factory.mktemp("large")
    tables = [{"name": "t", "num_embeddings": 16384, "embedding_dim": 64, "data_type": "fp32"}]
    torch.save(state_dict({"t": torch.randn(16384, 64)}), folder / "snapshot.pt")
    config = write_config(folder / "release.yaml", folder / "snapshot.pt", tables, parity={"batches": 1})
    return build_artifact(config, folder / "artifact", workers=2).artifact


def pages(artifact: Path, *options: str) -> tuple[int, int, int]:
    """KiB mapped, resident and locked of the rows in a fresh process."""
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, artifact, *options], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    size, resident, locked = map(int, child.stdout.split())
    return size, resident, locked


def test_pages_come_in_at_their_first_use_or_on_request_at_the_start(large: Path) -> None:
    size, resident, locked = pages(large)
    assert resident < size / 2
    assert locked == 0
    size, resident, locked = pages(large, "prefault")
    assert resident == size
    assert locked == 0


def test_locked_pages_are_in_memory_and_stay(large: Path) -> None:
    size, resident, locked = pages(large, "lock_memory")
    assert resident == size
    assert locked > 0


def test_locked_pages_are_not_released(built_artifact: Path) -> None:
    artifact = load_artifact(built_artifact, lock_memory=True)
    with pytest.raises(UnsupportedError, match="pages that are locked are not released"):
        artifact.release_pages()


def test_a_kernel_without_the_call_has_a_byte_of_each_page_read(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_MADV_POPULATE_READ", 12345)
    with (large / "weights/tables.safetensors").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    residency.prefault(mapping)
    text = Path("/proc/self/smaps").read_text()
    ours = text[text.rindex(str(large)) :]
    size, resident = (int(re.search(rf"{name}:\s+(\d+) kB", ours)[1]) for name in ("Size", "Rss"))  # type: ignore[index]
    assert resident == size


def test_a_lock_that_the_kernel_refuses_says_the_limit(large: Path) -> None:
    program = """
import ctypes, resource, sys
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
libc = ctypes.CDLL(None, use_errno=True)
class Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
class Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]
none = (Data * 2)()
assert libc.capset(ctypes.byref(Header(0x20080522, 0)), none) == 0  # root may lock whatever the limit
from runtime_py import UnsupportedError, load_artifact
try:
    load_artifact(sys.argv[1], lock_memory=True)
except UnsupportedError as error:
    print(error)
"""
    child = subprocess.run([sys.executable, "-c", program, large], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    size = (large / "weights/tables.safetensors").stat().st_size
    assert re.fullmatch(
        rf"lock_memory: tables\.safetensors: the kernel does not lock {size} bytes: .+; RLIMIT_MEMLOCK is 65536 bytes: "
        "raise it, or load without lock_memory\n",
        child.stdout,
    )
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) != (65536, 65536)


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**57, 1.5, "2", True, None])
def test_a_number_of_threads_that_is_none_is_refused(built_artifact: Path, threads: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"threads must be between 1 and 1024, got {threads!r}")):
        load_artifact(built_artifact, threads=threads)  # type: ignore[arg-type]


@pytest.mark.parametrize("spin_us", [-1, 10**9 + 1, 1.5, "2", True, None])
def test_a_time_to_look_out_for_work_that_is_none_is_refused(built_artifact: Path, spin_us: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"spin_us must be between 0 and 1000000000, got {spin_us!r}")):
        load_artifact(built_artifact, threads=2, spin_us=spin_us)  # type: ignore[arg-type]
