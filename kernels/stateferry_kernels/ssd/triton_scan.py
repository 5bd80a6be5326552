# mypy: allow-untyped-calls
"""Launches of the chunk scan's own forms: see triton_scan_kernels.py."""

from __future__ import annotations

import math
from typing import Any

import torch

from stateferry_kernels.layer_state import LayerState, SsmLayerParams
from stateferry_kernels.ssd.triton_scan_kernels import (
    outputs_kernel,
    starts_kernel,
)
from stateferry_kernels.ssd.triton_scan_tiles import SplitTile, scan_tile
from stateferry_kernels.ssd.triton_tiles import grid_form_tile
from stateferry_kernels.ssd.triton_walk import (
    Batch,
    Walks,
    launch_decays,
    launch_walks,
    state_block,
)
from stateferry_kernels.triton_inputs import dot_dtype


def launch_scan(
    walks: Walks,
    batch: Batch,
    params: SsmLayerParams,
    state: LayerState,
    tile: SplitTile | None = None,
) -> torch.Tensor:
    """What ``launch_walks`` does, for walks of consecutive rows each; the same bits, sooner.

    tile: the form; looked up when it is None. Scratch memory of the split form, given back when the
    kernels are queued: num_intervals * nheads * headdim * dstate elements of the products' dtype.
    """
    _, nheads, headdim, dstate = state.ssm_state.shape
    size = dot_dtype(state.tail_x.dtype).primitive_bitwidth // 8
    work = len(walks.walks) * nheads
    tile = tile or scan_tile(size, headdim, dstate, state.grid, nheads // _ngroups(state), work)
    if tile is None:
        return launch_walks(walks, batch, params, state)
    tile.check_covers(headdim)
    block_tokens = grid_form_tile(size, headdim, dstate, state.grid, walks.rows, work).block_tokens
    if block_tokens < state.grid:
        raise ValueError(f"a grid of {state.grid} does not fit in blocks of {block_tokens} tokens")
    dt, cumsum = launch_decays(walks, batch, params, state, block_tokens)
    sizes = {
        "NHEADS": nheads,
        "HEADDIM": headdim,
        "DSTATE": dstate,
        "PER_GROUP": nheads // _ngroups(state),
        "GRID": state.grid,
        "NUM_COLUMNS": walks.intervals.shape[1],
        "DOT": dot_dtype(state.tail_x.dtype),
        "BLOCK_T": block_tokens,
    }
    _split(walks, batch, params, state, dt, cumsum, tile, sizes)
    return dt


def _split(
    walks: Walks,
    batch: Batch,
    params: SsmLayerParams,
    state: LayerState,
    dt: torch.Tensor,
    cumsum: torch.Tensor,
    tile: SplitTile,
    sizes: dict[str, Any],
) -> None:
    nheads, headdim, dstate = (sizes[name] for name in ("NHEADS", "HEADDIM", "DSTATE"))
    num_intervals = len(walks.intervals)
    dtype = torch.bfloat16 if sizes["DOT"].primitive_bitwidth == 16 else torch.float32
    sizes["DIRECT"] = dtype == state.ssm_state.dtype
    starts = torch.empty(
        (num_intervals, nheads, headdim, dstate), dtype=dtype, device=batch.x.device
    )
    blocks = math.ceil(headdim / tile.starts_headdim) * math.ceil(dstate / tile.starts_dstate)
    starts_kernel[(len(walks.walks) * nheads * blocks,)](
        batch.x,
        batch.B,
        state.tail_x,
        state.tail_B,
        state.ssm_state,
        starts,
        dt,
        cumsum,
        walks.walks,
        walks.intervals,
        batch.x.stride(0),
        batch.B.stride(0),
        state.tail_x.stride(0),
        state.tail_B.stride(0),
        state.ssm_state.stride(0),
        **sizes,
        BLOCK_P=tile.starts_headdim,
        BLOCK_N=tile.starts_dstate,
        num_warps=tile.starts_warps,
        num_stages=tile.starts_stages,
    )
    row_blocks = math.ceil(state.grid / tile.block_rows)
    blocks = row_blocks * (1 if tile.rest else math.ceil(headdim / tile.block_headdim))
    tensors = (batch.x, batch.B, batch.C, batch.z, batch.out)
    outputs_kernel[(num_intervals * (nheads // tile.heads) * blocks,)](
        *tensors,
        params.D,
        state.tail_x,
        state.tail_B,
        state.ssm_state,
        starts,
        dt,
        cumsum,
        walks.intervals,
        *(0 if tensor is None else tensor.stride(0) for tensor in tensors),
        state.tail_x.stride(0),
        state.tail_B.stride(0),
        state.ssm_state.stride(0),
        **sizes,
        HEADS=tile.heads,
        BLOCK_P=tile.block_headdim,
        REST_P=tile.rest,
        BLOCK_N=state_block(dstate),
        BLOCK_R=tile.block_rows,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _ngroups(state: LayerState) -> int:
    return state.tail_B.shape[2]
