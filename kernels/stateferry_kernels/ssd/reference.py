"""The definition: the recurrence, one token after the other, in any float dtype.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t        y_t = C_t . S_t + D x_t

Source: Dao and Gu, "Transformers are SSMs" (2024), equations of the state space dual layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def process_dt_reference(
    dt: torch.Tensor,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> torch.Tensor:
    """dt (.., nheads): add the bias, softplus, clamp."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(*dt_limit)


def ssd_reference(
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
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: torch.Tensor | None = None,
    states_at: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
    """One sequence: x (seqlen, nheads, headdim), dt (seqlen, nheads), A (nheads,),
    B and C (seqlen, ngroups, dstate), z like x, initial_state (nheads, headdim, dstate).

    Returns y like x, the final state, and the states after the numbers of tokens in ``states_at``.
    """
    seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[1:]
    dt = process_dt_reference(dt, dt_bias, dt_softplus, dt_limit)
    B = B.repeat_interleave(nheads // ngroups, dim=1)  # (seqlen, nheads, dstate)
    C = C.repeat_interleave(nheads // ngroups, dim=1)
    S = x.new_zeros(nheads, headdim, dstate) if initial_state is None else initial_state.clone()
    states = {0: S.clone()} if 0 in states_at else {}
    y = torch.empty_like(x)
    for t in range(seqlen):
        decay = torch.exp(dt[t] * A)
        S = decay[:, None, None] * S + torch.einsum("h,hp,hn->hpn", dt[t], x[t], B[t])
        y[t] = torch.einsum("hpn,hn->hp", S, C[t])
        if D is not None:
            y[t] += D[:, None] * x[t]
        if t + 1 in states_at:
            states[t + 1] = S.clone()
    if z is not None:
        y = y * F.silu(z)
    return y, S, states
