# mypy: allow-untyped-calls
"""Launches of a verification's kernels: see triton_verify_kernels.py."""

from __future__ import annotations

import math

import torch

from stateferry_kernels.layer_state import DraftRows, LayerState, SsmLayerParams
from stateferry_kernels.ssd.triton_tiles import GridFormTile, covering_block
from stateferry_kernels.ssd.triton_walk import Batch, state_block
from stateferry_kernels.state_update.triton_tables import DraftTables
from stateferry_kernels.state_update.triton_verify_kernels import (
    verify_folds_kernel,
    verify_rows_kernel,
    verify_weights_kernel,
)
from stateferry_kernels.triton_inputs import dot_dtype

# As many as a program of decay_kernel takes: one shape of product, one order of its sums.
_HEADS = 16
# Rows that fit in a block of 32 wherever in the 16 before it they begin.
_SURE_ROWS = 17


def launch_verify(
    tables: DraftTables,
    batch: Batch,
    params: SsmLayerParams,
    state: LayerState,
    drafts: DraftRows,
    tile: GridFormTile,
) -> None:
    """Evaluate the drafts' rows into ``batch.out`` and leave their x, B and dt in ``drafts``."""
    _, nheads, headdim, dstate = state.ssm_state.shape
    ngroups, device = state.tail_B.shape[2], state.ssm_state.device
    walks = tables.walks
    num_rows, num_intervals = len(batch.x), len(walks.intervals)
    products = dot_dtype(state.tail_x.dtype)
    dtype = torch.bfloat16 if products.primitive_bitwidth == 16 else torch.float32
    weights = torch.empty((num_rows, nheads, state.grid), dtype=dtype, device=device)
    growth = torch.empty((num_rows, nheads), dtype=torch.float32, device=device)
    num_folds = len(tables.ends)
    folds = torch.empty((num_folds, nheads, headdim, dstate), dtype=dtype, device=device)
    size = (num_folds, nheads, state.grid)
    fold_weights = torch.empty(size, dtype=torch.float32, device=device)
    fold_growth = torch.empty(size[:2], dtype=torch.float32, device=device)
    sizes = {
        "NHEADS": nheads,
        "DSTATE": dstate,
        "PER_GROUP": nheads // ngroups,
        "GRID": state.grid,
        "NUM_COLUMNS": walks.intervals.shape[1],
        "DOT": products,
        "BLOCK_N": state_block(dstate),
        "BLOCK_T": tile.block_tokens,
    }
    head_blocks = ngroups * math.ceil(nheads // ngroups / _HEADS)
    verify_weights_kernel[(num_intervals * head_blocks,)](
        batch.dt,
        batch.B,
        batch.C,
        params.A,
        params.dt_bias,
        state.tail_B,
        state.tail_dt,
        drafts.B,
        drafts.dt,
        walks.intervals,
        walks.paths,
        tables.places,
        weights,
        growth,
        fold_weights,
        fold_growth,
        *batch.dt.stride(),
        batch.B.stride(0),
        batch.C.stride(0),
        state.tail_B.stride(0),
        state.tail_dt.stride(0),
        drafts.B.stride(0),
        drafts.dt.stride(0),
        *params.dt_limit,
        SOFTPLUS=params.dt_softplus,
        BLOCK_H=_HEADS,
        # Four of them have too few registers for the products of rows of 256.
        num_warps=4 if dstate <= 128 else 8,
        **sizes,
    )
    if num_folds:
        block_headdim = fold_block(headdim, dstate)
        verify_folds_kernel[(num_folds * nheads * math.ceil(headdim / block_headdim),)](
            batch.x,
            batch.B,
            state.tail_x,
            state.tail_B,
            state.ssm_state,
            folds,
            walks.intervals,
            walks.paths,
            tables.ends,
            fold_weights,
            fold_growth,
            batch.x.stride(0),
            batch.B.stride(0),
            state.tail_x.stride(0),
            state.tail_B.stride(0),
            state.ssm_state.stride(0),
            HEADDIM=headdim,
            BLOCK_P=block_headdim,
            num_warps=4,
            num_stages=1,
            **sizes,
        )
    more = walks.rows > _SURE_ROWS
    block_headdim = rows_block(tile, dstate, more, tables.carries)
    verify_rows_kernel[(len(walks.walks) * nheads * math.ceil(headdim / block_headdim),)](
        batch.x,
        batch.C,
        batch.z,
        batch.out,
        params.D,
        state.tail_x,
        drafts.x,
        state.ssm_state,
        walks.walks,
        walks.intervals,
        walks.paths,
        tables.places,
        weights,
        growth,
        folds,
        batch.x.stride(0),
        batch.C.stride(0),
        0 if batch.z is None else batch.z.stride(0),
        batch.out.stride(0),
        state.tail_x.stride(0),
        drafts.x.stride(0),
        state.ssm_state.stride(0),
        BLOCK_R=16 if walks.rows == 1 else 32,
        MORE=more,
        CARRIES=tables.carries,
        num_warps=tile.num_warps,
        HEADDIM=headdim,
        BLOCK_P=block_headdim,
        num_stages=tile.num_stages,
        **sizes,
    )


def rows_block(tile: GridFormTile, dstate: int, more: bool, carries: bool) -> int:
    """Of headdim, in a program that evaluates rows: with rows of 256 there are registers for less
    where it keeps the state for a next interval, or entries for a next block of rows."""
    parts = 1 if dstate <= 128 else 2 ** (more + carries)
    return max(16, tile.block_headdim // parts)


def fold_block(headdim: int, dstate: int) -> int:
    """Of headdim, in a program that folds: as large as registers for it and for what is added."""
    return max(16, min(covering_block(headdim), 8192 // state_block(dstate)))
