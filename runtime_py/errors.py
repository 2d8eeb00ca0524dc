"""What the loader refuses, one class a kind, so that a server can tell a damaged artifact from a bad request.

`ArtifactError` is the root; everything but `InvalidInputError` means that the artifact must not be served.
"""

__all__ = [
    "ArtifactError",
    "DeviceMemoryError",
    "DigestMismatchError",
    "ExtraFileError",
    "GoldenCaseError",
    "GraphError",
    "IncompatibleError",
    "InvalidInputError",
    "ManifestError",
    "MissingFileError",
    "PointerError",
    "SizeMismatchError",
    "UnknownFieldError",
    "UnknownFormatVersionError",
    "UnsupportedError",
    "VocabularyFileError",
    "WeightFileError",
]


class ArtifactError(Exception):
    """Root of every error that this package raises on purpose."""


class ManifestError(ArtifactError):
    """manifest.json is unreadable, malformed, or contradicts itself."""


class UnknownFormatVersionError(ManifestError):
    """The artifact was written in a format version that this reader does not know."""


class UnknownFieldError(ManifestError):
    """manifest.json has a field that this format version does not define."""


class MissingFileError(ArtifactError):
    """A file that the manifest lists is not there."""


class ExtraFileError(ArtifactError):
    """The folder holds something that the manifest does not list, or a link."""


class SizeMismatchError(ArtifactError):
    """A file has another size than the manifest says."""


class DigestMismatchError(ArtifactError):
    """A file's bytes are not those that were published."""


class WeightFileError(ArtifactError):
    """The weight file's header and the manifest disagree."""


class VocabularyFileError(ArtifactError):
    """A vocabulary's header and the manifest disagree."""


class GraphError(ArtifactError):
    """A graph cannot be loaded here, or does not fit the weight file."""


class GoldenCaseError(ArtifactError):
    """An artifact does not answer a golden case as it did when it was built."""


class PointerError(ArtifactError):
    """The pointer to the current version is unreadable, damaged, or says other than the version that it names."""


class IncompatibleError(ArtifactError):
    """A new version does not take or give what callers of the serving one count on."""


class UnsupportedError(ArtifactError):
    """The artifact has no graph for what was asked: another backend, target or option."""


class DeviceMemoryError(ArtifactError):
    """The rows do not fit into the memory of the device that was asked for."""


class InvalidInputError(ArtifactError, ValueError):
    """A request was refused; the message names the feature, the position, the value and what is allowed."""
