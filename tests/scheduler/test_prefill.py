"""The prefill scheduler against a memory that counts: order, cuts, aborts in every phase."""

from __future__ import annotations

import random
from collections import deque

import pytest

from stateferry.core.errors import ConfigError, InvariantViolation, Overloaded
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.scheduler.extend import ExtendSlice, ExtendStep
from stateferry.scheduler.prefill import PrefillScheduler
from support.counting_memory import CountingMemory


def prompt(name: str, length: int) -> GenerationRequest:
    sampling = SamplingParams(0.0, 0, 1.0, 0, None)
    return GenerationRequest(name, (1,) * length, sampling, StopConditions(1, 0, frozenset()))


def scheduler(
    capacity: int = 4, budget: int = 128, max_waiting: int = 100, max_in_flight: int = 1
) -> tuple[PrefillScheduler, CountingMemory]:
    memory = CountingMemory(capacity)
    prefill = PrefillScheduler(
        memory,
        grid=64,
        budget_tokens=budget,
        max_waiting=max_waiting,
        max_in_flight=max_in_flight,
    )
    return prefill, memory


def test_packs_whole_prompts_in_order_of_arrival() -> None:
    prefill, _ = scheduler()
    for name, length in (("a", 10), ("b", 20), ("c", 99)):
        prefill.submit(prompt(name, length), length)
    step = prefill.schedule()
    assert step is not None
    assert step.slices == (
        ExtendSlice("a", 0, 10, True),
        ExtendSlice("b", 0, 20, True),
        ExtendSlice("c", 0, 64, False),
    )
    assert prefill.complete(step) == ("a", "b")


def test_cuts_lie_on_the_grid() -> None:
    prefill, _ = scheduler(budget=150)
    prefill.submit(prompt("a", 1000), 1000)
    starts = []
    while (step := prefill.schedule()) is not None:
        (part,) = step.slices
        starts.append(part.start)
        if part.is_last:
            assert part.start + part.length == 1000
        prefill.complete(step)
    assert starts == [0, 128, 256, 384, 512, 640, 768, 896]


def test_a_prompt_that_cannot_reach_a_grid_point_waits_for_the_next_step() -> None:
    prefill, _ = scheduler(budget=128)
    prefill.submit(prompt("a", 100), 100)
    prefill.submit(prompt("b", 100), 100)
    step = prefill.schedule()
    assert step is not None and [s.request_id for s in step.slices] == ["a"]


def test_waits_for_memory_and_goes_on_when_it_returns() -> None:
    prefill, memory = scheduler(capacity=1)
    prefill.submit(prompt("a", 5), 5)
    prefill.submit(prompt("b", 5), 5)
    step = prefill.schedule()
    assert step is not None
    prefill.complete(step)
    assert prefill.schedule() is None
    prefill.release("a")
    step = prefill.schedule()
    assert step is not None and step.slices[0].request_id == "b"
    assert set(memory.held) == {"b"}


def test_the_queue_is_bounded() -> None:
    prefill, _ = scheduler(max_waiting=2)
    prefill.submit(prompt("a", 5), 5)
    prefill.submit(prompt("b", 5), 5)
    with pytest.raises(Overloaded):
        prefill.submit(prompt("c", 5), 5)


def test_a_budget_below_the_grid_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="extend_budget_tokens"):
        scheduler(budget=63)


def test_abort_in_flight_keeps_the_memory_until_the_step_is_done() -> None:
    prefill, memory = scheduler()
    prefill.submit(prompt("a", 5), 5)
    prefill.submit(prompt("b", 5), 5)
    step = prefill.schedule()
    assert step is not None
    prefill.abort("a")
    assert set(memory.held) == {"a", "b"}, "the step may still write there"
    assert prefill.complete(step) == ("b",)
    assert set(memory.held) == {"b"}


def test_a_failed_step_returns_all_it_touched() -> None:
    prefill, memory = scheduler()
    prefill.submit(prompt("a", 5), 5)
    prefill.submit(prompt("b", 500), 500)
    step = prefill.schedule()
    assert step is not None
    prefill.abort("a")
    prefill.fail(step)
    assert not memory.held and not prefill.knows("a") and not prefill.knows("b")


@pytest.mark.parametrize("most", [1, 2])
def test_so_many_steps_at_a_time_and_in_order(most: int) -> None:
    prefill, _ = scheduler(max_in_flight=most)
    for name in "abcd":
        prefill.submit(prompt(name, 100), 100)
    steps = [prefill.schedule() for _ in range(most)]
    assert all(steps) and prefill.schedule() is None
    assert prefill.queued_tokens == 400
    if most == 2:
        assert steps[1] is not None
        with pytest.raises(InvariantViolation, match="oldest"):
            prefill.complete(steps[1])
    assert steps[0] is not None
    assert prefill.complete(steps[0]) == ("a",)
    assert prefill.queued_tokens == 300
    assert prefill.schedule() is not None


