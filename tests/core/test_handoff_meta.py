"""The payload beside a state: exactly two non-negative integers, or nothing."""

from __future__ import annotations

import pytest

from stateferry.core.errors import FrameError
from stateferry.core.handoff import HandoffMeta


def test_round_trip() -> None:
    meta = HandoffMeta(position=12345, first_token_id=0)
    assert HandoffMeta.decode(meta.encode()) == meta


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[1,2]",
        b"\xff",
        b'{"position": 1}',
        b'{"position": -1, "first_token_id": 2}',
        b'{"position": 1.0, "first_token_id": 2}',
        b'{"position": true, "first_token_id": 2}',
        b'{"position": 1, "first_token_id": 2, "extra": 3}',
    ],
)
def test_anything_else_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        HandoffMeta.decode(payload)
