"""What a build shows: lines in a log, bars on a terminal, and nothing that could stop it."""

import io
import os
import re
import sys
import time
from unittest.mock import Mock

import pytest

from export.progress import LogProgress, NoProgress, TerminalProgress, progress_on

GB = 10**9
MARKUP = "[red]user[/blue] :smile: {0}"
SHOW_CURSOR = "\x1b[?25h"


@pytest.fixture
def clock():
    """Seconds that pass when a test says so."""
    clock = Mock(side_effect=lambda: clock.seconds, seconds=1000.0)
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """What a terminal that scrolls without end shows: its lines up to the cursor's, without colour."""
        lines, row = [""] * (self.getvalue().count("\n") + 1), 0
        for part in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            if part == "\n":
                row += 1
            elif part == "\x1b[2K":
                lines[row] = ""
            elif part == "\x1b[1A":
                row -= 1
            elif not part.startswith(("\x1b", "\r")):  # rich clears a line before it writes it anew
                lines[row] += part
        return [line.rstrip() for line in lines[: row + bool(lines[row])]]

    def wait_for(self, text):
        """Waits until the thread that draws has shown `text`; returns the screen."""
        end = time.monotonic() + 20
        while text not in "\n".join(lines := self.screen()):
            assert time.monotonic() < end, f"{text!r} was never shown: {lines}"
            time.sleep(0.01)
        return lines


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "20"}.items():
        monkeypatch.setenv(name, value)
    return Terminal()


def without_times(lines):
    """The lines without their times of day, which they must have."""
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    return [line[9:] for line in lines]


CLOSED = io.StringIO()
CLOSED.close()
ASCII = io.TextIOWrapper(io.BytesIO(), encoding="ascii")


class BrokenStream(io.StringIO):
    def write(self, text=""):
        raise BrokenPipeError

    flush = write


def drive(progress, clock):
    """A whole build, with tables of all kinds."""
    progress.phase("snapshot")
    clock.seconds += 3
    progress.phase("rows")
    progress.start({"user": 4 * GB, "none": 0, MARKUP: 4 * GB})
    progress.advance("none", 0)
    for table in ("user", MARKUP):
        for _ in range(4):
            clock.seconds += 9
            progress.advance(table, GB)
    progress.phase("publish")
    progress.start({})
    progress.close()


def test_a_log_has_a_line_a_phase_and_one_every_ten_seconds_with_names_as_they_are(clock):
    stream = io.StringIO()
    drive(LogProgress(stream, clock=clock), clock)
    assert without_times(stream.getvalue().splitlines()) == [
        "snapshot",
        "rows",
        "rows: 2.0 GB of 8.0 GB (25%), 111.1 MB/s, 0:00:54 left; user 2.0 GB of 4.0 GB",
        "rows: 4.0 GB of 8.0 GB (50%), 111.1 MB/s, 0:00:36 left",
        f"rows: 6.0 GB of 8.0 GB (75%), 111.1 MB/s, 0:00:18 left; {MARKUP} 2.0 GB of 4.0 GB",
        "rows: 8.0 GB of 8.0 GB (100%), 111.1 MB/s, 0:00:00 left",
        "publish",
    ]


def test_a_log_line_names_three_of_the_tables_in_work_and_rounds_percent_down(clock):
    stream = io.StringIO()
    progress = LogProgress(stream, clock=clock)
    progress.phase("rows")
    progress.start({"small": 9990, **dict.fromkeys("abcde", 2)})
    progress.advance("small", 9990)
    for name in "abcde":
        clock.seconds += 2
        progress.advance(name, 1)
    line = stream.getvalue().splitlines()[-1]
    assert "10.0 kB of 10.0 kB (99%)" in line
    assert line.endswith(" left; a 1 byte of 2 bytes, b 1 byte of 2 bytes, c 1 byte of 2 bytes and 2 more")


