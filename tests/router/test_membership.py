"""Who is there and how busy, on a clock that the test owns."""

from __future__ import annotations

import dataclasses

import pytest

from router.fakes import FINGERPRINT, FakeClock, description, load
from stateferry.core.errors import HandshakeMismatch, Overloaded, Refused
from stateferry.core.ids import Role
from stateferry.core.worker import PoolCount
from stateferry.router import membership
from stateferry.router.membership import Change, ChangeKind, WorkerRegistry

PREFILL = description(Role.PREFILL)
DECODE = description(Role.DECODE)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def changes() -> list[Change]:
    return []


@pytest.fixture
def registry(clock: FakeClock, changes: list[Change]) -> WorkerRegistry:
    registry = WorkerRegistry(clock, heartbeat_interval_s=1.0)
    registry.subscribe(changes.append)
    return registry


def kinds(changes: list[Change]) -> list[ChangeKind]:
    return [change.kind for change in changes]


def test_a_worker_comes_and_goes(registry: WorkerRegistry, changes: list[Change]) -> None:
    registration = registry.join(DECODE)
    assert [v.description for v in registry.views(Role.DECODE)] == [DECODE]
    assert registry.views(Role.PREFILL) == []
    assert registry.is_live(DECODE.key)
    registry.leave(registration)
    registry.leave(registration)
    assert not registry.is_live(DECODE.key)
    assert kinds(changes) == [ChangeKind.JOINED, ChangeKind.LEFT]


def test_a_newer_life_replaces_an_older_one(
    registry: WorkerRegistry, changes: list[Change]
) -> None:
    old = registry.join(DECODE)
    newer = description(Role.DECODE, incarnation=2)
    registry.join(newer)
    assert [v.description for v in registry.views(Role.DECODE)] == [newer]
    assert kinds(changes) == [ChangeKind.JOINED, ChangeKind.LOST, ChangeKind.JOINED]
    assert changes[1].worker == DECODE
    # The old stream has nothing to say any more.
    with pytest.raises(Refused):
        registry.report(old, load(1))
    registry.leave(old)
    assert registry.is_live(newer.key)


def test_an_older_life_is_refused_even_after_the_newer_left(registry: WorkerRegistry) -> None:
    registry.leave(registry.join(description(Role.DECODE, incarnation=5)))
    with pytest.raises(HandshakeMismatch, match="incarnation"):
        registry.join(description(Role.DECODE, incarnation=4))
    registry.join(description(Role.DECODE, incarnation=5))


def test_another_protocol_is_refused(registry: WorkerRegistry) -> None:
    other = dataclasses.replace(FINGERPRINT, protocol=99)
    with pytest.raises(HandshakeMismatch, match="protocol"):
        registry.join(description(Role.DECODE, fingerprint=other))


def test_a_life_on_a_new_stream_keeps_its_requests(registry: WorkerRegistry) -> None:
    old = registry.join(DECODE)
    dispatch = registry.dispatch(DECODE, 10, 10)
    registry.join(DECODE)
    registry.leave(old)
    [view] = registry.views(Role.DECODE)
    assert (view.dispatched_requests, view.busy_tokens) == (1, 10)
    dispatch.release()
    assert registry.views(Role.DECODE)[0].dispatched_requests == 0


def test_silence_of_three_intervals_is_a_loss(
    registry: WorkerRegistry, clock: FakeClock, changes: list[Change]
) -> None:
    silent = registry.join(DECODE)
    talking = registry.join(PREFILL)
    for sequence in range(1, 4):
        clock.now_s += 1.0
        registry.report(talking, load(sequence))
    registry.sweep()
    assert registry.is_live(DECODE.key)
    clock.now_s += 0.1
    registry.sweep()
    assert not registry.is_live(DECODE.key) and registry.is_live(PREFILL.key)
    assert changes[-1].kind is ChangeKind.LOST and "silent" in changes[-1].reason
    with pytest.raises(Refused, match="join again"):
        registry.report(silent, load(1))
    registry.join(DECODE)


def test_a_router_that_stood_still_does_not_blame_its_workers(
    registry: WorkerRegistry, clock: FakeClock
) -> None:
    registry.join(DECODE)
    clock.now_s += 60.0
    registry.forgive(60.0)
    registry.sweep()
    assert registry.is_live(DECODE.key)
    clock.now_s += 3.1
    registry.sweep()
    assert not registry.is_live(DECODE.key)


def test_busy_counts_ours_from_dispatch_and_others_from_reports(registry: WorkerRegistry) -> None:
    registration = registry.join(description(Role.PREFILL, capacity=4))
    worker = registry.views(Role.PREFILL)[0].description

    def busy() -> tuple[int, int, bool]:
        view = registry.views(Role.PREFILL)[0]
        return view.busy_requests, view.busy_tokens, view.has_room(1)

    first, second = registry.dispatch(worker, 100, 100), registry.dispatch(worker, 50, 50)
    assert busy() == (2, 150, True)
    # The report shows our two and two of another router.
    registry.report(registration, load(1, active=4, queued_tokens=170))
    assert busy() == (4, 170, False)
    first.release()
    first.release()
    assert busy() == (3, 70, True)
    # Old news changes nothing.
    registry.report(registration, load(1, active=9))
    assert busy() == (3, 70, True)
    registry.report(registration, load(2, active=1))
    second.release()
    assert busy() == (0, 0, True)


def test_kv_pages_count_from_dispatch_and_others_from_reports(registry: WorkerRegistry) -> None:
    registration = registry.join(description(Role.DECODE, kv_pages=10))
    worker = registry.views(Role.DECODE)[0].description

    def busy() -> tuple[int, bool, bool]:
        """Pages of 16 tokens; whether 32 and 33 more tokens have room."""
        view = registry.views(Role.DECODE)[0]
        return view.busy_kv_pages, view.has_room(32), view.has_room(33)

    first, second = registry.dispatch(worker, 1, 33), registry.dispatch(worker, 1, 80)
    assert busy() == (8, True, False)
    # The report shows our eight and another router's one.
    report = dataclasses.replace(load(1), kv_pages=PoolCount(free=1, total=10))
    registry.report(registration, report)
    assert busy() == (9, False, False)
    second.release()
    assert busy() == (4, True, True)
    registry.report(registration, dataclasses.replace(report, sequence=2))
    first.release()
    assert busy() == (6, True, True)


def test_releasing_after_the_worker_went_is_harmless(
    registry: WorkerRegistry, changes: list[Change]
) -> None:
    registration = registry.join(DECODE)
    dispatch = registry.dispatch(DECODE, 1, 1)
    registry.leave(registration)
    registry.join(description(Role.DECODE, incarnation=2))
    dispatch.release()
    assert registry.views(Role.DECODE)[0].dispatched_requests == 0
    assert ChangeKind.RELEASED not in kinds(changes)


def test_the_number_of_workers_and_of_remembered_ids_is_bounded(
    registry: WorkerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "MAX_WORKERS", 2)
    monkeypatch.setattr(membership, "MAX_KNOWN_IDS", 3)
    registry.join(DECODE)
    for number in range(10):
        registry.leave(registry.join(description(Role.PREFILL, f"p{number}")))
    assert len(registry._newest) == 3
    registry.join(PREFILL)
    with pytest.raises(Overloaded):
        registry.join(description(Role.PREFILL, "one-too-many"))
    with pytest.raises(HandshakeMismatch):
        registry.join(description(Role.DECODE, incarnation=0))
