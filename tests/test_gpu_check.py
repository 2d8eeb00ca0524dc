"""scripts/gpu/check: what it says without a GPU, a dry run of its steps, and that no failure hides the rest."""

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu" / "check"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# What a GPU machine may lack. The script runs where importing any of them fails.
MISSING = [
    "torchrec",
    "pydantic",
    "safetensors",
    "pyarrow",
    "typer",
    "rich",
    "ruamel",
    "upath",
    "scipy",
    "jinja2",
    "onnx",
    "pytest",
]
BARE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({MISSING!r}))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BARE, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = run("--output", tmp_path / "reports")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu check: device 'cuda' was asked for, and ")
    assert not (tmp_path / "reports").exists()


def test_a_dry_run_takes_its_steps_and_writes_both_reports(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-gpu-check-dry.json")
    report = json.loads(path.read_text())
    assert report["passed"] is True
    assert report["device"] == "none: a dry run on a CPU"
    titles = [result["check"] for result in report["checks"]]
    for precision in ("fp32", "fp16", "int8", "int4"):
        assert {f"rows read back, {precision}", f"parity, {precision}, device", f"speed, {precision}"} <= set(titles)
    parity = next(result["figures"] for result in report["checks"] if result["check"] == "parity, int4, device")
    assert parity["values_unlike_cpu"] == 0
    assert 0 < parity["largest_share_of_bound"] < 1
    golden = report["checks"][0]["figures"]
    assert (golden["largest_error"], golden["wrong_int2_values"]) == (0, 0)
    page = path.with_suffix(".md").read_text()
    assert page == done.stdout.removesuffix("\n")
    assert "all passed" in page.splitlines()[0]
    assert "none: a dry run on a CPU" in page


def test_a_check_that_fails_is_told_with_its_reason_and_the_next_ones_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(script, "plan", lambda context: {"first": broken, "second": lambda: {"ids": 5}})
    monkeypatch.setattr(sys, "argv", ["check", "--device", "cpu", "--output", str(tmp_path)])
    assert script.main() == 1
    (path,) = tmp_path.glob("*.json")
    first, second = json.loads(path.read_text())["checks"]
    assert (first["passed"], first["error"]) == (False, "RuntimeError: no kernel image")
    assert (second["passed"], second["figures"]) == (True, {"ids": 5})
    page = capsys.readouterr().out
    assert "1 of 2 FAILED" in page
    assert "* **first**: RuntimeError: no kernel image" in page


def test_a_run_ends_in_time(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LAST_START_S", -1)
    monkeypatch.setattr(script, "plan", lambda context: {"late": lambda: pytest.fail("it was run")})
    monkeypatch.setattr(sys, "argv", ["check", "--device", "cpu", "--output", str(tmp_path)])
    assert script.main() == 1
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["checks"][0]["error"] == "TimeoutError: not run: -1 s had passed"


def test_what_differs_is_found(script: ModuleType, tmp_path: Path) -> None:
    """The checks can fail: one row of the device's memory is changed after it was loaded."""
    from gpu_checks import CheckError, Context, check_parity, check_rows

    device, load = script.choose_device("cpu")

    def load_damaged(folder: Path, **options: str):
        artifact = load(folder, **options)
        artifact.graph.scripted.weights[artifact.layout.tables["int8_64"].offset_bytes :][:4000] ^= 1
        return artifact

    with pytest.raises(CheckError, match="int8_64"):
        check_rows(Context(device, tmp_path, load_damaged), "int8")
    with pytest.raises(CheckError, match=r"bags: .* from eager on the device"):
        check_parity(Context(device, tmp_path, load_damaged), "int8", "device")
    check_rows(Context(device, tmp_path, load), "int8")


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_rows_that_a_gpu_decodes_in_fp16_are_held_to_that(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The reference of a GPU, held against a CPU: the CPU's answer is within its bound, and is no answer of a GPU's."""
    import gpu_checks

    device, load = script.choose_device("cpu")
    context = gpu_checks.Context(device, tmp_path, load)
    folder = context.artifact(precision, weighted=True)
    reference = gpu_checks.Reference(context, folder)
    reference._stored = gpu_checks.decode(reference.manifest, folder, in_fp16=True)
    request = gpu_checks.draw(reference.manifest, 3, 33, 12)
    pooled, bound, unlike = gpu_checks._eager(reference.manifest, reference._stored, request, device)
    on_cpu = reference.here.lookup(*request)
    assert bool(((on_cpu.double() - pooled).abs() <= bound + unlike).all())
    if precision == "fp16":  # decoded alike
        assert not unlike.any()
        reference.check(request, on_cpu, "the CPU's")
        return
    assert bool((unlike > 20 * bound).any())
    with pytest.raises(gpu_checks.CheckError, match=r"^the CPU's: .* from eager on the device$"):
        reference.check(request, on_cpu, "the CPU's")
    reference.check(request, pooled.float(), "a GPU's")
