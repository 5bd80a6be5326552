"""Decode row, commit, verify and accept in Triton; the arithmetic is ssd/triton_kernels.py's.

Where the same bits come out: a decode row, a draft row and a row of the chunk scan of the same
token in the same activation and state dtype are equal to the byte, and so are the states of a
commit and of the chunk scan at the same grid point, whatever else is in the batch and however the
sequence was cut. Tested on an H100 and under the interpreter. It holds on one kind of GPU with one
version of Triton; the bits differ between GPUs, from those of the other backends, and from those of
other blocks of tokens in tuning/grid_form.json.
"""

from __future__ import annotations

import torch

from stateferry_kernels.draft_plans import AcceptPlan, VerifyPlan
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
from stateferry_kernels.layer_state import DraftRows, LayerState, SsmLayerParams
from stateferry_kernels.plans import CommitPlan, DecodePlan
from stateferry_kernels.ssd.triton_walk import Batch, launch_walks
from stateferry_kernels.state_update.triton_decode import decode_tile, launch_decode
from stateferry_kernels.state_update.triton_rows import (
    leave_rows,
    move_rows,
    write_conv_windows,
)
from stateferry_kernels.state_update.triton_tables import (
    accept_tables,
    commit_tables,
    decode_rows,
    decode_tables,
    draft_tables,
    verify_tables,
)
from stateferry_kernels.state_update.triton_verify import launch_verify


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

    Args, what is mutated and errors: as ``state_update.torch_ops.decode_row``; rows of ``out`` must
    be contiguous.
    """
    check_ssm_inputs(x, dt, B, C, z, out, params, state, len(plan.state_slots))
    check_decode_plan(plan, state)
    batch = Batch.of(x, dt, B, C, z, out)
    rows = decode_rows(plan, x.device)
    if not len(rows):
        return
    tile = decode_tile(state, 1)
    if tile is not None:
        launch_decode(rows, batch, params, state, tile)
        return
    tables = decode_tables(plan, x.device)
    processed = launch_walks(tables.walks, batch, params, state)
    leave_rows(tables.left, batch, processed, state.tail_x, state.tail_B, state.tail_dt)


def commit(*, params: SsmLayerParams, plan: CommitPlan, state: LayerState) -> None:
    """Fold tails into fresh slots. What is mutated and errors: as ``torch_ops.commit``."""
    check_params(params, state.ssm_state.shape[1])
    check_state(state)
    check_commit_plan(plan, state)
    if not plan.dst_slots:
        return
    tables = commit_tables(plan, state.ssm_state.device)
    launch_walks(tables.walks, None, params, state)
    write_conv_windows(tables.windows, state)


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
    """Evaluate draft tokens, each on its sequence's tail and its own ancestors. The state is read
    once for all of a sequence's tokens, and again for each full interval that paths pass.

    Args, what is mutated and errors: as ``state_update.torch_ops.verify``; rows of ``out`` must be
    contiguous.
    """
    check_ssm_inputs(x, dt, B, C, z, out, params, state, plan.num_rows)
    check_drafts(drafts, state)
    check_verify_plan(plan, state, drafts)
    batch = Batch.of(x, dt, B, C, z, out)
    if not plan.num_rows:
        return
    draft = draft_tables(plan, x.device)
    tile = decode_tile(state, draft.walks.rows)
    if tile is not None:
        launch_verify(draft, batch, params, state, drafts, tile)
        return
    tables = verify_tables(plan, x.device)
    processed = launch_walks(tables.walks, batch, params, state)
    leave_rows(tables.left, batch, processed, drafts.x, drafts.B, drafts.dt)


def accept(
    *, params: SsmLayerParams, plan: AcceptPlan, state: LayerState, drafts: DraftRows
) -> None:
    """Append accepted draft tokens to their tails, and commit the tails that this fills. What is
    mutated and errors: as ``torch_ops.accept``."""
    check_params(params, state.ssm_state.shape[1])
    check_state(state)
    check_drafts(drafts, state)
    check_accept_plan(plan, state, drafts)
    tables = accept_tables(plan, state.ssm_state.device)
    move_rows(tables.before, drafts, state)
    commit(params=params, plan=tables.commit, state=state)
    move_rows(tables.after, drafts, state)
