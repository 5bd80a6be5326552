"""Whose prompt is next, and which one gets the step's tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.test_prefill import prompt
from stateferry.core.request import GenerationRequest
from stateferry.scheduler.extend import ExtendStep
from stateferry.scheduler.prefill import PrefillScheduler
from support.counting_memory import CountingMemory

GRID, BUDGET, STARVATION_S = 64, 128, 10.0


def ask(name: str, length: int, priority: int = 0) -> GenerationRequest:
    return replace(prompt(name, length), priority=priority)


def scheduler(capacity: int = 9, max_in_flight: int = 1) -> tuple[PrefillScheduler, CountingMemory]:
    memory = CountingMemory(capacity)
    made = PrefillScheduler(
        memory,
        grid=GRID,
        budget_tokens=BUDGET,
        max_waiting=1000,
        max_in_flight=max_in_flight,
        starvation_s=STARVATION_S,
    )
    return made, memory


def names(step: ExtendStep | None) -> list[str]:
    assert step is not None
    return [part.request_id for part in step.slices]


def test_memory_goes_to_the_highest_and_then_to_the_first() -> None:
    prefill, _ = scheduler(capacity=1)
    for name, priority in (("a", 0), ("b", 1), ("c", -1), ("d", 1)):
        prefill.submit(ask(name, 10, priority), 10)
    order = []
    while prefill.num_waiting:
        step = prefill.schedule()
        assert step is not None
        [done] = prefill.complete(step)
        prefill.release(done)
        order.append(done)
    assert order == ["b", "d", "a", "c"]


def test_a_long_prompt_gives_way_between_two_of_its_slices() -> None:
    prefill, _ = scheduler()
    prefill.submit(ask("long", 1000), 1000)
    for expected in (["long"], ["high", "long"], ["long"]):
        if "high" in expected:
            prefill.submit(ask("high", 50, 1), 50)
        step = prefill.schedule()
        assert names(step) == expected and step is not None
        prefill.complete(step)
    # What is left of the step's tokens ends on the grid.
    assert prefill.queued_tokens == 1000 - 128 - 64 - 128


def test_who_has_waited_too_long_for_memory_or_for_tokens_is_next() -> None:
    prefill, _ = scheduler(capacity=2)
    prefill.submit(ask("low", 500, -1), 500, 0.0)
    step = prefill.schedule(0.0)
    assert names(step) == ["low"] and step is not None
    prefill.complete(step)
    prefill.submit(ask("waits", 500, -2), 500, 1.0)
    prefill.submit(ask("high", 2000, 1), 2000, 2.0)
    step = prefill.schedule(9.0)
    assert names(step) == ["high"] and step is not None, "though the other is under way"
    prefill.complete(step)
    step = prefill.schedule(10.0)
    assert names(step) == ["low"] and step is not None
    prefill.complete(step)
    prefill.abort("high")
    prefill.submit(ask("newest", 10, 9), 10, 10.0)
    step = prefill.schedule(11.0)
    # The place that came free is for the one that has waited since 1.0; it is behind the other.
    assert names(step) == ["low"] and prefill.num_waiting == 1
    assert not prefill.knows("high") and prefill.num_active == 2


@settings(deadline=None, max_examples=60)
@given(data=st.data(), most=st.sampled_from((1, 2)), capacity=st.integers(1, 4))
def test_walk(data: st.DataObject, most: int, capacity: int) -> None:
    """Whatever comes: nobody is overtaken in the line by one that is to come later, no prompt loses
    or repeats a token, nothing leaks, and all end."""
    prefill, memory = scheduler(capacity, most)
    in_flight: deque[ExtendStep] = deque()
    requests: dict[str, tuple[int, int, float]] = {}
    reached: dict[str, int] = {}
    now = 0.0

    def land() -> None:
        step = in_flight.popleft()
        for done in prefill.complete(step):
            assert reached[done] == requests[done][0]
            prefill.release(done)

    def begin() -> None:
        waiting = {name for name in requests if name not in memory.held and prefill.knows(name)}
        held = set(memory.held)
        step = prefill.schedule(now)
        for winner in set(memory.held) - held:
            for loser in waiting - set(memory.held):
                assert rank(winner) < rank(loser)
        if step is None:
            return
        assert sum(part.length for part in step.slices) <= BUDGET
        for part in step.slices:
            assert part.start == reached.get(part.request_id, 0)
            reached[part.request_id] = part.start + part.length
        in_flight.append(step)

    def rank(name: str) -> tuple[float, float, int]:
        _, priority, since = requests[name]
        starves = now - since >= STARVATION_S
        return (-1000.0 if starves else -priority), since, int(name)

    for number in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(("ask", "ask", "begin", "begin", "land", "abort", "wait"))):
            case "ask":
                length = data.draw(st.sampled_from((1, 40, 64, 129, 300)))
                priority = data.draw(st.integers(-1, 1))
                requests[str(number)] = length, priority, now
                prefill.submit(ask(str(number), length, priority), length, now)
            case "begin":
                begin()
            case "land" if in_flight:
                land()
            case "abort" if requests:
                prefill.abort(data.draw(st.sampled_from(sorted(requests))))
            case "wait":
                now += data.draw(st.sampled_from((0.5, 4.0, 11.0)))
    while prefill.num_waiting or prefill.num_active:
        begin()
        assert in_flight, "it stands still"
        land()
    assert not memory.held and not prefill.queued_tokens
