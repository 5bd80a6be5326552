"""Which grid points of a prompt keep their state. The scan passes all of them anyway, so what is
chosen here costs a slot each and no second pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """``last`` is the prompt's last grid point, None when it lies in what was resumed: the sequence
    goes on from it, so it has a slot in any case. ``optional`` are further ones, ascending, that
    need a slot each. ``tail_rows`` tokens follow the last grid point. ``num_skipped`` were wanted
    and left out for want of slots."""

    last: int | None
    optional: tuple[int, ...]
    tail_rows: int
    num_skipped: int

    @property
    def boundaries(self) -> tuple[int, ...]:
        """All grid points to keep, ascending."""
        return (*self.optional, self.last) if self.last is not None else self.optional

    def within(self, start: int, end: int) -> tuple[int, ...]:
        """Those that an extend of tokens [start, end) passes."""
        return tuple(position for position in self.boundaries if start < position <= end)


def plan_snapshots(
    prompt_len: int,
    prefix_len: int,
    grid: int,
    *,
    spare_slots: int,
    branch_position: int | None = None,
    hints: Iterable[int] = (),
    interval: int = 0,
    free_slots: int = 0,
    free_interval: int = 0,
) -> SnapshotPlan:
    """Plan for a prompt whose first ``prefix_len`` tokens were resumed.

    ``branch_position`` is where the cache saw this prompt part from others; ``hints`` are positions
    that somebody expects to come back to (ends of messages, the router's), rounded down to the
    grid, those outside what is computed now ignored; ``interval`` wants every multiple of it, 0
    none. When more than ``spare_slots`` are wanted, the branch comes first, then hints, then the
    interval, deeper ones, which save more, before others. Multiples of ``free_interval`` get what
    that leaves of the ``free_slots`` among them, which hold nothing, and are not missed.
    """
    last = prompt_len // grid * grid
    if branch_position is not None and branch_position % grid:
        raise ValueError(f"branch_position {branch_position} is off the grid of {grid}")
    for each in (interval, free_interval):
        if each % grid:
            raise ValueError(f"interval {each} is not a multiple of the grid of {grid}")
    wishes = (
        [branch_position or 0],
        sorted((hint // grid * grid for hint in hints), reverse=True),
        _multiples(interval, last),
    )
    # A dict keeps the order of the wishes and one of each.
    wanted = dict.fromkeys(
        position for wish in wishes for position in wish if prefix_len < position < last
    )
    chosen = list(wanted)[: max(spare_slots, 0)]
    num_free = min(free_slots, spare_slots) - len(chosen)
    extra = [
        p for p in _multiples(free_interval, last) if prefix_len < p < last and p not in wanted
    ]
    chosen += extra[: max(num_free, 0)]
    return SnapshotPlan(
        last=last if last > prefix_len else None,
        optional=tuple(sorted(chosen)),
        tail_rows=prompt_len - last,
        num_skipped=len(wanted.keys() - set(chosen)),
    )


def _multiples(interval: int, last: int) -> range:
    """The deepest first; none of 0."""
    return range(last // interval * interval, 0, -interval) if interval else range(0)
