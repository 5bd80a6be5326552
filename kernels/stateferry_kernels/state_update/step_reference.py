"""The definition of the plain step: read a state, fold one token in, write it back.

    dt' = clamp(softplus(dt + bias))
    s = exp(dt' A) s + dt' x B        y = C . s + D x, times silu(z)

The functions named ``*_reference`` treat one sequence in its own float dtype. ``state_step``,
``state_steps`` and ``state_step_untied`` are the host entries of step_torch.py in fp64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from stateferry_kernels.layer_state import PAD_SLOT, SsmLayerParams
from stateferry_kernels.ssd.reference import process_dt_reference
from stateferry_kernels.state_update.step_checks import (
    check_step_inputs,
    check_step_states,
    check_tied,
    check_untied,
)

_NO_LIMIT = (-math.inf, math.inf)


def state_step_reference(
    ssm_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: ssm_state and A (nheads, headdim, dstate), B and C (ngroups, dstate), all others
    (nheads, headdim). Parameters that a head shares may be expanded. Returns y and the state."""
    per_group = len(x) // len(B)
    B = B.repeat_interleave(per_group, dim=0)[:, None]  # (nheads, 1, dstate)
    C = C.repeat_interleave(per_group, dim=0)[:, None]
    dt = process_dt_reference(dt, dt_bias, dt_softplus, dt_limit)
    ssm_state = torch.exp(dt[..., None] * A) * ssm_state + (dt * x)[..., None] * B
    y = (ssm_state * C).sum(-1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z)
    return y, ssm_state


def state_steps_reference(
    ssm_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    params: SsmLayerParams,
    *,
    z: torch.Tensor | None = None,
    parents: list[int] | None = None,
    kept_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some tokens: ssm_state (nheads, headdim, dstate), x and z (num_steps, nheads, headdim), dt
    (num_steps, nheads), B and C (num_steps, ngroups, dstate).

    Step t > 0 starts from the state after step ``parents[t]``, or from ``ssm_state`` where that is
    -1; without ``parents`` from the state after step t - 1. A state that is looked up by its step
    was kept in ``kept_dtype``. Returns y like x, and the states after each step."""
    tied = _tied(params, ssm_state)
    ys: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    for t in range(len(x)):
        before = states[t - 1] if t and parents is None else ssm_state
        if parents is not None and t and parents[t] >= 0:
            before = states[parents[t]].to(kept_dtype or x.dtype).to(x.dtype)
        y, state = state_step_reference(
            before,
            x[t],
            dt[t][:, None].expand_as(x[t]),
            B=B[t],
            C=C[t],
            z=None if z is None else z[t],
            **tied,
        )
        ys.append(y)
        states.append(state)
    return torch.stack(ys), torch.stack(states)


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
    check_step_inputs(ssm_state, x, dt, B, C, z, out, state_slots)
    check_tied(params, ssm_state)
    tied = _tied(params, ssm_state)
    dt = dt[..., None].expand_as(x)
    _each_sequence(ssm_state, x, dt, B, C, z, state_slots, out, tied)


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
    check_step_inputs(ssm_state, x, dt, B, C, z, out, state_slots, dt_per_channel=True)
    check_untied(A, D, dt_bias, ssm_state)
    untied = {"A": _wide(A), "D": _wide(D), "dt_bias": _wide(dt_bias), "dt_softplus": dt_softplus}
    _each_sequence(ssm_state, x, dt, B, C, z, state_slots, out, untied)


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
    check_step_states(x, ssm_state, step_states, step_slots, parents)
    check_step_inputs(ssm_state, x, dt, B, C, z, out, state_slots, num_steps=x.shape[1])
    check_tied(params, ssm_state)
    rows = (state_slots if step_slots is None else step_slots).tolist()
    for i, slot in enumerate(state_slots.tolist()):
        if slot == PAD_SLOT:
            continue
        is_kept = step_states is not None and rows[i] != PAD_SLOT
        y, states = state_steps_reference(
            ssm_state[slot].double(),
            x[i].double(),
            dt[i].double(),
            B[i].double(),
            C[i].double(),
            params,
            z=None if z is None else z[i].double(),
            parents=parents[i].tolist() if parents is not None and is_kept else None,
            kept_dtype=None if step_states is None else step_states.dtype,
        )
        out[i] = y.to(out.dtype)
        if step_states is not None and is_kept:
            step_states[rows[i], : len(states)] = states.to(step_states.dtype)
        if write_state:
            ssm_state[slot] = states[-1].to(ssm_state.dtype)


def _each_sequence(
    ssm_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor | None,
    state_slots: torch.Tensor,
    out: torch.Tensor,
    parameters: dict[str, Any],
) -> None:
    for i, slot in enumerate(state_slots.tolist()):
        if slot != PAD_SLOT:
            y, after = state_step_reference(
                ssm_state[slot].double(),
                x[i].double(),
                dt[i].double(),
                B=B[i].double(),
                C=C[i].double(),
                z=None if z is None else z[i].double(),
                **parameters,
            )
            out[i] = y.to(out.dtype)
            ssm_state[slot] = after.to(ssm_state.dtype)


def _tied(params: SsmLayerParams, ssm_state: torch.Tensor) -> dict[str, Any]:
    """The parameters of heads as those of channels: views, fp64."""
    shape = ssm_state.shape[-3:]

    def per_channel(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.double()[:, None].expand(shape[:2])

    return {
        "A": params.A.double()[:, None, None].expand(shape),
        "D": per_channel(params.D),
        "dt_bias": per_channel(params.dt_bias),
        "dt_softplus": params.dt_softplus,
        "dt_limit": params.dt_limit,
    }


def _wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()
