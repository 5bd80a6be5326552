"""Work on big buffers without stalling the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")

# Copying and checking 2 MiB takes well under a millisecond; a hop to a thread costs 0.1 ms or more.
INLINE_MAX_BYTES = 2 << 20
# google_crc32c keeps the GIL for anything but `bytes`; at 10-16 GB/s a slice holds it for 0.1 ms.
_CRC_SLICE_BYTES = 1 << 20


def crc32c(data: Bytes) -> int:
    """CRC-32C of a contiguous array."""
    crc = 0
    for start in range(0, data.size, _CRC_SLICE_BYTES):
        crc = google_crc32c.extend(crc, data[start : start + _CRC_SLICE_BYTES])
    return crc


async def run_sized(size_bytes: int, work: Callable[[], T]) -> T:
    """Run ``work``, which touches ``size_bytes``: here when that is little, else in a thread.

    If the caller is cancelled, the cancellation is delivered after ``work`` has ended: no thread is
    left that still touches the caller's buffers.
    """
    if size_bytes <= INLINE_MAX_BYTES:
        return work()
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        # Take a possible exception, which nobody will ask for any more.
        future.exception()
        raise
