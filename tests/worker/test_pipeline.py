"""Steps on the engine's thread: their order, their failures, and the gaps between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from stateferry.core.clock import SystemClock
from stateferry.core.sampling import SampledToken
from stateferry.engine.launch import Launch, Over, Planned, Sampled
from stateferry.worker.pipeline import Pipeline
from support.scripted_runner import Gate, NullMeter


@dataclass(frozen=True)
class Step:
    number: int
    num_rows: int = 1
    num_tokens: int = 1


class Gaps(NullMeter):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def observe_gap(self, kind: str, seconds: float) -> None:
        self.seen.append(seconds)


@dataclass
class Bench:
    """Numbered steps. Those in ``broken_plans`` cannot be planned, those in ``broken`` fail."""

    most: int
    left: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    broken_plans: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    gates: dict[int, Gate] = field(default_factory=dict)
    ran: list[int] = field(default_factory=list)
    landed: list[tuple[int, str]] = field(default_factory=list)
    meter: Gaps = field(default_factory=Gaps)
    pipeline: Pipeline[Step] = field(init=False)
    _number: int = 0

    def give(self, count: int) -> None:
        self.left += count
        self.pipeline.wake()

    async def all_landed(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.landed) < count:
                await asyncio.sleep(0.001)

    def schedule(self) -> Step | None:
        if not self.left or self.in_flight == self.most:
            return None
        self.left -= 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self._number += 1
        return Step(self._number)

    def plan(self, step: Step) -> Launch:
        if step.number in self.broken_plans:
            raise RuntimeError("no plan")

        def start() -> Over:
            self.gates.get(step.number, lambda: None)()
            self.ran.append(step.number)
            if step.number in self.broken:
                raise RuntimeError("bad weather")
            return Over([SampledToken(step.number)])

        return Planned(start)

    def land(self, step: Step, sampled: Sampled | Exception) -> None:
        self.in_flight -= 1
        if isinstance(sampled, list):
            assert sampled == [SampledToken(step.number)]
        self.landed.append((step.number, str(sampled) if isinstance(sampled, Exception) else ""))


@pytest_asyncio.fixture(params=[1, 2], ids=["in turn", "overlap"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    made = Bench(request.param)
    with ThreadPoolExecutor(1) as executor:
        made.pipeline = Pipeline(
            "extend",
            executor,
            SystemClock(),
            made.meter,
            schedule=made.schedule,
            plan=made.plan,
            land=made.land,
        )
        running = asyncio.ensure_future(made.pipeline.run())
        yield made
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_in_order_whatever_fails(bench: Bench) -> None:
    bench.broken_plans, bench.broken = {2, 3, 7}, {5, 6}
    bench.give(9)
    await bench.all_landed(9)
    assert [number for number, _ in bench.landed] == list(range(1, 10))
    why = {2: "no plan", 3: "no plan", 5: "bad weather", 6: "bad weather", 7: "no plan"}
    assert dict(bench.landed) == {n: why.get(n, "") for n in range(1, 10)}
    assert bench.ran == [n for n in range(1, 10) if n not in bench.broken_plans]
    assert bench.most_in_flight == bench.most


async def test_a_gap_is_one_with_work_at_hand(bench: Bench) -> None:
    """Between the third step and the fourth there was nothing to do."""
    bench.give(3)
    await bench.all_landed(3)
    assert len(bench.meter.seen) == 2
    await asyncio.sleep(0.05)
    bench.give(2)
    await bench.all_landed(5)
    assert len(bench.meter.seen) == 3 and max(bench.meter.seen) < 0.05


async def test_a_step_that_comes_while_another_runs(bench: Bench) -> None:
    gate = bench.gates[1] = Gate()
    bench.give(1)
    assert await asyncio.to_thread(gate.entered.wait, 5)
    bench.give(1)
    await asyncio.sleep(0.02)
    assert bench.in_flight == bench.most, "not planned at once" if bench.most == 2 else "planned"
    gate.open()
    await bench.all_landed(2)


async def test_in_order_work_waits_for_what_is_in_flight(bench: Bench) -> None:
    gate = bench.gates[1] = Gate()
    bench.give(1)
    assert await asyncio.to_thread(gate.entered.wait, 5)
    work = asyncio.ensure_future(bench.pipeline.in_order(lambda: list(bench.ran)))
    await asyncio.sleep(0.02)
    assert not work.done()
    gate.open()
    assert await work == [1]


async def test_cancelled_it_waits_for_the_thread(bench: Bench) -> None:
    gate = Gate()
    with ThreadPoolExecutor(1) as executor:
        pipeline: Pipeline[Step] = Pipeline(
            "decode",
            executor,
            SystemClock(),
            NullMeter(),
            schedule=bench.schedule,
            plan=bench.plan,
            land=bench.land,
        )
        bench.gates[1] = gate
        bench.left = 1
        running = asyncio.ensure_future(pipeline.run())
        assert await asyncio.to_thread(gate.entered.wait, 5)
        running.cancel()
        await asyncio.sleep(0.02)
        assert not running.done()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert not bench.landed
