"""Bounds and waiting lines, on a clock that the test owns."""

from __future__ import annotations

import asyncio
import math

import pytest

from router.fakes import FakeClock, description
from stateferry.core.errors import DeadlineExceeded, InvalidRequest, NoWorker, Overloaded
from stateferry.core.ids import Role
from stateferry.router.admission import Admission, AdmissionLimits, Seats
from stateferry.router.membership import WorkerRegistry
from stateferry.router.observer import NoObserver
from stateferry.router.placement import Need

NEED = Need(prompt_len=10, total_tokens=20, needs_decode=True)


class House:
    """An admission over a registry with one worker of each role."""

    def __init__(self, capacity: int = 1, *, join: bool = True) -> None:
        self.clock = FakeClock()
        self.registry = WorkerRegistry(self.clock, 1000.0)
        self.capacity = capacity
        self.admission = Admission(
            AdmissionLimits(max_requests=3, max_queue_s=10.0),
            self.registry,
            self.clock,
            NoObserver(),
        )
        self.registrations = {r: self.join(r) for r in Role} if join else {}

    def join(self, role: Role, incarnation: int = 1) -> object:
        return self.registry.join(
            description(role, capacity=self.capacity, incarnation=incarnation)
        )

    def ask(self, need: Need = NEED, within_s: float = math.inf) -> asyncio.Task[Seats]:
        deadline_s = self.clock.now_s + within_s
        return asyncio.create_task(self.admission.take_seats(need, deadline_s))

    async def pass_time(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.admission.tick()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    def num_dispatched(self) -> int:
        return sum(v.dispatched_requests for r in Role for v in self.registry.views(r))


def test_places_are_bounded_and_given_back() -> None:
    admission = House().admission
    with admission.enter("a"), admission.enter("b"), admission.enter("c"):
        assert admission.num_in_flight == 3
        with pytest.raises(Overloaded) as caught, admission.enter("d"):
            pass
        assert caught.value.retry_after_s > 0
    assert admission.num_in_flight == 0


def test_every_choice_counts_against_the_limit_and_in_what_is_reported() -> None:
    house = House()
    reported: list[tuple[int, int]] = []
    observer = NoObserver()
    observer.occupancy = lambda *counts: reported.append(counts)  # type: ignore[method-assign]
    limits = AdmissionLimits(max_requests=3, max_queue_s=10.0)
    admission = Admission(limits, house.registry, house.clock, observer)
    with admission.enter("a", num_choices=2), pytest.raises(Overloaded), admission.enter("b", 2):
        pass
    with pytest.raises(InvalidRequest, match="n: "), admission.enter("c", num_choices=4):
        pass
    assert reported == [(2, 0), (0, 0)]


def test_an_id_is_in_flight_once_and_free_again_after() -> None:
    admission = House().admission
    with admission.enter("a"), pytest.raises(InvalidRequest) as caught, admission.enter("a"):
        pass
    assert caught.value.field == "request_id"
    with pytest.raises(ValueError), admission.enter("a"):
        raise ValueError
    with admission.enter("a"):
        pass


async def test_first_in_first_out() -> None:
    house = House()
    seats = await house.ask()
    served: list[int] = []

    async def wait(number: int) -> None:
        taken = await house.ask()
        served.append(number)
        await asyncio.sleep(0)
        taken.release()

    waiting = [asyncio.create_task(wait(n)) for n in range(3)]
    await house.pass_time(1.0)
    assert house.admission.num_waiting == 3 and served == []
    seats.release()
    await asyncio.gather(*waiting)
    assert served == [0, 1, 2]
    assert house.num_dispatched() == 0 and house.admission.num_waiting == 0


async def test_nobody_overtakes_the_line() -> None:
    house = House(capacity=2)
    first, second = await house.ask(), await house.ask()
    waiting = house.ask()
    await house.pass_time(0.1)
    first.release()
    late = house.ask()
    await house.pass_time(0.1)
    assert waiting.done() and not late.done()
    second.release()
    (await waiting).release()
    (await late).release()


async def test_a_full_line_gives_up_after_the_queue_time() -> None:
    house = House()
    seats = await house.ask()
    waiting = house.ask()
    await house.pass_time(0)
    await house.pass_time(9.9)
    assert not waiting.done()
    await house.pass_time(0.2)
    with pytest.raises(Overloaded):
        await waiting
    seats.release()
    assert house.num_dispatched() == 0


async def test_a_deadline_ends_a_wait() -> None:
    house = House()
    seats = await house.ask()
    waiting = house.ask(within_s=2.0)
    await house.pass_time(0)
    await house.pass_time(2.1)
    with pytest.raises(DeadlineExceeded):
        await waiting
    seats.release()


@pytest.mark.parametrize("role", Role)
async def test_a_missing_role_is_forgiven_for_a_second(role: Role) -> None:
    house = House()
    house.registry.leave(house.registrations[role])  # type: ignore[arg-type]
    waiting = house.ask()
    await house.pass_time(0)
    await house.pass_time(0.8)
    assert not waiting.done()
    await house.pass_time(0.3)
    with pytest.raises(NoWorker, match=role.value):
        await waiting


async def test_a_restarted_worker_is_waited_for() -> None:
    house = House()
    house.registry.leave(house.registrations[Role.DECODE])  # type: ignore[arg-type]
    waiting = house.ask()
    await house.pass_time(0.8)
    house.join(Role.DECODE, incarnation=2)
    seats = await asyncio.wait_for(waiting, 1)
    assert seats.decode is not None and seats.decode.worker.key.incarnation == 2
    seats.release()


async def test_a_role_that_goes_missing_during_the_wait() -> None:
    house = House()
    seats = await house.ask()
    waiting = house.ask()
    await house.pass_time(5.0)
    house.registry.leave(house.registrations[Role.DECODE])  # type: ignore[arg-type]
    await house.pass_time(0)
    await house.pass_time(0.9)
    assert not waiting.done()
    await house.pass_time(0.2)
    with pytest.raises(NoWorker):
        await waiting
    seats.release()


async def test_a_cancelled_wait_leaves_the_line() -> None:
    house = House()
    seats = await house.ask()
    waiting, behind = house.ask(), house.ask()
    await house.pass_time(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert house.admission.num_waiting == 1
    seats.release()
    (await behind).release()
    assert house.num_dispatched() == 0


async def test_a_cancel_in_the_moment_of_success_gives_the_seats_back() -> None:
    house = House()
    seats = await house.ask()
    waiting = house.ask()
    await house.pass_time(0)
    seats.release()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    assert house.num_dispatched() == 0


async def test_one_that_gives_up_lets_a_smaller_one_behind_it_go() -> None:
    house = House(capacity=1)
    decode_only_busy = await house.ask()
    decode_only_busy.prefill.release()
    head = house.ask(within_s=1.0)
    await house.pass_time(0)
    behind = house.ask(Need(prompt_len=1, total_tokens=2, needs_decode=False))
    await house.pass_time(0.5)
    assert not behind.done()
    await house.pass_time(0.6)
    with pytest.raises(DeadlineExceeded):
        await head
    (await asyncio.wait_for(behind, 1)).release()
    decode_only_busy.release()
    assert house.num_dispatched() == 0
