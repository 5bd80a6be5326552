"""One bit flipped on the way, in any message of a hand-off: refused, and only that one is hurt."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from stateferry.core.errors import IntegrityError, PeerLost, StateferryError
from stateferry.transfer.manifest import segment_offsets

HELLO, PUSH, DATA = range(3)


class OneFlip:
    """Flips a bit of message ``number``; of DATA, only bytes of segments, not the gaps between."""

    def __init__(self, rng: random.Random, number: int, sizes: list[int]) -> None:
        self._rng, self._number = rng, number
        starts, _ = segment_offsets(sizes)
        self._spans = list(zip(starts, sizes, strict=True))
        self.done = 0

    async def on_send(self, number: int, data: Any) -> Any:
        if number != self._number:
            return data
        if number == DATA:
            start, size = self._rng.choice(self._spans)
            at = start + self._rng.randrange(size)
        else:
            at = self._rng.randrange(data.size)
        flipped = data.copy()
        flipped[at] ^= 1 << self._rng.randrange(8)
        self.done += 1
        return flipped


async def flips(cluster: Any, faults: Any, trials: int) -> Counter[str]:
    """How the pushes ended, by message hurt and error."""
    rng, ends = random.Random(trials), Counter[str]()
    segments = cluster.segments()
    healthy = cluster.sender(cluster.prefill)
    for trial in range(trials):
        number = trial % 3
        flip = OneFlip(rng, number, [segment.size_bytes for segment in segments])
        faults.on_send = flip.on_send
        victim = cluster.sender(faults=faults)
        expectation = cluster.expect(f"hurt-{trial}")
        with pytest.raises(StateferryError) as caught:
            await cluster.push(victim, f"hurt-{trial}", segments=segments)
        assert flip.done == 1
        ends[f"{number} {type(caught.value).__name__}"] += 1
        if number == DATA:
            with pytest.raises(IntegrityError):
                await expectation.sealed(1.0)
        else:
            assert expectation.is_free
            expectation.cancel()
        await victim.close()
        cluster.senders.remove(victim)
        if trial % 10 == 0:
            await cluster.serves(f"well-{trial}", healthy)
    totals = cluster.receiver.snapshot().totals
    assert totals.handoffs_sealed == -(-trials // 10)
    assert totals.handoffs_failed == ends[f"{DATA} IntegrityError"]
    assert len(healthy_connections(healthy)) == 1
    return ends


def healthy_connections(sender: Any) -> list[Any]:
    """The healthy sender must never have lost its first connection."""
    return [lane for lane in sender._lanes.values() if lane.connected]


def assert_all_refused(ends: Counter[str], trials: int) -> None:
    lost, wrong = PeerLost.__name__, IntegrityError.__name__
    assert sum(ends.values()) == trials
    assert set(ends) == {f"{HELLO} {lost}", f"{PUSH} {lost}", f"{DATA} {wrong}"}
    assert min(ends.values()) >= trials // 3


async def test_some_hundred_flips(cluster: Any, faults: Any) -> None:
    assert_all_refused(await flips(cluster, faults, 300), 300)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_ten_thousand_flips(cluster: Any, faults: Any) -> None:
    assert_all_refused(await flips(cluster, faults, 10_000), 10_000)
