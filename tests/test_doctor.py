"""The doctor: what it finds here, and in environments that lack something, hold it twice, or do not fit together."""

import base64
import hashlib
import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support import make_rows, run_export, state_dict, write_config

from export import build_artifact, doctor
from export.doctor import describe, diagnose
from export.lookup import OPERATOR_LIBRARIES
from runtime_py import UnsupportedError, aot_inductor, vocabulary
from runtime_py.manifest import WEIGHTS

LIBRARIES = sorted({*OPERATOR_LIBRARIES, vocabulary.LIBRARY})
TABLES = [{"name": "t", "num_embeddings": 20, "embedding_dim": 4, "data_type": "fp32"}]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    torch.save(state_dict(make_rows(TABLES)), folder / "s.pt")
    config = write_config(folder / "r.yaml", folder / "s.pt", TABLES, serving={"graphs": ["torchscript", "onnx"]})
    return build_artifact(config, folder / "artifact", workers=1).artifact


class Site:
    """A folder of installed packages, as pip writes it."""

    def __init__(self, folder):
        self.folder = folder

    def install(self, name, version, libraries=None):
        """A distribution that owns FBGEMM's libraries, where their contents are given; a later one overwrites."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"{info.name}/METADATA,,"]
        for library in LIBRARIES if libraries is not None else []:
            path = self.folder / "fbgemm_gpu" / f"{library}.so"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(libraries)
            digest = base64.urlsafe_b64encode(hashlib.sha256(libraries).digest()).rstrip(b"=").decode()
            lines.append(f"fbgemm_gpu/{path.name},sha256={digest},{len(libraries)}")
        (info / "RECORD").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the process that imports torch and loads the operators."""
    monkeypatch.setattr(doctor, "_MACHINE", """print('{"operators": {}, "cuda": null, "devices": []}')""")


@pytest.fixture
def site(tmp_path, monkeypatch, quick):
    """What seems to be installed."""
    made = Site(tmp_path / "site")
    monkeypatch.setattr(doctor, "distributions", lambda: importlib.metadata.distributions(path=[str(made.folder)]))
    return made


