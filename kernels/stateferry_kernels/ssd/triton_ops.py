"""The chunk scan in Triton: its own kernels where they are tuned, elsewhere the walk."""

from __future__ import annotations

import torch

from stateferry_kernels.device_tables import device_table
from stateferry_kernels.guards import check_extend_plan, check_ssm_inputs
from stateferry_kernels.layer_state import PAD_SLOT, LayerState, SsmLayerParams
from stateferry_kernels.plans import ExtendPlan, ExtendSequence
from stateferry_kernels.ssd.triton_scan import launch_scan
from stateferry_kernels.ssd.triton_walk import (
    CARRY_ON,
    Batch,
    Interval,
    Walks,
    walk_tables,
)
from stateferry_kernels.state_update.triton_rows import leave_rows


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    plan: ExtendPlan,
    state: LayerState,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
) -> None:
    """Consume a packed batch of tokens, each sequence on its own absolute grid.

    Args, what is mutated and errors: as ``ssd.torch_ops.chunk_scan``; rows of ``out`` must be
               contiguous.
    Precision: sums in fp32 of products in the activation dtype; a token's bits are those that
               decode rows and draft rows give.
    """
    check_ssm_inputs(x, dt, B, C, z, out, params, state, plan.total_tokens)
    check_extend_plan(plan, state)
    batch = Batch.of(x, dt, B, C, z, out)
    if not plan.sequences:
        return
    walks, left = _tables(plan, x.device)
    processed = launch_scan(walks, batch, params, state)
    # Apart from the walks, of which many read the rows that it overwrites.
    leave_rows(left, batch, processed, state.tail_x, state.tail_B, state.tail_dt)


def _tables(plan: ExtendPlan, device: torch.device) -> tuple[Walks, torch.Tensor]:
    """The walks, and the rows that they leave in the tails. Kept in ``plan.cache``."""
    key = f"ssd_triton:{device}"
    if key not in plan.cache:
        walks, left, num_intervals = [], [], 0
        for sequence, first_row in zip(plan.sequences, plan.cu_seqlens, strict=False):
            walk = _intervals(sequence, first_row, plan.grid)
            walks.append(walk)
            num_intervals += len(walk)
            last = walk[-1]
            if last.count < plan.grid:
                place = (num_intervals - 1) * plan.grid
                for row in range(last.old_rows, last.count):
                    token = last.first + row - last.old_rows
                    left.append((token, place + row, sequence.tail_page, row))
        plan.cache[key] = walk_tables(walks, None, device), device_table(left, 4, device)
    tables: tuple[Walks, torch.Tensor] = plan.cache[key]
    return tables


def _intervals(sequence: ExtendSequence, first_row: int, grid: int) -> list[Interval]:
    slots = {write.position: write.state_slot for write in sequence.boundaries}
    first_point = sequence.start // grid * grid
    intervals = []
    for begin in range(first_point, sequence.end, grid):
        is_first = begin == first_point
        old_rows = sequence.start - begin if is_first else 0
        intervals.append(
            Interval(
                state_slot=sequence.state_slot if is_first else CARRY_ON,
                tail_page=sequence.tail_page,
                old_rows=old_rows,
                first=first_row if is_first else first_row + begin - sequence.start,
                count=min(grid, sequence.end - begin),
                first_row=old_rows,
                boundary_slot=slots.get(begin + grid, PAD_SLOT),
                folds=begin + grid <= sequence.end,
            )
        )
    return intervals
