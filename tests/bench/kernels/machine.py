"""What the numbers were measured on, and how much of it others used meanwhile."""

from __future__ import annotations

import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch

from stateferry_kernels.native.library import native


def describe(threads: int) -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "native": native().variant.name,
        "torch": torch.__version__,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


class ForeignLoad:
    """The share of the machine's processor time that other processes took since the start."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """Children count as ours once they have ended."""
        busy, own, wall = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _wait, irq, softirq, steal, *_ = (
            int(number) / ticks for number in Path("/proc/stat").read_text().split()[1:11]
        )
        busy = user + nice + system + irq + softirq + steal
        usages = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        own = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        return busy, own, time.perf_counter()
