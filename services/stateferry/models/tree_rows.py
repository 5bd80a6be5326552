"""How attention sees a batch of draft trees: as their paths, each a sequence of its own.

Siblings have the same position, and keys lie by position. So every path from a tree's root to a
leaf has pages of its own where it is not what is shared anyway, and a node that several paths have
in common is computed for each of them, to the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from stateferry_kernels.kv_layer import KvPlan


@dataclass(frozen=True, slots=True)
class TreeRows:
    """``kv_plan`` has a sequence for each path. ``rows`` are the packed rows of the batch that the
    paths' rows are, one after the other; ``first`` says for each row of the batch where it is first
    among those, ``positions`` where it is in its sequence."""

    kv_plan: KvPlan
    rows: tuple[int, ...]
    first: tuple[int, ...]
    positions: tuple[int, ...]
