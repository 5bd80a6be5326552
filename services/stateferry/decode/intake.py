"""Copies a received hand-off into the pool, after checking that it is exactly what fits there."""

from __future__ import annotations

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import FrameError
from stateferry.core.handoff import HandoffMeta
from stateferry.transfer.receiver import ReceivedHandoff
from stateferry.worker.segments import take_in_segments


class PageIntake:
    """Of one attempt: what comes before its last part, full KV pages in order."""

    def __init__(self, request_id: str, prompt_len: int, cache: StateCache) -> None:
        self._request_id = request_id
        self._cache = cache
        self._most_pages = prompt_len // cache.pools.kv.page_tokens
        self.num_pages = 0

    def take_in(self, received: ReceivedHandoff) -> None:
        """Copy the next pages into the request's lease, which nobody reads before the last part is
        there. Mutates its pages. Raises FrameError, before a byte is copied, for anything else."""
        segments = received.segments
        end = self.num_pages + (segments[0].shape[0] if segments and segments[0].shape else 0)
        if not self.num_pages < end <= self._most_pages:
            problem = f"{end} pages by now, the prompt fills {self._most_pages}"
            raise FrameError(f"an early part of a hand-off: {problem}")
        lease = self._cache.lease(self._request_id)
        views = self._cache.pools.kv.page_views(lease, self.num_pages, end)
        take_in_segments(segments, views)
        self.num_pages = end


def take_in(
    received: ReceivedHandoff,
    request_id: str,
    prompt_len: int,
    cache: StateCache,
    num_pages: int = 0,
) -> HandoffMeta:
    """Fill the request's lease from the last part of a sealed hand-off, ``num_pages`` pages of
    which came before. Returns where the sequence stands.

    Mutates the lease and its slots and pages. Raises FrameError, before a byte is copied, when the
    segments are not the rest of those of a sequence of ``prompt_len`` tokens.
    """
    meta = HandoffMeta.decode(received.manifest.payload)
    if meta.position != prompt_len:
        raise FrameError(f"the state is at position {meta.position}, the prompt has {prompt_len}")
    lease = cache.lease(request_id)
    lease.adopt(meta.position, cache.pools.grid)
    take_in_segments(received.segments, cache.pools.sequence_views(lease, num_pages))
    return meta
