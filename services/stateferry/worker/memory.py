"""How much memory a worker may take for its sequences when nobody has said so."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# The rest is for weights and activations.
RAM_SHARE = 0.5
# The rest is for activations and for what torch keeps.
GPU_SHARE = 0.85
# A GPU's memory is the worker's own; a CPU's is everybody's.
CPU_CACHE_BYTES = 1 << 30
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def automatic_budget_bytes(device: torch.device, workers_per_machine: int) -> int:
    """One worker's part of a share of the memory that the machine or its container has, or of what
    is free on a GPU: ask for it once the weights are loaded. Together they never take more than the
    share."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes * GPU_SHARE / workers_per_machine)
    return int(_ram_bytes() * RAM_SHARE / workers_per_machine)


def automatic_cache_bytes(device: torch.device) -> int:
    """Most memory for what is cached, of what running sequences leave."""
    return CPU_CACHE_BYTES if device.type == "cpu" else 1 << 62


def _ram_bytes() -> int:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(_CGROUP_LIMIT.read_text(encoding="ascii"))
    except (OSError, ValueError):
        # No such file, or "max".
        return physical
    return min(physical, limit)
