"""Who gets a worker first, and when a full one is not full."""

from __future__ import annotations

import asyncio
import math

from router.fakes import FakeClock, description
from stateferry.core.ids import Role
from stateferry.router.admission import Admission, AdmissionLimits, Seats
from stateferry.router.membership import WorkerRegistry
from stateferry.router.observer import NoObserver
from stateferry.router.placement import Need

STARVATION_S = 10.0


class House:
    """Three prefill places, so that decode workers are what is short."""

    def __init__(
        self, capacity: int = 1, *, preempts: bool = True, kv_pages: int = 0, decodes: int = 1
    ) -> None:
        self.clock = FakeClock()
        self.registry = WorkerRegistry(self.clock, 1e9)
        limits = AdmissionLimits(99, 1000.0, STARVATION_S)
        self.admission = Admission(limits, self.registry, self.clock, NoObserver())
        self.registry.join(description(Role.PREFILL, capacity=30))
        for number in range(decodes):
            self.registry.join(
                description(
                    Role.DECODE,
                    f"decode-{number}",
                    capacity=capacity,
                    kv_pages=kv_pages,
                    preempts=preempts,
                )
            )

    def ask(
        self, priority: int = 0, *, preemptible: bool = True, tokens: int = 20
    ) -> asyncio.Task[Seats]:
        need = Need(10, tokens, True, priority=priority, preemptible=preemptible)
        return asyncio.create_task(self.admission.take_seats(need, math.inf))

    async def pass_time(self, seconds: float = 0.0) -> None:
        self.clock.now_s += seconds
        self.admission.tick()
        for _ in range(3):
            await asyncio.sleep(0)


async def test_the_line_goes_by_priority_and_then_by_arrival() -> None:
    house = House(preempts=False)
    taken = await house.ask()
    served: list[tuple[int, int]] = []

    async def wait(number: int, priority: int) -> None:
        seats = await house.ask(priority)
        served.append((priority, number))
        await asyncio.sleep(0)
        seats.release()

    waiting = [asyncio.create_task(wait(n, p)) for n, p in enumerate((0, 3, -2, 3, 0))]
    await house.pass_time()
    assert house.admission.num_waiting == 5
    taken.release()
    await asyncio.gather(*waiting)
    assert served == [(3, 1), (3, 3), (0, 0), (0, 4), (-2, 2)]


async def test_nobody_waits_longer_than_the_bound_while_higher_ones_come() -> None:
    house = House(preempts=False)
    taken = await house.ask(5)
    low = house.ask(-5)
    await house.pass_time()
    for _ in range(6):
        high = house.ask(5)
        await house.pass_time(STARVATION_S / 5)
        taken.release()
        await house.pass_time()
        if low.done():
            break
        taken = await high
    assert low.done() and not high.done()
    assert house.clock.now_s - 1000.0 == STARVATION_S, "at the first place that came free"
    (await low).release()
    (await high).release()


async def test_the_bound_lets_one_go_that_needs_less_than_the_first_in_line() -> None:
    """No place comes free then: what changes with time is who is first."""
    house = House(capacity=3, preempts=False, kv_pages=8)
    taken, freed = await house.ask(tokens=90), await house.ask(tokens=20)
    small = house.ask(-5, tokens=20)
    await house.pass_time()
    big = house.ask(5, tokens=90)
    await house.pass_time()
    freed.release()
    await house.pass_time(STARVATION_S - 0.1)
    assert not small.done(), "it has room, and is not first"
    await house.pass_time(0.2)
    assert small.done() and not big.done()
    for seats in (taken, await small):
        seats.release()
    (await big).release()


async def test_a_full_worker_takes_one_of_higher_priority_for_each_lower_one() -> None:
    house = House(capacity=2)
    low = [await house.ask(0), await house.ask(1)]
    same = house.ask(0)
    await house.pass_time()
    assert not same.done()
    high = [await house.ask(2), await house.ask(2)]
    third = house.ask(2)
    await house.pass_time()
    assert not third.done(), "nobody is left that it could push aside"
    # Two too many: those that pause have to end, or come back, before a place is free again.
    low[0].release()
    await house.pass_time()
    assert not same.done() and not third.done()
    high[0].release()
    await house.pass_time()
    assert third.done() and not same.done()
    for seats in (low[1], high[1], await third):
        seats.release()
    (await same).release()
    [view] = house.registry.views(Role.DECODE)
    assert (view.busy_requests, dict(view.shares)) == (0, {})


async def test_what_cannot_pause_and_who_does_not_preempt_are_full_when_full() -> None:
    for house, preemptible in ((House(), False), (House(preempts=False), True)):
        low = await house.ask(0, preemptible=preemptible)
        high = house.ask(100)
        await house.pass_time()
        assert not high.done()
        low.release()
        (await high).release()


async def test_keys_and_values_of_lower_ones_are_not_counted_either() -> None:
    house = House(capacity=9, kv_pages=8)
    low = await house.ask(0, tokens=100)
    same, high = house.ask(0, tokens=100), house.ask(1, tokens=100)
    await house.pass_time()
    assert high.done() and not same.done()
    for seats in (low, await high):
        seats.release()
    (await same).release()


async def test_a_place_that_is_free_is_taken_before_anybody_is_pushed_aside() -> None:
    house = House(decodes=3)
    low = [await house.ask(0), await house.ask(0)]
    seats = await house.ask(9)
    places = {s.placement.decode.key.worker_id for s in (*low, seats) if s.placement.decode}
    assert places == {"decode-0", "decode-1", "decode-2"}


async def test_of_full_workers_the_one_with_fewer_of_its_own_rank() -> None:
    house = House(capacity=2, decodes=2)
    taken = [await house.ask(0) for _ in range(4)]
    taken += [await house.ask(3) for _ in range(4)]
    places = [s.placement.decode.key.worker_id for s in taken[4:] if s.placement.decode]
    assert sorted(places) == ["decode-0", "decode-0", "decode-1", "decode-1"]
