"""Steps of one engine, one after the other on its thread, the next one planned while one runs.

::

    event loop   plan 1   plan 2   land 1, plan 3   land 2, plan 4
    engine       -        step 1   step 2           step 3

With overlap off a step is planned when the one before has landed. The scheduler decides: it has no
step to give while it has as many in flight as it may.

A GPU's step is queued by the engine's thread, which goes on with the next; another waits for it::

    engine       queue 1   queue 2            queue 3
    device                 step 1    step 2            step 3
    results      -         wait for 1         wait for 2
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from stateferry.core.clock import Clock
from stateferry.engine.launch import Planned, Running
from stateferry.worker.meter import WorkerMeter
from stateferry.worker.waiting import Wakeup, run_to_end, settle

log = logging.getLogger(__name__)


class Step(Protocol):
    """One forward pass."""

    @property
    def num_rows(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...


T = TypeVar("T")
StepT = TypeVar("StepT", bound=Step)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class _Ran(Generic[ResultT]):
    sampled: ResultT
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class _InFlight(Generic[StepT, ResultT]):
    step: StepT
    ran: asyncio.Future[_Ran[ResultT]]
    # Whether there was nothing that it could have followed without a gap.
    is_first: bool


class Pipeline(Generic[StepT, ResultT]):
    """``schedule`` gives the next step, or None; ``plan`` makes its launch; ``land`` gets a step
    with what it sampled or what it failed with, in the order of ``schedule``, and may not raise."""

    def __init__(
        self,
        kind: str,
        executor: Executor,
        clock: Clock,
        meter: WorkerMeter,
        *,
        schedule: Callable[[], StepT | None],
        plan: Callable[[StepT], Planned[ResultT]],
        land: Callable[[StepT, ResultT | Exception], None],
    ) -> None:
        """``executor`` has one thread; ``kind`` is the steps' name in the metrics."""
        self._kind = kind
        self._executor = executor
        self._results = ThreadPoolExecutor(1, "results")
        self._clock = clock
        self._meter = meter
        self._schedule = schedule
        self._plan = plan
        self._land = land
        self._wakeup = Wakeup()
        self._in_flight: deque[_InFlight[StepT, ResultT]] = deque()
        self._ended_s = 0.0
        self._is_idle = True

    def wake(self) -> None:
        """There may be something to schedule."""
        self._wakeup.set()

    async def run(self) -> None:
        """For ever. Cancelled, it returns once nothing is in flight; nothing lands any more."""
        try:
            while True:
                self._launch_what_can_be()
                self._is_idle = not self._in_flight
                if self._in_flight and self._in_flight[0].ran.done():
                    self._take(self._in_flight.popleft())
                else:
                    await self._wakeup.wait()
        finally:
            for launched in self._in_flight:
                await settle(launched.ran)
            self._results.shutdown(wait=False)

    async def in_order(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the engine's thread, behind what is in flight. Never returns before it
        has ended, even when cancelled."""
        return await run_to_end(self._executor, work)

    def _launch_what_can_be(self) -> None:
        while (step := self._schedule()) is not None:
            ran = self._launch(step)
            ran.add_done_callback(lambda _: self._wakeup.set())
            self._in_flight.append(_InFlight(step, ran, self._is_idle))
            self._is_idle = False

    def _launch(self, step: StepT) -> asyncio.Future[_Ran[ResultT]]:
        ran: Future[_Ran[ResultT]] = Future()
        # Not to be cancelled: somebody waits until it has run.
        ran.set_running_or_notify_cancel()
        try:
            self._executor.submit(self._start, self._plan(step), ran)
        except Exception as error:
            ran.set_exception(error)
        return asyncio.wrap_future(ran)

    def _start(self, launch: Planned[ResultT], ran: Future[_Ran[ResultT]]) -> None:
        """On the engine's thread."""
        began_s = self._clock.monotonic_s()
        try:
            started = launch.start()
            if not started.is_over:
                self._results.submit(self._finish, started, began_s, ran)
                return
        except Exception as error:
            ran.set_exception(error)
        else:
            self._finish(started, began_s, ran)

    def _finish(
        self, started: Running[ResultT], began_s: float, ran: Future[_Ran[ResultT]]
    ) -> None:
        try:
            sampled = started.sampled()
        except Exception as error:
            ran.set_exception(error)
        else:
            ran.set_result(_Ran(sampled, began_s, self._clock.monotonic_s()))

    def _take(self, launched: _InFlight[StepT, ResultT]) -> None:
        try:
            ran = launched.ran.result()
        except Exception as error:
            log.exception("a step of kind %s failed", self._kind)
            self._land(launched.step, error)
            return
        step = launched.step
        # A step that was queued ahead began when the one before it ended.
        began_s = max(ran.began_s, self._ended_s)
        took_s = ran.ended_s - began_s
        self._meter.observe_step(self._kind, took_s, step.num_rows, step.num_tokens)
        if not launched.is_first:
            self._meter.observe_gap(self._kind, began_s - self._ended_s)
        self._ended_s = ran.ended_s
        self._land(step, ran.sampled)
