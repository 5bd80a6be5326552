"""From the settings of the cache to its rules."""

from __future__ import annotations

from stateferry.cache.hybrid_cache import CacheOptions
from stateferry.cache.reuse import NO_REUSE, Reuse
from stateferry.config import CacheSection
from stateferry.core.errors import ConfigError
from stateferry.models.model import Model
from stateferry.prefix.state_tracking import check_tracking

# Closer ones of a prompt push out more than they give, by the hit rates of `make bench-cache`.
_SNAPSHOT_INTERVALS = 16
# Without them a prefix that prompts share is met for the second time before its state is kept.
_FREE_INTERVALS = 2
_TRACK_INTERVALS = 4
_EVICTION = ("value", "lru")


def reuse_of(
    section: CacheSection,
    model: Model,
    grid: int,
    weights: str,
    layout: str,
    *,
    draft_tokens: int = 0,
) -> Reuse:
    """draft_tokens: most guesses that one step accepts. Raises ConfigError that says what to set
    instead."""
    if not section.enabled:
        return NO_REUSE
    if section.eviction not in _EVICTION:
        raise ConfigError("cache.eviction", f"{section.eviction!r} is none of value, lru")
    interval = section.snapshot_interval_tokens or _SNAPSHOT_INTERVALS * grid
    if interval > 0 and interval % grid:
        fix = -(-interval // grid) * grid
        raise ConfigError(
            "cache.snapshot_interval_tokens",
            f"{interval} is not a multiple of the grid of {grid}: set {fix}",
        )
    return Reuse(
        is_on=True,
        weights=weights,
        layout=layout,
        tracking=check_tracking(
            strategy=section.state_strategy,
            grid=grid,
            interval=section.track_interval_tokens or _TRACK_INTERVALS * grid,
            draft_tokens=draft_tokens,
            d_conv=model.state_geometry.d_conv,
            page_tokens=grid if model.kv_geometry.num_layers else None,
        ),
        interval=max(interval, 0),
        free_interval=0 if section.snapshot_interval_tokens else _FREE_INTERVALS * grid,
        max_snapshots=section.max_snapshots_per_prompt,
        options=CacheOptions(
            eviction=section.eviction,
            max_states_per_path=section.max_states_per_path,
            host_bytes=section.host_bytes,
            session_share=section.session_share,
            session_ttl_s=section.session_ttl_s,
        ),
    )
