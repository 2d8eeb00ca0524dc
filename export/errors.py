"""Every error that a build reports to its user, each with the exit code of the command line.

They exist so that a caller can tell a refused input from a failed gate, and so that `export.cli` has one boundary:
an `ExportError` is one clear line, anything else is a defect and keeps its traceback.
"""

__all__ = [
    "AccessCountsError",
    "ColumnsError",
    "ConfigError",
    "ExportError",
    "GateError",
    "PeerError",
    "PublishError",
    "RowsError",
    "SnapshotChangedError",
    "SnapshotError",
    "SurgeryError",
    "VocabularyError",
]


class ExportError(Exception):
    """A build, or a command, was refused. Exit code 1."""

    exit_code = 1


class ConfigError(ExportError):
    """The release configuration is unreadable, incomplete or contradictory."""


class SnapshotError(ExportError):
    """The training snapshot is unreadable, incomplete or does not match the configuration."""


class RowsError(ExportError):
    """A table holds values that the chosen serving precision cannot store."""


class SurgeryError(ExportError):
    """The surgery module cannot be had, filled or called, or a graph cannot express it."""


class ColumnsError(ExportError):
    """Parquet files that a table names are unreadable, or hold what their columns must not."""


class VocabularyError(ColumnsError):
    """A vocabulary is unreadable, contradicts itself, or does not fit its table."""


class AccessCountsError(ColumnsError):
    """Access counts are unreadable, or do not fit their table."""


class PublishError(ExportError):
    """The artifact could not be staged or published: the target exists, the disk is full, permission is denied."""


class SnapshotChangedError(SnapshotError):
    """The training snapshot was written again while it was read."""


class PeerError(ExportError):
    """Another process of a build has failed, with this message and exit code, and has said so itself."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class GateError(ExportError):
    """A parity or accuracy gate failed; nothing was published. Exit code 3."""

    exit_code = 3
