"""What the cache did, counted from the start of the process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class CacheCounters:
    """Monotonic. Tokens unless the name says otherwise."""

    lookups: int = 0
    prompt_tokens: int = 0
    # Resumed from: the state at a grid point, and the rows of a tail after it.
    boundary_hit_tokens: int = 0
    tail_hit_tokens: int = 0
    # Prompts whose last token was known already: they run no forward.
    repeated_prompts: int = 0
    # Had their keys and values here, and were computed again for want of a state.
    kv_only_tokens: int = 0
    snapshots_planned: int = 0
    snapshots_skipped: int = 0
    # Boundary states and tails that entered the tree.
    states_inserted: int = 0
    tails_inserted: int = 0
    kv_pages_inserted: int = 0
    # Handed in, but there already.
    states_duplicate: int = 0
    tails_duplicate: int = 0
    kv_pages_duplicate: int = 0
    states_evicted: int = 0
    tails_evicted: int = 0
    kv_pages_evicted: int = 0
    # Left the tree for another reason: the cap on a path, or a longer tail in their place.
    states_dropped: int = 0
    tails_dropped: int = 0
    # Pages copied because a sequence goes on writing where a snapshot ends.
    tail_copies: int = 0
    kv_copies: int = 0
    # Of snapshots that are to be evicted last, until one of the next three; and of those that had
    # to go all the same.
    protections_begun: int = 0
    protections_ended: int = 0
    protections_expired: int = 0
    protections_over_budget: int = 0
    protected_evicted: int = 0
    # To host memory when they were evicted, unless they were there already, and back.
    states_moved_out: int = 0
    tails_moved_out: int = 0
    kv_pages_moved_out: int = 0
    states_restored: int = 0
    tails_restored: int = 0
    kv_pages_restored: int = 0
    # What went to host memory, less what was dropped from there, is what it holds.
    host_moved_out_bytes: int = 0
    host_dropped_bytes: int = 0
    host_restored_bytes: int = 0
