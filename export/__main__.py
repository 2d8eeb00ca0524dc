"""Entry of `python -m export`."""

import os
import signal
from contextlib import suppress
from types import FrameType


def _stop(number: int, _: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, f"error: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # until `main` has handlers of its own: the imports take seconds
        signal.signal(number, _stop)
    from export.cli import main

    main()
