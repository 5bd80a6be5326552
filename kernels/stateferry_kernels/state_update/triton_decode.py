# mypy: allow-untyped-calls
"""Launches of the decode row's two kernels: see triton_decode_kernels.py."""

from __future__ import annotations

import math

import torch

from stateferry_kernels.layer_state import LayerState, SsmLayerParams
from stateferry_kernels.ssd.triton_tiles import GridFormTile, row_tile
from stateferry_kernels.ssd.triton_walk import Batch, state_block
from stateferry_kernels.state_update.triton_decode_kernels import (
    decode_rows_kernel,
    decode_weights_kernel,
)
from stateferry_kernels.triton_inputs import dot_dtype

# As many as a program of decay_kernel takes: one shape of product, one order of its sums.
_HEADS = 16


def decode_tile(state: LayerState, num_rows: int) -> GridFormTile | None:
    """The tile of the kernels that evaluate num_rows of an interval at most; None where an interval
    does not fit in a block of tokens, so that only the walk of the grid form computes it."""
    _, _, headdim, dstate = state.ssm_state.shape
    size = dot_dtype(state.tail_x.dtype).primitive_bitwidth // 8
    tile = row_tile(size, headdim, dstate, state.grid, num_rows)
    return tile if tile.block_tokens >= state.grid else None


def launch_decode(
    rows: torch.Tensor,
    batch: Batch,
    params: SsmLayerParams,
    state: LayerState,
    tile: GridFormTile,
) -> None:
    """Evaluate one row of the batch per sequence into ``batch.out`` and append it to its tail's x,
    B and dt. rows: (num_rows, 4) int64 of row in the batch, state slot, tail page, tail row."""
    _, nheads, headdim, dstate = state.ssm_state.shape
    ngroups, device = state.tail_B.shape[2], rows.device
    products = dot_dtype(state.tail_x.dtype)
    dtype = torch.bfloat16 if products.primitive_bitwidth == 16 else torch.float32
    weights = torch.empty((len(rows), nheads, state.grid), dtype=dtype, device=device)
    growth = torch.empty((len(rows), nheads), dtype=torch.float32, device=device)
    sizes = {
        "NHEADS": nheads,
        "DSTATE": dstate,
        "PER_GROUP": nheads // ngroups,
        "GRID": state.grid,
        "DOT": products,
        "BLOCK_N": state_block(dstate),
        "BLOCK_T": tile.block_tokens,
    }
    head_blocks = ngroups * math.ceil(nheads // ngroups / _HEADS)
    decode_weights_kernel[(len(rows) * head_blocks,)](
        batch.dt,
        batch.B,
        batch.C,
        params.A,
        params.dt_bias,
        state.tail_B,
        state.tail_dt,
        rows,
        weights,
        growth,
        *batch.dt.stride(),
        batch.B.stride(0),
        batch.C.stride(0),
        state.tail_B.stride(0),
        state.tail_dt.stride(0),
        *params.dt_limit,
        SOFTPLUS=params.dt_softplus,
        BLOCK_H=_HEADS,
        num_warps=4,
        **sizes,
    )
    decode_rows_kernel[(len(rows) * nheads * math.ceil(headdim / tile.block_headdim),)](
        batch.x,
        batch.C,
        batch.z,
        batch.out,
        params.D,
        state.tail_x,
        state.ssm_state,
        rows,
        weights,
        growth,
        batch.x.stride(0),
        batch.C.stride(0),
        0 if batch.z is None else batch.z.stride(0),
        batch.out.stride(0),
        state.tail_x.stride(0),
        state.ssm_state.stride(0),
        HEADDIM=headdim,
        BLOCK_P=tile.block_headdim,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **sizes,
    )
