"""While no prefill worker has room, a decode worker that probably knows the prompt is asked for it;
if it declines, the request waits as if nothing had been."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any

from router.fakes import FakeClock, FakeCluster, FakeWorker, description, fake_cluster, reserved
from router.scripts import Events, ask, decode_well, ids_of, prefill_well
from router.test_prompt_at_decode import decode_runs_it
from stateferry.core.ids import Role, WorkerKey
from stateferry.router.admission import Admission, AdmissionLimits
from stateferry.router.membership import WorkerRegistry
from stateferry.router.observer import NoObserver
from stateferry.router.placement import Need
from stateferry.v1 import inference_pb2 as pb
from stateferry.v1 import worker_pb2


async def knows_turns_alone(me: FakeWorker, request: Any, ticket: Any) -> Events:
    """Runs what it is asked to run alone, and takes the first turn from the prefill worker."""
    runs = decode_runs_it if request.here_only else decode_well
    async for event in runs(me, request, ticket):
        yield event


async def declines(me: FakeWorker, request: Any, ticket: Any) -> Events:
    if request.here_only:
        yield worker_pb2.DecodeEvent(reserved=worker_pb2.Reserved(declined=True))
        return
    async for event in decode_well(me, request, ticket):
        yield event


async def ignores_it(me: FakeWorker, request: Any, ticket: Any) -> Events:
    """A worker that does not know the word: it reserves, and would wait for a push."""
    yield reserved()
    if request.here_only:
        await asyncio.sleep(30)
    async for event in decode_well(me, request, ticket):
        if not event.HasField("reserved"):
            yield event


def turn() -> pb.GenerateRequest:
    request = ask("hello", max_tokens=4)
    request.session_id = "chat"
    return request


@contextlib.contextmanager
def no_prefill_room(cluster: FakeCluster) -> Any:
    """Somebody else has all of its places."""
    [view] = cluster.router.registry.views(Role.PREFILL)
    places = view.description.capacity_requests
    taken = [cluster.router.registry.dispatch(view.description, 1, 1) for _ in range(places)]
    yield taken
    for place in taken:
        place.release()


@contextlib.asynccontextmanager
async def second_turn(script: Any) -> AsyncIterator[FakeCluster]:
    async with fake_cluster(prefill_well, script, capacity=2) as cluster:
        await cluster.call(turn())
        assert not cluster.decode.requests[0].here_only
        await cluster.assert_clean()
        yield cluster
        await cluster.assert_clean()


async def test_it_runs_there_without_a_place_at_a_prefill_worker() -> None:
    async with second_turn(knows_turns_alone) as cluster:
        with no_prefill_room(cluster):
            events = await asyncio.wait_for(cluster.call(turn()), 2)
        assert ids_of(events) == [65, 66, 67, 68]
        assert events[-1].completion.prefill_worker == "decode-0@1"
        assert cluster.decode.requests[1].here_only and len(cluster.prefill.requests) == 1


async def test_with_room_nobody_is_asked_first() -> None:
    async with second_turn(declines) as cluster:
        await cluster.call(turn())
        assert not cluster.decode.requests[1].here_only and len(cluster.prefill.requests) == 2


async def test_if_it_declines_the_request_waits_and_is_served() -> None:
    for script in (declines, ignores_it):
        async with second_turn(script) as cluster:
            with no_prefill_room(cluster):
                answer = asyncio.create_task(cluster.call(turn()))
                await cluster.until(lambda: cluster.router.admission.num_waiting == 1)
                await cluster.until(lambda: cluster.decode.num_active == 0)
                [view] = cluster.router.registry.views(Role.DECODE)
                assert view.busy_requests == 0, "it holds nothing while it waits"
                assert [r.here_only for r in cluster.decode.requests] == [False, True]
            events = await asyncio.wait_for(answer, 2)
            assert ids_of(events) == [65, 66, 67, 68]
            assert [r.here_only for r in cluster.decode.requests] == [False, True, False]
            nonces = {ticket.nonce for ticket in cluster.decode.tickets}
            assert len(nonces) == 3, "a ticket is for one call"


class House:
    def __init__(self, capacity: int = 3) -> None:
        self.registry = WorkerRegistry(FakeClock(), 1e9)
        limits = AdmissionLimits(99, 1000.0)
        self.admission = Admission(limits, self.registry, FakeClock(), NoObserver())
        prefill = description(Role.PREFILL, capacity=1)
        self.registry.join(prefill)
        self.registry.join(description(Role.DECODE, capacity=capacity))
        self.taken = self.registry.dispatch(prefill, 1, 1)

    async def gets_seats(self, **changes: Any) -> bool:
        last = WorkerKey("decode-0", 1)
        need = Need(10, 20, **({"needs_decode": True, "last_decode": last} | changes))
        asking = asyncio.create_task(self.admission.take_seats(need, math.inf))
        for _ in range(3):
            await asyncio.sleep(0)
        if not asking.done():
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            return False
        seats = asking.result()
        assert seats.prefill is None and seats.decode is not None
        seats.release()
        return True


async def test_who_is_asked_first() -> None:
    house = House()
    assert await house.gets_seats(asks_decode=True)
    assert not await house.gets_seats(asks_decode=False)
    assert not await house.gets_seats(asks_decode=True, needs_decode=False)
    for other in (None, WorkerKey("decode-0", 2), WorkerKey("decode-1", 1)):
        assert not await house.gets_seats(asks_decode=True, last_decode=other)


async def test_nobody_who_waits_is_the_worse_for_it() -> None:
    """There is a place for each of them at the decode worker as well."""
    house = House(capacity=3)
    waiting = []
    for number in range(3):
        assert await house.gets_seats(asks_decode=True) == (number < 3)
        need = Need(10, 20, needs_decode=True)
        waiting.append(asyncio.create_task(house.admission.take_seats(need, math.inf)))
        await asyncio.sleep(0)
    assert not await house.gets_seats(asks_decode=True)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
