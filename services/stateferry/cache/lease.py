"""One running sequence's claim on state memory."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry_kernels.layer_state import ZERO_SLOT


@dataclass(slots=True)
class SequenceLease:
    """Two state slots, one tail page and all KV pages, held from admission to the end.

    ``position`` tokens have been consumed. ``state_slot`` holds the state at the last grid point
    and is never written again; ``next_slot`` is the fresh place of the next one. Passing a grid
    point swaps them::

        [0, grid_point)          folded into state_slot
        [grid_point, position)   rows of tail_page

    ``kv_pages`` has places for every token that the sequence may ever hold here, in order; empty
    for a model without attention.
    """

    tail_page: int
    slots: tuple[int, int]
    kv_pages: tuple[int, ...] = ()
    position: int = 0
    state_slot: int = ZERO_SLOT

    @property
    def next_slot(self) -> int:
        return self.slots[1] if self.state_slot == self.slots[0] else self.slots[0]

    def advance(self, num_tokens: int) -> None:
        """Consume tokens without passing a grid point."""
        self.position += num_tokens

    def advance_past_boundary(self, num_tokens: int) -> None:
        """Consume tokens; the last grid point passed was written to ``next_slot``."""
        self.position += num_tokens
        self.state_slot = self.next_slot

    def adopt(self, position: int, grid: int) -> None:
        """Take over a sequence whose state is about to be copied in from another worker."""
        self.position = position
        self.state_slot = self.slots[0] if position >= grid else ZERO_SLOT
