"""What decides over a decoding request's turn, and what it needs to go on after a pause."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import StopConditions


@dataclass(frozen=True, slots=True)
class Preemption:
    """How preempted sequences go on: with extends of at most ``budget_tokens``, at least one grid
    interval, that take turns with decode steps."""

    grid: int
    budget_tokens: int


@dataclass(slots=True)
class PreemptionCounts:
    """Monotonic. ``recomputed_tokens`` had been computed before, and were lost meanwhile."""

    preempted: int = 0
    recomputed_tokens: int = 0


@dataclass(slots=True, eq=False)
class Standing:
    """``number`` counts arrivals. ``since_s`` is when it began to wait, moved back by how long it
    had waited before: what counts is the whole of it. ``is_safe``: it has waited for so long that
    nobody may push it aside any more."""

    request_id: str
    held_tokens: int
    priority: int
    number: int
    since_s: float
    waited_s: float = 0.0
    is_safe: bool = False
    # Prompt and output so far, of one that was preempted.
    again: GenerationRequest | None = None

    def began(self, now_s: float, starvation_s: float) -> None:
        """Its waiting is over."""
        self.waited_s = now_s - self.since_s
        self.is_safe |= self.waited_s >= starvation_s


@dataclass(slots=True, eq=False)
class ActiveSequence:
    """One that takes decode steps. ``prompt`` is what its first of ``output_ids`` followed; None
    where that is not known, so that it cannot be preempted."""

    standing: Standing
    stop: StopConditions
    num_output_tokens: int
    prompt: GenerationRequest | None
    output_ids: list[int] = field(default_factory=list)
    num_in_flight: int = 0

    @property
    def request_id(self) -> str:
        return self.standing.request_id

    @property
    def last_token_id(self) -> int:
        return self.output_ids[-1]

    def so_far(self) -> GenerationRequest:
        """What to run to go on behind all of its output."""
        assert self.prompt is not None
        return replace(
            self.prompt,
            prompt_ids=(*self.prompt.prompt_ids, *self.output_ids),
            num_output_ids=self.prompt.num_output_ids + len(self.output_ids),
            snapshot_hints=(),
        )
