"""A packed or batched scan as an extend over throw-away slots: which slot holds which state.

Slot ZERO_SLOT is zeros, the next ones are the caller's initial states in their order, all others
are written by the scan. Page i belongs to the i-th sequence that has tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from stateferry_kernels.layer_state import ZERO_SLOT
from stateferry_kernels.plans import BoundaryWrite, CommitPlan, ExtendPlan, ExtendSequence


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens [begin, end) of one batch row that form a sequence. ``initial`` is its row of
    initial_states; None starts it from zeros."""

    begin: int
    end: int
    initial: int | None


@dataclass(frozen=True, slots=True)
class ScanPlan:
    extend: ExtendPlan
    commit: CommitPlan
    num_slots: int
    end_slots: tuple[tuple[int, ...], ...]  # by batch row and stretch: the state at its end
    edge_slots: tuple[tuple[int, ...], ...]  # by batch row and chunk: the state before it


def stretches_of_packed(cu_seqlens: Sequence[int], has_initial: bool) -> list[Stretch]:
    """The sequences of one packed row, those of no tokens included."""
    return [
        Stretch(begin, end, number if has_initial else None)
        for number, (begin, end) in enumerate(pairwise(cu_seqlens))
    ]


def stretches_of_row(
    row: int, seqlen: int, seq_idx: Sequence[int] | None, has_initial: bool
) -> list[Stretch]:
    """The sequences of batch row ``row``: runs of equal seq_idx, or the whole row. The row's
    initial state is that of sequence 0, if the row begins with it."""
    if seq_idx is None or not seqlen:
        return [Stretch(0, seqlen, row if has_initial else None)]
    stretches = []
    begin = 0
    for number, run in groupby(seq_idx):
        end = begin + len(list(run))
        takes_initial = has_initial and begin == 0 and number == 0
        stretches.append(Stretch(begin, end, row if takes_initial else None))
        begin = end
    return stretches


def plan_scan(
    rows: Sequence[Sequence[Stretch]],
    seqlen: int,
    chunk_size: int,
    num_initial: int,
    *,
    every_edge: bool,
    end_states: bool,
) -> ScanPlan:
    """rows: the stretches of each batch row, in order, covering [0, seqlen).

    With ``every_edge`` a sequence starts at its offset modulo the chunk instead of at 0, so that
    its grid points are the edges of the row's chunks; rows before its start count as zero inputs.
    """
    builder = _Builder(chunk_size, next_slot=ZERO_SLOT + 1 + num_initial)
    edges = range(0, seqlen if every_edge else 0, chunk_size)
    end_slots, edge_slots = [], []
    for row in rows:
        reached: dict[int, int] = {}
        ends = []
        for stretch in row:
            slots = builder.add(stretch, every_edge, end_states)
            ends.append(slots[stretch.end])
            # Where a sequence begins at the end of another, it is the one that counts.
            reached |= slots
        end_slots.append(tuple(ends))
        edge_slots.append(tuple(reached[edge] for edge in edges))
    return ScanPlan(
        extend=ExtendPlan(chunk_size, tuple(builder.sequences)),
        commit=builder.commit_plan(),
        num_slots=builder.next_slot,
        end_slots=tuple(end_slots),
        edge_slots=tuple(edge_slots),
    )


class _Builder:
    """Hands out slots and pages while sequences are added."""

    def __init__(self, chunk_size: int, next_slot: int) -> None:
        self.chunk_size = chunk_size
        self.next_slot = next_slot
        self.sequences: list[ExtendSequence] = []
        self._folds: list[tuple[int, int, int, int]] = []  # source, destination, page, rows

    def add(self, stretch: Stretch, every_edge: bool, end_state: bool) -> dict[int, int]:
        """Slots of the sequence's states by token offset in the row: at its begin, at the grid
        points in it, and at its end (where nobody wants that, any slot)."""
        source = ZERO_SLOT if stretch.initial is None else ZERO_SLOT + 1 + stretch.initial
        slots = {stretch.begin: source}
        length = stretch.end - stretch.begin
        if not length:
            return slots
        grid = self.chunk_size
        start = stretch.begin % grid if every_edge else 0
        last = (start + length) // grid * grid
        points = range(grid, start + length + 1, grid) if every_edge else range(last, last + 1)
        writes = tuple(BoundaryWrite(p, self._fresh()) for p in points if p > start)
        page = len(self.sequences)
        self.sequences.append(ExtendSequence(start, length, source, page, writes))
        to_token = stretch.begin - start
        slots |= {write.position + to_token: write.state_slot for write in writes}
        tail_rows = start + length - last
        if tail_rows:
            # Where the end lies in the interval of the start, the tail begins with zero inputs.
            newest = writes[-1].state_slot if writes else source
            slots[stretch.end] = self._fresh() if end_state else newest
            if end_state:
                self._folds.append((newest, slots[stretch.end], page, tail_rows))
        return slots

    def commit_plan(self) -> CommitPlan:
        src, dst, pages, tail_rows = zip(*self._folds, strict=True) if self._folds else ((),) * 4
        return CommitPlan(self.chunk_size, src, dst, pages, tail_rows)

    def _fresh(self) -> int:
        self.next_slot += 1
        return self.next_slot - 1
