"""What the schedulers need to know of the state cache."""

from __future__ import annotations

from typing import Protocol


class StateMemory(Protocol):
    """Memory for whole sequences, leased by request id."""

    def reserve(self, request_id: str) -> bool:
        """Lease a sequence's memory; False when there is none now."""

    def release(self, request_id: str) -> None:
        """Return a sequence's memory."""
