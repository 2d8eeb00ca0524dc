"""The AOTInductor graph: the plain-op lookup, compiled to a shared library for an instruction set, without a weight byte.

torch packs what it compiles into a zip file, and its loader would unpack that to a temporary folder at every load, without a
look at the names in it. Here it is unpacked once, into the artifact: the library, stripped of debug records, which hold
paths of the build machine, and the two files that its loader reads beside it.
"""

import shutil
import subprocess
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from export.errors import ConfigError, ExportError
from export.lookup import Lookup, WeightedLookup
from export.publish import write_file
from runtime_py.aot_inductor import check_isa
from runtime_py.errors import UnsupportedError
from runtime_py.manifest import AOT_INDUCTOR_FILES

__all__ = ["check_build_isa", "compiler", "write_aot_inductor"]

_MOST_IDS = 2**31 - 1
_MOST_BAGS = 2**20
_EXAMPLE_BAGS = 2  # with 0 or 1, torch.export takes the number for a constant
_VECTOR_BITS = {"x86-64-v3": 256, "x86-64-v4": 512}


def compiler() -> str:
    """The C++ compiler that torch calls; raises ConfigError where there is none."""
    found = shutil.which("g++")
    if found is None:
        raise ConfigError("serving.graphs: aot_inductor needs a C++ compiler to build (not to serve); install g++")
    return found


def check_build_isa(isa: str) -> None:
    """Makes sure that the gates can run here what is compiled; raises ConfigError where they cannot."""
    try:
        check_isa(isa)
    except UnsupportedError as error:
        raise ConfigError(
            f"serving.isa: {error}; the gates run the graph, so build on a machine that has it"
        ) from error


def write_aot_inductor(lookup: Lookup | WeightedLookup, isa: str, folder: Path) -> None:
    """Compiles `lookup` for an instruction set, and writes its files below `folder`; takes half a minute.

    Raises:
        ConfigError: there is no compiler.
        ExportError: torch cannot compile it, or packs something else than one library.
    """
    compiler()
    with tempfile.TemporaryDirectory(prefix="aot-inductor-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        package = Path(name, "lookup.pt2")
        try:
            torch._inductor.aoti_compile_and_package(
                _export(lookup),
                package_path=str(package),
                inductor_configs={
                    "aot_inductor.package_constants_in_so": False,
                    "always_keep_tensor_constants": True,  # or small ones become code
                    "cpp.march": isa,
                    "cpp.simdlen": _VECTOR_BITS[isa],
                },
            )
        except OSError:
            raise
        except Exception as error:  # torch raises nearly anything here
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            surgery = getattr(lookup, "surgery", None)
            what = "the lookup" if surgery is None else f"the lookup with its surgery {type(surgery.module).__name__}"
            raise ExportError(f"aot_inductor: torch cannot compile {what}: {reason}") from error
        _unpack(package, folder)


def _export(lookup: Lookup | WeightedLookup) -> torch.export.ExportedProgram:
    count = _EXAMPLE_BAGS * lookup.num_features
    ids = Dim("ids", min=0, max=_MOST_IDS)
    arguments: list[torch.Tensor] = [torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.int32)]
    shapes: dict[str, Any] = {
        "values": {0: ids},
        "lengths": {0: lookup.num_features * Dim("bags", min=1, max=_MOST_BAGS)},
    }
    if isinstance(lookup, WeightedLookup):
        arguments.append(torch.ones(count))
        shapes["per_sample_weights"] = {0: ids}
    return torch.export.export(lookup, tuple(arguments), dynamic_shapes=shapes)


def _unpack(package: Path, folder: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if name.startswith("/") or ".." in Path(name).parts or "\\" in name:
                raise ExportError(f"aot_inductor: torch packed a file that leaves its folder: {name!r}")
        for target in AOT_INDUCTOR_FILES:
            ending = target[target.index(".wrapper") :]
            found = [name for name in archive.namelist() if name.endswith(ending)]
            if len(found) != 1:
                raise ExportError(f"aot_inductor: torch packed {len(found)} files *{ending}, expected one")
            write_file(folder / target, archive.read(found[0]))
    library = folder / next(name for name in AOT_INDUCTOR_FILES if name.endswith(".so"))
    subprocess.run(["strip", "--strip-all", library], check=True)  # of binutils, which every compiler needs
    library.chmod(0o644)
