"""What the C library does with the memory that a forward pass frees."""

from __future__ import annotations

import ctypes

# Numbers of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# The most that glibc takes; larger pieces go back to the system one by one.
_LARGEST_KEPT_BYTES = 32 << 20
_KEPT_BYTES = 256 << 20


def keep_freed_memory() -> None:
    """Let this process keep freed memory for the next pass.

    A prefill's temporaries are tens of megabytes. Given back to the system, they come again as
    pages that have to be zeroed and mapped one by one: 3 to 4 % of a prefill's time. Does nothing
    where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
