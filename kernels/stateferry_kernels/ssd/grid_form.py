"""One grid interval, in torch operations: the sum that prefill, decode and commit all evaluate.

For an interval that starts with state S, c being the running sum of dt * A from its start,

    y_t = C_t . (exp(c_t) S) + sum over s <= t of (C_t . B_s) exp(c_t - c_s) dt_s x_s + D x_t
    S'  = exp(c_L) S + sum over s of exp(c_L - c_s) dt_s x_s B_s

A token's bits must not depend on which of the three asks. So the interval is always padded to the
full grid (with dt = 0 and x = 0, which adds exact zeros), every operand has the same layout, and a
matrix product never has fewer than MIN_ROWS rows: below that, the CPU's library picks another order
of summation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry_kernels.elementwise import softplus
from stateferry_kernels.layer_state import SsmLayerParams

# Rows of a product agree to the byte from 5 rows up (measured, torch 2.13, fp32); 8 leaves room.
MIN_ROWS = 8


@dataclass(frozen=True, slots=True)
class Intervals:
    """Inputs of n grid intervals, head first, fp32, zero where no token is.

    x (n, nheads, grid, headdim), B (n, ngroups, grid, dstate), dt (n, nheads, grid).
    """

    x: torch.Tensor
    B: torch.Tensor
    dt: torch.Tensor
    cumsum: torch.Tensor  # (n, nheads, grid): running sum of dt * A

    @classmethod
    def of(cls, x: torch.Tensor, B: torch.Tensor, dt: torch.Tensor, A: torch.Tensor) -> Intervals:
        """From token-first tensors: x (n, grid, nheads, headdim), B (n, grid, ngroups, dstate), dt
        (n, grid, nheads)."""
        dt = dt.transpose(1, 2).contiguous()
        return cls(
            x=x.float().transpose(1, 2).contiguous(),
            B=B.float().transpose(1, 2).contiguous(),
            dt=dt,
            cumsum=torch.cumsum(dt * A[:, None], dim=-1),
        )


def process_dt(dt: torch.Tensor, params: SsmLayerParams) -> torch.Tensor:
    """dt (num_rows, nheads) raw, any float dtype -> fp32 after bias, softplus and clamp."""
    # Contiguous, because torch evaluates strided and packed elements with different code for exp.
    processed = dt.float().contiguous()
    if params.dt_bias is not None:
        processed = processed + params.dt_bias
    if params.dt_softplus:
        processed = softplus(processed)
    return processed.clamp(*params.dt_limit)


def evaluate_rows(
    intervals: Intervals,
    C: torch.Tensor,
    row_idx: torch.Tensor,
    states: torch.Tensor,
    D: torch.Tensor | None,
) -> torch.Tensor:
    """Outputs of some rows of each interval.

    C (n, ngroups, rows, dstate) fp32; row_idx (n, rows) int64, a row's place in its interval;
    states (n, nheads, headdim, dstate) fp32 at the interval's start. rows >= MIN_ROWS.
    Returns (n, nheads, rows, headdim) fp32.
    """
    n, nheads, grid, headdim = intervals.x.shape
    ngroups, rows, dstate = C.shape[1:]
    per_group = nheads // ngroups

    C = C.contiguous()
    CB = torch.bmm(
        C.view(n * ngroups, rows, dstate), intervals.B.view(n * ngroups, grid, dstate).mT
    ).view(n, ngroups, 1, rows, grid)

    index = row_idx[:, None, :].expand(n, nheads, rows)
    c_rows = intervals.cumsum.gather(2, index)  # (n, nheads, rows)
    x_rows = intervals.x.gather(2, index[..., None].expand(n, nheads, rows, headdim))
    later = torch.arange(grid, device=C.device) > row_idx[:, None, :, None]  # (n, 1, rows, grid)
    log_decay = c_rows[..., None] - intervals.cumsum[:, :, None, :]
    decay = torch.exp(log_decay.masked_fill_(later, -torch.inf))

    weights = CB * decay.view(n, ngroups, per_group, rows, grid)
    weights = weights.view(n, nheads, rows, grid) * intervals.dt[:, :, None, :]
    within = torch.bmm(
        weights.view(n * nheads, rows, grid), intervals.x.view(n * nheads, grid, headdim)
    )
    C_heads = C[:, :, None].expand(n, ngroups, per_group, rows, dstate).reshape(-1, rows, dstate)
    before = torch.bmm(C_heads, states.reshape(n * nheads, headdim, dstate).mT)
    y = before.view(n, nheads, rows, headdim) * torch.exp(c_rows)[..., None]
    y += within.view(n, nheads, rows, headdim)
    if D is not None:
        y += D[:, None, None] * x_rows
    return y


def fold_inputs(intervals: Intervals) -> tuple[torch.Tensor, torch.Tensor]:
    """What a full interval adds to its state, and what remains of the state it began with.

    Returns (n, nheads, headdim, dstate) and the decay (n, nheads), both fp32.
    """
    n, nheads, grid, headdim = intervals.x.shape
    ngroups, dstate = intervals.B.shape[1], intervals.B.shape[3]
    last = intervals.cumsum[:, :, -1]
    weights = torch.exp(last[..., None] - intervals.cumsum) * intervals.dt  # (n, nheads, grid)
    weighted = (intervals.x * weights[..., None]).view(n * nheads, grid, headdim)
    B_heads = (
        intervals.B[:, :, None]
        .expand(n, ngroups, nheads // ngroups, grid, dstate)
        .reshape(n * nheads, grid, dstate)
    )
    added = torch.bmm(weighted.mT, B_heads).view(n, nheads, headdim, dstate)
    return added, torch.exp(last)


def next_states(states: torch.Tensor, added: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """S' of each interval: states and added (.., nheads, headdim, dstate), decay (.., nheads)."""
    return states * decay[..., None, None] + added
