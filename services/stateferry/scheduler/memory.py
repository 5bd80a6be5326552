"""What the schedulers need to know of the state cache."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from stateferry.core.request import GenerationRequest


class StateMemory(Protocol):
    """Memory for whole sequences, leased by request id."""

    def reserve(self, request_id: str, num_tokens: int) -> bool:
        """Lease the memory of a sequence of at most ``num_tokens``; False when there is not enough
        now."""

    def release(self, request_id: str) -> None:
        """Return a sequence's memory."""

    def consumed(self, request_id: str, token_id: int) -> None:
        """A decode step of the sequence has consumed its next token; a later one may be in
        flight."""

    def spoil(self, request_id: str) -> None:
        """What the request computed is not to be trusted: keep none of it when it is released."""


class PromptMemory(StateMemory, Protocol):
    """Memory that may know the beginning of a prompt."""

    def resume(self, request: GenerationRequest, num_tokens: int) -> int | None:
        """Lease the memory of a prompt's sequence of at most ``num_tokens``; returns how many of
        the prompt's tokens need no forward, all of them if it is known to its end. None when there
        is not enough memory now."""


class PreemptibleMemory(PromptMemory, Protocol):
    """Memory whose sequences may have to make way for others."""

    def fits_without(self, num_tokens: int, request_ids: Collection[str]) -> bool:
        """Whether a sequence of at most ``num_tokens`` would have room once these gave theirs back.
        May say no where what they share with others would come free as well."""

    def park(self, request_id: str) -> None:
        """Return the memory of a sequence that will come back: what it leaves is kept as long as
        there is something else to take."""

    def forget(self, request_id: str) -> None:
        """A parked sequence will not come back."""

    def publish(self, request_id: str) -> None:
        """A resumed sequence has caught up with where it was."""
