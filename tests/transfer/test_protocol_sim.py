"""The hand-off machines under seeded schedules of drops, repeats, late writes and crashes."""

from __future__ import annotations

from collections import Counter

import pytest

from stateferry.transfer.protocol.receiving import Attempt, AttemptBook
from stateferry.transfer.protocol.sending import PartOffer
from support.handoff_world import Violated, World

STEPS = 120
HAZARDS = (
    "sealed",
    "sealed in parts",
    "late write",
    "read after the sender had left",
    "broken while it may be read",
    "dropped after a cancel",
    "wrong bytes",
    "no staging",
    "repeated",
    "reordered",
    "dropped",
    "data without credit",
    "part within a part",
    "answer not due",
    "reservation refused",
    "DUPLICATE",
    "CLOSED",
    "UNEXPECTED",
    "WRONG_SENDER",
    "WRONG_RECEIVER",
)


def run(seeds: range) -> Counter[str]:
    hazards: Counter[str] = Counter()
    for seed in seeds:
        World(seed, hazards).run(STEPS)
    return hazards


def assert_met(hazards: Counter[str]) -> None:
    assert {name: hazards[name] for name in HAZARDS if not hazards[name]} == {}


def test_schedules() -> None:
    assert_met(run(range(2000)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_schedules() -> None:
    assert_met(run(range(100_000)))


def test_reuse_of_what_may_be_read_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator finds a sender that reuses staging too early."""
    monkeypatch.setattr(PartOffer, "peer_may_read", property(lambda _: False))
    with pytest.raises(Violated, match="reused"):
        run(range(2000))


def test_a_cancel_that_is_forgotten_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator finds a receiver that copies into memory that was given away."""

    def close(self: AttemptBook, attempt: Attempt) -> bool:
        return False

    monkeypatch.setattr(AttemptBook, "close", close)
    with pytest.raises(Violated):
        run(range(200))
