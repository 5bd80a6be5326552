"""With a cluster key, only who has it can push."""

from __future__ import annotations

from typing import Any

import pytest

from stateferry.core.cluster_key import MAC_BYTES, ClusterKey
from stateferry.core.errors import FrameError, PeerLost
from stateferry.transfer.push_mac import PushMac

KEY, OTHER = ClusterKey(b"k" * 16), ClusterKey(b"o" * 16)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(KEY, OTHER), (KEY, None), (None, KEY)], ids=["other", "none", "extra"]
)
async def test_a_push_under_another_key(
    cluster: Any, ours: ClusterKey | None, theirs: ClusterKey | None
) -> None:
    object.__setattr__(cluster.receiver._shared, "mac", PushMac(ours))
    stranger, friend = cluster.sender(), cluster.sender()
    object.__setattr__(stranger._shared, "mac", PushMac(theirs))
    object.__setattr__(friend._shared, "mac", PushMac(ours))
    expectation = cluster.expect("r1")
    with pytest.raises(PeerLost):
        await cluster.push(stranger, "r1")
    assert expectation.is_free and cluster.receiver.snapshot().totals.frames_refused == 1
    expectation.cancel()
    await cluster.serves("r2", friend)


def test_every_byte_and_the_sequence_are_vouched_for() -> None:
    mac, manifest = PushMac(KEY), bytes(range(200))
    body = mac.wrap(7, manifest)
    assert len(body) == MAC_BYTES + len(manifest) and mac.unwrap(7, body) == manifest
    for at in range(len(body)):
        changed = bytearray(body)
        changed[at] ^= 1
        with pytest.raises(FrameError, match="cluster's key"):
            mac.unwrap(7, bytes(changed))
    for cut in (0, MAC_BYTES - 1, MAC_BYTES, len(body) - 1):
        with pytest.raises(FrameError):
            mac.unwrap(7, body[:cut])
    with pytest.raises(FrameError):
        mac.unwrap(8, body)
    assert PushMac(None).unwrap(1, PushMac(None).wrap(1, manifest)) == manifest
