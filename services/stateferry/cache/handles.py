"""What a snapshot is known by, and who may believe it.

A handle names a place in a pool *and* what was written there: its generation tells whether the
place has been recycled since, its stamp which launch wrote it, its layout what the bytes mean. An
unstamped handle is a plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stateferry.cache.slots import SlotPool
from stateferry.core.errors import InvariantViolation


@dataclass(frozen=True, slots=True)
class StateHandle:
    """The state as of ``position`` tokens, a multiple of the grid above 0, in a state slot."""

    slot: int
    generation: int
    position: int
    layout: str
    stamp: int | None = None

    def written(self, stamp: int) -> StateHandle:
        """The same place after launch ``stamp`` has written it."""
        return replace(self, stamp=stamp)


@dataclass(frozen=True, slots=True)
class TailHandle:
    """Rows ``[0, rows)`` of a tail page: the inputs of the tokens from grid point ``position``
    on, fewer than the grid."""

    page: int
    generation: int
    position: int
    rows: int
    layout: str
    stamp: int | None = None

    def written(self, stamp: int) -> TailHandle:
        """The same place after launch ``stamp`` has written it."""
        return replace(self, stamp=stamp)


def check_handle(handle: StateHandle | TailHandle, pool: SlotPool, layout: str) -> None:
    """Raises InvariantViolation unless what the handle names was written and is still there."""
    place = handle.slot if isinstance(handle, StateHandle) else handle.page
    name = f"{pool.name} {place} at position {handle.position}"
    if handle.stamp is None:
        raise InvariantViolation(f"{name} was never written")
    if pool.owner(place) is None or pool.generation(place) != handle.generation:
        raise InvariantViolation(
            f"{name} is of generation {handle.generation}, the place is of "
            f"{pool.generation(place)}: it was recycled"
        )
    if handle.layout != layout:
        raise InvariantViolation(f"{name} has layout {handle.layout}, not {layout}")
