"""Pages of a mapped file: brought into memory at the start, and kept there, for a server that wants no page fault later.

Both are of the page cache, which every process that maps the file shares.
"""

import ctypes
import mmap
import os
import resource

import numpy as np

from runtime_py.errors import UnsupportedError

__all__ = ["lock", "prefault", "release"]

_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it


def prefault(mapping: mmap.mmap) -> None:
    """Reads every page of a mapping and enters it into the page table of this process."""
    mapping.madvise(mmap.MADV_WILLNEED)
    try:
        mapping.madvise(_MADV_POPULATE_READ)
    except OSError:  # an older kernel: touch a byte of each page
        np.frombuffer(mapping, np.uint8)[:: mmap.PAGESIZE].max()


def lock(mapping: mmap.mmap, name: str) -> None:
    """Keeps every page of a mapping, the file `name`, in memory as long as it is mapped.

    Raises:
        UnsupportedError: the kernel refuses, mostly since RLIMIT_MEMLOCK is too low.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(mapping))) == 0:
        return
    reason = os.strerror(ctypes.get_errno())
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    allowed = "has no limit" if limit == resource.RLIM_INFINITY else f"is {limit} bytes"
    raise UnsupportedError(
        f"lock_memory: {name}: the kernel does not lock {len(mapping)} bytes: {reason}; RLIMIT_MEMLOCK {allowed}: "
        "raise it, or load without lock_memory"
    )


def release(mapping: mmap.mmap) -> None:
    """Takes the pages of a mapping out of this process's resident memory; they stay in the page cache.

    Raises:
        UnsupportedError: they are locked.
    """
    try:
        mapping.madvise(mmap.MADV_DONTNEED)
    except OSError as error:
        raise UnsupportedError(f"pages that are locked are not released: {error.strerror}") from error
