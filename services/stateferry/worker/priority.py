"""Who computes first when several workers share a machine's processors."""

from __future__ import annotations

import os
import threading


def stand_back(added_nice: int) -> None:
    """Raise the niceness of the calling thread, and so of the threads it starts from now on.

    The kernels' threads are started by the thread that runs steps. The process's other threads
    keep their priority: heartbeats and hand-offs must not wait for somebody's matrix products.
    """
    if added_nice:
        thread = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(19, now + added_nice))
