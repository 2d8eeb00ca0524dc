"""Counts by feature that many threads add to."""

import threading
from collections.abc import Iterable, Mapping

__all__ = ["Tally"]


class Tally:
    """Counts by feature. Adding nothing takes no lock."""

    def __init__(self, features: Iterable[str]) -> None:
        self._counts = dict.fromkeys(features, 0)
        self._lock = threading.Lock()

    def add(self, counts: Mapping[str, int]) -> None:
        """Adds to the features that `counts` names."""
        if counts:
            with self._lock:
                for name, number in counts.items():
                    self._counts[name] += number

    def read(self) -> dict[str, int]:
        """The counts so far, of every feature."""
        with self._lock:
            return dict(self._counts)
