# mypy: allow-untyped-calls
"""Launches that move rows: what a batch leaves in pages, what an accepted draft moves to tails."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from stateferry_kernels.layer_state import DraftRows, LayerState
from stateferry_kernels.state_update.triton_kernels import (
    conv_window_kernel,
    leave_rows_kernel,
    move_rows_kernel,
)

if TYPE_CHECKING:
    from stateferry_kernels.ssd.triton_walk import Batch

_BLOCK = 1024
_CHANNELS = 256


def leave_rows(
    table: torch.Tensor,
    batch: Batch,
    processed_dt: torch.Tensor,
    to_x: torch.Tensor,
    to_B: torch.Tensor,
    to_dt: torch.Tensor,
) -> None:
    """Write a batch's rows to pages: table (num_rows, 4) int64 of row in the batch, row of
    processed_dt (num_intervals, nheads, grid) counted through all intervals, page, row in it."""
    if not len(table):
        return
    nheads = to_dt.shape[2]
    x_size, B_size = to_x.shape[2:].numel(), to_B.shape[2:].numel()
    leave_rows_kernel[(len(table) * math.ceil(max(x_size, B_size, nheads) / _BLOCK),)](
        batch.x,
        batch.B,
        processed_dt,
        to_x,
        to_B,
        to_dt,
        table,
        batch.x.stride(0),
        batch.B.stride(0),
        to_x.stride(0),
        to_B.stride(0),
        to_dt.stride(0),
        X=x_size,
        B=B_size,
        NHEADS=nheads,
        GRID=processed_dt.shape[2],
        BLOCK=_BLOCK,
    )


def move_rows(table: torch.Tensor, drafts: DraftRows, state: LayerState) -> None:
    """Rows of draft pages to rows of tails: table (num_rows, 4) int64 of page, row, page, row."""
    if not len(table):
        return
    for source, target in (
        (drafts.xBC, state.tail_xBC),
        (drafts.x, state.tail_x),
        (drafts.B, state.tail_B),
        (drafts.dt, state.tail_dt),
    ):
        size = target.shape[2:].numel()
        move_rows_kernel[(len(table) * math.ceil(size / _BLOCK),)](
            source, target, table, source.stride(0), target.stride(0), SIZE=size, BLOCK=_BLOCK
        )


def write_conv_windows(table: torch.Tensor, state: LayerState) -> None:
    """conv_state of each commit: table (num_commits, 4) int64 of source slot, target slot, page,
    rows."""
    conv_dim, window = state.conv_state.shape[1:]
    if not window:
        return
    conv_window_kernel[(len(table) * math.ceil(conv_dim / _CHANNELS),)](
        state.conv_state,
        state.tail_xBC,
        table,
        state.conv_state.stride(0),
        state.tail_xBC.stride(0),
        CONV_DIM=conv_dim,
        WINDOW=window,
        BLOCK=_CHANNELS,
        num_warps=1,
    )
