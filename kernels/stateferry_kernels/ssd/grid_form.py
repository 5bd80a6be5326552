"""One grid interval, in torch operations: the sum that prefill, decode and commit all evaluate.

For an interval that starts with state S, c being the running sum of dt * A from its start,

    y_t = C_t . (exp(c_t) S) + sum over s <= t of (C_t . B_s) exp(c_t - c_s) dt_s x_s + D x_t
    S'  = exp(c_L) S + sum over s of exp(c_L - c_s) dt_s x_s B_s

A token's bits must not depend on which of the three asks. So the interval is always padded to the
full grid (with dt = 0 and x = 0, which adds exact zeros), every operand has the same layout, and
matrix products run over whole tiles of rows (row_tile.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry_kernels.elementwise import softplus
from stateferry_kernels.layer_state import SsmLayerParams
from stateferry_kernels.row_tile import bmm_rows


@dataclass(frozen=True, slots=True)
class Intervals:
    """Inputs of n grid intervals, head first, fp32, contiguous, zero where no token is.

    x (n, nheads, grid, headdim), B (n, ngroups, grid, dstate), dt (n, nheads, grid).
    """

    x: torch.Tensor
    B: torch.Tensor
    dt: torch.Tensor
    cumsum: torch.Tensor  # (n, nheads, grid): running sum of dt * A

    @classmethod
    def of(cls, x: torch.Tensor, B: torch.Tensor, dt: torch.Tensor, A: torch.Tensor) -> Intervals:
        """From head-first tensors of any float dtype and layout, A (nheads,)."""
        dt = dt.contiguous()
        return cls(
            x=x.float().contiguous(),
            B=B.float().contiguous(),
            dt=dt,
            cumsum=torch.cumsum(dt * A[:, None], dim=-1),
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of each interval to evaluate, fp32.

    C (n, ngroups, rows, dstate), x (n, nheads, rows, headdim), cumsum (n, nheads, rows); ``later``
    (n or 1, 1, rows, grid) bool marks the interval's tokens that come after a row.
    """

    C: torch.Tensor
    x: torch.Tensor
    cumsum: torch.Tensor
    later: torch.Tensor


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
    intervals: Intervals, rows: Rows, states: torch.Tensor, D: torch.Tensor | None
) -> torch.Tensor:
    """Outputs of some rows of each interval, (n, nheads, rows, headdim) fp32.

    states (n, nheads, headdim, dstate), contiguous: those at the intervals' starts.
    """
    n, nheads, grid, headdim = intervals.x.shape
    ngroups, num_rows, dstate = rows.C.shape[1:]
    per_group = nheads // ngroups
    C = rows.C.reshape(n * ngroups, num_rows, dstate)

    CB = bmm_rows(C, intervals.B.view(n * ngroups, grid, dstate).mT)
    log_decay = rows.cumsum[..., None] - intervals.cumsum[:, :, None, :]
    # Masked after exp, which takes three times as long over infinities.
    decay = torch.exp(log_decay).masked_fill_(rows.later, 0)
    weights = CB.view(n, ngroups, 1, num_rows, grid) * decay.view(
        n, ngroups, per_group, num_rows, grid
    )
    weights = weights.view(n, nheads, num_rows, grid) * intervals.dt[:, :, None, :]
    within = bmm_rows(
        weights.view(n * nheads, num_rows, grid), intervals.x.view(n * nheads, grid, headdim)
    )

    # All heads of a group share C, so their states are the columns of one product.
    before = bmm_rows(C, states.float().view(n * ngroups, per_group * headdim, dstate).mT)
    before = before.view(n, ngroups, num_rows, per_group, headdim).transpose(2, 3)
    grown = torch.exp(rows.cumsum.contiguous()).view(n, ngroups, per_group, num_rows, 1)
    y = within.view(n, ngroups, per_group, num_rows, headdim)
    y += before * grown
    y = y.view(n, nheads, num_rows, headdim)
    if D is not None:
        y += D[:, None, None] * rows.x
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
    added = bmm_rows(weighted.mT, B_heads).view(n, nheads, headdim, dstate)
    return added, torch.exp(last.contiguous())


def next_states(states: torch.Tensor, added: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """S' of each interval in the dtype that states are kept in: states and added
    (.., nheads, headdim, dstate), decay (.., nheads)."""
    return (states.float() * decay[..., None, None] + added).to(states.dtype)
