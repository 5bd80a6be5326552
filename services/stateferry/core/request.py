"""A request as workers see it: token ids in, token ids out."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.core.sampling import SamplingParams, StopConditions


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Immutable input of one request. ``prompt_ids`` is never empty."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopConditions

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_ids)
