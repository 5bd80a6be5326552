"""The plain step in torch operations: one token per sequence, or some, states updated in place.

A row's bits do not depend on the other rows: all is element by element, but for the sum over
dstate, which torch takes along one contiguous row. Finding the rows that are not padding needs
their number on the host, so on a GPU these entries wait for the device; use the Triton ones there.
"""

from __future__ import annotations

import torch

from stateferry_kernels.elementwise import silu, softplus
from stateferry_kernels.layer_state import PAD_SLOT, SsmLayerParams
from stateferry_kernels.ssd.grid_form import process_dt
from stateferry_kernels.state_update.step_checks import (
    check_step_inputs,
    check_step_states,
    check_tied,
    check_untied,
)


def state_step(
    ssm_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    state_slots: torch.Tensor,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
) -> None:
    """One token per sequence: s = exp(dt A) s + dt x B, y = C . s + D x, times silu(z) if given.

    Args:     x, z (num_seqs, nheads, headdim); dt (num_seqs, nheads) raw; B and C (num_seqs,
              ngroups, dstate); state_slots (num_seqs,) int32 or int64, no live slot twice.
    Mutates:  out like x; ssm_state (num_slots, nheads, headdim, dstate) at the rows' slots. A row
              with PAD_SLOT reads and writes nothing.
    Raises:   TypeError, ValueError on a mismatch.
    Precision: fp32 throughout, stored as the destination's dtype: fp32, bf16 or fp16.
    """
    check_step_inputs(ssm_state, x, dt, B, C, z, out, state_slots)
    check_tied(params, ssm_state)
    live = (state_slots != PAD_SLOT).nonzero()[:, 0]
    slots = state_slots[live].long()
    processed = process_dt(dt[live], params)
    decay = torch.exp(processed * params.A)[..., None, None]
    state, y = _step(
        ssm_state[slots].float(), decay, processed[..., None], x[live], B[live], C[live]
    )
    ssm_state[slots] = state.to(ssm_state.dtype)
    D = None if params.D is None else params.D[:, None]
    out[live] = _finish(y, x[live], D, None if z is None else z[live])


def state_step_untied(
    ssm_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    A: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_slots: torch.Tensor,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
) -> None:
    """``state_step`` where every channel has parameters of its own, as in Mamba-1.

    Args:     dt like x, raw; A (nheads, headdim, dstate), D and dt_bias (nheads, headdim), fp32, of
              any strides. All else, and what is mutated and raised, as in ``state_step``.
    """
    check_step_inputs(ssm_state, x, dt, B, C, z, out, state_slots, dt_per_channel=True)
    check_untied(A, D, dt_bias, ssm_state)
    live = (state_slots != PAD_SLOT).nonzero()[:, 0]
    slots = state_slots[live].long()
    processed = dt[live].float()
    if dt_bias is not None:
        processed = processed + dt_bias
    if dt_softplus:
        processed = softplus(processed)
    decay = torch.exp(processed[..., None] * A)
    state, y = _step(ssm_state[slots].float(), decay, processed, x[live], B[live], C[live])
    ssm_state[slots] = state.to(ssm_state.dtype)
    out[live] = _finish(y, x[live], D, None if z is None else z[live])


def state_steps(
    ssm_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    state_slots: torch.Tensor,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
    step_states: torch.Tensor | None = None,
    step_slots: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
    write_state: bool = True,
) -> None:
    """``state_step`` for num_steps tokens of each sequence, one after the other.

    Args:     as in ``state_step`` with num_steps as the second dimension of x, dt, B, C, z and out;
              step_states (rows, at least num_steps, nheads, headdim, dstate) fp32, bf16 or fp16,
              step_slots (num_seqs,) its row for each sequence, ``state_slots`` by default;
              parents (num_seqs, num_steps): step t > 0 starts from the state after step
              ``parents[i, t]`` as it was stored in step_states, or from the sequence's own where
              that is -1. Without parents, step t starts from the unrounded state after step t - 1.
    Mutates:  out; step_states[step_slots[i], t] = the state after step t; ssm_state = the state
              after the last step, if ``write_state``. A row with PAD_SLOT reads and writes nothing;
              one with PAD_SLOT in step_slots keeps no step and is a chain.
    Raises:   TypeError, ValueError on a mismatch, on parents or step_slots without step_states.
    """
    check_step_states(x, ssm_state, step_states, step_slots, parents)
    check_step_inputs(ssm_state, x, dt, B, C, z, out, state_slots, num_steps=x.shape[1])
    check_tied(params, ssm_state)
    live = (state_slots != PAD_SLOT).nonzero()[:, 0]
    slots = state_slots[live].long()
    rows = (state_slots if step_slots is None else step_slots)[live].long()
    kept = (rows != PAD_SLOT).nonzero()[:, 0]
    D = None if params.D is None else params.D[:, None]
    first = state = ssm_state[slots].float()
    for t in range(x.shape[1]):
        if parents is not None and step_states is not None and t:
            before = parents[live[kept], t].long()
            kept_before = step_states[rows[kept], before.clamp(min=0)].float()
            is_root = (before < 0)[:, None, None, None]
            state = state.index_copy(0, kept, torch.where(is_root, first[kept], kept_before))
        processed = process_dt(dt[live, t], params)
        decay = torch.exp(processed * params.A)[..., None, None]
        x_t = x[live, t]
        state, y = _step(state, decay, processed[..., None], x_t, B[live, t], C[live, t])
        out[live, t] = _finish(y, x_t, D, None if z is None else z[live, t])
        if step_states is not None:
            step_states[rows[kept], t] = state[kept].to(step_states.dtype)
    if write_state:
        ssm_state[slots] = state.to(ssm_state.dtype)


def _step(
    state: torch.Tensor,
    decay: torch.Tensor,
    dt: torch.Tensor,
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """state (n, nheads, headdim, dstate) fp32, decay and dt broadcast to it and to x. Returns the
    state after the token and C . state (n, nheads, headdim), fp32."""
    per_group = x.shape[1] // B.shape[1]
    B_heads = B.float().repeat_interleave(per_group, dim=1)[:, :, None]
    C_heads = C.float().repeat_interleave(per_group, dim=1)[:, :, None]
    state = state * decay + (dt * x.float())[..., None] * B_heads
    return state, (state * C_heads).sum(-1)


def _finish(
    y: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None
) -> torch.Tensor:
    if D is not None:
        y = y + D * x.float()
    if z is not None:
        y = y * silu(z.float())
    return y.to(x.dtype)
