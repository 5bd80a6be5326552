"""The definitions of decode row and commit: replay the tail, one token after the other."""

from __future__ import annotations

import math

import torch

from stateferry_kernels.layer_state import SsmLayerParams
from stateferry_kernels.ssd.reference import process_dt_reference, ssd_reference


def commit_reference(
    ssm_state: torch.Tensor,
    tail_x: torch.Tensor,
    tail_dt: torch.Tensor,
    tail_B: torch.Tensor,
    params: SsmLayerParams,
) -> torch.Tensor:
    """The state after the tail: ssm_state (nheads, headdim, dstate), tail_x (rows, nheads,
    headdim), tail_dt (rows, nheads) already processed, tail_B (rows, ngroups, dstate); one float
    dtype. A tail of no rows gives the state back."""
    _, state, _ = ssd_reference(
        tail_x,
        tail_dt,
        params.A.to(tail_x.dtype),
        tail_B,
        torch.zeros_like(tail_B),
        dt_limit=(-math.inf, math.inf),
        initial_state=ssm_state,
    )
    return state


def decode_row_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    ssm_state: torch.Tensor,
    params: SsmLayerParams,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of one sequence: x (nheads, headdim), dt (nheads,) raw, B and C (ngroups, dstate),
    ssm_state as of the token before. Returns y like x and the processed dt."""

    def alike(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(x.dtype)

    bias = alike(params.dt_bias)
    y, _, _ = ssd_reference(
        x[None],
        dt[None],
        params.A.to(x.dtype),
        B[None],
        C[None],
        D=alike(params.D),
        dt_bias=bias,
        dt_softplus=params.dt_softplus,
        dt_limit=params.dt_limit,
        initial_state=ssm_state,
    )
    return y[0], process_dt_reference(dt, bias, params.dt_softplus, params.dt_limit)
