"""Where a batch's rows come from and go to. Built once per step, used by every layer.

Plans hold plain Python integers (host side) and are cheap to build; a backend derives whatever
index tensors it wants and may keep them in ``cache`` of the plan for the other layers of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stateferry_kernels.layer_state import PAD_SLOT, ZERO_SLOT


@dataclass(frozen=True, slots=True)
class BoundaryWrite:
    """Store the state as of absolute token position ``position`` (a multiple of the grid)."""

    position: int
    state_slot: int


@dataclass(frozen=True, slots=True)
class ExtendSequence:
    """One sequence's share of an extend: consume ``length`` tokens from absolute position
    ``start``.

    Reads ``state_slot`` (the state at the last grid point at or before ``start``) and rows
    ``[0, start % grid)`` of ``tail_page``. Afterwards the page holds the rows since the last grid
    point at or before ``start + length``. ``boundaries`` lists any grid points in
    ``(start, start + length]`` in ascending order; the last one passed must be among them, since
    the sequence continues from it.
    """

    start: int
    length: int
    state_slot: int
    tail_page: int
    boundaries: tuple[BoundaryWrite, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class ExtendPlan:
    """Rows of a packed extend batch, in the order of ``sequences``."""

    grid: int
    sequences: tuple[ExtendSequence, ...]
    cache: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for sequence in self.sequences:
            _check_extend(sequence, self.grid)
        if not _distinct([sequence.tail_page for sequence in self.sequences]):
            raise ValueError("two sequences share a tail page")
        written = [w.state_slot for sequence in self.sequences for w in sequence.boundaries]
        read = {sequence.state_slot for sequence in self.sequences}
        if not _distinct(written) or read & set(written):
            raise ValueError("a boundary needs a fresh slot: the slots written overlap")

    @property
    def total_tokens(self) -> int:
        return sum(sequence.length for sequence in self.sequences)

    @property
    def cu_seqlens(self) -> list[int]:
        """(num_seqs + 1,) offsets of the sequences' rows."""
        offsets = [0]
        for sequence in self.sequences:
            offsets.append(offsets[-1] + sequence.length)
        return offsets


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One row per sequence. ``tail_rows[i] == position % grid`` of the token being consumed.

    A row whose ``state_slots`` is PAD_SLOT is skipped: its output is undefined, nothing is written.
    """

    grid: int
    state_slots: tuple[int, ...]
    tail_pages: tuple[int, ...]
    tail_rows: tuple[int, ...]
    cache: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not len(self.state_slots) == len(self.tail_pages) == len(self.tail_rows):
            raise ValueError("state_slots, tail_pages and tail_rows differ in length")
        for slot, row in zip(self.state_slots, self.tail_rows, strict=True):
            if slot < PAD_SLOT or not 0 <= row < self.grid:
                raise ValueError(f"slot {slot}, tail row {row}: out of range for grid {self.grid}")
        pages = zip(self.state_slots, self.tail_pages, strict=True)
        if not _distinct([page for slot, page in pages if slot != PAD_SLOT]):
            raise ValueError("two rows share a tail page")


@dataclass(frozen=True, slots=True)
class CommitPlan:
    """Fold the tail of each page into ``dst_slots``, reading the state in ``src_slots``.

    ``tail_rows[i]`` rows are folded, 1 to grid; by default all of them. Serving commits full tails
    alone: the state after a shorter one is not on the grid, and is for whoever takes it elsewhere.
    """

    grid: int
    src_slots: tuple[int, ...]
    dst_slots: tuple[int, ...]
    tail_pages: tuple[int, ...]
    tail_rows: tuple[int, ...] = ()
    cache: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.tail_rows:
            object.__setattr__(self, "tail_rows", (self.grid,) * len(self.src_slots))
        columns = (self.src_slots, self.dst_slots, self.tail_pages, self.tail_rows)
        if len({len(column) for column in columns}) != 1:
            raise ValueError("src_slots, dst_slots, tail_pages and tail_rows differ in length")
        if any(not 1 <= rows <= self.grid for rows in self.tail_rows):
            raise ValueError(f"tail_rows {self.tail_rows}: out of range for grid {self.grid}")
        if any(slot <= ZERO_SLOT for slot in self.dst_slots):
            raise ValueError("a commit cannot write ZERO_SLOT or PAD_SLOT")
        if set(self.src_slots) & set(self.dst_slots) or not _distinct(self.dst_slots):
            raise ValueError("a commit writes fresh slots: dst_slots overlap")


def _distinct(numbers: Sequence[int]) -> bool:
    return len(set(numbers)) == len(numbers)


def _check_extend(sequence: ExtendSequence, grid: int) -> None:
    if sequence.start < 0 or sequence.length < 1:
        raise ValueError(f"extend of {sequence.length} tokens from position {sequence.start}")
    if sequence.state_slot < ZERO_SLOT or sequence.tail_page < 0:
        raise ValueError(f"slot {sequence.state_slot}, page {sequence.tail_page}: out of range")
    last_passed = sequence.end // grid * grid
    positions = [write.position for write in sequence.boundaries]
    if any(p % grid or not sequence.start < p <= sequence.end for p in positions):
        raise ValueError(f"boundaries {positions} are not grid points of the extend")
    if positions != sorted(set(positions)):
        raise ValueError(f"boundaries {positions} are not ascending")
    if last_passed > sequence.start and (not positions or positions[-1] != last_passed):
        raise ValueError(f"the last grid point passed, {last_passed}, has no slot to go to")
    if any(write.state_slot in (ZERO_SLOT, PAD_SLOT) for write in sequence.boundaries):
        raise ValueError("a boundary cannot be written to ZERO_SLOT or PAD_SLOT")
