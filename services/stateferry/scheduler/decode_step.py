"""What a decode step is, and what came of it for each of its requests."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.core.sampling import FinishReason


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One sequence's next step: consume ``token_id``, which was output token ``index - 1``, and
    sample output token ``index``. None: what the step before this one samples for it."""

    request_id: str
    token_id: int | None
    index: int


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """What one forward pass decodes; never empty."""

    rows: tuple[DecodeRow, ...]

    @property
    def sampling_parts(self) -> tuple[DecodeRow, ...]:
        """Those after which a token is sampled: all."""
        return self.rows

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(row.request_id for row in self.rows)

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step did for one request that is still wanted."""

    request_id: str
    index: int
    finish_reason: FinishReason | None
