"""Many small independent pieces of work on a few threads, stopped at the first failure or signal."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["map_ordered"]


Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ordered(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """The results of `function` in the order of `items`, computed on `threads` threads.

    Where a piece fails, or the caller stops taking results, pieces that have not begun are dropped: an interrupted
    build ends within one piece's time, however many are left.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
