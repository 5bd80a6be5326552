"""Which prompt tokens run next: first come, first served, cut on the grid, within a token budget.

Life of a job::

    submit -> waiting -> (memory leased) running -> computed -> release
                 abort at any point; memory is returned once no step in flight can touch it

A slice is taken off a prompt when it is launched: the next step goes on behind it, whether it has
come back or not.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from stateferry.core.errors import ConfigError, InvariantViolation, Overloaded
from stateferry.core.request import GenerationRequest
from stateferry.scheduler.in_flight import InFlight
from stateferry.scheduler.memory import PromptMemory


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
    def num_rows(self) -> int:
        return len(self.slices)

    @property
    def num_tokens(self) -> int:
        return sum(part.length for part in self.slices)


@dataclass(slots=True)
class _Job:
    request: GenerationRequest
    held_tokens: int
    launched_len: int = 0
    # All of it: a prompt that was known has a slice without tokens.
    is_launched: bool = False

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        return self.request.prompt_len

    def take(self, part: ExtendSlice) -> None:
        """The slice is launched."""
        self.launched_len += part.length
        self.is_launched = part.is_last


class PrefillScheduler:
    """Chunked prefill. Each step: ``schedule``, run it, ``complete`` or ``fail``; up to
    ``max_in_flight`` of them at once, which run and end in order."""

    def __init__(
        self,
        memory: PromptMemory,
        *,
        grid: int,
        budget_tokens: int,
        max_waiting: int,
        max_in_flight: int = 1,
    ) -> None:
        if budget_tokens < grid:
            raise ConfigError(
                "worker.extend_budget_tokens", f"{budget_tokens} is less than the grid of {grid}"
            )
        self._memory = memory
        self._grid = grid
        self._budget_tokens = budget_tokens
        self._max_waiting = max_waiting
        self._waiting: deque[_Job] = deque()
        self._running: dict[str, _Job] = {}
        self._computed: set[str] = set()
        self._in_flight: InFlight[ExtendStep] = InFlight(max_in_flight, memory.release)

    def submit(self, request: GenerationRequest, held_tokens: int) -> None:
        """Queue a prompt. ``held_tokens`` is the most that the sequence will ever have here, at
        least the prompt's. Raises Overloaded when the queue is full."""
        if self.knows(request.request_id):
            raise InvariantViolation(f"{request.request_id} was submitted twice")
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} prompts are waiting already")
        self._waiting.append(_Job(request, held_tokens))

    def schedule(self) -> ExtendStep | None:
        """The next step, which is in flight from now on; None when nothing can run now."""
        if self._in_flight.is_full:
            return None
        self._admit()
        computed: list[ExtendSlice] = []
        known: list[ExtendSlice] = []
        left = self._budget_tokens
        for job in self._running.values():
            if job.is_launched:
                continue
            part = self._cut(job, left)
            if part is None:
                break
            (computed if part.length else known).append(part)
            left -= part.length
        if not computed and not known:
            return None
        step = ExtendStep((*computed, *known))
        for part in step.slices:
            self._running[part.request_id].take(part)
        self._in_flight.launch(step, (part.request_id for part in step.slices))
        return step

    def complete(self, step: ExtendStep) -> tuple[str, ...]:
        """Account for the oldest step, which has run; returns the requests whose prompt is now
        computed and still wanted."""
        unwanted = self._in_flight.land(step)
        finished = [
            part.request_id
            for part in step.slices
            if part.is_last and part.request_id not in unwanted
        ]
        for request_id in finished:
            del self._running[request_id]
            self._computed.add(request_id)
        return tuple(finished)

    def fail(self, step: ExtendStep) -> None:
        """The oldest step did not run to its end: the requests that it touched are lost."""
        for part in step.slices:
            self._memory.spoil(part.request_id)
            if self._running.pop(part.request_id, None) is not None:
                self._in_flight.let_go(part.request_id)
        self._in_flight.land(step)

    def release(self, request_id: str) -> None:
        """The computed state of a request is needed no longer."""
        self._computed.remove(request_id)
        self._memory.release(request_id)

    def hand_over(self, request_id: str) -> None:
        """Somebody else owns the memory of a computed request from now on."""
        self._computed.remove(request_id)

    def abort(self, request_id: str) -> None:
        """Forget a request in any phase. Unknown ids are ignored: it may have ended already."""
        if request_id in self._computed:
            self.release(request_id)
        elif self._running.pop(request_id, None) is not None:
            self._in_flight.let_go(request_id)
        else:
            self._waiting = deque(job for job in self._waiting if job.request_id != request_id)

    def knows(self, request_id: str) -> bool:
        """Whether the request still has anything here, memory included."""
        return (
            request_id in self._running
            or request_id in self._computed
            or self._in_flight.is_leaving(request_id)
            or any(job.request_id == request_id for job in self._waiting)
        )

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Requests that hold memory."""
        return len(self._running) + len(self._computed) + self._in_flight.num_leaving

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens not computed yet."""
        jobs = (*self._waiting, *self._running.values())
        launched = sum(step.num_tokens for step in self._in_flight.steps)
        return launched + sum(job.prompt_len - job.launched_len for job in jobs)

    def _admit(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            resumed = self._memory.resume(job.request, job.held_tokens)
            if resumed is None:
                return
            job.launched_len = resumed
            self._running[job.request_id] = self._waiting.popleft()

    def _cut(self, job: _Job, budget_tokens: int) -> ExtendSlice | None:
        start = job.launched_len
        remaining = job.prompt_len - start
        if remaining <= budget_tokens:
            return ExtendSlice(job.request_id, start, remaining, is_last=True)
        # A cut on the grid leaves a finished state behind instead of a tail to read again.
        end = (start + budget_tokens) // self._grid * self._grid
        if end <= start:
            return None
        return ExtendSlice(job.request_id, start, end - start, is_last=False)
