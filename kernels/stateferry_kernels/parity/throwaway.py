"""Pools that live for one call, so that entries with tensors of their own can use the kernels."""

from __future__ import annotations

from functools import cache

import torch

from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.layer_state import ZERO_SLOT, LayerState
from stateferry_kernels.operations import Kernels


@cache
def default_kernels(device_type: str) -> Kernels:
    """What the entries run on when the caller names no backend: the best for tensors of that
    device, chosen once."""
    return select_kernels(device=device_type)


def scan_state(
    x: torch.Tensor, B: torch.Tensor, num_slots: int, num_pages: int, grid: int, zero_tails: bool
) -> LayerState:
    """Pools for a scan of x (total_tokens, nheads, headdim) and B (total_tokens, ngroups, dstate):
    fp32 states, slot ZERO_SLOT zero, nothing else initialised but, on request, the tails.

    There is no convolution here, so its window is one column, and its pages are one page.
    """
    nheads, headdim = x.shape[1:]
    ngroups, dstate = B.shape[1:]
    conv_dim = nheads * headdim + 2 * ngroups * dstate
    new = x.new_zeros if zero_tails else x.new_empty
    ssm_state = x.new_empty((num_slots, nheads, headdim, dstate), dtype=torch.float32)
    ssm_state[ZERO_SLOT] = 0
    return LayerState(
        ssm_state=ssm_state,
        conv_state=x.new_empty((num_slots, conv_dim, 1)),
        tail_xBC=x.new_empty((1, grid, conv_dim)).expand(num_pages, -1, -1),
        tail_x=new((num_pages, grid, nheads, headdim)),
        tail_B=new((num_pages, grid, ngroups, dstate)),
        tail_dt=new((num_pages, grid, nheads), dtype=torch.float32),
    )


def conv_state(
    xBC: torch.Tensor, num_slots: int, num_pages: int, grid: int, window: int
) -> LayerState:
    """Pools for a convolution of xBC (total_tokens, conv_dim): slot ZERO_SLOT zero, nothing else
    initialised. There is no recurrence here: one head of conv_dim channels, without a state."""
    conv_dim = xBC.shape[1]
    columns = xBC.new_empty((num_slots, conv_dim, window))
    columns[ZERO_SLOT] = 0
    return LayerState(
        ssm_state=xBC.new_empty((num_slots, 1, conv_dim, 0), dtype=torch.float32),
        conv_state=columns,
        tail_xBC=xBC.new_empty((num_pages, grid, conv_dim)),
        tail_x=xBC.new_empty((1, grid, 1, conv_dim)).expand(num_pages, -1, -1, -1),
        tail_B=xBC.new_empty((num_pages, grid, 1, 0)),
        tail_dt=xBC.new_empty((num_pages, grid, 1), dtype=torch.float32),
    )