def test_this_environment_is_well_and_runs_every_graph(artifact):
    done = run_export("doctor", artifact, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["problems"] == found["notes"] == []
    assert found["versions"]["torch"] == torch.__version__
    [owner] = [wheel for wheel in found["wheels"] if wheel["owns"]]
    assert owner["files"] > 100
    assert found["versions"]["fbgemm"] == owner["version"] == importlib.metadata.version(owner["name"])
    assert all("CPU" in kernels.split(", ") for kernels in found["operators"].values())
    assert len(found["operators"]) == 3
    assert found["isas"].keys() == set(aot_inductor.ISAS)
    assert found["graphs"] == [
        {"backend": "torchscript", "target": "cpu", "reason": ""},
        {"backend": "onnx", "target": "cpu", "reason": ""},
    ]


def test_it_asks_for_the_libraries_that_the_graphs_and_the_vocabularies_need():
    assert sorted(set(doctor._OPERATORS.values())) == LIBRARIES


def test_two_wheels_that_own_one_folder_are_named_with_the_one_whose_files_are_there(site):
    site.install("torch", "2.13.0")
    site.install("fbgemm-gpu", "1.8.0", b"cuda")
    site.install("fbgemm_gpu-cpu", "1.8.0", b"cpu!")
    found = diagnose()
    assert found.problems == [
        "fbgemm-gpu 1.8.0 and fbgemm-gpu-cpu 1.8.0 own the same folder, fbgemm_gpu/: the files are those of fbgemm-gpu-cpu "
        "1.8.0; uninstall both, then install the one for this machine"
    ]
    assert [(wheel.name, wheel.files, wheel.owns) for wheel in found.wheels] == [
        ("fbgemm-gpu", len(LIBRARIES), False),
        ("fbgemm-gpu-cpu", len(LIBRARIES), True),
    ]
    assert f"fbgemm      fbgemm-gpu 1.8.0: claims {len(LIBRARIES)} files, of another\n" in describe(found)
    (site.folder / "fbgemm_gpu" / f"{LIBRARIES[0]}.so").write_bytes(b"else")
    assert "the files are those of neither; uninstall both" in diagnose().problems[0]


def test_a_distribution_without_files_owns_nothing(site):
    site.install("torch", "2.13.0")
    site.install("torchrec", "1.8.0")
    site.install("fbgemm-gpu", "1.8.0+cpu.shim")
    site.install("fbgemm-gpu-cpu", "1.8.0", b"cpu")
    found = diagnose()
    assert (found.problems, found.notes) == ([], [])
    assert found.versions["fbgemm"] == "1.8.0"
    assert "fbgemm-gpu 1.8.0+cpu.shim: no files\n" in describe(found)


@pytest.mark.parametrize("damage", [b"other bytes", b"CPU", None], ids=["size", "bytes", "missing"])
def test_libraries_that_are_not_those_of_their_wheel_are_noticed(site, damage):
    site.install("torch", "2.13.0")
    site.install("fbgemm-gpu-cpu", "1.8.0", b"cpu")
    path = site.folder / "fbgemm_gpu" / f"{LIBRARIES[-1]}.so"
    path.write_bytes(damage) if damage else path.unlink()
    import importlib_metadata  # noqa: F401  # its finder answers from now on, and leaves out what is missing

    [problem] = diagnose().problems
    assert problem == (
        "fbgemm-gpu-cpu 1.8.0: its libraries in fbgemm_gpu/ are not those that it was installed with; install it again"
    )


@pytest.mark.parametrize(
    ("versions", "problems"),
    [
        ({"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.1"}, []),
        ({"torch": "2.11.0+cu130", "fbgemm-gpu": "1.6.0", "torchrec": "1.6.1"}, []),
        (
            {"torch": "2.12.1", "fbgemm-gpu": "1.8.0", "torchrec": "1.6.0"},
            ["fbgemm 1.8.0 does not fit torch 2.12.1, which needs 1.7",
             "torchrec 1.6.0 does not fit torch 2.12.1, which needs 1.7"],
        ),
        (
            {"torch": "2.9.0", "fbgemm-gpu": "1.4.0", "torchrec": "1.4.0"},
            ["torch 2.9.0: expected one of 2.11, 2.12, 2.13, with FBGEMM and torchrec to match"],
        ),
        ({"torch": "2.13.0", "torchrec": "1.8.0"}, ["FBGEMM is not installed; install fbgemm-gpu-cpu or fbgemm-gpu"]),
        ({"fbgemm-gpu": "1.8.0"}, ["torch is not installed as a package, so that its version is unknown"]),
    ],
    ids=["cpu", "cuda", "mixed", "old", "no FBGEMM", "no torch"],
)  # fmt: skip
def test_versions_that_do_not_match_are_said(site, versions, problems):
    for name, version in versions.items():
        site.install(name, version, b"fbgemm" if "fbgemm" in name else None)
    assert diagnose().problems == problems


def test_without_torchrec_it_says_that_nothing_can_be_built(site):
    site.install("torch", "2.13.0")
    site.install("fbgemm-gpu-cpu", "1.8.0", b"cpu")
    found = diagnose()
    assert found.problems == []
    assert found.notes == ["torchrec is not installed: artifacts can be served here, and not built"]
    assert "torchrec    not installed\n" in describe(found)


# Hides packages from the interpreters that find this module.
HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = "fbgemm_gpu", "onnxruntime"
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split(".")[0] in hidden else find(name, path, target)
)
"""


def test_what_cannot_be_loaded_is_a_reason_and_no_crash(artifact, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    paths = [str(tmp_path), str(Path(doctor.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = run_export("doctor", artifact, env=environment)
    assert done.returncode == 1
    assert f"torch       {torch.__version__}\n" in done.stdout
    assert done.stdout.endswith(
        "graph       torchscript for cpu: does not run\ngraph       onnx for cpu: does not run\n"
    )
    *operators, script, onnx = done.stderr.splitlines()
    assert len(operators) == 3
    for line in operators:
        assert line.startswith("error: operator fbgemm::")
        assert "no fbgemm_gpu is installed; install fbgemm-gpu-cpu or fbgemm-gpu" in line
    assert script.startswith(
        f"error: {artifact}: its graph torchscript for cpu does not run here: graphs/lookup.torchscript.pt"
    )
    assert "no fbgemm_gpu is installed" in script
    assert onnx == (
        f"error: {artifact}: its graph onnx for cpu does not run here: ONNX Runtime cannot be imported: "
        "No module named 'onnxruntime'"
    )


def test_a_damaged_artifact_is_a_reason(artifact, tmp_path, quick):
    copy = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    for path, text in ((copy, "are not those that were published"), (tmp_path / "nothing", "no such folder")):
        found = diagnose(path)
        [problem] = found.problems
        assert text in problem
        assert (found.artifact, found.artifact_id, found.graphs) == (str(path), None, [])


def test_a_crash_of_what_is_tried_is_a_reason():
    assert doctor._run_probe("import os; os.kill(os.getpid(), 11)")[1] == "the process was ended by SIGSEGV"
    assert doctor._run_probe("raise ValueError('what')")[1] == "ValueError: what"
    assert doctor._run_probe("raise SystemExit(3)")[1] == "exit code 3"
    assert doctor._run_probe("print(1)") == ("1\n", "")


def test_a_machine_that_answers_nothing_is_a_reason(site, monkeypatch):
    site.install("torch", "2.13.0")
    site.install("fbgemm-gpu-cpu", "1.8.0", b"cpu")
    monkeypatch.setattr(doctor, "_MACHINE", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    assert diagnose().problems == [
        "torch and FBGEMM's operators cannot be loaded: ImportError: libcudart.so.13: cannot open shared object file"
    ]
    monkeypatch.setattr(doctor, "_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(doctor, "_MACHINE", "import time; time.sleep(9)")
    assert diagnose().problems == ["torch and FBGEMM's operators cannot be loaded: no answer within 0.2 s"]


def test_what_the_cpu_lacks_is_what_the_loader_says(site, monkeypatch):
    site.install("torch", "2.13.0")
    monkeypatch.setattr(aot_inductor, "_cpu_flags", lambda: aot_inductor._FLAGS["x86-64-v3"] - {"fma"})
    found = diagnose()
    for isa in aot_inductor.ISAS:
        with pytest.raises(UnsupportedError) as refused:
            aot_inductor.check_isa(isa)
        assert found.isas[isa] == str(refused.value)
    assert "; x86-64-v3: no, x86-64-v4: no\n" in describe(found)
