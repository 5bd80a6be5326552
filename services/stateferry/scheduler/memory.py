"""What the schedulers need to know of the state cache."""

from __future__ import annotations

from typing import Protocol


class StateMemory(Protocol):
    """Memory for whole sequences, leased by request id."""

    def reserve(self, request_id: str, num_tokens: int) -> bool:
        """Lease the memory of a sequence of at most ``num_tokens``; False when there is not enough
        now."""

    def release(self, request_id: str) -> None:
        """Return a sequence's memory."""
