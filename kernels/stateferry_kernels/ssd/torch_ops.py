"""The chunk scan in torch operations: the fallback, and the oracle of faster ones."""

from __future__ import annotations

import torch

from stateferry_kernels.elementwise import silu
from stateferry_kernels.guards import check_extend_plan, check_ssm_inputs
from stateferry_kernels.layer_state import LayerState, SsmLayerParams
from stateferry_kernels.plans import ExtendPlan
from stateferry_kernels.ssd.chunk_table import ChunkTable, chunk_table
from stateferry_kernels.ssd.grid_form import (
    Intervals,
    Rows,
    evaluate_rows,
    fold_inputs,
    next_states,
    process_dt,
)

# Elements of the largest temporary, (chunks, nheads, grid, grid): 64 MB in fp32.
_MAX_ELEMENTS = 1 << 24


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

    Args:     x, z (total_tokens, nheads, headdim) and B, C (total_tokens, ngroups, dstate) in the
              activation dtype, after the convolution; dt (total_tokens, nheads) raw.
    Reads:    each sequence's state slot and the old rows of its tail page, in place.
    Mutates:  out like x; ssm_state at each listed boundary's slot; tail_x, tail_B and tail_dt of
              the rows after the last grid point.
    Raises:   TypeError, ValueError on a mismatch (guards.py).
    Precision: fp32 throughout, stored as the destination's dtype.
    """
    check_ssm_inputs(x, dt, B, C, z, out, params, state, plan.total_tokens)
    check_extend_plan(plan, state)
    if not plan.sequences:
        return
    table = chunk_table(plan, x.device)
    dt = process_dt(dt, params)
    y = _scan(x, dt, B, C, params, plan, table, state)
    _leave_tail(x, dt, B, table, state)
    rows = y.flatten(0, 1)[table.token_place]
    if z is not None:
        rows = rows * silu(z.float())
    out.copy_(rows)


def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    params: SsmLayerParams,
    plan: ExtendPlan,
    table: ChunkTable,
    state: LayerState,
) -> torch.Tensor:
    """Outputs of all rows of all chunks, (nchunks, grid, nheads, headdim) fp32; writes
    boundaries."""
    num_chunks, grid = len(table.chunks), plan.grid
    x_all = _placed(x, table, num_chunks, grid, state.tail_x)
    B_all = _placed(B, table, num_chunks, grid, state.tail_B)
    dt_all = _placed(dt, table, num_chunks, grid, state.tail_dt)
    C_all = _placed(C, table, num_chunks, grid, None)
    y = torch.empty(x_all.shape, dtype=torch.float32, device=x.device)
    later = torch.ones(grid, grid, dtype=torch.bool, device=x.device).triu(1)[None, None]
    nheads = x.shape[1]
    step = max(1, _MAX_ELEMENTS // (nheads * grid * grid))
    running: torch.Tensor | None = None
    for begin in range(0, num_chunks, step):
        part = slice(begin, min(begin + step, num_chunks))
        x_part, B_part, dt_part = (t[part].transpose(1, 2) for t in (x_all, B_all, dt_all))
        intervals = Intervals.of(x_part, B_part, dt_part, params.A)
        incoming, running = _pass_states(intervals, part, running, plan, table, state)
        C_part = C_all[part].float().transpose(1, 2)
        rows = Rows(C_part, intervals.x, intervals.cumsum, later)
        y[part] = evaluate_rows(intervals, rows, incoming, params.D).transpose(1, 2)
    return y


def _pass_states(
    intervals: Intervals,
    part: slice,
    running: torch.Tensor | None,
    plan: ExtendPlan,
    table: ChunkTable,
    state: LayerState,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The state each chunk begins with, and the one to carry on; writes the listed boundaries.

    The only sequential part: chunk by chunk along each sequence.
    """
    added, decay = fold_inputs(intervals)
    incoming = torch.empty_like(added, dtype=state.ssm_state.dtype)
    for offset, chunk in enumerate(table.chunks[part]):
        if chunk.is_first:
            running = state.ssm_state[plan.sequences[chunk.sequence].state_slot]
        if running is None:
            raise ValueError("a chunk table must begin with a sequence's first chunk")
        incoming[offset] = running
        running = next_states(running, added[offset], decay[offset])
        if chunk.boundary_slot is not None:
            state.ssm_state[chunk.boundary_slot] = running
    return incoming, running


def _placed(
    rows: torch.Tensor,
    table: ChunkTable,
    num_chunks: int,
    grid: int,
    tail: torch.Tensor | None,
) -> torch.Tensor:
    """Rows at their place in their chunk, (nchunks, grid, ..), zero elsewhere; old tail rows
    too."""
    placed = rows.new_zeros((num_chunks * grid, *rows.shape[1:]))
    placed[table.token_place] = rows
    if tail is not None:
        place, page, row = table.old_tail
        placed[place] = tail[page, row]
    return placed.view(num_chunks, grid, *rows.shape[1:])


def _leave_tail(
    x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, table: ChunkTable, state: LayerState
) -> None:
    token, page, row = table.new_tail
    state.tail_x[page, row] = x[token]
    state.tail_B[page, row] = B[token]
    state.tail_dt[page, row] = dt[token]
