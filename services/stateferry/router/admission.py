"""Bounds the work inside the router, and lines requests up for workers.

Pure but for futures: time comes from ``tick`` and the clock, workers from the registry.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from stateferry.core.clock import Clock
from stateferry.core.errors import DeadlineExceeded, InvalidRequest, NoWorker, Overloaded
from stateferry.core.ids import Role
from stateferry.core.request import MAX_PRIORITY
from stateferry.core.waiting_line import WaitingLine
from stateferry.core.worker import WorkerDescription
from stateferry.router.membership import Change, ChangeKind, Dispatch, WorkerRegistry, WorkerView
from stateferry.router.observer import RouterObserver
from stateferry.router.placement import Need, Placement, place, place_at_decode, what_is_missing

# How long a request waits for a role that has no worker at all: a restarted worker rejoins faster,
# and the client still hears of it within two seconds.
NO_WORKER_GRACE_S = 1.0
_MAKES_ROOM = {ChangeKind.JOINED, ChangeKind.REPORTED, ChangeKind.RELEASED}


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """``max_requests`` counts all requests inside, waiting or running; each choice is one. Who has
    waited for ``starvation_s`` comes before all others."""

    max_requests: int
    max_queue_s: float
    starvation_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Seats:
    """A placement, counted on its workers. Each side is released when its call has ended.
    ``prefill`` is None where the decode worker is to run the prompt or to decline."""

    placement: Placement
    prefill: Dispatch | None
    decode: Dispatch | None

    def release_prefill(self) -> None:
        if self.prefill is not None:
            self.prefill.release()

    def release(self) -> None:
        self.release_prefill()
        if self.decode is not None:
            self.decode.release()


@dataclass(slots=True, eq=False)
class _Waiter:
    need: Need
    since_s: float
    deadline_s: float
    seats: asyncio.Future[Seats]
    missing: NoWorker | InvalidRequest | None = None
    missing_since_s: float = 0.0

    def note_missing(self, what: NoWorker | InvalidRequest | None, now_s: float) -> None:
        if what is not None and self.missing is None:
            self.missing_since_s = now_s
        self.missing = what


class Admission:
    """``enter`` bounds and tells apart requests; ``take_seats`` waits for workers, by priority and
    then first in first out: nobody is served before one that is to be served earlier. ``tick`` must
    be called a few times per second to end waits that are in vain."""

    def __init__(
        self,
        limits: AdmissionLimits,
        registry: WorkerRegistry,
        clock: Clock,
        observer: RouterObserver,
    ) -> None:
        self._limits = limits
        self._registry = registry
        self._clock = clock
        self._observer = observer
        self._inside: dict[str, int] = {}
        self._waiting: WaitingLine[_Waiter] = WaitingLine(limits.starvation_s)
        self._turn = 0
        registry.subscribe(self._on_change)

    @property
    def num_in_flight(self) -> int:
        return sum(self._inside.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @contextlib.contextmanager
    def enter(self, request_id: str, num_choices: int = 1) -> Iterator[None]:
        """Hold as many of ``max_requests`` places. Raises InvalidRequest when the id is in flight
        or there are not that many places, Overloaded when the router is full."""
        if request_id in self._inside:
            raise InvalidRequest("request_id", "is already in flight")
        most = self._limits.max_requests
        if num_choices > most:
            raise InvalidRequest("n", f"this router runs {most} choices at a time")
        if self.num_in_flight + num_choices > most:
            raise Overloaded(f"{self.num_in_flight} of {most} requests are in flight already")
        self._inside[request_id] = num_choices
        self._tell_occupancy()
        try:
            yield
        finally:
            del self._inside[request_id]
            self._tell_occupancy()

    async def take_seats(self, need: Need, deadline_s: float) -> Seats:
        """Wait for workers; the caller releases them. ``deadline_s`` is monotonic time.

        Raises Overloaded after ``max_queue_s``, NoWorker when none could ever come free,
        InvalidRequest when none could ever hold it, and DeadlineExceeded.
        """
        now_s = self._clock.monotonic_s()
        seats = None
        if not self._waiting.anyone_before(need.priority, now_s):
            seats = self._try(need)
        seats = seats or self._try_decode(need)
        if seats is not None:
            return seats
        waiter = _Waiter(need, now_s, deadline_s, asyncio.get_running_loop().create_future())
        waiter.note_missing(self._missing(need), now_s)
        self._waiting.add(waiter, need.priority, now_s)
        self._tell_occupancy()
        try:
            return await waiter.seats
        except asyncio.CancelledError:
            # Cancelled in the very moment in which seats were found.
            found = waiter.seats
            if found.done() and not found.cancelled() and found.exception() is None:
                found.result().release()
            raise
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            self._tell_occupancy()
            # The next in line may need less than this one did.
            self._serve_waiting()

    def tick(self) -> None:
        """End the waits that have become too long or hopeless."""
        now_s = self._clock.monotonic_s()
        workers = self._workers()
        for waiter in list(self._waiting):
            waiter.note_missing(what_is_missing(*workers, waiter.need), now_s)
            error = self._reason_to_give_up(waiter, now_s)
            if error is not None:
                self._waiting.remove(waiter)
                if not waiter.seats.done():
                    waiter.seats.set_exception(error)
        # Whoever has waited too long may need less than the one that was first so far.
        self._serve_waiting()

    def _reason_to_give_up(self, waiter: _Waiter, now_s: float) -> Exception | None:
        if now_s >= waiter.deadline_s:
            return DeadlineExceeded("no worker came free before the deadline")
        missing = waiter.missing
        if missing is not None and now_s - waiter.missing_since_s >= NO_WORKER_GRACE_S:
            return missing
        if now_s - waiter.since_s >= self._limits.max_queue_s:
            return Overloaded(f"no worker came free within {self._limits.max_queue_s:g} s")
        return None

    def _missing(self, need: Need) -> NoWorker | InvalidRequest | None:
        return what_is_missing(*self._workers(), need)

    def _workers(self) -> tuple[list[WorkerView], list[WorkerView]]:
        return self._registry.views(Role.PREFILL), self._registry.views(Role.DECODE)

    def _try(self, need: Need) -> Seats | None:
        placement = place(*self._workers(), need, self._turn)
        if placement is None:
            return None
        self._turn += 1
        decode = placement.decode
        return Seats(
            placement,
            self._dispatch(placement.prefill, need),
            None if decode is None else self._dispatch(decode, need),
        )

    def _try_decode(self, need: Need) -> Seats | None:
        """Only what nobody who waits would have had sooner for that."""
        placement = place_at_decode(*self._workers(), need, len(self._waiting))
        if placement is None or placement.decode is None:
            return None
        return Seats(placement, None, self._dispatch(placement.decode, need))

    def _dispatch(self, worker: WorkerDescription, need: Need) -> Dispatch:
        pushed_by = need.pushed_by if worker.role is Role.DECODE else MAX_PRIORITY
        held_tokens = need.held_tokens(worker.role)
        return self._registry.dispatch(worker, need.prompt_len, held_tokens, pushed_by)

    def _on_change(self, change: Change) -> None:
        if change.kind in _MAKES_ROOM:
            self._serve_waiting()

    def _serve_waiting(self) -> None:
        now_s = self._clock.monotonic_s()
        while (head := self._waiting.first(now_s)) is not None:
            if not head.seats.done():
                seats = self._try(head.need)
                if seats is None:
                    return
                head.seats.set_result(seats)
            self._waiting.remove(head)

    def _tell_occupancy(self) -> None:
        self._observer.occupancy(self.num_in_flight, len(self._waiting))
