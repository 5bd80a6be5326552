# mypy: allow-untyped-calls
"""Walks through grid intervals: their tables, and the launch that all operations share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch

from stateferry_kernels.device_tables import device_table
from stateferry_kernels.layer_state import PAD_SLOT, LayerState, SsmLayerParams
from stateferry_kernels.ssd.triton_kernels import decay_kernel, walk_kernel
from stateferry_kernels.ssd.triton_tiles import grid_form_tile
from stateferry_kernels.triton_inputs import dot_dtype, is_packed, packed

CARRY_ON = -1
_DECAY_HEADS = 16


@dataclass(frozen=True, slots=True)
class Interval:
    """Entries of one grid interval. The order of the fields is the table's.

    Entries ``[0, old_rows)`` are rows of the tail page; those up to ``count`` are rows
    ``first, first + 1, ..`` of the batch or, with paths, rows ``paths[first], ..``.
    """

    state_slot: int  # of the state it begins with, or CARRY_ON from the interval before
    tail_page: int
    old_rows: int
    first: int
    count: int
    first_row: int  # the first entry to evaluate; all after it are, too
    boundary_slot: int = PAD_SLOT  # where the state at its end goes
    folds: bool = False  # whether the walk's state moves on to its end


class Walks(NamedTuple):
    """Device tables, int64."""

    walks: torch.Tensor  # (num_walks, 2): first interval, and the one after the last
    intervals: torch.Tensor  # (num_intervals, fields of Interval)
    paths: torch.Tensor | None  # rows of the batch
    folds: bool  # whether any interval does
    rows: int  # that an interval evaluates, at most


def walk_tables(
    walks: Sequence[Sequence[Interval]], paths: Sequence[int] | None, device: torch.device
) -> Walks:
    bounds: list[tuple[int, int]] = []
    rows: list[list[int]] = []
    for walk in walks:
        bounds.append((len(rows), len(rows) + len(walk)))
        rows += [[int(value) for value in astuple(interval)] for interval in walk]
    return Walks(
        walks=device_table(bounds, 2, device),
        intervals=device_table(rows, len(Interval.__dataclass_fields__), device),
        paths=None if paths is None else device_table([paths], len(paths), device),
        folds=any(interval.folds for walk in walks for interval in walk),
        rows=max((i.count - i.first_row for walk in walks for i in walk), default=0),
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """New rows: x, z, out (num_rows, nheads, headdim), dt (num_rows, nheads) raw, B and C
    (num_rows, ngroups, dstate); each row of heads or groups is contiguous."""

    x: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    z: torch.Tensor | None
    out: torch.Tensor

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        z: torch.Tensor | None,
        out: torch.Tensor,
    ) -> Batch:
        """Rows that are not contiguous are copied first; ``out`` has to be (ValueError)."""
        if not is_packed(out):
            raise ValueError("out: a row of heads must be contiguous")
        return cls(packed(x), dt, packed(B), packed(C), None if z is None else packed(z), out)


def launch_decays(
    walks: Walks,
    batch: Batch | None,
    params: SsmLayerParams,
    state: LayerState,
    block_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each interval's processed dt and the running sum of dt A, both (num_intervals, nheads, grid)
    fp32; dt is zero where an interval has no entry."""
    nheads, num_intervals = state.ssm_state.shape[1], len(walks.intervals)
    size = (2, num_intervals, nheads, state.grid)
    dt, cumsum = torch.empty(size, dtype=torch.float32, device=state.ssm_state.device).unbind()
    decay_kernel[(num_intervals * math.ceil(nheads / _DECAY_HEADS),)](
        None if batch is None else batch.dt,
        params.dt_bias,
        params.A,
        state.tail_dt,
        walks.intervals,
        walks.paths,
        dt,
        cumsum,
        *((0, 0) if batch is None else batch.dt.stride()),
        state.tail_dt.stride(0),
        *params.dt_limit,
        NHEADS=nheads,
        GRID=state.grid,
        NUM_COLUMNS=walks.intervals.shape[1],
        SOFTPLUS=params.dt_softplus,
        BLOCK_H=_DECAY_HEADS,
        BLOCK_T=block_tokens,
    )
    return dt, cumsum


def launch_walks(
    walks: Walks, batch: Batch | None, params: SsmLayerParams, state: LayerState
) -> torch.Tensor:
    """Evaluate the intervals' rows into ``batch.out`` and write their boundaries to ssm_state.

    Returns processed dt as ``launch_decays``.
    """
    _, nheads, headdim, dstate = state.ssm_state.shape
    grid, ngroups = state.grid, state.tail_B.shape[2]
    products = dot_dtype(state.tail_x.dtype)
    work = len(walks.walks) * nheads
    tile = grid_form_tile(products.primitive_bitwidth // 8, headdim, dstate, grid, walks.rows, work)
    dt, cumsum = launch_decays(walks, batch, params, state, tile.block_tokens)
    tensors = (None,) * 5 if batch is None else (batch.x, batch.B, batch.C, batch.z, batch.out)
    walk_kernel[(len(walks.walks) * nheads * math.ceil(headdim / tile.block_headdim),)](
        *tensors,
        params.D,
        state.tail_x,
        state.tail_B,
        state.ssm_state,
        dt,
        cumsum,
        walks.walks,
        walks.intervals,
        walks.paths,
        *(0 if tensor is None else tensor.stride(0) for tensor in tensors),
        state.tail_x.stride(0),
        state.tail_B.stride(0),
        state.ssm_state.stride(0),
        NHEADS=nheads,
        HEADDIM=headdim,
        DSTATE=dstate,
        PER_GROUP=nheads // ngroups,
        GRID=grid,
        NUM_COLUMNS=walks.intervals.shape[1],
        FOLDS=walks.folds,
        DOT=products,
        BLOCK_P=tile.block_headdim,
        BLOCK_N=state_block(dstate),
        BLOCK_T=tile.block_tokens,
        BLOCK_R=tile.block_rows,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dt


def state_block(dstate: int) -> int:
    """The block that covers a row of the state: what products take, at least."""
    return max(16, 1 << (dstate - 1).bit_length())
