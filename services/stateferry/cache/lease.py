"""One running sequence's claim on state memory."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

from stateferry_kernels.layer_state import ZERO_SLOT


@dataclass(slots=True)
class SequenceLease:
    """Two state slots, one tail page and all KV pages, held from admission to the end.

    ``position`` tokens have been consumed, or will have been once the launches that were planned
    have run. ``state_slot`` holds the state at the last grid point and is never written again;
    ``next_slot`` is the fresh place of the next one. Passing a grid point swaps them::

        [0, grid_point)          folded into state_slot
        [grid_point, position)   rows of tail_page

    ``state_slot`` and the first of ``kv_pages`` may be the cache's, shared with others and read in
    place; ``kv_pages`` has places for every token that the sequence may ever hold here, in order;
    empty for a model without attention.

    ``snapshot_slots`` are for grid points on the way whose states are to be kept, besides the last
    one; ``snapshots`` those of them that have been written. ``tokens`` are the prompt and then each
    output token once a step has come back that consumed it; None where nobody keeps them. ``final``
    is what the token after a whole prompt follows from, once it is known.
    """

    tail_page: int
    slots: tuple[int, int]
    kv_pages: tuple[int, ...] = ()
    position: int = 0
    state_slot: int = ZERO_SLOT
    snapshot_slots: Mapping[int, int] = field(default_factory=dict)
    snapshots: dict[int, int] = field(default_factory=dict)
    tokens: array[int] | None = None
    final: object | None = None
    # Where the state was before the last grid point was passed.
    _slot_before: int = field(init=False, default=ZERO_SLOT)

    @property
    def next_slot(self) -> int:
        return self.slots[1] if self.state_slot == self.slots[0] else self.slots[0]

    def writes(self, num_tokens: int, grid: int) -> tuple[tuple[int, int], ...]:
        """(grid point, slot) of the states that consuming ``num_tokens`` writes, ascending; the
        sequence goes on from the last."""
        last = (self.position + num_tokens) // grid * grid
        if last <= self.position:
            return ()
        kept = [(p, slot) for p, slot in self.snapshot_slots.items() if self.position < p < last]
        return (*kept, (last, self.snapshot_slots.get(last, self.next_slot)))

    def advance(self, num_tokens: int, grid: int) -> None:
        """Consume tokens, by a launch that writes what ``writes`` says."""
        writes = self.writes(num_tokens, grid)
        self.position += num_tokens
        for position, slot in writes:
            if position in self.snapshot_slots:
                self.snapshots[position] = slot
        if writes:
            self._slot_before = self.state_slot
            self.state_slot = writes[-1][1]

    def rewind(self, position: int, grid: int) -> None:
        """Undo decode steps that nobody wants, past one grid point at most: back to ``position``,
        or to the grid point before it where the rows behind that are gone.

        What one step wrote lies behind the rows that are read from then on, and in a slot that is
        nobody's state. A second one, behind the grid point, has written over the first row."""
        passed = self.position // grid * grid
        if position < passed:
            self.state_slot = self._slot_before
            if passed < self.position:
                position = position // grid * grid
        self.position = position

    def adopt(self, position: int, grid: int) -> None:
        """Take over a sequence whose state is about to be copied in from another worker."""
        self.position = position
        self.state_slot = self.slots[0] if position >= grid else ZERO_SLOT