def test_a_terminal_shows_the_phase_and_the_tables_in_work_with_their_names_as_they_are(terminal, clock):
    progress = TerminalProgress(terminal, clock=clock)
    progress.phase("snapshot")
    clock.seconds += 3
    terminal.wait_for("0:00:03")  # a phase without tables is seen to live
    progress.phase("rows")
    progress.start({MARKUP: 9 * GB, "item": 4 * GB, "small": 1 * GB})
    progress.advance("small", 1 * GB)
    for _ in range(3):
        clock.seconds += 10
        progress.advance(MARKUP, GB)
        progress.advance("item", GB)
    _, rows, user, item = terminal.wait_for("3.0/4.0 GB")
    assert re.fullmatch(r"rows +━.* 7\.0/14\.0 GB 200\.0 MB/s 0:00:35", rows)
    assert re.fullmatch(re.escape(f"  {MARKUP} ") + r"━.* 3\.0/9\.0 GB 100\.0 MB/s 0:01:00", user)
    assert re.fullmatch(r"  item +━.* 3\.0/4\.0 GB 100\.0 MB/s 0:00:10", item)
    progress.advance("item", GB)
    assert len(terminal.wait_for("8.0/14.0 GB")) == 3, "a table that is done has a bar no more"
    progress.close()
    assert "small" not in terminal.getvalue()


def test_a_terminal_keeps_one_line_for_each_finished_phase(terminal, clock):
    drive(TerminalProgress(terminal, clock=clock), clock)
    lines = ["snapshot: 0:00:03", "rows: 0:01:12, 8.0 GB, 111.1 MB/s", "publish: 0:00:00"]
    assert without_times(terminal.screen()) == lines
    shown = terminal.getvalue()
    assert shown.endswith(SHOW_CURSOR)
    time.sleep(0.3)
    assert terminal.getvalue() == shown, "something was drawn after close"


@pytest.mark.parametrize("width", [1, 10, 40, 400])
def test_300_tables_do_not_flood_a_terminal_of_any_width(width, terminal, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    progress = TerminalProgress(terminal, clock=clock)
    progress.phase("rows")
    names = [f"{number} {'表' * 100}" for number in range(300)]
    progress.start(dict.fromkeys(names, 2))
    for name in names:
        progress.advance(name, 1)
    time.sleep(0.3)
    assert len(terminal.screen()) <= 9
    assert all(len(line) <= width for line in terminal.screen())
    progress.close()
    assert without_times(terminal.screen()) == ["rows: 0:00:00"]


def test_a_failed_phase_leaves_only_its_warnings_and_gives_back_the_cursor_and_stderr(terminal, monkeypatch):
    results = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", results)
    with pytest.raises(KeyboardInterrupt), progress_on(terminal) as progress:
        progress.phase("rows")
        print("a result")
        print("a warning about [red] and [/nothing]", file=sys.stderr)
        print("and [/more]", end="", file=sys.stderr, flush=True)
        raise KeyboardInterrupt
    assert terminal.screen() == ["a warning about [red] and [/nothing]", "and [/more]"]
    assert terminal.getvalue().endswith(SHOW_CURSOR)
    assert (results.getvalue(), sys.stderr) == ("a result\n", terminal)


def test_the_stream_decides_what_is_shown(terminal, clock, monkeypatch, capsys):
    def shown_on(stream):
        with progress_on(stream) as progress:
            drive(progress, clock)
        return type(progress)

    assert shown_on(terminal) is TerminalProgress
    assert shown_on(io.StringIO()) is shown_on(CLOSED) is LogProgress
    assert shown_on(None) is NoProgress
    monkeypatch.setenv("TERM", "dumb")
    assert shown_on(terminal) is LogProgress
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [LogProgress, TerminalProgress])
@pytest.mark.parametrize("stream", [BrokenStream(), ASCII, CLOSED], ids=["broken", "ascii", "closed"])
def test_a_broken_stream_does_not_stop_a_build(stream, kind, terminal, clock):
    stdout = os.fstat(1)
    progress = kind(stream, clock=clock)
    progress.phase("表")
    time.sleep(0.2)  # the thread that draws fails, too, and pytest would say so
    drive(progress, clock)
    assert os.fstat(1) == stdout, "rich points stdout to /dev/null where a pipe is broken"
