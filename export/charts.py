"""The charts of the report: SVG drawn by matplotlib, to stand inside the page.

Positions are pixels, and every text has room that was measured for it, so that none can run into another. Colours and
font are the page's (light, dark or printed): matplotlib draws with placeholders for the first and for the words. No
setting of matplotlib changes for anyone else, and equal data give equal bytes.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path

from export.numerals import count

__all__ = ["Bar", "draw_bars", "draw_histogram", "histogram_range"]

# The placeholder colours, and the page's variables that they stand for.
_INK, _QUIET, _TRACK, _BEFORE, _AFTER, _FAILED, _PAPER = (f"#01010{digit}" for digit in range(1, 8))
_VARIABLES = {
    _INK: "var(--ink)",
    _QUIET: "var(--quiet)",
    _TRACK: "var(--track)",
    _BEFORE: "var(--before)",
    _AFTER: "var(--after)",
    _FAILED: "var(--failed)",
    _PAPER: "var(--paper)",
}
_TEXT, _SMALL = 12.5, 11.0
_WIDTH = 528
_SLACK = 1.06  # what a reader's font may be wider than the one that we measure


@dataclass(frozen=True)
class Bar:
    """A name, what is written to its right, and one or two lengths drawn below, the second the one that counts."""

    name: str
    text: str
    lengths: tuple[float, ...]
    failed: bool = False


def draw_bars(bars: Sequence[Bar], label: str, *, limit: float | None = None) -> Markup:
    """Horizontal bars to one scale from 0, each below its own line of text.

    Args:
        bars: from top to bottom.
        label: what the chart shows, for those who cannot see it.
        limit: a length to mark on every bar; those much longer are cut, which a gap shows.
    """
    thickness = 8
    below = max(len(bar.lengths) for bar in bars) * (thickness + 1)
    pitch = 18 + below + 12
    longest = max(max(bar.lengths) for bar in bars)
    scale = max(min(longest, 1.5 * limit), 1.06 * limit) if limit else longest
    drawing = _Drawing(_WIDTH, pitch * len(bars) - 8)
    for place, bar in enumerate(bars):
        top = pitch * place
        colour = _FAILED if bar.failed else _INK
        room = _WIDTH - _width_of(bar.text, _TEXT) - 16
        drawing.text(0, top + 12, _shorten(bar.name, room, _TEXT), _TEXT, _INK)
        drawing.text(_WIDTH, top + 12, bar.text, _TEXT, colour, anchor="right")
        top += 19
        if limit:
            drawing.box(0, top, _WIDTH * limit / scale, thickness, _TRACK)
        colours = [_BEFORE] * (len(bar.lengths) - 1) + [_FAILED if bar.failed else _AFTER]
        for length, colour in zip(bar.lengths, colours, strict=True):
            # A length that is not zero is never invisible.
            end = max(_WIDTH * min(length / scale, 1.0), 1.0) if length and scale else 0.0
            drawing.box(0, top, end, thickness, colour)
            if length > scale:
                drawing.line([_WIDTH - 13, _WIDTH - 9], [top + thickness + 1, top - 1], _PAPER, 3.0)
            top += thickness + 1
        if limit:
            x = _WIDTH * limit / scale
            drawing.line([x, x], [top - thickness - 1, top + 3], _INK, 1.5)
    return drawing.svg(label)


def histogram_range(edges: Sequence[float], marks: Sequence[float]) -> tuple[float, float]:
    """What a scale has to hold of bins by lower edge, sqrt(2) wide, and of some marks: two decades at least."""
    ends = [*edges, *(math.sqrt(2) * edge for edge in edges), *(mark for mark in marks if mark > 0)]
    low, high = math.log10(min(ends, default=1e-2)), math.log10(max(ends, default=1.0))
    missing = max(0.0, 2 - (high - low)) / 2
    return 10 ** (low - missing - 0.05), 10 ** (high + missing + 0.05)


def draw_histogram(
    edges: Sequence[float],
    rows: Sequence[int],
    scale: tuple[float, float],
    label: str,
    *,
    mean: float | None,
    limit: float | None,
) -> Markup:
    """Rows by error, both logarithmic; `mean` is marked by a solid line, `limit` by a dashed one."""
    width, height, left, right, top, bottom = 340, 190, 52, 8, 20, 40
    drawing = _Drawing(width, height)
    low, high = math.log10(scale[0]), math.log10(scale[1])
    most = max(1.0, math.log10(max(rows)))
    floor = -0.25  # a bar of one row is seen
    base = height - bottom

    def x(value: float) -> float:
        return left + (width - left - right) * (math.log10(value) - low) / (high - low)

    def y(power: float) -> float:
        return base - (base - top) * (power - floor) / (most - floor)

    for power in range(0, math.floor(most) + 1, max(1, math.ceil(math.floor(most) / 3))):
        drawing.line([left, width - right], [y(power)] * 2, _TRACK, 1.0)
        drawing.text(left - 6, y(power) + 4, count(10**power) if power < 6 else f"1e{power}", _SMALL, _QUIET, "right")
    for edge, amount in zip(edges, rows, strict=True):
        if amount:
            begin, end = x(edge), x(edge * math.sqrt(2))
            drawing.box(begin, y(math.log10(amount)), end - begin - 1, base - y(math.log10(amount)), _AFTER)
    drawing.line([left, width - right], [base, base], _QUIET, 1.0)
    powers = range(math.ceil(low), math.floor(high) + 1)
    for power in powers[:: max(1, math.ceil(len(powers) / 7))]:
        drawing.line([x(10**power)] * 2, [base, base + 4], _QUIET, 1.0)
        drawing.text(
            x(10**power), base + 17, f"{10.0**power:g}" if power > -4 else f"1e{power}", _SMALL, _QUIET, "center"
        )
    drawing.text(left - 6, 11, "rows", _SMALL, _QUIET, "right")
    drawing.text((left + width - right) / 2, height - 5, "relative L2 error of a row", _SMALL, _QUIET, "center")
    for value, dashes in ((mean, None), (limit, (4, 3))):
        if value:
            drawing.line([x(value)] * 2, [top, base], _INK, 1.5, dashes)
    return drawing.svg(label)


class _Drawing:
    """A canvas of so many pixels, (0, 0) at its upper left."""

    def __init__(self, width: float, height: float) -> None:
        self._size = width, height
        self._texts: list[str] = []
        with _settings():
            self._figure = Figure(figsize=(width / 72, height / 72), dpi=72)
            self._axes = self._figure.add_axes((0, 0, 1, 1))
            self._axes.set_axis_off()
            self._axes.set_xlim(0, width)
            self._axes.set_ylim(height, 0)

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle; (x, y) is its upper left."""
        order = len(self._axes.get_children())  # what is drawn later lies above
        self._axes.add_patch(
            Rectangle((x, y), width, height, facecolor=colour, linewidth=0, clip_on=False, zorder=order)
        )

    def line(
        self, x: list[float], y: list[float], colour: str, width: float, dashes: tuple[float, ...] | None = None
    ) -> None:
        """A line from point to point; `dashes` are pixels on and off."""
        line = Line2D(x, y, color=colour, linewidth=width, clip_on=False, zorder=len(self._axes.get_children()))
        if dashes:
            line.set_linestyle((0, [part / width for part in dashes]))
        self._axes.add_artist(line)

    def text(self, x: float, y: float, text: str, height: float, colour: str, anchor: str = "left") -> None:
        """Words on the baseline `y`. matplotlib gets their number only: it would warn of letters that its font lacks."""
        self._axes.text(x, y, f"text{len(self._texts)}", ha=anchor, va="baseline", fontsize=height, color=colour)
        self._texts.append(text)

    def svg(self, label: str) -> Markup:
        """The drawing as an element of an HTML page."""
        file = io.StringIO()
        with _settings():
            self._figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        text = file.getvalue()
        text = text[text.index("<g ") : text.rindex("</g>")] + "</g>"
        text = re.sub(
            r' id="[^"]*"| transform="rotate\(-0 [^"]*"', "", text
        )  # of several drawings, not unique in a page
        text = re.sub(r"font-family: [^;]*; ", "", text)
        text = re.sub(r"\s*\n\s*", " ", text)
        text = re.sub(r"#01010\d", lambda found: _VARIABLES[found[0]], text)
        text = re.sub(r">text(\d+)<", lambda found: f">{escape(self._texts[int(found[1])])}<", text)
        width, height = self._size
        return Markup('<svg role="img" viewBox="0 0 {} {}" style="max-width: {}px" aria-label="{}">{}</svg>').format(
            width,
            height,
            width,
            label,
            Markup(text),  # noqa: S704 - every text in it is escaped above
        )


@contextmanager
def _settings() -> Iterator[None]:
    """matplotlib's own settings, whatever the user's are, and ours; the user's again when done."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "report", "figure.facecolor": "none"})
        yield


def _width_of(text: str, height: float) -> float:
    """Pixels that a line of text takes in most fonts; letters that ours lacks count as the widest."""
    properties = FontProperties(family="DejaVu Sans", size=height)
    known = get_font(findfont(properties)).get_charmap()
    text = "".join(letter if ord(letter) in known else "W" for letter in text)
    width: float = text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0]
    return _SLACK * width


def _shorten(text: str, room: float, height: float) -> str:
    """The text, or its beginning and its end, where it is wider than `room`."""
    short, kept = text, len(text)
    while kept > 2 and _width_of(short, height) > room:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}\N{HORIZONTAL ELLIPSIS}{text[-(kept // 2) :]}"
    return short
