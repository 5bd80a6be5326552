"""Which tokens a program of the convolution kernels treats and where their columns lie: built from
the plan's integers, once for all layers of a step."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch

from stateferry_kernels.device_tables import device_table
from stateferry_kernels.draft_plans import VerifyPlan
from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.plans import DecodePlan, ExtendPlan, ExtendSequence

# More would not fit into the registers of the kernel (tests/kernels/test_triton_compiles.py).
TILE_TOKENS = 16
NUM_EXTEND_COLUMNS = 8
_NOT_IN_TAIL = -1


@dataclass(frozen=True, slots=True)
class ExtendTile:
    """Some tokens of one sequence and one grid interval. The order of the fields is the table's."""

    first_row: int  # of the sequence in the batch
    begin: int  # first token, counted from the sequence's first row
    count: int
    state_slot: int
    tail_page: int
    old_rows: int  # of the tail before the extend
    boundary_slot: int  # of the grid point at the tile's end, or PAD_SLOT
    tail_row: int  # that the first token is left in, or -1


class ExtendTables(NamedTuple):
    """Device tables (num_tiles, NUM_EXTEND_COLUMNS) int64. ``later``: the tiles whose raw columns
    may only go to their tail when the old rows have been read, or None when no tile is."""

    tiles: torch.Tensor
    later: torch.Tensor | None


def extend_tables(plan: ExtendPlan, window: int, device: torch.device) -> ExtendTables:
    key = f"conv1d_triton:{device}:{window}"
    if key not in plan.cache:
        tiles, overwrites = [], False
        offsets = plan.cu_seqlens
        for number, sequence in enumerate(plan.sequences):
            tiles += _tiles(sequence, offsets[number], plan.grid)
            overwrites |= _overwrites_old_rows(sequence, plan.grid, window)
        later = [tile for tile in tiles if tile.tail_row != _NOT_IN_TAIL] if overwrites else []
        plan.cache[key] = ExtendTables(
            _table(tiles, device), _table(later, device) if later else None
        )
    tables: ExtendTables = plan.cache[key]
    return tables


def decode_table(plan: DecodePlan, device: torch.device) -> torch.Tensor:
    """(num_seqs, 3) int64: state slot, tail page, tail row."""
    key = f"conv1d_triton:{device}"
    if key not in plan.cache:
        rows = list(zip(plan.state_slots, plan.tail_pages, plan.tail_rows, strict=True))
        plan.cache[key] = device_table(rows, 3, device)
    table: torch.Tensor = plan.cache[key]
    return table


def verify_table(plan: VerifyPlan, window: int, device: torch.device) -> torch.Tensor:
    """(num_rows, 4 + 2 window) int64: state slot, tail page, draft page, node; then for each of the
    window's columns the ancestor's row in the batch, or -1 and the row after the grid point."""
    key = f"conv1d_triton:{device}:{window}"
    if key not in plan.cache:
        rows: list[list[int]] = []
        for sequence in plan.sequences:
            first = len(rows)
            place = [sequence.state_slot, sequence.tail_page, sequence.draft_page]
            for node, path in enumerate(sequence.paths()):
                row = [*place, node]
                for depth in range(len(path) - 1 - window, len(path) - 1):
                    is_draft = depth >= 0
                    row.append(first + path[depth] if is_draft else -1)
                    row.append(0 if is_draft else sequence.tail_rows + depth)
                rows.append(row)
        plan.cache[key] = device_table(rows, 4 + 2 * window, device)
    table: torch.Tensor = plan.cache[key]
    return table


def _tiles(sequence: ExtendSequence, first_row: int, grid: int) -> list[ExtendTile]:
    slots = {write.position: write.state_slot for write in sequence.boundaries}
    last_point = sequence.end // grid * grid
    tiles, position = [], sequence.start
    while position < sequence.end:
        next_point = position // grid * grid + grid
        end = min(position + TILE_TOKENS, next_point, sequence.end)
        tiles.append(
            ExtendTile(
                first_row=first_row,
                begin=position - sequence.start,
                count=end - position,
                state_slot=sequence.state_slot,
                tail_page=sequence.tail_page,
                old_rows=sequence.start % grid,
                boundary_slot=slots.get(end, PAD_SLOT),
                tail_row=position % grid if position >= last_point else _NOT_IN_TAIL,
            )
        )
        position = end
    return tiles


def _overwrites_old_rows(sequence: ExtendSequence, grid: int, window: int) -> bool:
    """Whether the new tail takes the place of columns that the extend's first tokens read."""
    old_rows = sequence.start % grid
    crosses = sequence.end // grid > sequence.start // grid
    return crosses and max(0, old_rows - window) < min(old_rows, sequence.end % grid)


def _table(tiles: list[ExtendTile], device: torch.device) -> torch.Tensor:
    return device_table([astuple(tile) for tile in tiles], NUM_EXTEND_COLUMNS, device)
