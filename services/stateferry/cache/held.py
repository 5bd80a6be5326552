"""What one request has of the pools."""

from __future__ import annotations

from dataclasses import dataclass, field

from stateferry.cache.entries import Origin
from stateferry.cache.handles import TailHandle
from stateferry.cache.hybrid_cache import Hold
from stateferry.cache.insertion import Inserted
from stateferry.cache.lease import SequenceLease


@dataclass(slots=True)
class Held:
    """``slots``, ``tails`` and ``pages`` are the request's own; the rest of what its lease names is
    the cache's, kept by ``hold``."""

    request_id: str
    lease: SequenceLease
    slots: set[int]
    tails: set[int]
    pages: set[int]
    hold: Hold
    namespace: bytes = b""
    prompt_len: int = 0
    resumed_tokens: int = 0
    is_spoilt: bool = False
    # Whose last snapshot is protected; empty: nobody's.
    session: str = ""
    # Why states are kept that are on the way.
    origins: dict[int, Origin] = field(default_factory=dict)

    @property
    def is_kept(self) -> bool:
        """Whether what it computed may go to the cache."""
        return self.lease.tokens is not None and not self.is_spoilt

    @property
    def protects(self) -> tuple[bytes, str] | None:
        """By what name the end of what it computed is protected; None: it is not."""
        return (self.namespace, self.session) if self.session else None

    @property
    def num_known(self) -> int:
        """Tokens consumed of which it is known what they were: all but those of decode steps that
        have not come back, or that were one too many."""
        tokens = self.lease.tokens
        return self.lease.position if tokens is None else min(self.lease.position, len(tokens))

    def settle(self, tail: TailHandle | None, result: Inserted) -> None:
        """What the cache took over is its own no more."""
        self.slots.difference_update(result.taken_slots)
        self.pages.difference_update(result.taken_kv_pages)
        if result.taken_tail and tail is not None:
            self.tails.discard(tail.page)
