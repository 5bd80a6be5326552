"""Decode row, commit, verify and accept in torch operations: the fallback, and the oracle of faster
ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry_kernels.draft_plans import AcceptPlan, AcceptSequence, VerifyPlan
from stateferry_kernels.elementwise import silu
from stateferry_kernels.guards import (
    check_accept_plan,
    check_commit_plan,
    check_decode_plan,
    check_drafts,
    check_params,
    check_ssm_inputs,
    check_state,
    check_verify_plan,
)
from stateferry_kernels.layer_state import PAD_SLOT, DraftRows, LayerState, SsmLayerParams
from stateferry_kernels.live_rows import live_rows
from stateferry_kernels.plans import CommitPlan, DecodePlan
from stateferry_kernels.ssd.grid_form import (
    Intervals,
    Rows,
    evaluate_rows,
    fold_inputs,
    next_states,
    process_dt,
)
from stateferry_kernels.state_update.virtual_tails import PathIndex, verify_index


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
    key = f"decode_masks:{x.device}"
    if key not in plan.cache:
        plan.cache[key] = _Masks.of(live.rows, plan.grid)
    masks: _Masks = plan.cache[key]
    intervals = _tails(live.pages, masks, params, state)
    states = state.ssm_state.index_select(0, live.slots)
    y = _newest_rows(x, C, intervals, masks, states, params)
    if z is not None:
        y = y * silu(live.of(z).float())
    live.put(y.to(out.dtype), out)


def commit(*, params: SsmLayerParams, plan: CommitPlan, state: LayerState) -> None:
    """Fold tails into fresh slots.

    Mutates:  ssm_state and conv_state at ``dst_slots``; the source slots and the pages stay as they
              are. Raises TypeError, ValueError on a mismatch (guards.py).
    Precision: fp32; for a full tail the same bits as the chunk scan writes at the same boundary.
    """
    check_params(params, state.ssm_state.shape[1])
    check_state(state)
    check_commit_plan(plan, state)
    if not plan.dst_slots:
        return
    index = _commit_index(plan, state.ssm_state.device)
    intervals = _tails(index.pages, index.masks, params, state)
    src = state.ssm_state.index_select(0, index.src)
    state.ssm_state[index.dst] = next_states(src, *fold_inputs(intervals))
    window = state.conv_state.shape[2]
    columns = zip(plan.src_slots, plan.dst_slots, plan.tail_pages, plan.tail_rows, strict=True)
    for src_slot, dst_slot, page, rows in columns:
        recent = state.tail_xBC[page, max(0, rows - window) : rows].mT
        kept = state.conv_state[src_slot][:, recent.shape[1] :]
        state.conv_state[dst_slot] = torch.cat([kept, recent], dim=1)


def verify(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    plan: VerifyPlan,
    state: LayerState,
    drafts: DraftRows,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
) -> None:
    """Evaluate draft tokens, each on its sequence's tail and its own ancestors.

    Args:     x, z (num_rows, nheads, headdim), B, C (num_rows, ngroups, dstate) activation dtype,
              after the convolution; dt (num_rows, nheads) raw; rows as in ``plan``.
    Mutates:  out like x; the draft pages' x, B and dt. No state and no tail is written.
    Raises:   TypeError, ValueError on a mismatch (guards.py).
    Precision: fp32; the bits that decode rows along a token's path would give.
    """
    check_ssm_inputs(x, dt, B, C, z, out, params, state, plan.num_rows)
    check_drafts(drafts, state)
    check_verify_plan(plan, state, drafts)
    if not plan.num_rows:
        return
    index = verify_index(plan, x.device)
    place = (index.draft_page, index.draft_row)
    drafts.x[place], drafts.B[place], drafts.dt[place] = x, B, process_dt(dt, params)
    states = state.ssm_state.index_select(0, index.state_slot)
    if len(index.crossing):
        folds, _ = _path_intervals(index.folds, plan.grid, params, state, drafts)
        before = state.ssm_state.index_select(0, index.fold_slot)
        states[index.crossing] = next_states(before, *fold_inputs(folds))[index.fold_of]
    intervals, masks = _path_intervals(index.rows, plan.grid, params, state, drafts)
    y = _newest_rows(x, C, intervals, masks, states, params)
    out.copy_(y if z is None else y * silu(z.float()))


def accept(
    *, params: SsmLayerParams, plan: AcceptPlan, state: LayerState, drafts: DraftRows
) -> None:
    """Append accepted draft tokens to their tails, and commit the tails that this fills.

    Mutates:  the tail pages; ssm_state and conv_state at each ``boundary_slot``.
    Raises:   TypeError, ValueError on a mismatch (guards.py).
    """
    check_params(params, state.ssm_state.shape[1])
    check_state(state)
    check_drafts(drafts, state)
    check_accept_plan(plan, state, drafts)
    for sequence in plan.sequences:
        to_grid = plan.grid - sequence.tail_rows
        _append(sequence, sequence.path[:to_grid], sequence.tail_rows, state, drafts)
    full = [sequence for sequence in plan.sequences if sequence.boundary_slot != PAD_SLOT]
    if not full:
        return
    src = tuple(sequence.state_slot for sequence in full)
    dst = tuple(sequence.boundary_slot for sequence in full)
    pages = tuple(sequence.tail_page for sequence in full)
    commit(params=params, plan=CommitPlan(plan.grid, src, dst, pages), state=state)
    for sequence in full:
        to_grid = plan.grid - sequence.tail_rows
        _append(sequence, sequence.path[to_grid:], 0, state, drafts)


@dataclass(frozen=True, slots=True)
class _Masks:
    """Which tokens of n tails count: those up to ``newest``, their last row."""

    newest: torch.Tensor  # (n,) int64
    later: torch.Tensor  # (n, 1, 1, grid) bool: after the newest
    written: torch.Tensor  # (n, 1, grid, 1) int32: -1 up to the newest, 0 after it

    @classmethod
    def of(cls, newest: torch.Tensor, grid: int) -> _Masks:
        later = torch.arange(grid, device=newest.device) > newest[:, None]
        written = later.to(torch.int32) - 1
        return cls(newest, later[:, None, None], written[:, None, :, None])


def _tails(
    pages: torch.Tensor, masks: _Masks, params: SsmLayerParams, state: LayerState
) -> Intervals:
    x, B, dt = (t.index_select(0, pages) for t in (state.tail_x, state.tail_B, state.tail_dt))
    return _written(x, B, dt, masks, params)


def _written(
    x: torch.Tensor, B: torch.Tensor, dt: torch.Tensor, masks: _Masks, params: SsmLayerParams
) -> Intervals:
    """Intervals of copies of tails, each (n, grid, ..). What lies in an unwritten row may be NaN,
    so it is selected away rather than multiplied by zero; masking the bits is the fastest selection
    there is."""
    x, B, dt = (rows.transpose(1, 2).float().contiguous() for rows in (x, B, dt))
    for tensor in (x, B):
        tensor.view(torch.int32).bitwise_and_(masks.written)
    dt.view(torch.int32).bitwise_and_(masks.written[..., 0])
    return Intervals.of(x, B, dt, params.A)


def _newest_rows(
    x: torch.Tensor,
    C: torch.Tensor,
    intervals: Intervals,
    masks: _Masks,
    states: torch.Tensor,
    params: SsmLayerParams,
) -> torch.Tensor:
    """Outputs (n, nheads, headdim) fp32 of the newest row of each of n intervals."""
    newest = masks.newest[:, None, None].expand(-1, x.shape[1], 1)
    rows = Rows(
        C.float()[:, :, None],
        x.float()[:, :, None],
        intervals.cumsum.gather(2, newest),
        masks.later,
    )
    return evaluate_rows(intervals, rows, states, params.D)[:, :, 0]


def _path_intervals(
    paths: PathIndex, grid: int, params: SsmLayerParams, state: LayerState, drafts: DraftRows
) -> tuple[Intervals, _Masks]:
    masks = _Masks.of(paths.length - 1, grid)
    x = paths.gather(state.tail_x, drafts.x)
    B = paths.gather(state.tail_B, drafts.B)
    dt = paths.gather(state.tail_dt, drafts.dt)
    return _written(x, B, dt, masks, params), masks


def _append(
    sequence: AcceptSequence,
    path: tuple[int, ...],
    first_row: int,
    state: LayerState,
    drafts: DraftRows,
) -> None:
    page, rows = sequence.tail_page, slice(first_row, first_row + len(path))
    for name in ("xBC", "x", "B", "dt"):
        draft = getattr(drafts, name)[sequence.draft_page]
        getattr(state, f"tail_{name}")[page, rows] = draft[list(path)]


@dataclass(frozen=True, slots=True)
class _CommitIndex:
    """(n,) int64 each."""

    src: torch.Tensor
    dst: torch.Tensor
    pages: torch.Tensor
    masks: _Masks


def _commit_index(plan: CommitPlan, device: torch.device) -> _CommitIndex:
    """Built once and kept in ``plan.cache``."""
    key = f"commit_index:{device}"
    if key not in plan.cache:
        columns = (plan.src_slots, plan.dst_slots, plan.tail_pages, plan.tail_rows)
        table = torch.tensor(columns, dtype=torch.int64, device=device)
        src, dst, pages, rows = table.unbind()
        plan.cache[key] = _CommitIndex(src, dst, pages, _Masks.of(rows - 1, plan.grid))
    index: _CommitIndex = plan.cache[key]
    return index
