"""What a worker reports while it works; telemetry turns it into metrics."""

from __future__ import annotations

from typing import Protocol


class WorkerMeter(Protocol):
    """Receives measurements. telemetry/metrics.py implements it."""

    def observe_step(self, kind: str, seconds: float, rows: int, tokens: int) -> None:
        """One forward pass, "extend" or "decode"."""

    def observe_gap(self, kind: str, seconds: float) -> None:
        """The engine had nothing to run before such a pass, though there was work: what overlapped
        scheduling is there to avoid."""

    def preempted(self, sequences: int, recomputed_tokens: int) -> None:
        """So many more decoding sequences had to pause; of earlier ones, so many tokens more are
        computed again because the cache had lost them."""

    def handoff_sealed(self, size_bytes: int, seconds: float) -> None:
        """A hand-off is complete."""

    def handoff_failed(self) -> None:
        """A hand-off broke, or what arrived could not be used."""
