"""Which states of a decoding sequence are kept, and which settings cannot be served."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from stateferry.core.errors import ConfigError


class StateStrategy(enum.Enum):
    """``extra_buffer``: tracked grid points and the end of the turn; each tracked state costs one
    slot, taken before the state is given away. ``no_buffer``: the end of the turn only, at no
    extra slot. ``off``: decode leaves nothing behind."""

    EXTRA_BUFFER = "extra_buffer"
    NO_BUFFER = "no_buffer"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class StateTracking:
    """The rule of one worker. ``interval`` is a multiple of ``grid``."""

    strategy: StateStrategy
    grid: int
    interval: int

    def keeps_boundary(self, position: int) -> bool:
        """Whether the state that was just committed at grid point ``position`` goes to the cache
        while its sequence runs on."""
        return self.strategy is StateStrategy.EXTRA_BUFFER and position % self.interval == 0

    def keeps_end(self) -> bool:
        """Whether a sequence that ends leaves its last state and tail to the cache."""
        return self.strategy is not StateStrategy.OFF


def check_tracking(
    *,
    strategy: str,
    grid: int,
    interval: int,
    draft_tokens: int,
    d_conv: int,
    page_tokens: int | None,
) -> StateTracking:
    """The tracking that settings ask for. Raises ConfigError that says what to set instead.

    ``draft_tokens`` is the most that one verification can accept, 0 without speculation;
    ``page_tokens`` is None for a model without attention.
    """
    names = [known.value for known in StateStrategy]
    if strategy not in names:
        raise ConfigError("cache.state_strategy", f"{strategy!r} is none of {', '.join(names)}")
    if grid <= d_conv - 1:
        raise ConfigError(
            "model.grid_tokens",
            f"{grid} is not longer than the convolution's window of {d_conv - 1}: set {d_conv} or "
            "more",
        )
    if interval < grid or interval % grid:
        fix = max(-(-interval // grid), 1) * grid
        raise ConfigError(
            "cache.track_interval_tokens",
            f"{interval} is not a multiple of the grid of {grid}: set {fix}",
        )
    if interval < draft_tokens:
        # One verification would pass two tracked points, and only one slot waits for them.
        fix = -(-draft_tokens // grid) * grid
        raise ConfigError(
            "cache.track_interval_tokens",
            f"{interval} is less than the {draft_tokens} tokens that a verification can accept: "
            f"set {fix} or more, or draft fewer tokens",
        )
    if page_tokens is not None and (page_tokens < 1 or grid % page_tokens):
        raise ConfigError(
            "model.grid_tokens",
            f"KV pages of {page_tokens} tokens do not divide the grid of {grid}, so no state is "
            f"where a page ends: set a multiple of {page_tokens}",
        )
    return StateTracking(StateStrategy(strategy), grid, interval)
