"""Which chunk of the grid each row of an extend falls into; index tensors shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry_kernels.plans import ExtendPlan


@dataclass(frozen=True, slots=True)
class Chunk:
    """One grid interval of one sequence. ``boundary_slot`` is where the state at its end goes."""

    sequence: int
    is_first: bool
    boundary_slot: int | None


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """All chunks of a plan, sequence by sequence, in ascending order. Index tensors are int64.

    A *place* is ``chunk number * grid + row in the chunk``.
    """

    chunks: tuple[Chunk, ...]
    token_place: torch.Tensor  # (total_tokens,)
    old_tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # place, page, row: read from pages
    new_tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # token, page, row: left in pages


def chunk_table(plan: ExtendPlan, device: torch.device) -> ChunkTable:
    """The plan's table, built once and kept in ``plan.cache``."""
    key = f"chunk_table:{device}"
    if key not in plan.cache:
        plan.cache[key] = _build(plan, device)
    table: ChunkTable = plan.cache[key]
    return table


def _build(plan: ExtendPlan, device: torch.device) -> ChunkTable:
    grid = plan.grid
    chunks: list[Chunk] = []
    token_place: list[int] = []
    old_tail: list[tuple[int, int, int]] = []
    new_tail: list[tuple[int, int, int]] = []
    for number, sequence in enumerate(plan.sequences):
        slots = {write.position: write.state_slot for write in sequence.boundaries}
        first_grid_point = sequence.start // grid * grid
        base = len(chunks) * grid - first_grid_point  # place = base + position
        for row in range(sequence.start - first_grid_point):
            old_tail.append((base + first_grid_point + row, sequence.tail_page, row))
        last_grid_point = sequence.end // grid * grid
        for position in range(max(sequence.start, last_grid_point), sequence.end):
            token = len(token_place) + position - sequence.start
            new_tail.append((token, sequence.tail_page, position - last_grid_point))
        token_place += range(base + sequence.start, base + sequence.end)
        for begin in range(first_grid_point, sequence.end, grid):
            chunks.append(Chunk(number, begin == first_grid_point, slots.get(begin + grid)))
    return ChunkTable(
        chunks=tuple(chunks),
        token_place=torch.tensor(token_place, device=device),
        old_tail=_columns(old_tail, device),
        new_tail=_columns(new_tail, device),
    )


def _columns(
    rows: list[tuple[int, int, int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    table = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]
