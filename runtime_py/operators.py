"""FBGEMM's operators, a library at a time: 4 ms where `import fbgemm_gpu` takes 550."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch

from runtime_py.errors import GraphError

__all__ = ["load_operators"]


def load_operators(libraries: Iterable[str]) -> None:
    """Loads libraries of the installed FBGEMM by name, without importing its Python package.

    Raises:
        GraphError: FBGEMM is not installed, or a library of it cannot be loaded.
    """
    libraries = list(libraries)
    spec = importlib.util.find_spec("fbgemm_gpu")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise GraphError(
            f"needs FBGEMM's operators ({', '.join(libraries)}), and no fbgemm_gpu is installed; "
            "install fbgemm-gpu-cpu or fbgemm-gpu"
        )
    for name in libraries:
        library = Path(folders[0], f"{name}.so")
        try:
            torch.ops.load_library(library)
        except OSError as error:
            raise GraphError(f"needs {library}, which cannot be loaded: {error}") from error
