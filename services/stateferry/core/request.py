"""A request as workers see it: token ids in, token ids out.

On a worker, ``request_id`` is the attempt's (``Ticket.attempt_id``).
"""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.core.sampling import SamplingParams, StopConditions


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a decode worker knows of a request: not its prompt, which is folded into the state."""

    request_id: str
    sampling: SamplingParams
    stop: StopConditions


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Immutable input of one request. ``prompt_ids`` is never empty."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopConditions

    @property
    def continuation(self) -> Continuation:
        """All but the prompt."""
        return Continuation(self.request_id, self.sampling, self.stop)

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_ids)
