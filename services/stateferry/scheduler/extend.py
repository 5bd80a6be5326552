"""Prompts that are computed slice by slice, and how a slice is cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stateferry.core.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class ExtendSlice:
    """Compute prompt tokens ``[start, start + length)`` of one request; none where the whole prompt
    was known already and token 0 follows without a forward."""

    request_id: str
    start: int
    length: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class ExtendStep:
    """What one forward pass computes; never empty. Slices without tokens are last."""

    slices: tuple[ExtendSlice, ...]

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(part.request_id for part in self.slices)

    @property
    def sampling_parts(self) -> tuple[ExtendSlice, ...]:
        """Those after which a token is sampled."""
        return tuple(part for part in self.slices if part.is_last)

    @property
    def num_rows(self) -> int:
        return len(self.slices)

    @property
    def num_tokens(self) -> int:
        return sum(part.length for part in self.slices)


@dataclass(slots=True, eq=False)
class ExtendJob:
    """A prompt that is computed, or waits for that. A slice is taken off it when it is launched:
    the next one goes on behind it, whether it has come back or not."""

    request: GenerationRequest
    held_tokens: int
    since_s: float = 0.0
    launched_len: int = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def missing_len(self) -> int:
        """Tokens that are not launched yet."""
        return self.request.prompt_len - self.launched_len

    def cut(self, budget_tokens: int, grid: int) -> ExtendSlice | None:
        """The next slice, of at most so many tokens. None when they do not reach a grid point."""
        start, missing = self.launched_len, self.missing_len
        if missing <= budget_tokens:
            return ExtendSlice(self.request_id, start, missing, is_last=True)
        # A cut on the grid leaves a finished state behind instead of a tail to read again.
        end = (start + budget_tokens) // grid * grid
        if end <= start:
            return None
        return ExtendSlice(self.request_id, start, end - start, is_last=False)


def take_slices(jobs: Iterable[ExtendJob], budget_tokens: int, grid: int) -> ExtendStep | None:
    """A step of at most so many tokens, taken off ``jobs`` in this order, of which something is
    missing; None when there is nothing that it could compute. Mutates the jobs."""
    computed: list[ExtendSlice] = []
    known: list[ExtendSlice] = []
    for job in jobs:
        part = job.cut(budget_tokens, grid)
        if part is None:
            break
        job.launched_len += part.length
        budget_tokens -= part.length
        (computed if part.length else known).append(part)
    return ExtendStep((*computed, *known)) if computed or known else None
