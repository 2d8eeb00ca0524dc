"""What torch and somebody else's module say when a surgery fails, as one line, and nothing beside it."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

__all__ = ["quiet", "reason"]

_STDOUT, _STDERR = 1, 2


def reason(error: BaseException) -> str:
    """The kind of an error and the first line that it says something in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what exporters print, log and warn of to themselves: stdout is the build's result, and stderr its one line.

    They print from C++ as well, past Python's streams: for a moment, nothing of this process is seen.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with ExitStack() as stack:
            for stream in (_STDOUT, _STDERR):
                stack.enter_context(_to_nowhere(stream))
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _to_nowhere(stream: int) -> Iterator[None]:
    try:
        kept = os.dup(stream)
    except OSError:  # the shell has closed it
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(nowhere, stream)
        yield
    finally:
        os.dup2(kept, stream)
        os.close(kept)
        os.close(nowhere)
