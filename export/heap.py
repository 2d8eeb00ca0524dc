"""Keeps the heap from growing with the table: temporary arrays of some MiB leave holes between the small results that stay.

glibc gives large blocks mappings of their own, which go back to the kernel as a whole, but takes the size of the largest
block that was ever freed for the limit. Of a sparse table a build grew by some 2 MiB for every GiB, and not with a fixed one.
"""

import ctypes

__all__ = ["fix_mapping_threshold"]

_M_MMAP_THRESHOLD = -3  # of malloc.h
_THRESHOLD_BYTES = 1 << 18


def fix_mapping_threshold() -> bool:
    """Tells the allocator of this process to map every block from 256 KiB on; False where it is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES) == 1
