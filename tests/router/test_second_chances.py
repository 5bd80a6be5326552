"""Which failures are followed by another attempt, how many times, and without whom."""

from __future__ import annotations

import pytest

from stateferry.core.errors import (
    DeadlineExceeded,
    GuideBroke,
    IntegrityError,
    InvalidRequest,
    InvariantViolation,
    NoWorker,
    Overloaded,
    PeerLost,
    StateferryError,
    WorkerLost,
)
from stateferry.core.ids import WorkerKey
from stateferry.router import second_chances
from stateferry.router.second_chances import FailoverLimits, SecondChances

ONE, OTHER = WorkerKey("decode-0", 1), WorkerKey("decode-1", 1)
NOBODY: frozenset[WorkerKey] = frozenset()


class Clock:
    now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


def chances(
    max_attempts: int = 4, max_wait_s: float = 10.0, deadline_s: float = 99.0
) -> tuple[SecondChances, Clock]:
    clock = Clock()
    return SecondChances(FailoverLimits(max_attempts, max_wait_s), clock, deadline_s), clock


@pytest.mark.parametrize("error", [WorkerLost("x"), PeerLost("x"), IntegrityError("x")])
def test_who_lost_a_worker_or_its_bytes_tries_again(error: StateferryError) -> None:
    made, _ = chances(max_attempts=3)
    assert made.take(error, frozenset({ONE})) and made.avoided == {ONE}
    assert made.take(error, frozenset({OTHER})) and made.avoided == {ONE, OTHER}
    assert not made.take(error, NOBODY), "one attempt more than there may be"


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("x"),
        DeadlineExceeded("x"),
        InvalidRequest("field", "x"),
        GuideBroke("x"),
        InvariantViolation("x"),
    ],
)
def test_what_another_attempt_would_meet_again_does_not(error: StateferryError) -> None:
    made, _ = chances()
    assert not made.take(error, frozenset({ONE}))


def test_one_attempt_is_one() -> None:
    made, _ = chances(max_attempts=1)
    assert not made.take(WorkerLost("x"), NOBODY)


async def test_a_first_attempt_does_not_wait_for_workers() -> None:
    made, _ = chances()

    async def nobody() -> None:
        raise NoWorker("x")

    with pytest.raises(NoWorker):
        await made.seats(nobody)


@pytest.mark.parametrize("limit", ["wait", "deadline"])
async def test_a_later_one_does_for_a_while(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """And meets those again that it avoided, should nobody else be there."""
    monkeypatch.setattr(second_chances, "_POLL_S", 0.0)
    made, clock = chances(
        max_wait_s=10.0 if limit == "wait" else 99.0,
        deadline_s=10.0 if limit == "deadline" else 99.0,
    )
    assert made.take(WorkerLost("x"), frozenset({ONE}))
    seen: list[frozenset[WorkerKey]] = []

    async def nobody() -> str:
        seen.append(made.avoided)
        clock.now_s += 3.0
        raise (NoWorker if len(seen) % 2 else Overloaded)("x")

    with pytest.raises((NoWorker, Overloaded)):
        await made.seats(nobody)
    assert seen == [frozenset({ONE}), NOBODY, NOBODY, NOBODY]

    async def found() -> str:
        return "seats"

    assert await made.seats(found) == "seats"


async def test_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(second_chances.asyncio, "sleep", sleep)
    made, _ = chances(max_attempts=20)
    for _ in range(12):
        assert made.take(WorkerLost("x"), NOBODY)
        await made.pause()
    assert len(slept) == 11, "the first one waits for nothing"
    assert slept[0] < 0.1 < slept[-1] <= 1.0
