"""Time as an argument, so that tests and simulators can own it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Source of time. ``monotonic_s`` for durations and timers, ``wall_s`` for expiry dates."""

    def monotonic_s(self) -> float: ...

    def wall_s(self) -> float: ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()
