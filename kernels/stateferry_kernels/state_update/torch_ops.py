"""Decode row and commit in torch operations: the fallback, and the oracle of faster ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry_kernels.elementwise import silu
from stateferry_kernels.guards import (
    check_commit_plan,
    check_decode_plan,
    check_params,
    check_ssm_inputs,
    check_state,
)
from stateferry_kernels.layer_state import LayerState, SsmLayerParams
from stateferry_kernels.live_rows import LiveRows, live_rows
from stateferry_kernels.plans import CommitPlan, DecodePlan
from stateferry_kernels.ssd.grid_form import (
    Intervals,
    Rows,
    evaluate_rows,
    fold_inputs,
    next_states,
    process_dt,
)


def decode_row(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    plan: DecodePlan,
    state: LayerState,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
) -> None:
    """Consume one token per sequence: append it to the tail, evaluate its row, write no state.

    Args:     x, z (num_seqs, nheads, headdim), B, C (num_seqs, ngroups, dstate) activation dtype,
              after the convolution; dt (num_seqs, nheads) raw. A PAD_SLOT row is skipped.
    Mutates:  out like x (padding rows are left alone); row ``tail_rows`` of tail_x, tail_B,
              tail_dt.
    Raises:   TypeError, ValueError on a mismatch (guards.py).
    Precision: fp32; the same bits as the chunk scan gives for the same token.
    """
    check_ssm_inputs(x, dt, B, C, z, out, params, state, len(plan.state_slots))
    check_decode_plan(plan, state)
    live = live_rows(plan, x.device)
    if not live.count:
        return
    x, dt, B, C = (live.of(tensor) for tensor in (x, dt, B, C))
    state.tail_x[live.pages, live.rows] = x
    state.tail_B[live.pages, live.rows] = B
    state.tail_dt[live.pages, live.rows] = process_dt(dt, params)
    masks = _masks(plan, live)
    intervals = _written_tails(live, masks, params, state)
    newest = live.rows[:, None, None].expand(-1, x.shape[1], 1)
    rows = Rows(
        C.float()[:, :, None],
        x.float()[:, :, None],
        intervals.cumsum.gather(2, newest),
        masks.later,
    )
    states = state.ssm_state.index_select(0, live.slots)
    y = evaluate_rows(intervals, rows, states, params.D)[:, :, 0]
    if z is not None:
        y = y * silu(live.of(z).float())
    live.put(y.to(out.dtype), out)


def commit(*, params: SsmLayerParams, plan: CommitPlan, state: LayerState) -> None:
    """Fold full tails into fresh slots.

    Mutates:  ssm_state and conv_state at ``dst_slots``; the source slots and the pages stay as they
              are. Raises TypeError, ValueError on a mismatch (guards.py).
    Precision: fp32; the same bits as the chunk scan writes at the same boundary.
    """
    check_params(params, state.ssm_state.shape[1])
    check_state(state)
    check_commit_plan(plan, state)
    if not plan.dst_slots:
        return
    src, dst, pages = _commit_index(plan, state.ssm_state.device)
    intervals = _tails(pages, params, state)
    added, decay = fold_inputs(intervals)
    state.ssm_state[dst] = next_states(state.ssm_state.index_select(0, src), added, decay)
    window = state.conv_state.shape[2]
    if window:
        first = plan.grid - window
        state.conv_state[dst] = state.tail_xBC[:, first:].index_select(0, pages).mT


@dataclass(frozen=True, slots=True)
class _Masks:
    """Which tokens of the tails count, for each live row."""

    later: torch.Tensor  # (num_live, 1, 1, grid) bool: after the new row
    written: torch.Tensor  # (num_live, 1, grid, 1) int32: -1 up to the new row, 0 after it


def _masks(plan: DecodePlan, live: LiveRows) -> _Masks:
    key = f"decode_masks:{live.rows.device}"
    if key not in plan.cache:
        later = torch.arange(plan.grid, device=live.rows.device) > live.rows[:, None]
        written = later.to(torch.int32) - 1
        plan.cache[key] = _Masks(later[:, None, None], written[:, None, :, None])
    masks: _Masks = plan.cache[key]
    return masks


def _written_tails(
    live: LiveRows, masks: _Masks, params: SsmLayerParams, state: LayerState
) -> Intervals:
    """The tails up to the new row. What lies in an unwritten row may be NaN, so it is selected away
    rather than multiplied by zero; masking the bits is the fastest selection there is."""
    x = _head_first(state.tail_x, live.pages)
    B = _head_first(state.tail_B, live.pages)
    dt = _head_first(state.tail_dt, live.pages)
    for tensor in (x, B):
        tensor.view(torch.int32).bitwise_and_(masks.written)
    dt.view(torch.int32).bitwise_and_(masks.written[..., 0])
    return Intervals.of(x, B, dt, params.A)


def _tails(pages: torch.Tensor, params: SsmLayerParams, state: LayerState) -> Intervals:
    """Full tails."""
    x, B, dt = (_head_first(t, pages) for t in (state.tail_x, state.tail_B, state.tail_dt))
    return Intervals.of(x, B, dt, params.A)


def _head_first(pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """A fp32 copy of some pages of a tail pool, (num_pages, heads, grid, ..), contiguous."""
    return pool.transpose(1, 2).index_select(0, pages).float().contiguous()


def _commit_index(
    plan: CommitPlan, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """src_slots, dst_slots and tail_pages as int64, built once and kept in ``plan.cache``."""
    key = f"commit_index:{device}"
    if key not in plan.cache:
        columns = (plan.src_slots, plan.dst_slots, plan.tail_pages)
        plan.cache[key] = torch.tensor(columns, dtype=torch.int64, device=device).unbind()
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = plan.cache[key]
    return index
