"""What a worker reports while it works; telemetry turns it into metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from stateferry.core.clock import Clock


class WorkerMeter(Protocol):
    """Receives measurements. telemetry/metrics.py implements it."""

    def observe_step(self, kind: str, seconds: float, rows: int, tokens: int) -> None: ...

    def observe_handoff(self, result: str, size_bytes: int, seconds: float) -> None: ...


@dataclass(slots=True)
class HandoffMeasure:
    """Filled in by whoever moves the bytes."""

    size_bytes: int = 0


class WorkerObserver:
    """Times hand-offs and forwards steps."""

    def __init__(self, meter: WorkerMeter, clock: Clock) -> None:
        self._meter = meter
        self._clock = clock

    def step(self, kind: str, seconds: float, rows: int, tokens: int) -> None:
        self._meter.observe_step(kind, seconds, rows, tokens)

    @contextmanager
    def handoff(self) -> Iterator[HandoffMeasure]:
        """Times a hand-off; one that raises counts as failed."""
        measure = HandoffMeasure()
        began_s = self._clock.monotonic_s()
        result = "failed"
        try:
            yield measure
            result = "sealed"
        finally:
            took_s = self._clock.monotonic_s() - began_s
            self._meter.observe_handoff(result, measure.size_bytes, took_s)
