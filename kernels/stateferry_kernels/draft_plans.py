"""Where the rows of speculated tokens come from and go to: verify a draft, accept a path of it.

A draft is a tree: node ``j`` of a sequence consumes its token after the one at ``parents[j]``, or
after the sequence's last token when that is ROOT. A chain is the tree ``(ROOT, 0, 1, ..)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stateferry_kernels.layer_state import PAD_SLOT, ZERO_SLOT

ROOT = -1


@dataclass(frozen=True, slots=True)
class VerifySequence:
    """One sequence's draft. ``tail_rows`` is position % grid of its first draft token: rows
    ``[0, tail_rows)`` of ``tail_page`` are read. Node ``j`` is row ``j`` of ``draft_page``."""

    state_slot: int
    tail_page: int
    tail_rows: int
    draft_page: int
    parents: tuple[int, ...]

    def paths(self) -> list[tuple[int, ...]]:
        """For each node the nodes from the root to itself, itself included."""
        paths: list[tuple[int, ...]] = []
        for node, parent in enumerate(self.parents):
            paths.append((*(() if parent == ROOT else paths[parent]), node))
        return paths


@dataclass(frozen=True, slots=True)
class VerifyPlan:
    """Rows of a packed batch of drafts, in the order of ``sequences`` and their nodes."""

    grid: int
    sequences: tuple[VerifySequence, ...]
    cache: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for sequence in self.sequences:
            _check_verify(sequence, self.grid)
        _check_distinct("draft page", [sequence.draft_page for sequence in self.sequences])

    @property
    def num_rows(self) -> int:
        return sum(len(sequence.parents) for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class AcceptSequence:
    """Append the nodes of ``path``, root first, to a tail of ``tail_rows`` rows.

    When that reaches the grid, the full tail is committed to ``boundary_slot`` and the rest of the
    path becomes the first rows of the same page.
    """

    state_slot: int
    tail_page: int
    tail_rows: int
    draft_page: int
    path: tuple[int, ...]
    boundary_slot: int = PAD_SLOT


@dataclass(frozen=True, slots=True)
class AcceptPlan:
    """What each sequence keeps of its draft."""

    grid: int
    sequences: tuple[AcceptSequence, ...]
    cache: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for sequence in self.sequences:
            _check_accept(sequence, self.grid)
        _check_distinct("tail page", [sequence.tail_page for sequence in self.sequences])
        _check_distinct("draft page", [sequence.draft_page for sequence in self.sequences])
        written = [s.boundary_slot for s in self.sequences if s.boundary_slot != PAD_SLOT]
        _check_distinct("boundary slot", written)
        if {sequence.state_slot for sequence in self.sequences} & set(written):
            raise ValueError("a boundary needs a fresh slot: the slots written overlap")


def _check_verify(sequence: VerifySequence, grid: int) -> None:
    _check_place(sequence, grid)
    if not sequence.parents:
        raise ValueError("a draft of no tokens")
    for node, parent in enumerate(sequence.parents):
        if not ROOT <= parent < node:
            raise ValueError(f"node {node}: parent {parent} does not come before it")
    deepest = max(map(len, sequence.paths()))
    if deepest > grid:
        raise ValueError(f"a draft path of {deepest} tokens is longer than the grid of {grid}")


def _check_accept(sequence: AcceptSequence, grid: int) -> None:
    _check_place(sequence, grid)
    length = len(sequence.path)
    if not 1 <= length <= grid or any(node < 0 for node in sequence.path):
        raise ValueError(f"path {sequence.path}: 1 to {grid} nodes, none negative")
    if list(sequence.path) != sorted(set(sequence.path)):
        raise ValueError(f"path {sequence.path}: nodes must ascend from the root")
    crosses = sequence.tail_rows + length >= grid
    if crosses != (sequence.boundary_slot > ZERO_SLOT):
        raise ValueError(
            f"{length} tokens after {sequence.tail_rows} "
            + ("reach the grid: a boundary_slot is needed" if crosses else "reach no boundary")
        )


def _check_place(sequence: VerifySequence | AcceptSequence, grid: int) -> None:
    if sequence.state_slot < ZERO_SLOT or min(sequence.tail_page, sequence.draft_page) < 0:
        raise ValueError(f"slot {sequence.state_slot}: slots and pages cannot be negative")
    if not 0 <= sequence.tail_rows < grid:
        raise ValueError(f"tail_rows {sequence.tail_rows}: out of range for grid {grid}")


def _check_distinct(name: str, numbers: Sequence[int]) -> None:
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"two sequences share a {name}")
