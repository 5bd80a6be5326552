"""Which prompt tokens run next: by priority and arrival, cut on the grid, within a token budget.

Life of a job::

    submit -> waiting -> (memory leased) running -> computed -> release
                 abort at any point; memory is returned once no step in flight can touch it

A slice is taken off a prompt when it is launched: the next step goes on behind it, whether it has
come back or not.
"""

from __future__ import annotations

import math

from stateferry.core.errors import ConfigError, InvariantViolation, Overloaded
from stateferry.core.request import GenerationRequest
from stateferry.core.waiting_line import WaitingLine
from stateferry.scheduler.extend import ExtendJob, ExtendStep, take_slices
from stateferry.scheduler.in_flight import InFlight
from stateferry.scheduler.memory import PromptMemory


class PrefillScheduler:
    """Chunked prefill. Each step: ``schedule``, run it, ``complete`` or ``fail``; up to
    ``max_in_flight`` of them at once, which run and end in order.

    ``now_s`` is the caller's time, in seconds; a prompt that has waited for memory or for its next
    slice for ``starvation_s`` since it was submitted comes before all others."""

    def __init__(
        self,
        memory: PromptMemory,
        *,
        grid: int,
        budget_tokens: int,
        max_waiting: int,
        max_in_flight: int = 1,
        starvation_s: float = math.inf,
    ) -> None:
        if budget_tokens < grid:
            raise ConfigError(
                "worker.extend_budget_tokens", f"{budget_tokens} is less than the grid of {grid}"
            )
        self._memory = memory
        self._grid = grid
        self._budget_tokens = budget_tokens
        self._max_waiting = max_waiting
        self._jobs: dict[str, ExtendJob] = {}
        self._waiting: WaitingLine[str] = WaitingLine(starvation_s)
        # Those that hold memory, and of which something is to be launched.
        self._extending: WaitingLine[str] = WaitingLine(starvation_s)
        self._computed: set[str] = set()
        self._in_flight: InFlight[ExtendStep] = InFlight(max_in_flight, memory.release)

    def submit(self, request: GenerationRequest, held_tokens: int, now_s: float = 0.0) -> None:
        """Queue a prompt. ``held_tokens`` is the most that the sequence will ever have here, at
        least the prompt's. Raises Overloaded when the queue is full."""
        if self.knows(request.request_id):
            raise InvariantViolation(f"{request.request_id} was submitted twice")
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} prompts are waiting already")
        self._jobs[request.request_id] = ExtendJob(request, held_tokens, now_s)
        self._waiting.add(request.request_id, request.priority, now_s)

    def schedule(self, now_s: float = 0.0) -> ExtendStep | None:
        """The next step, which is in flight from now on; None when nothing can run now."""
        if self._in_flight.is_full:
            return None
        self._admit(now_s)
        jobs = (self._jobs[request_id] for request_id in self._extending.in_order(now_s))
        step = take_slices(jobs, self._budget_tokens, self._grid)
        if step is None:
            return None
        for part in step.slices:
            if part.is_last:
                self._extending.remove(part.request_id)
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
            del self._jobs[request_id]
            self._computed.add(request_id)
        return tuple(finished)

    def fail(self, step: ExtendStep) -> None:
        """The oldest step did not run to its end: the requests that it touched are lost."""
        for part in step.slices:
            self._memory.spoil(part.request_id)
            self._stop(part.request_id)
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
        elif request_id in self._waiting:
            self._waiting.remove(request_id)
            del self._jobs[request_id]
        else:
            self._stop(request_id)

    def knows(self, request_id: str) -> bool:
        """Whether the request still has anything here, memory included."""
        return (
            request_id in self._jobs
            or request_id in self._computed
            or self._in_flight.is_leaving(request_id)
        )

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Requests that hold memory."""
        running = len(self._jobs) - len(self._waiting)
        return running + len(self._computed) + self._in_flight.num_leaving

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens not computed yet."""
        launched = sum(step.num_tokens for step in self._in_flight.steps)
        return launched + sum(job.missing_len for job in self._jobs.values())

    def _admit(self, now_s: float) -> None:
        while (request_id := self._waiting.first(now_s)) is not None:
            job = self._jobs[request_id]
            resumed = self._memory.resume(job.request, job.held_tokens)
            if resumed is None:
                return
            job.launched_len = resumed
            self._waiting.remove(request_id)
            self._extending.add(request_id, job.request.priority, job.since_s)

    def _stop(self, request_id: str) -> None:
        """Of a prompt that holds memory, if it is one."""
        if self._jobs.pop(request_id, None) is not None:
            if request_id in self._extending:
                self._extending.remove(request_id)
            self._in_flight.let_go(request_id)
