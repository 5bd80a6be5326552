"""Decode row and commit in torch operations: the fallback, and the oracle of faster ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry_kernels.elementwise import silu
from stateferry_kernels.guards import check_params, check_ssm_inputs, check_state
from stateferry_kernels.layer_state import PAD_SLOT, LayerState, SsmLayerParams
from stateferry_kernels.plans import CommitPlan, DecodePlan
from stateferry_kernels.ssd.grid_form import (
    MIN_ROWS,
    Intervals,
    evaluate_rows,
    fold_inputs,
    next_states,
    process_dt,
)


@dataclass(frozen=True, slots=True)
class DecodeIndex:
    """Index tensors of a decode plan, int64, for the rows that are not padding."""

    live: torch.Tensor  # (num_live,) row in the batch
    slots: torch.Tensor
    pages: torch.Tensor
    rows: torch.Tensor
    written: torch.Tensor  # (num_live, grid) bool: tail rows up to and including the new one
    row_idx: torch.Tensor  # (num_live, MIN_ROWS): the new row, repeated


def decode_index(plan: DecodePlan, device: torch.device) -> DecodeIndex:
    """The plan's index tensors, built once and kept in ``plan.cache``."""
    key = f"decode_index:{device}"
    if key not in plan.cache:
        live = [i for i, slot in enumerate(plan.state_slots) if slot != PAD_SLOT]
        rows = torch.tensor([plan.tail_rows[i] for i in live], dtype=torch.int64, device=device)
        plan.cache[key] = DecodeIndex(
            live=torch.tensor(live, dtype=torch.int64, device=device),
            slots=torch.tensor([plan.state_slots[i] for i in live], device=device),
            pages=torch.tensor([plan.tail_pages[i] for i in live], device=device),
            rows=rows,
            written=torch.arange(plan.grid, device=device) <= rows[:, None],
            row_idx=rows[:, None].expand(-1, MIN_ROWS),
        )
    index: DecodeIndex = plan.cache[key]
    return index


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
    index = decode_index(plan, x.device)
    if not index.live.numel():
        return
    live = index.live
    state.tail_x[index.pages, index.rows] = x[live]
    state.tail_B[index.pages, index.rows] = B[live]
    state.tail_dt[index.pages, index.rows] = process_dt(dt[live], params)
    intervals = _tail_intervals(index.pages, index.written, params, state)
    C_rows = C[live].float()[:, :, None].expand(-1, -1, MIN_ROWS, -1)
    states = state.ssm_state[index.slots]
    y = evaluate_rows(intervals, C_rows, index.row_idx, states, params.D)[:, :, 0]
    if z is not None:
        y = y * silu(z[live].float())
    out[live] = y.to(out.dtype)


def commit(*, params: SsmLayerParams, plan: CommitPlan, state: LayerState) -> None:
    """Fold full tails into fresh slots.

    Mutates:  ssm_state and conv_state at ``dst_slots``; the source slots and the pages stay as they
              are. Raises TypeError, ValueError on a mismatch (guards.py).
    Precision: fp32; the same bits as the chunk scan writes at the same boundary.
    """
    check_params(params, state.ssm_state.shape[1])
    check_state(state)
    device = state.ssm_state.device
    src = torch.tensor(plan.src_slots, device=device)
    dst = torch.tensor(plan.dst_slots, device=device)
    pages = torch.tensor(plan.tail_pages, device=device)
    intervals = _tail_intervals(pages, None, params, state)
    added, decay = fold_inputs(intervals)
    state.ssm_state[dst] = next_states(state.ssm_state[src], added, decay)
    window = state.conv_state.shape[2]
    if window:
        state.conv_state[dst] = state.tail_xBC[pages][:, -window:].mT


def _tail_intervals(
    pages: torch.Tensor,
    written: torch.Tensor | None,
    params: SsmLayerParams,
    state: LayerState,
) -> Intervals:
    """The tails of some pages; rows that are not ``written`` count as no token (None: all are)."""
    x, B, dt = state.tail_x[pages], state.tail_B[pages], state.tail_dt[pages]
    if written is not None:
        # A selection, not a product: what lies in an unwritten row may be NaN.
        unwritten = ~written
        x.masked_fill_(unwritten[:, :, None, None], 0)
        B.masked_fill_(unwritten[:, :, None, None], 0)
        dt.masked_fill_(unwritten[:, :, None], 0)
    return Intervals.of(x, B, dt, params.A)
