"""Which sequences take a decode step next: all that are ready, joining and leaving at any step.

Life of a sequence::

    admit -> waiting -> (memory leased) reserved -> activate -> active -> finished
                 abort at any point; memory is returned once no step in flight can touch it

A step may be scheduled before the tokens are known that it is to consume. A sequence that turns out
to have ended by then has taken one step too many, whose token nobody gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stateferry.core.errors import InvariantViolation, Overloaded
from stateferry.core.sampling import FinishReason, StopConditions
from stateferry.scheduler.in_flight import InFlight
from stateferry.scheduler.memory import StateMemory


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


@dataclass(slots=True)
class _Sequence:
    request_id: str
    stop: StopConditions
    last_token_id: int
    num_output_tokens: int
    num_in_flight: int = 0

    @property
    def next_row(self) -> DecodeRow | None:
        """None when what is in flight brings its last token."""
        index = self.num_output_tokens + self.num_in_flight
        if index >= self.stop.max_tokens:
            return None
        return DecodeRow(self.request_id, None if self.num_in_flight else self.last_token_id, index)


class DecodeScheduler:
    """Continuous batching. Each step: ``schedule``, run it, ``complete``; one or, if they overlap,
    two of them at once, which run and end in order."""

    def __init__(
        self, memory: StateMemory, *, max_waiting: int, max_in_flight: Literal[1, 2] = 1
    ) -> None:
        self._memory = memory
        self._max_waiting = max_waiting
        self._waiting: dict[str, int] = {}
        self._reserved: set[str] = set()
        self._active: dict[str, _Sequence] = {}
        self._in_flight: InFlight[DecodeStep] = InFlight(max_in_flight, memory.release)

    def admit(self, request_id: str, held_tokens: int) -> None:
        """Queue for memory. ``held_tokens`` is the most that the sequence will ever have here.
        Raises Overloaded when the queue is full."""
        if self.knows(request_id):
            raise InvariantViolation(f"{request_id} was admitted twice")
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests are waiting for memory already")
        self._waiting[request_id] = held_tokens

    def reserve_waiting(self) -> tuple[str, ...]:
        """Lease memory to those who wait, in order; returns who got it."""
        reserved = []
        for request_id, held_tokens in self._waiting.items():
            if not self._memory.reserve(request_id, held_tokens):
                break
            reserved.append(request_id)
        for request_id in reserved:
            del self._waiting[request_id]
        self._reserved.update(reserved)
        return tuple(reserved)

    def activate(self, request_id: str, first_token_id: int, stop: StopConditions) -> None:
        """A reserved sequence's state is complete and token 0 is known: it may step."""
        self._reserved.remove(request_id)
        self._join(request_id, first_token_id, stop)

    def take_over(
        self, request_id: str, token_id: int, stop: StopConditions, num_output_tokens: int = 1
    ) -> None:
        """Continue a sequence whose memory was leased by somebody else over the same cache;
        ``token_id`` is the last of its output so far."""
        if self.knows(request_id):
            raise InvariantViolation(f"{request_id} is here already")
        self._join(request_id, token_id, stop, num_output_tokens)

    def schedule(self) -> DecodeStep | None:
        """The next step, which is in flight from now on; None when no sequence is ready."""
        if self._in_flight.is_full:
            return None
        rows = tuple(row for s in self._active.values() if (row := s.next_row) is not None)
        if not rows:
            return None
        step = DecodeStep(rows)
        for row in rows:
            self._active[row.request_id].num_in_flight += 1
        self._in_flight.launch(step, (row.request_id for row in rows))
        return step

    def complete(
        self, step: DecodeStep, outputs: Sequence[Sequence[int]]
    ) -> tuple[Advance, ...]:
        """Account for the oldest step and what it sampled: of each row one output token, or several
        where guesses were right, all of which but the last were consumed; no token of a row that
        failed.

        Finished and failed sequences return their memory once no step touches it; failed ones have
        no advance.
        """
        for row, token_ids in zip(step.rows, outputs, strict=True):
            if not token_ids:
                self._memory.spoil(row.request_id)
        unwanted = self._in_flight.land(step)
        advances = []
        for row, token_ids in zip(step.rows, outputs, strict=True):
            if row.request_id in unwanted:
                continue
            if not token_ids:
                self.abort(row.request_id)
                continue
            advances += self._advance(row, token_ids)
        return tuple(advances)

    def _advance(self, row: DecodeRow, token_ids: Sequence[int]) -> list[Advance]:
        sequence = self._active[row.request_id]
        sequence.num_in_flight -= 1
        advances = []
        for offset, token_id in enumerate(token_ids):
            self._memory.consumed(row.request_id, sequence.last_token_id)
            sequence.last_token_id = token_id
            sequence.num_output_tokens += 1
            reason = sequence.stop.check(token_id, sequence.num_output_tokens)
            advances.append(Advance(row.request_id, row.index + offset, reason))
            if reason is not None:
                self.abort(row.request_id)
                break
        return advances

    def abort(self, request_id: str) -> None:
        """Forget a request in any phase. Unknown ids are ignored: it may have ended already."""
        if request_id in self._reserved:
            self._reserved.remove(request_id)
            self._memory.release(request_id)
        elif self._active.pop(request_id, None) is not None:
            self._in_flight.let_go(request_id)
        elif request_id in self._waiting:
            del self._waiting[request_id]

    def knows(self, request_id: str) -> bool:
        """Whether the request still has anything here, memory included."""
        return (
            request_id in self._active
            or request_id in self._reserved
            or self._in_flight.is_leaving(request_id)
            or request_id in self._waiting
        )

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Requests that hold memory."""
        return len(self._active) + len(self._reserved) + self._in_flight.num_leaving

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens not computed yet: none, a decode worker computes no prompts."""
        return 0

    def _join(
        self, request_id: str, token_id: int, stop: StopConditions, num_output_tokens: int = 1
    ) -> None:
        self._active[request_id] = _Sequence(request_id, stop, token_id, num_output_tokens)
