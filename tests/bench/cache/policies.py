"""What the contenders keep of what was computed. All have the same tree, pools and engine.

Each is a state cache that leaves less behind than ours. They change a lease while they do, so none
may have a step in flight meanwhile: they run without overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from stateferry.cache.hybrid_cache import CacheOptions
from stateferry.cache.lookup import Match
from stateferry.cache.pools import SequencePools
from stateferry.cache.reuse import Reuse
from stateferry.cache.state_cache import StateCache
from stateferry.core.worker import PoolSizes
from stateferry.prefix.prefix_hash import TOKEN_BYTES, chain_hashes
from stateferry.prefix.state_tracking import StateStrategy, StateTracking

OURS, ONE_SNAPSHOT, LEAF_ONLY = "ours", "one_snapshot_lru", "leaf_only"
LRU = CacheOptions(eviction="lru")


class OneSnapshotCache(StateCache):
    """As SGLang does it: the state at the last grid point of a prompt, the one where it parted from
    what others had computed, and the last one of its output. Nothing between grid points."""

    def publish(self, request_id: str) -> None:
        lease = self.lease(request_id)
        position = lease.position
        self._round_down(request_id)
        super().publish(request_id)
        lease.position = position

    def release(self, request_id: str) -> None:
        self._round_down(request_id)
        super().release(request_id)

    def _round_down(self, request_id: str) -> None:
        lease = self.lease(request_id)
        lease.position -= lease.position % self.pools.grid
        lease.final = None


class LeafOnlyCache(StateCache):
    """The state where a request ended, for prompts that begin with all of it."""

    _ENDED = object()

    def __post_init__(self) -> None:
        super().__post_init__()
        # Tokens after the last grid point of all that ended there, by the hash of what is before.
        self._ends: dict[bytes, set[bytes]] = {}

    def match(self, namespace: bytes, key: bytes) -> Match:
        grid = self.pools.grid
        num_tokens = len(key) // TOKEN_BYTES
        links = [namespace, *chain_hashes(namespace, key, grid)]
        for unit in range(len(links) - 1, -1, -1):
            begin = unit * grid * TOKEN_BYTES
            ends = self._ends.get(links[unit], ())
            for tokens in sorted(ends, key=len, reverse=True):
                end = begin + len(tokens)
                if 0 < end < len(key) and key.startswith(tokens, begin):
                    found = super().match(namespace, key[:end])
                    if found.final is self._ENDED:
                        return replace(
                            found, num_tokens=num_tokens, final=None, branch_position=None
                        )
        return Match(num_tokens)

    def publish(self, request_id: str) -> None:
        self.lease(request_id).final = None

    def release(self, request_id: str) -> None:
        lease, grid = self.lease(request_id), self.pools.grid
        lease.final = self._ENDED
        if lease.tokens is not None:
            key = lease.tokens[: lease.position].tobytes()
            links = [namespace := self.reuse.namespace(""), *chain_hashes(namespace, key, grid)]
            whole = (len(links) - 1) * grid * TOKEN_BYTES
            self._ends.setdefault(links[-1], set()).add(key[whole:])
        super().release(request_id)


@dataclass(frozen=True)
class Share:
    """What memory for cached things is cut into: so many states and tails for so many tokens of
    keys and values."""

    states: int
    tails: int
    tokens: int


@dataclass(frozen=True)
class Policy:
    """``shares`` are cuts of the memory to choose the best from; none: the cache's own cut."""

    name: str
    make: Callable[[SequencePools, PoolSizes, Reuse], StateCache]
    adapt: Callable[[Reuse, int], Reuse]
    shares: tuple[Share, ...] = ()


def cut(sizes: PoolSizes, memory_bytes: int, share: Share) -> PoolSizes:
    """The pools of as many sequences as ``sizes`` has, and the rest of the memory in shares."""
    context_pages = sizes.kv_pages_for(share.tokens)
    share_bytes = (
        share.states * sizes.state_slot_bytes
        + share.tails * sizes.tail_page_bytes
        + context_pages * sizes.kv_page_bytes
    )
    count = max(memory_bytes - sizes.size_bytes, 0) // share_bytes
    return replace(
        sizes,
        state_slots=sizes.state_slots + count * share.states,
        tail_pages=sizes.tail_pages + count * share.tails,
        kv_pages=sizes.kv_pages + count * context_pages,
    )


def _one_snapshot(reuse: Reuse, budget_tokens: int) -> Reuse:
    # Each forward of a prompt that is cut leaves a state. Of the output the last grid point does,
    # which costs nothing here: the closest interval, the grid's own, is its best.
    tracking = StateTracking(StateStrategy.NO_BUFFER, reuse.tracking.grid, reuse.tracking.grid)
    interval = budget_tokens // tracking.grid * tracking.grid
    return replace(reuse, tracking=tracking, interval=interval, free_interval=0, options=LRU)


def _leaf_only(reuse: Reuse, budget_tokens: int) -> Reuse:
    tracking = StateTracking(StateStrategy.NO_BUFFER, reuse.tracking.grid, reuse.tracking.grid)
    return replace(
        reuse, tracking=tracking, interval=0, free_interval=0, max_snapshots=0, options=LRU
    )


_TOKENS = (128, 256, 384, 512, 1024, 2048)
OURS_BY_DEFAULT = Policy(OURS, StateCache, lambda reuse, _: reuse)
# As others are asked for their best cut: another `cache.tokens_per_state`.
OURS_BEST_CUT = replace(OURS_BY_DEFAULT, shares=tuple(Share(8, 1, 8 * n) for n in _TOKENS))
POLICIES = {
    OURS: OURS_BY_DEFAULT,
    ONE_SNAPSHOT: Policy(
        ONE_SNAPSHOT, OneSnapshotCache, _one_snapshot, tuple(Share(1, 0, n) for n in _TOKENS)
    ),
    LEAF_ONLY: Policy(LEAF_ONLY, LeafOnlyCache, _leaf_only, tuple(Share(1, 1, n) for n in _TOKENS)),
}
