"""The weight file: the rows of every table, as the manifest describes them."""

from pathlib import Path

from runtime_py.errors import WeightFileError
from runtime_py.manifest import WEIGHTS, Manifest
from runtime_py.tensor_file import TensorFile, encode_header, layout_tables

__all__ = ["WeightFile"]


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
        super().__init__(artifact / WEIGHTS, manifest.tables)

    def verify_digests(self, threads: int) -> None:
        """Compares every row with the digests of the manifest, on `threads` cores.

        Raises:
            DigestMismatchError: naming the table, or the header, whose bytes differ.
        """
        digests = {table.name: table.digest for table in self.manifest.tables}
        self.compare_digests(digests, self.manifest.file[WEIGHTS].digest, threads)


def _check_layout(path: Path, manifest: Manifest) -> None:
    header_bytes = len(encode_header(manifest.tables))
    if manifest.weights_offset_bytes != header_bytes:
        raise WeightFileError(
            f"{path}: the manifest says that data starts at {manifest.weights_offset_bytes}, "
            f"its tables say {header_bytes}"
        )
    for name, offset in layout_tables(manifest.tables).items():
        if manifest.table[name].offset_bytes != offset:
            raise WeightFileError(
                f"{path}: table '{name}': the manifest says offset {manifest.table[name].offset_bytes}, "
                f"the layout rule gives {offset}"
            )
    data_bytes = sum(table.bytes for table in manifest.tables)
    if manifest.weights_bytes != data_bytes:
        raise WeightFileError(
            f"{path}: the manifest says {manifest.weights_bytes} bytes of rows, its tables have {data_bytes}"
        )
