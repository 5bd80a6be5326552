"""Decode row, commit, verify and accept on the CPU: native/src/rows.h and commit.h.

Arguments, what is mutated and errors are those of ``state_update.torch_ops``; sums in one order
(native/src/tile.h), so that the bits of a token do not depend on which of them, or of the chunk
scan, produced it.
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
from stateferry_kernels.native.arguments import (
    Rows,
    accept_struct,
    commit_struct,
    decode_struct,
    drafts_struct,
    layer_struct,
    look_of,
    pack_rows,
    params_struct,
    verify_struct,
)
from stateferry_kernels.native.library import native
from stateferry_kernels.plans import CommitPlan, DecodePlan


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
    """Consume one token per sequence: append it to the tail, evaluate its row, write no state."""
    num_rows = len(plan.state_slots)
    gates = () if z is None else (z,)
    look = [num_rows, *look_of(x, dt, B, C, out, *gates)]
    seen = state.cache.get("decode row")
    # The layers of a decode step look the same from one step to the next.
    if seen is not None and seen[0] is params and seen[1] == look:
        alive, packed = None, pack_rows(seen[2], x, dt, B, C, z, out)
    else:
        check_ssm_inputs(x, dt, B, C, z, out, params, state, num_rows)
        alive = Rows(x, dt, B, C, z, out)
        packed = alive.struct
        if not alive.copied:
            state.cache["decode row"] = (params, look, alive.strides)
    check_decode_plan(plan, state)
    native().decode_row(
        layer_struct(state),
        params_struct(params),
        decode_struct(plan),
        packed,
        torch.get_num_threads(),
    )


def commit(*, params: SsmLayerParams, plan: CommitPlan, state: LayerState) -> None:
    """Fold tails into fresh slots."""
    check_params(params, state.ssm_state.shape[1])
    check_state(state)
    check_commit_plan(plan, state)
    native().commit(
        layer_struct(state), params_struct(params), commit_struct(plan), torch.get_num_threads()
    )


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
    once for all of a sequence's tokens."""
    check_ssm_inputs(x, dt, B, C, z, out, params, state, plan.num_rows)
    check_drafts(drafts, state)
    check_verify_plan(plan, state, drafts)
    rows = Rows(x, dt, B, C, z, out)
    native().verify(
        layer_struct(state),
        params_struct(params),
        verify_struct(plan),
        rows.struct,
        drafts_struct(drafts),
        torch.get_num_threads(),
    )


def accept(
    *, params: SsmLayerParams, plan: AcceptPlan, state: LayerState, drafts: DraftRows
) -> None:
    """Append accepted draft tokens to their tails, and commit the tails that this fills."""
    check_params(params, state.ssm_state.shape[1])
    check_state(state)
    check_drafts(drafts, state)
    check_accept_plan(plan, state, drafts)
    native().accept(
        layer_struct(state),
        params_struct(params),
        accept_struct(plan),
        drafts_struct(drafts),
        torch.get_num_threads(),
    )
