"""The environment of worker processes, which some libraries read once, when they are loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping

from stateferry.config import ENV_PREFIX, Config, to_environment

# Of torch's own operations; the kernels have threads of their own, which do likewise. Idle threads
# sleep instead of spinning: two busy processes on two cores otherwise take milliseconds for every
# parallel region. But not at once: the next region follows after some microseconds, less than it
# takes to wake a thread.
_OPENMP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}

# Weights and states in pages of 2 MB: a decode step, which reads all of them, then spends 5 to 7 %
# less (torch asks for such pages where the kernel gives them to those who ask).
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}

# Memory of tensors is kept for the next one instead of being returned to the kernel, page by page,
# after every step; few arenas, because few threads allocate.
_MALLOC = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}


def child_environment(config: Config, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a child gets: ``inherited`` (ours), ``config`` in place of its settings, and defaults.

    A variable that the user has set keeps its value, unless it is a setting of ours: those are
    already part of ``config``.
    """
    inherited = os.environ if inherited is None else inherited
    kept = {k: v for k, v in inherited.items() if not k.startswith(f"{ENV_PREFIX}_")}
    threads = {"OMP_NUM_THREADS": str(config.worker.threads)}
    return {**_OPENMP, **_HUGE_PAGES, **_MALLOC, **threads, **kept, **to_environment(config)}


def prepare_this_process() -> None:
    """The same for a process that nobody supervises. Call it before torch is imported.

    Malloc's settings are left out: the C library has read them long before.
    """
    for name, value in {**_OPENMP, **_HUGE_PAGES}.items():
        os.environ.setdefault(name, value)
