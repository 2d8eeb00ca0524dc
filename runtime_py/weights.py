"""The weight file: the rows of every table and the parameters of a surgery, as the manifest describes them."""

from pathlib import Path

import torch

from runtime_py.errors import WeightFileError
from runtime_py.manifest import WEIGHTS, Manifest, ParameterType
from runtime_py.tensor_file import TensorFile, encode_header, layout_tables

__all__ = ["TORCH_TYPES", "WeightFile", "view_parameters"]

TORCH_TYPES: dict[ParameterType, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class WeightFile(TensorFile):
    """An open weight file that agrees with a manifest."""

    error = WeightFileError
    follows_from = "the manifest's tables"

    def __init__(self, artifact: Path, manifest: Manifest) -> None:
        """Opens the file and checks its header.

        Raises:
            WeightFileError: the manifest's offsets, or the header, are not those that follow from its tables.
        """
        self.manifest = manifest
        _check_layout(artifact / WEIGHTS, manifest)
        super().__init__(artifact / WEIGHTS, manifest.stored_tensors)

    def verify_digests(self, threads: int) -> None:
        """Compares every row with the digests of the manifest, on `threads` cores.

        Raises:
            DigestMismatchError: naming the table, or the header, whose bytes differ.
        """
        digests = {tensor.name: tensor.digest for tensor in self.manifest.stored_tensors}
        self.compare_digests(digests, self.manifest.file[WEIGHTS].digest, threads)


def view_parameters(manifest: Manifest, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters of the manifest's surgery by name, where they lie in `weights`, the mapped data; none without one."""
    views = {}
    for parameter in manifest.surgery.parameters if manifest.surgery else []:
        data = weights[parameter.offset_bytes : parameter.offset_bytes + parameter.bytes]
        views[parameter.parameter] = data.view(TORCH_TYPES[parameter.dtype]).view(parameter.dims)
    return views


def _check_layout(path: Path, manifest: Manifest) -> None:
    tensors = manifest.stored_tensors
    header_bytes = len(encode_header(tensors))
    if manifest.weights_offset_bytes != header_bytes:
        raise WeightFileError(
            f"{path}: the manifest says that data starts at {manifest.weights_offset_bytes}, "
            f"its tables say {header_bytes}"
        )
    said = {tensor.name: tensor.offset_bytes for tensor in tensors}
    for name, offset in layout_tables(tensors).items():
        if said[name] != offset:
            raise WeightFileError(
                f"{path}: table '{name}': the manifest says offset {said[name]}, the layout rule gives {offset}"
            )
    data_bytes = sum(tensor.bytes for tensor in tensors)
    if manifest.weights_bytes != data_bytes:
        raise WeightFileError(
            f"{path}: the manifest says {manifest.weights_bytes} bytes of rows, its tables have {data_bytes}"
        )
