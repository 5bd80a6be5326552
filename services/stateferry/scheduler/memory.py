"""What the schedulers need to know of the state cache."""

from __future__ import annotations

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
