"""Which prompt tokens run next: first come, first served, cut on the grid, within a token budget.

Life of a job::

    submit -> waiting -> (memory leased) running -> computed -> release
                 abort at any point; memory is returned once no step in flight can touch it
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from stateferry.core.errors import ConfigError, InvariantViolation, Overloaded
from stateferry.core.request import GenerationRequest
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
    def num_tokens(self) -> int:
        return sum(part.length for part in self.slices)


@dataclass(slots=True)
class _Job:
    request: GenerationRequest
    held_tokens: int
    computed_len: int = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        return self.request.prompt_len


class PrefillScheduler:
    """Chunked prefill. One step is in flight at a time: ``schedule``, run it, ``complete``."""

    def __init__(
        self, memory: PromptMemory, *, grid: int, budget_tokens: int, max_waiting: int
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
        self._in_flight: ExtendStep | None = None
        self._aborted_in_flight: set[str] = set()

    def submit(self, request: GenerationRequest, held_tokens: int) -> None:
        """Queue a prompt. ``held_tokens`` is the most that the sequence will ever have here, at
        least the prompt's. Raises Overloaded when the queue is full."""
        if self.knows(request.request_id):
            raise InvariantViolation(f"{request.request_id} was submitted twice")
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} prompts are waiting already")
        self._waiting.append(_Job(request, held_tokens))

    def schedule(self) -> ExtendStep | None:
        """The next step, or None when nothing can run."""
        if self._in_flight is not None:
            raise InvariantViolation("a step is in flight already")
        self._admit()
        computed: list[ExtendSlice] = []
        known: list[ExtendSlice] = []
        left = self._budget_tokens
        for job in self._running.values():
            part = self._cut(job, left)
            if part is None:
                break
            (computed if part.length else known).append(part)
            left -= part.length
        slices = (*computed, *known)
        self._in_flight = ExtendStep(slices) if slices else None
        return self._in_flight

    def complete(self, step: ExtendStep) -> tuple[str, ...]:
        """Account for a step that has run; returns the requests whose prompt is now computed."""
        if step is not self._in_flight:
            raise InvariantViolation("completed a step that was not in flight")
        self._in_flight = None
        finished = []
        for part in step.slices:
            if part.request_id in self._aborted_in_flight:
                self._aborted_in_flight.remove(part.request_id)
                self._memory.release(part.request_id)
                continue
            job = self._running[part.request_id]
            job.computed_len += part.length
            if part.is_last:
                del self._running[part.request_id]
                self._computed.add(part.request_id)
                finished.append(part.request_id)
        return tuple(finished)

    def fail(self, step: ExtendStep) -> None:
        """The step did not run to its end: everything it touched is lost, and its memory
        returned."""
        if step is not self._in_flight:
            raise InvariantViolation("failed a step that was not in flight")
        self._in_flight = None
        for part in step.slices:
            self._running.pop(part.request_id, None)
            self._aborted_in_flight.discard(part.request_id)
            self._memory.spoil(part.request_id)
            self._memory.release(part.request_id)

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
        elif request_id in self._running:
            del self._running[request_id]
            if self._step_touches(request_id):
                self._aborted_in_flight.add(request_id)
            else:
                self._memory.release(request_id)
        else:
            self._waiting = deque(job for job in self._waiting if job.request_id != request_id)

    def knows(self, request_id: str) -> bool:
        """Whether the request still has anything here, memory included."""
        return (
            request_id in self._running
            or request_id in self._computed
            or request_id in self._aborted_in_flight
            or any(job.request_id == request_id for job in self._waiting)
        )

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Requests that hold memory."""
        return len(self._running) + len(self._computed) + len(self._aborted_in_flight)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens not computed yet."""
        jobs = (*self._waiting, *self._running.values())
        return sum(job.prompt_len - job.computed_len for job in jobs)

    def _admit(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            resumed = self._memory.resume(job.request, job.held_tokens)
            if resumed is None:
                return
            job.computed_len = resumed
            self._running[job.request_id] = self._waiting.popleft()

    def _cut(self, job: _Job, budget_tokens: int) -> ExtendSlice | None:
        start = job.computed_len
        remaining = job.prompt_len - start
        if remaining <= budget_tokens:
            return ExtendSlice(job.request_id, start, remaining, is_last=True)
        # A cut on the grid leaves a finished state behind instead of a tail to read again.
        end = (start + budget_tokens) // self._grid * self._grid
        if end <= start:
            return None
        return ExtendSlice(job.request_id, start, end - start, is_last=False)

    def _step_touches(self, request_id: str) -> bool:
        step = self._in_flight
        return step is not None and any(part.request_id == request_id for part in step.slices)
