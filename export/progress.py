"""What a build shows while it works: bars on a terminal, plain lines elsewhere.

Progress is not the result: whatever becomes of the stream that shows it, the build goes on.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol, TextIO, cast

import rich.progress
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column

__all__ = ["LogProgress", "NoProgress", "Progress", "TerminalProgress", "progress_on"]

_LINE_SECONDS = 10
_TABLES_IN_A_LINE = 3
_TABLE_BARS = 8
_TIME = "%H:%M:%S"


class Progress(Protocol):
    """What a build reports to, always from one thread."""

    def phase(self, name: str) -> None:
        """The phase `name` begins; the one before it is done."""

    def start(self, table_bytes: Mapping[str, int]) -> None:
        """The phase goes through tables, of so many bytes each."""

    def advance(self, table: str, count: int) -> None:
        """`count` more bytes of `table` are done."""

    def close(self) -> None:
        """The last phase is done or, while an exception is handled, has failed; nothing is reported after it."""


class NoProgress:
    """Shows nothing."""

    def phase(self, *_: object, **__: object) -> None:
        """Does nothing."""

    start = advance = close = phase


class LogProgress:
    """A line for each phase as it begins, and one every ten seconds while tables advance."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = cast(TextIO, _Unfailing(stream))
        self._clock = clock

    def phase(self, name: str) -> None:
        """Prints the phase."""
        self._phase = name
        self._print(name)

    def start(self, table_bytes: Mapping[str, int]) -> None:
        """Prints nothing, so that a short build has no lines but its phases."""
        self._bytes, self._done = dict(table_bytes), dict[str, int]()
        self._began = self._clock()
        self._due = self._began + _LINE_SECONDS

    def advance(self, table: str, count: int) -> None:
        """Prints a line if one is due: no thread does it."""
        self._done[table] = self._done.get(table, 0) + count
        now = self._clock()
        if now >= self._due:
            self._due = now + _LINE_SECONDS
            self._print(f"{self._phase}: {self._describe(now - self._began)}")

    def close(self) -> None:
        """Does nothing: every line is complete."""

    def _describe(self, seconds: float) -> str:
        done, total = sum(self._done.values()), sum(self._bytes.values())
        percent = done * 100 // total if total else 100  # rounded down, so that 100% is all of it
        text = f"{decimal(done)} of {decimal(total)} ({percent}%)"
        if done:
            left = round((total - done) / done * seconds)
            text += f", {decimal(int(done / seconds))}/s, {timedelta(seconds=left)} left"
        in_work = [name for name, count in self._done.items() if count < self._bytes[name]]
        shown = [f"{name} {decimal(self._done[name])} of {decimal(self._bytes[name])}" for name in in_work]
        if shown:
            text += "; " + ", ".join(shown[:_TABLES_IN_A_LINE])
        if len(shown) > _TABLES_IN_A_LINE:
            text += f" and {len(shown) - _TABLES_IN_A_LINE} more"
        return text

    def _print(self, text: str) -> None:
        print(f"{time.strftime(_TIME)} {text}", file=self._stream, flush=True)


class TerminalProgress:
    """Bars for the phase and for each table in work; a line for each finished phase is all that stays.

    A thread redraws them, so that a phase that takes long is seen to live.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        file = cast(TextIO, _Unfailing(stream))
        self._console = Console(file=file, force_terminal=True, markup=False, emoji=False, highlight=False)
        text = Column(no_wrap=True, overflow="ellipsis", max_width=32)
        number = Column(no_wrap=True, justify="right")
        name = rich.progress.TextColumn("{task.description}", markup=False, table_column=text)
        bar = rich.progress.BarColumn()
        kinds = (rich.progress.DownloadColumn, rich.progress.TransferSpeedColumn, rich.progress.TimeRemainingColumn)
        self._time_columns = (name, bar, rich.progress.TimeElapsedColumn(table_column=number))
        self._byte_columns = (name, bar, *(kind(table_column=number) for kind in kinds))
        self._bars = rich.progress.Progress(
            console=self._console,
            transient=True,
            redirect_stdout=False,  # a result never goes to stderr
            redirect_stderr=stream is sys.stderr,  # a warning goes above the bars
            get_time=clock,
        )

    def phase(self, name: str) -> None:
        """Leaves the line of the phase before, and shows a bar that only pulses."""
        self._finish()
        self._bars.columns = self._time_columns
        self._phase = self._bars.add_task(name, total=None, began=time.strftime(_TIME))
        self._bars.start()

    def start(self, table_bytes: Mapping[str, int]) -> None:
        """Gives the phase's bar its length."""
        self._bytes, self._done = dict(table_bytes), dict.fromkeys(table_bytes, 0)
        self._tables: dict[str, rich.progress.TaskID] = {}
        self._bars.update(self._phase, total=sum(table_bytes.values()))
        self._bars.columns = self._byte_columns

    def advance(self, table: str, count: int) -> None:
        """Moves the bars; a table has one from its first bytes to its last, if not too many are in work."""
        self._done[table] += count
        done, total = self._done[table], self._bytes[table]
        self._bars.advance(self._phase, count)
        if table in self._tables:
            self._bars.advance(self._tables[table], count)
            if done >= total:
                self._bars.remove_task(self._tables.pop(table))
        elif done < total and len(self._tables) < _TABLE_BARS:
            self._tables[table] = self._bars.add_task(f"  {table}", total=total, completed=done)

    def close(self) -> None:
        """Removes the bars and gives the cursor back."""
        try:
            self._finish(failed=sys.exception() is not None)
            self._bars.stop()
        finally:  # also where a signal interrupts the above
            self._console.show_cursor(True)

    def _finish(self, *, failed: bool = False) -> None:
        tasks = self._bars.tasks
        for task in tasks:
            self._bars.remove_task(task.id)
        if tasks and not failed:
            phase, done, seconds = tasks[0], int(tasks[0].completed), tasks[0].elapsed or 0
            figures = f", {decimal(done)}, {decimal(int(done / seconds))}/s" if done and seconds else ""
            text = f"{phase.fields['began']} {phase.description}: {timedelta(seconds=round(seconds))}{figures}"
            self._console.print(text, soft_wrap=True)


@contextmanager
def progress_on(stream: TextIO | None) -> Iterator[Progress]:
    """The progress that suits `stream`, closed at the end; None is a stderr that the shell has closed."""
    bars = False
    with suppress(ValueError):  # it is closed
        bars = stream is not None and stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    progress: Progress = NoProgress() if stream is None else TerminalProgress(stream) if bars else LogProgress(stream)
    try:
        yield progress
    finally:
        progress.close()


class _Unfailing:
    """A stream that loses what cannot be written: into a broken pipe, a full disk, a closed file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