def test_slices_follow_on_those_in_flight() -> None:
    prefill, memory = scheduler(max_in_flight=2)
    prefill.submit(prompt("a", 200), 200)
    first, second = prefill.schedule(), prefill.schedule()
    assert first is not None and first.slices == (ExtendSlice("a", 0, 128, False),)
    assert second is not None and second.slices == (ExtendSlice("a", 128, 72, True),)
    assert prefill.complete(first) == ()
    assert prefill.schedule() is None, "all of it is launched"
    assert prefill.complete(second) == ("a",)
    assert set(memory.held) == {"a"}


@pytest.mark.parametrize("fails", [False, True])
def test_a_prompt_that_goes_stays_until_its_last_step_is_over(fails: bool) -> None:
    prefill, memory = scheduler(max_in_flight=2)
    prefill.submit(prompt("a", 200), 200)
    first, second = prefill.schedule(), prefill.schedule()
    assert first is not None and second is not None
    if fails:
        prefill.fail(first)
    else:
        prefill.abort("a")
        prefill.complete(first)
    assert set(memory.held) == {"a"} and prefill.knows("a")
    assert prefill.complete(second) == ()
    assert not memory.held and not prefill.knows("a")
    assert memory.spoilt == ({"a"} if fails else set())


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_random_walk_computes_every_token_once_and_leaks_nothing(seed: int, most: int) -> None:
    rng = random.Random(seed)
    prefill, memory = scheduler(capacity=3, budget=192, max_in_flight=most)
    in_flight: deque[ExtendStep] = deque()
    overlapped = 0
    lengths: dict[str, int] = {}
    computed: dict[str, int] = {}
    aborted: set[str] = set()
    done: set[str] = set()
    for number in range(300):
        if rng.random() < 0.4:
            name = f"r{number}"
            lengths[name] = rng.choice([1, 63, 64, 65, 200, 1000])
            prefill.submit(prompt(name, lengths[name]), lengths[name])
        if (scheduled := prefill.schedule()) is not None:
            in_flight.append(scheduled)
        if rng.random() < 0.2 and lengths:
            victim = rng.choice(sorted(lengths))
            if victim not in done:
                prefill.abort(victim)
                aborted.add(victim)
        overlapped += len(in_flight) > 1
        if not in_flight or (len(in_flight) < most and rng.random() < 0.5):
            continue
        step = in_flight.popleft()
        if rng.random() < 0.05:
            prefill.fail(step)
            aborted |= {part.request_id for part in step.slices}
            continue
        for part in step.slices:
            # Of one that a failed step took with it, this is what comes behind.
            assert part.start == computed.get(part.request_id, 0) or part.request_id in aborted
            computed[part.request_id] = part.start + part.length
        for name in prefill.complete(step):
            assert name not in aborted and computed[name] == lengths[name]
            done.add(name)
            prefill.release(name)
        assert len(memory.held) == prefill.num_active
    assert bool(overlapped) == (most > 1)
    for name in lengths:
        prefill.abort(name)
    for step in in_flight:
        prefill.complete(step)
    assert not memory.held and prefill.queued_tokens == 0
    assert done and aborted


def test_asks_for_the_memory_of_all_that_will_be_held() -> None:
    memory = CountingMemory(capacity=4, capacity_tokens=100)
    prefill = PrefillScheduler(memory, grid=64, budget_tokens=128, max_waiting=9)
    prefill.submit(prompt("a", 10), 60)
    prefill.submit(prompt("b", 10), 50)
    prefill.submit(prompt("c", 10), 10)
    step = prefill.schedule()
    assert step is not None and [part.request_id for part in step.slices] == ["a"]
    # First come, first served: c would fit, but b must not starve.
    assert memory.held == {"a": 60} and prefill.num_waiting == 2
    prefill.complete(step)
    prefill.release("a")
    step = prefill.schedule()
    assert step is not None and [part.request_id for part in step.slices] == ["b", "c"]
    assert memory.held == {"b": 50, "c": 10}


def test_what_is_known_is_not_computed() -> None:
    """All of b is known, and 40 tokens of c: b costs nothing, and its slice comes last."""
    prefill, memory = scheduler(budget=128)
    memory.known |= {"b": 100, "c": 40}
    for name in ("a", "b", "c"):
        prefill.submit(prompt(name, 100), 100)
    assert prefill.queued_tokens == 300
    step = prefill.schedule()
    assert step is not None
    assert step.slices == (
        ExtendSlice("a", 0, 100, True),
        ExtendSlice("c", 40, 24, False),
        ExtendSlice("b", 100, 0, True),
    )
    assert prefill.complete(step) == ("a", "b")
    step = prefill.schedule()
    assert step is not None and step.slices == (ExtendSlice("c", 64, 36, True),)
    prefill.complete(step)


def test_what_failed_is_spoilt() -> None:
    prefill, memory = scheduler()
    prefill.submit(prompt("a", 5), 5)
    step = prefill.schedule()
    assert step is not None
    prefill.fail(step)
    assert memory.spoilt == {"a"} and not memory.held
