"""Which sequences take a decode step next: all that are ready, joining and leaving at any step.

Life of a sequence::

    admit -> waiting -> (memory leased) reserved -> activate -> active -> finished
                ^                                                 |
                |                                            preempted
                +--- resuming <- (memory leased) waiting <--------+
                 abort at any point; memory is returned once no step in flight can touch it

A step may be scheduled before the tokens are known that it is to consume. A sequence that turns out
to have ended by then has taken one step too many, whose token nobody gets.

A preempted sequence takes no further step and, when those in flight are over, leaves its state to
the cache. It waits as newcomers do, and goes on with an extend over what the cache has lost of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from stateferry.core.errors import InvariantViolation, Overloaded
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import StopConditions
from stateferry.core.waiting_line import WaitingLine
from stateferry.scheduler.decode_step import Advance, DecodeRow, DecodeStep
from stateferry.scheduler.extend import ExtendJob, ExtendSlice, ExtendStep, take_slices
from stateferry.scheduler.in_flight import InFlight
from stateferry.scheduler.memory import PreemptibleMemory
from stateferry.scheduler.standing import ActiveSequence, Preemption, PreemptionCounts, Standing


class DecodeScheduler:
    """Continuous batching. Each step: ``schedule``, run it, ``complete`` (or ``fail``, of an
    extend); one or, if they overlap, two of them at once, which run and end in order.

    ``now_s`` is the caller's time, in seconds. Whoever has waited for ``starvation_s``, pauses
    included, is next and then is not preempted any more. Without ``preemption`` nobody ever is."""

    def __init__(
        self,
        memory: PreemptibleMemory,
        *,
        max_waiting: int,
        max_in_flight: Literal[1, 2] = 1,
        starvation_s: float = math.inf,
        preemption: Preemption | None = None,
    ) -> None:
        self._memory = memory
        self._max_waiting = max_waiting
        self._preemption = preemption
        self._standings: dict[str, Standing] = {}
        self._num_arrived = 0
        self._line: WaitingLine[str] = WaitingLine(starvation_s)
        self._reserved: set[str] = set()
        self._active: dict[str, ActiveSequence] = {}
        # Chosen to be preempted; its steps in flight have to end first.
        self._pausing: ActiveSequence | None = None
        # Preempted once, and on the way back; of those in the list something is to be launched.
        self._resuming: dict[str, ExtendJob] = {}
        self._extending: list[ExtendJob] = []
        self._extended_last = False
        self._in_flight: InFlight[DecodeStep | ExtendStep] = InFlight(max_in_flight, memory.release)
        self.counts = PreemptionCounts()

    # -- waiting for memory ---------------------------------------------------------------------

    def admit(
        self, request_id: str, held_tokens: int, priority: int = 0, now_s: float = 0.0
    ) -> None:
        """Queue for memory. ``held_tokens`` is the most that the sequence will ever have here.
        Raises Overloaded when the queue is full."""
        if self.knows(request_id):
            raise InvariantViolation(f"{request_id} was admitted twice")
        newcomers = sum(self._standings[waiting].again is None for waiting in self._line)
        if newcomers >= self._max_waiting:
            raise Overloaded(f"{newcomers} requests are waiting for memory already")
        self._stand(request_id, held_tokens, priority, now_s)
        self._line.add(request_id, priority, now_s)

    def reserve_waiting(self, now_s: float = 0.0) -> tuple[str, ...]:
        """Lease memory to those who wait, in order, and take some away where that serves a higher
        priority; returns which newcomers got it."""
        reserved: list[str] = []
        while True:
            self._serve_line(now_s, reserved)
            if not self._make_way(now_s):
                return tuple(reserved)

    def anyone_before(self, priority: int, now_s: float) -> bool:
        """Whether somebody waits for memory who comes before a newcomer of this priority."""
        return self._line.anyone_before(priority, now_s)

    # -- steps ----------------------------------------------------------------------------------

    def activate(
        self,
        request_id: str,
        first_token_id: int,
        stop: StopConditions,
        prompt: GenerationRequest | None = None,
        num_output_tokens: int = 1,
    ) -> None:
        """A reserved sequence's state is complete and the token after it known: it may step. With
        its ``prompt`` it may be preempted."""
        self._reserved.remove(request_id)
        self._join(request_id, first_token_id, stop, num_output_tokens, prompt)

    def take_over(
        self,
        request_id: str,
        token_id: int,
        stop: StopConditions,
        num_output_tokens: int = 1,
        prompt: GenerationRequest | None = None,
    ) -> None:
        """Continue a sequence whose memory was leased by somebody else over the same cache;
        ``token_id`` is the last of its output so far, and what follows ``prompt``."""
        if self.knows(request_id):
            raise InvariantViolation(f"{request_id} is here already")
        if prompt is None:
            self._stand(request_id, 0, 0, 0.0)
        else:
            self._stand(request_id, prompt.total_tokens, prompt.priority, 0.0)
        self._join(request_id, token_id, stop, num_output_tokens, prompt)

    def schedule(self) -> DecodeStep | ExtendStep | None:
        """The next step, which is in flight from now on; None when no sequence is ready."""
        if self._in_flight.is_full:
            return None
        first, second = self._extend_step, self._decode_step
        step = second() or first() if self._extended_last else first() or second()
        if step is None:
            return None
        self._extended_last = isinstance(step, ExtendStep)
        self._in_flight.launch(step, step.request_ids)
        return step

    def preempted(self, request_id: str) -> GenerationRequest:
        """What an extend is about: prompt and output of a sequence that is on its way back."""
        return self._resuming[request_id].request

    def complete(
        self, step: DecodeStep | ExtendStep, outputs: Sequence[Sequence[int]]
    ) -> tuple[Advance, ...]:
        """Account for the oldest step and what it sampled: of each row one output token, or several
        where guesses were right, all of which but the last were consumed; no token of a row that
        failed. Of an extend: of each prompt that it ended.

        Finished and failed sequences return their memory once no step touches it; failed ones have
        no advance.
        """
        parts: Sequence[DecodeRow | ExtendSlice] = step.sampling_parts
        for part, token_ids in zip(parts, outputs, strict=True):
            if not token_ids:
                self._memory.spoil(part.request_id)
        unwanted = self._in_flight.land(step)
        advances: list[Advance] = []
        for part, token_ids in zip(parts, outputs, strict=True):
            if part.request_id in unwanted:
                continue
            if not token_ids:
                self.abort(part.request_id)
            elif isinstance(part, DecodeRow):
                advances += self._advance(part, token_ids)
            else:
                advances.append(self._return(part.request_id, *token_ids))
        return tuple(advances)

    def fail(self, step: ExtendStep) -> None:
        """The oldest step, an extend, did not run to its end: what it touched is lost."""
        for part in step.slices:
            self._memory.spoil(part.request_id)
            if part.request_id in self._resuming:
                self.abort(part.request_id)
        self._in_flight.land(step)

    def abort(self, request_id: str) -> None:
        """Forget a request in any phase. Unknown ids are ignored: it may have ended already."""
        standing = self._standings.pop(request_id, None)
        if standing is None:
            return
        if request_id in self._line:
            self._line.remove(request_id)
            if standing.again is not None:
                self._memory.forget(request_id)
        elif request_id in self._reserved:
            self._reserved.remove(request_id)
            self._memory.release(request_id)
        elif (job := self._resuming.pop(request_id, None)) is not None:
            if job in self._extending:
                self._extending.remove(job)
            self._in_flight.let_go(request_id)
        else:
            if self._active.pop(request_id) is self._pausing:
                self._pausing = None
            self._in_flight.let_go(request_id)

    # -- reports --------------------------------------------------------------------------------

    def knows(self, request_id: str) -> bool:
        """Whether the request still has anything here, memory included."""
        return request_id in self._standings or self._in_flight.is_leaving(request_id)

    @property
    def num_waiting(self) -> int:
        """Newcomers and preempted ones."""
        return len(self._line)

    @property
    def num_active(self) -> int:
        """Requests that hold memory."""
        return len(self._standings) - len(self._line) + self._in_flight.num_leaving

    @property
    def is_resuming(self) -> bool:
        """Whether there are extends to schedule."""
        return bool(self._extending)

    @property
    def queued_tokens(self) -> int:
        """Tokens of preempted sequences that are to be computed again."""
        return sum(job.missing_len for job in self._resuming.values())

    # -- inside ---------------------------------------------------------------------------------

    def _stand(self, request_id: str, held_tokens: int, priority: int, now_s: float) -> None:
        self._num_arrived += 1
        number = self._num_arrived
        self._standings[request_id] = Standing(request_id, held_tokens, priority, number, now_s)

    def _join(
        self,
        request_id: str,
        token_id: int,
        stop: StopConditions,
        num_output_tokens: int,
        prompt: GenerationRequest | None,
    ) -> None:
        standing = self._standings[request_id]
        sequence = ActiveSequence(standing, stop, num_output_tokens, prompt, [token_id])
        self._active[request_id] = sequence

    def _serve_line(self, now_s: float, reserved: list[str]) -> None:
        while (request_id := self._line.first(now_s)) is not None:
            standing = self._standings[request_id]
            again, held_tokens = standing.again, standing.held_tokens
            if again is None:
                if not self._memory.reserve(request_id, held_tokens):
                    return
                self._reserved.add(request_id)
                reserved.append(request_id)
            else:
                known = self._memory.resume(again, held_tokens)
                if known is None:
                    return
                # The last token of its output was to be consumed anyhow.
                self.counts.recomputed_tokens += max(again.prompt_len - known - 1, 0)
                job = ExtendJob(again, held_tokens, launched_len=known)
                self._resuming[request_id] = job
                self._extending.append(job)
            self._line.remove(request_id)
            standing.began(now_s, self._line.starvation_s)

    def _make_way(self, now_s: float) -> bool:
        """Whether a sequence has just given its memory back. One at a time: what one of them held
        may be enough, and is seen only then."""
        if self._pausing is None or self._pausing.standing.priority >= self._highest:
            self._pausing = self._victim(now_s)
        victim = self._pausing
        if victim is None or victim.num_in_flight:
            return False
        self._pausing = None
        del self._active[victim.request_id]
        standing = victim.standing
        standing.again = victim.so_far()
        standing.since_s = now_s - standing.waited_s
        self._memory.park(victim.request_id)
        self._line.add(victim.request_id, standing.priority, standing.since_s)
        self.counts.preempted += 1
        return True

    @property
    def _highest(self) -> float:
        """Of the priorities of those who wait."""
        highest = self._line.highest()
        return -math.inf if highest is None else self._standings[highest].priority

    def _victim(self, now_s: float) -> ActiveSequence | None:
        """Of the lowest priority, the youngest; None where nobody may be pushed aside, or where
        that would not help the one who is next."""
        first = self._line.first(now_s)
        if self._preemption is None or first is None:
            return None
        highest = self._highest
        lower = [
            sequence
            for sequence in self._active.values()
            if sequence.standing.priority < highest
            and sequence.prompt is not None
            and not sequence.standing.is_safe
        ]
        if not lower:
            return None
        needed = self._standings[first].held_tokens
        leaving = self._in_flight.leaving
        if leaving and self._memory.fits_without(needed, leaving):
            # It has only to wait for the end of a step.
            return None
        if not self._memory.fits_without(needed, {*leaving, *(s.request_id for s in lower)}):
            return None
        return min(lower, key=lambda s: (s.standing.priority, -s.standing.number))

    def _decode_step(self) -> DecodeStep | None:
        rows = tuple(row for s in self._active.values() if (row := self._next_row(s)) is not None)
        for row in rows:
            self._active[row.request_id].num_in_flight += 1
        return DecodeStep(rows) if rows else None

    def _next_row(self, sequence: ActiveSequence) -> DecodeRow | None:
        """None when what is in flight brings its last token, or is the last before a pause."""
        index = sequence.num_output_tokens + sequence.num_in_flight
        if index >= sequence.stop.max_tokens or sequence is self._pausing:
            return None
        token_id = None if sequence.num_in_flight else sequence.last_token_id
        return DecodeRow(sequence.request_id, token_id, index)

    def _extend_step(self) -> ExtendStep | None:
        if not self._extending or self._preemption is None:
            return None
        step = take_slices(self._extending, self._preemption.budget_tokens, self._preemption.grid)
        if step is not None:
            ended = {part.request_id for part in step.slices if part.is_last}
            self._extending = [job for job in self._extending if job.request_id not in ended]
        return step

    def _advance(self, row: DecodeRow, token_ids: Sequence[int]) -> list[Advance]:
        sequence = self._active[row.request_id]
        sequence.num_in_flight -= 1
        advances = []
        for offset, token_id in enumerate(token_ids):
            self._memory.consumed(row.request_id, sequence.last_token_id)
            sequence.output_ids.append(token_id)
            sequence.num_output_tokens += 1
            reason = sequence.stop.check(token_id, sequence.num_output_tokens)
            advances.append(Advance(row.request_id, row.index + offset, reason))
            if reason is not None:
                self.abort(row.request_id)
                break
        return advances

    def _return(self, request_id: str, token_id: int) -> Advance:
        """A preempted sequence has caught up, and has a further token."""
        request = self._resuming.pop(request_id).request
        index = request.num_output_ids
        self._memory.publish(request_id)
        self._join(request_id, token_id, request.stop, index + 1, request)
        reason = request.stop.check(token_id, index + 1)
        if reason is not None:
            self.abort(request_id)
        return Advance(request_id, index, reason)
