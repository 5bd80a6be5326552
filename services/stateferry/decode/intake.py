"""Copies a received hand-off into the pool, after checking that it is exactly what fits there."""

from __future__ import annotations

import torch

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import FrameError
from stateferry.core.handoff import HandoffMeta
from stateferry.transfer.manifest import segment_from_tensor
from stateferry.transfer.receiver import ReceivedHandoff


def take_in(
    received: ReceivedHandoff, request_id: str, prompt_len: int, cache: StateCache
) -> HandoffMeta:
    """Fill the request's lease from a sealed hand-off. Returns where the sequence stands.

    Mutates the lease and its slots and page. Raises FrameError, before a byte is copied, when the
    segments are not those of a sequence of ``prompt_len`` tokens.
    """
    meta = HandoffMeta.decode(received.manifest.payload)
    if meta.position != prompt_len:
        raise FrameError(f"the state is at position {meta.position}, the prompt has {prompt_len}")
    lease = cache.lease(request_id)
    lease.adopt(meta.position, cache.pool.grid)
    targets = [
        segment_from_tensor(view.kind, view.layer, view.tensor)
        for view in cache.pool.sequence_views(lease)
    ]
    expected = [(t.kind, t.layer, t.dtype, t.shape) for t in targets]
    arrived = [(s.kind, s.layer, s.dtype, s.shape) for s in received.segments]
    if expected != arrived:
        raise FrameError(f"{len(arrived)} segments do not match the {len(expected)} of this state")
    for target, segment in zip(targets, received.segments, strict=True):
        torch.from_numpy(target.data).copy_(torch.from_numpy(segment.data))
    return meta
