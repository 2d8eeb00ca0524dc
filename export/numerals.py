"""Numbers as the reports write them: with their unit, in few digits, and never rounded into a better one."""

import math

from rich.filesize import decimal

__all__ = ["cosine", "count", "coverage", "duration", "number", "percent", "plain", "signed", "size"]

_SPACE = "\N{NO-BREAK SPACE}"
_MISSING = "\N{EN DASH}"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits: `0.00210`, `2.07e-05`; a whole number as it is, so that `0` is exactly 0."""
    if value is None:
        return _MISSING
    if value == int(value) and abs(value) < 1e6:
        return _minus(f"{int(value):,}")
    whole = 10**digits - 0.5 <= abs(value) < 1e6
    return _minus(f"{value:,.0f}" if whole else f"{value:#.{digits}g}".rstrip("."))


def plain(value: float, digits: int = 6) -> str:
    """Up to so many digits, as somebody would write the number."""
    return _minus(f"{value:,.{digits}g}")


def signed(value: float) -> str:
    """A difference, with its sign."""
    return number(value) if value < 0 else f"+{number(value)}"


def cosine(value: float | None, digits: int = 3) -> str:
    """As many decimals as show `digits - 1` digits of what is missing to 1, so that only 1 reads as 1."""
    if value is None:
        return _MISSING
    if value == 1:
        return "1"
    missing = math.ceil(-math.log10(abs(1 - value)))
    return _minus(f"{value:.{max(digits, missing + digits - 2)}f}")


def count(value: int) -> str:
    """With thousands separated."""
    return f"{value:,}"


def percent(share: float | None) -> str:
    """A share as a percentage that is 0 or 100 only where the share is exactly 0 or 1."""
    if share is None:
        return _MISSING
    if math.isinf(share):
        return "more than all"
    hundredfold = 100 * share
    if 0 < hundredfold < 0.01:
        return f"<{_SPACE}0.01{_SPACE}%"
    for decimals in range(0 if hundredfold >= 10 or not hundredfold else 1 if hundredfold >= 1 else 2, 9):
        text = f"{hundredfold:.{decimals}f}"
        if share == 1 or float(text) != 100:
            return f"{hundredfold:,.{decimals}f}{_SPACE}%"
    return f"just {'under' if share < 1 else 'over'} 100{_SPACE}%"


def coverage(share: float) -> str:
    """A share as a percentage, never rounded up."""
    return f"{math.floor(1e4 * share) / 1e2:g}{_SPACE}%"


def size(value: int) -> str:
    """Bytes in decimal units."""
    return decimal(value).replace(" ", _SPACE)


def duration(seconds: float) -> str:
    """Seconds, with minutes and hours where there are some."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}{_SPACE}h {int(seconds % 3600 // 60)}{_SPACE}min"
    if seconds >= 120:
        return f"{int(seconds // 60)}{_SPACE}min {int(seconds % 60)}{_SPACE}s"
    return f"{seconds:.{3 if seconds < 1 else 2 if seconds < 10 else 1}f}{_SPACE}s"


def _minus(text: str) -> str:
    return f"\N{MINUS SIGN}{text[1:]}" if text.startswith("-") else text
