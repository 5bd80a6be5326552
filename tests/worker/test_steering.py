"""What a request's tokens are chosen by is made beside the event loop, and in nobody's way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from stateferry.core.guide import ANY_JSON_OBJECT, Guide
from stateferry.core.request import Continuation, GenerationRequest
from stateferry.core.sampling import Penalties, SamplingParams, StopConditions
from stateferry.engine.rules import RulesMaker, SequenceRules
from stateferry.worker.steering import Steering

STOP = StopConditions(4, 0, frozenset())


class SlowGuides:
    """A compiler whose every guide takes until ``ready`` is set."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.num_compiled = 0

    def matcher(self, guide: Guide) -> Any:
        assert self.ready.wait(10)
        self.num_compiled += 1
        return object()


@pytest.fixture
def guides() -> Iterator[SlowGuides]:
    slow = SlowGuides()
    yield slow
    slow.ready.set()


def sampling(guide: Guide | None = None, repetition: float = 1.0) -> SamplingParams:
    penalties = Penalties(repetition=repetition)
    return SamplingParams(0.0, 0, 1.0, 0, None, penalties=penalties, guide=guide)


async def test_hard_guides_hold_up_guides_alone(guides: SlowGuides) -> None:
    steering = Steering(RulesMaker(guides))  # type: ignore[arg-type]
    guided = [
        asyncio.create_task(
            steering.continuation(Continuation(str(n), sampling(ANY_JSON_OBJECT), STOP))
        )
        for n in range(40)
    ]
    await asyncio.sleep(0.01)
    plain = await steering.continuation(Continuation("plain", sampling(), STOP))
    assert plain.rules is None
    penal = GenerationRequest("penal", (5, 5, 6), sampling(repetition=2.0), STOP, prompt_logprobs=1)
    steered = await steering.prompt(penal)
    assert isinstance(steered.rules, SequenceRules) and steered.scores is not None
    # Hand-offs are copied on the default threads, which are all free.
    await asyncio.wait_for(asyncio.gather(*(asyncio.to_thread(int) for _ in range(8))), 5)
    assert not any(task.done() for task in guided)
    for task in guided[1:]:
        task.cancel()
    await asyncio.gather(*guided[1:], return_exceptions=True)
    guides.ready.set()
    assert isinstance((await guided[0]).rules, SequenceRules)
    steering.close()
    assert guides.num_compiled == 1, "those that were cancelled in the queue were compiled"
