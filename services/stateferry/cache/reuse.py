"""What one worker keeps of what it computes, and for whom."""

from __future__ import annotations

from dataclasses import dataclass, field

from stateferry.cache.hybrid_cache import CacheOptions
from stateferry.prefix.prefix_hash import namespace_of
from stateferry.prefix.state_tracking import StateStrategy, StateTracking


@dataclass(frozen=True, slots=True)
class Reuse:
    """``weights`` and ``layout`` are fingerprints: states of others are never shared. States are
    kept every ``interval`` tokens of a prompt, a multiple of the grid, 0 for none, and every
    ``free_interval`` where nothing has to go for it, but no more than ``max_snapshots`` of one
    prompt: with 0 not even where it parts from others."""

    is_on: bool
    weights: str
    layout: str
    tracking: StateTracking
    interval: int = 0
    free_interval: int = 0
    max_snapshots: int = 16
    options: CacheOptions = field(default_factory=CacheOptions)

    def namespace(self, salt: str) -> bytes:
        """Of the prompts that were sent with ``salt``."""
        return namespace_of((salt, self.weights, self.layout))

    def spread(self, interval: int, prompt_len: int) -> int:
        """Wider than ``interval``, one of the two, where a prompt would get too many."""
        grid = self.tracking.grid
        if not interval or not self.max_snapshots:
            return 0
        widest = -(-prompt_len // (self.max_snapshots * grid)) * grid
        return max(interval, widest)


NO_REUSE = Reuse(
    is_on=False, weights="", layout="", tracking=StateTracking(StateStrategy.OFF, 1, 1)
)
