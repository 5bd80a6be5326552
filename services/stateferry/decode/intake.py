"""Copies a received hand-off into the pool, after checking that it is exactly what fits there."""

from __future__ import annotations

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import FrameError
from stateferry.core.handoff import HandoffMeta
from stateferry.transfer.receiver import ReceivedHandoff
from stateferry.worker.segments import take_in_segments


def take_in(
    received: ReceivedHandoff, request_id: str, prompt_len: int, cache: StateCache
) -> HandoffMeta:
    """Fill the request's lease from a sealed hand-off. Returns where the sequence stands.

    Mutates the lease and its slots and pages. Raises FrameError, before a byte is copied, when the
    segments are not those of a sequence of ``prompt_len`` tokens.
    """
    meta = HandoffMeta.decode(received.manifest.payload)
    if meta.position != prompt_len:
        raise FrameError(f"the state is at position {meta.position}, the prompt has {prompt_len}")
    lease = cache.lease(request_id)
    lease.adopt(meta.position, cache.pools.grid)
    take_in_segments(received.segments, cache.pools.sequence_views(lease))
    return meta
