# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Draft rows of the grid form in kernels of their own, as decode rows have them.

All take the intervals of draft_tables: a path of a draft is an interval, two where it passes the
grid, and evaluates those of its rows that no path before it has. The first kernel does once for an
interval what its heads share: C . B, dt and its running sum, and from them the weight with which
each entry enters each row of each head. The second, for paths that pass the grid, leaves the state
there in scratch memory. The third reads a state once for all paths of a draft, and each path's x.
An entry has the place in a tile that it has for every other operation, so the bits are the walk's.
The first and the last also write their part of the new rows to the drafts, which nobody reads here.

Bytes between them: nheads * grid weights a draft row, and for each state that is folded
nheads * headdim * dstate, all in the products' dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stateferry_kernels.ssd.triton_kernels import (
    _added_by,
    _batch_rows,
    _entries,
    _fields,
    _processed,
    _running_sum,
)
from stateferry_kernels.triton_math import exp2, round_to, silu

# The fewest rows that a product takes.
_ROWS = tl.constexpr(16)


@triton.jit
def verify_weights_kernel(
    dt_ptr,
    B_ptr,
    C_ptr,
    A_ptr,
    bias_ptr,
    tail_B_ptr,
    tail_dt_ptr,
    draft_B_ptr,
    draft_dt_ptr,
    intervals_ptr,
    paths_ptr,
    places_ptr,
    weights_ptr,
    growth_ptr,
    fold_weights_ptr,
    fold_growth_ptr,
    dt_stride_row,
    dt_stride_head,
    B_stride,
    C_stride,
    tail_B_stride,
    tail_dt_stride,
    draft_B_stride,
    draft_dt_stride,
    dt_low,
    dt_high,
    NHEADS: tl.constexpr,
    DSTATE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GRID: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One interval and block of a group's heads: weights (num_rows, NHEADS, GRID) in DOT, growth
    (num_rows, NHEADS) fp32, what the state at the grid point has become; for intervals that fold,
    what their entries and the state before them add to the next state, fold_weights (num_folds,
    NHEADS, GRID) and fold_growth (num_folds, NHEADS), fp32. An interval of no entries is
    padding."""
    H_BLOCKS: tl.constexpr = (PER_GROUP + BLOCK_H - 1) // BLOCK_H
    GROUPS: tl.constexpr = NHEADS // PER_GROUP
    B_SIZE: tl.constexpr = GROUPS * DSTATE
    program = tl.program_id(0)
    interval = (program // (H_BLOCKS * GROUPS)).to(tl.int64)
    of_group = program // H_BLOCKS % GROUPS
    in_group = program % H_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    head = of_group * PER_GROUP + in_group
    in_heads = in_group < PER_GROUP
    entry = intervals_ptr + interval * NUM_COLUMNS
    _, page, old_rows, first, count, first_row, _, _ = _fields(entry)
    if count == 0:
        return
    k = tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    in_n = n < DSTATE
    group = of_group * DSTATE + n

    is_new = (k >= old_rows) & (k < count)
    rows = _batch_rows(paths_ptr, first, k - old_rows, is_new)
    tail_dt = tail_dt_ptr + page * tail_dt_stride + k[:, None] * NHEADS + head[None, :]
    dt = tl.load(tail_dt, mask=(k < old_rows)[:, None] & in_heads[None, :], other=0.0)
    new = is_new[:, None] & in_heads[None, :]
    raw = dt_ptr + rows[:, None] * dt_stride_row + head[None, :] * dt_stride_head
    raw = tl.load(raw, mask=new, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + head, mask=in_heads, other=0.0)[None, :]
    dt = tl.where(new, _processed(raw, dt_low, dt_high, SOFTPLUS), dt)
    A = tl.load(A_ptr + head, mask=in_heads, other=0.0)
    cumsum = _running_sum(tl.zeros_like(dt), dt, A[None, :], k, k)

    tail_B = tail_B_ptr + page * tail_B_stride
    B = _entries(B_ptr, tail_B, rows, k, old_rows, count, B_stride, B_SIZE, group, in_n, DOT)
    draft, node = tl.load(places_ptr + interval * 4), rows - tl.load(places_ptr + interval * 4 + 1)
    is_fresh = (k >= first_row) & (k < count)
    to_dt = draft_dt_ptr + draft * draft_dt_stride + node[:, None] * NHEADS + head[None, :]
    tl.store(to_dt, dt, mask=is_fresh[:, None] & in_heads[None, :])
    if program % H_BLOCKS == 0:
        to_B = draft_B_ptr + draft * draft_B_stride + node[:, None] * B_SIZE + group[None, :]
        tl.store(to_B, B, mask=is_fresh[:, None] & in_n[None, :])

    for row_begin in range(first_row // _ROWS * _ROWS, count, _ROWS):
        row = row_begin + tl.arange(0, _ROWS)
        is_row = (row >= first_row) & (row < count)
        tokens = _batch_rows(paths_ptr, first, row - old_rows, is_row)
        C_places = C_ptr + tokens[:, None] * C_stride + group[None, :]
        C = tl.load(C_places, mask=is_row[:, None] & in_n[None, :], other=0.0).to(DOT)
        products = tl.dot(C, tl.trans(B), input_precision="ieee")
        for r in range(tl.maximum(row_begin, first_row), tl.minimum(row_begin + _ROWS, count)):
            CB = tl.sum(tl.where((row == r)[:, None], products, 0.0), axis=0)
            row_cumsum = tl.sum(tl.where((k == r)[:, None], cumsum, 0.0), axis=0)
            log_decay = tl.where((k > r)[:, None], -float("inf"), row_cumsum[None, :] - cumsum)
            weights = CB[:, None] * exp2(log_decay) * dt
            of_row = tl.load(paths_ptr + first + r - old_rows) * NHEADS + head
            places = weights_ptr + of_row[None, :] * GRID + k[:, None]
            tl.store(places, weights.to(DOT), mask=(k < GRID)[:, None] & in_heads[None, :])
            tl.store(growth_ptr + of_row, exp2(row_cumsum), mask=in_heads)
    fold = tl.load(places_ptr + interval * 4 + 3)
    if fold >= 0:
        last = tl.sum(tl.where((k == GRID - 1)[:, None], cumsum, 0.0), axis=0)
        of_head = fold * NHEADS + head
        places = fold_weights_ptr + of_head[None, :] * GRID + k[:, None]
        weights = exp2(last[None, :] - cumsum) * dt
        tl.store(places, weights, mask=(k < GRID)[:, None] & in_heads[None, :])
        tl.store(fold_growth_ptr + of_head, exp2(last), mask=in_heads)


@triton.jit
def verify_folds_kernel(
    x_ptr,
    B_ptr,
    tail_x_ptr,
    tail_B_ptr,
    state_ptr,
    folds_ptr,
    intervals_ptr,
    paths_ptr,
    ends_ptr,
    fold_weights_ptr,
    fold_growth_ptr,
    x_stride,
    B_stride,
    tail_x_stride,
    tail_B_stride,
    state_stride,
    NHEADS: tl.constexpr,
    HEADDIM: tl.constexpr,
    DSTATE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GRID: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The state at the end of a full interval, one head and block of headdim: folds (num_folds,
    NHEADS, HEADDIM, DSTATE) in DOT, rounded as a slot would have it first. ends (num_folds, 2)
    int64: interval, or -1 for padding, and the slot of the state that it begins with."""
    NUM_BLOCKS: tl.constexpr = (HEADDIM + BLOCK_P - 1) // BLOCK_P
    X_SIZE: tl.constexpr = NHEADS * HEADDIM
    B_SIZE: tl.constexpr = NHEADS // PER_GROUP * DSTATE
    program = tl.program_id(0)
    fold = (program // (NUM_BLOCKS * NHEADS)).to(tl.int64)
    head = program // NUM_BLOCKS % NHEADS
    p = program % NUM_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_T)
    in_p, in_n = p < HEADDIM, n < DSTATE
    channel = head * HEADDIM + p
    group = head // PER_GROUP * DSTATE + n
    states = channel[:, None] * DSTATE + n[None, :]
    in_state = in_p[:, None] & in_n[None, :]
    interval = tl.load(ends_ptr + fold * 2)
    if interval < 0:
        return
    S = state_ptr + tl.load(ends_ptr + fold * 2 + 1) * state_stride + states
    S = tl.load(S, mask=in_state, other=0.0).to(tl.float32)
    entry = intervals_ptr + interval * NUM_COLUMNS
    _, page, old_rows, first, count, _, _, _ = _fields(entry)
    rows = _batch_rows(paths_ptr, first, k - old_rows, (k >= old_rows) & (k < count))
    tail_x = tail_x_ptr + page * tail_x_stride
    tail_B = tail_B_ptr + page * tail_B_stride
    x = _entries(x_ptr, tail_x, rows, k, old_rows, count, x_stride, X_SIZE, channel, in_p, DOT)
    B = _entries(B_ptr, tail_B, rows, k, old_rows, count, B_stride, B_SIZE, group, in_n, DOT)
    of_head = fold * NHEADS + head
    weights = tl.load(fold_weights_ptr + of_head * GRID + k, mask=k < GRID, other=0.0)
    added = _added_by(tl.zeros_like(S), x, B, weights, DOT)
    S = tl.fma(S, tl.load(fold_growth_ptr + of_head) + tl.zeros_like(S), added)
    S = round_to(S, state_ptr.dtype.element_ty).to(tl.float32)
    to = folds_ptr + fold * (NHEADS * HEADDIM * DSTATE) + states
    tl.store(to, round_to(S, DOT), mask=in_state)


@triton.jit
def _rows_inputs(pointers, strides, columns, extent, row_begin, GRID: tl.constexpr,
    NHEADS: tl.constexpr, DOT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What a block of an interval's rows is evaluated on, beside its entries and the state."""
    x_ptr, C_ptr, z_ptr, weights_ptr, growth_ptr, paths_ptr = pointers
    channel, group, in_p, in_n, head = columns
    old_rows, first, count, first_row = extent
    row = row_begin + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_T)
    is_row = (row >= first_row) & (row < count)
    tokens = _batch_rows(paths_ptr, first, row - old_rows, is_row)
    C = C_ptr + tokens[:, None] * strides[1] + group[None, :]
    C = tl.load(C, mask=is_row[:, None] & in_n[None, :], other=0.0).to(DOT)
    of_head = tokens * NHEADS + head
    weights = weights_ptr + of_head[:, None] * GRID + k[None, :]
    weights = tl.load(weights, mask=is_row[:, None] & (k < GRID)[None, :], other=0.0)
    growth = tl.load(growth_ptr + of_head, mask=is_row, other=0.0)
    mask = is_row[:, None] & in_p[None, :]
    own = x_ptr + tokens[:, None] * strides[0] + channel[None, :]
    own = tl.load(own, mask=mask, other=0.0)
    if z_ptr is not None:
        z = z_ptr + tokens[:, None] * strides[2] + channel[None, :]
        z = tl.load(z, mask=mask, other=0.0)
    else:
        z = own
    return tokens, mask, C, weights, growth, own, z


@triton.jit
def _rows(inputs, to, columns, x, S, D, X_SIZE: tl.constexpr, WITH_D: tl.constexpr,
    WITH_Z: tl.constexpr,
):  # fmt: skip
    """Evaluate a block of rows, and leave their x in the draft."""
    tokens, mask, C, weights, growth, own, z = inputs
    out_ptr, out_stride, draft_x, draft_begin = to
    channel = columns[0]
    y = tl.dot(weights, x, input_precision="ieee")
    before = tl.dot(C, S, input_precision="ieee")
    y = tl.fma(before, tl.broadcast_to(growth[:, None], before.shape), y)
    if WITH_D:
        y = tl.fma(D + tl.zeros_like(y), own.to(tl.float32), y)
    if WITH_Z:
        y *= silu(z.to(tl.float32))
    outs = out_ptr + tokens[:, None] * out_stride + channel[None, :]
    tl.store(outs, round_to(y, out_ptr.dtype.element_ty), mask=mask)
    drafted = draft_x + (tokens - draft_begin)[:, None] * X_SIZE + channel[None, :]
    tl.store(drafted, own, mask=mask)


@triton.jit
def verify_rows_kernel(
    x_ptr,
    C_ptr,
    z_ptr,
    out_ptr,
    D_ptr,
    tail_x_ptr,
    draft_x_ptr,
    state_ptr,
    walks_ptr,
    intervals_ptr,
    paths_ptr,
    places_ptr,
    weights_ptr,
    growth_ptr,
    folds_ptr,
    x_stride,
    C_stride,
    z_stride,
    out_stride,
    tail_x_stride,
    draft_x_stride,
    state_stride,
    NHEADS: tl.constexpr,
    HEADDIM: tl.constexpr,
    DSTATE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GRID: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MORE: tl.constexpr,
    CARRIES: tl.constexpr,
):
    """One draft, head and block of headdim. MORE: whether an interval evaluates more rows than fit
    in a block that begins at a multiple of 16; CARRIES: whether some interval goes on with the
    state of the one before it.

    Loads come before what waits for any, because a program has little else to do than to wait."""
    NUM_BLOCKS: tl.constexpr = (HEADDIM + BLOCK_P - 1) // BLOCK_P
    X_SIZE: tl.constexpr = NHEADS * HEADDIM
    program = tl.program_id(0)
    walk = (program // (NUM_BLOCKS * NHEADS)).to(tl.int64)
    head = program // NUM_BLOCKS % NHEADS
    p = program % NUM_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_T)
    in_p, in_n = p < HEADDIM, n < DSTATE
    channel = head * HEADDIM + p
    group = head // PER_GROUP * DSTATE + n
    states = channel[:, None] * DSTATE + n[None, :]
    columns = (channel, group, in_p, in_n, head)
    pointers = (x_ptr, C_ptr, z_ptr, weights_ptr, growth_ptr, paths_ptr)
    strides = (x_stride, C_stride, z_stride)
    WITH_D: tl.constexpr = D_ptr is not None
    WITH_Z: tl.constexpr = z_ptr is not None
    D = tl.load(D_ptr + head) if WITH_D else 0.0

    S = tl.zeros((BLOCK_P, BLOCK_N), dtype=DOT)
    for interval in range(tl.load(walks_ptr + walk * 2), tl.load(walks_ptr + walk * 2 + 1)):
        entry = intervals_ptr + interval * NUM_COLUMNS
        slot, page, old_rows, first, count, first_row, _, _ = _fields(entry)
        place = places_ptr + interval * 4
        draft_x = draft_x_ptr + tl.load(place) * draft_x_stride
        draft_begin = tl.load(place + 1)
        # No branches: what is loaded in one has to arrive there.
        old_states = state_ptr + slot * state_stride + states
        in_slot = in_p[:, None] & (n < tl.where(slot >= 0, DSTATE, 0))[None, :]
        stored = tl.load(old_states, mask=in_slot, other=0.0).to(tl.float32).to(DOT)
        fold = tl.load(place + 2)
        folded = folds_ptr + fold * (NHEADS * HEADDIM * DSTATE) + states
        in_fold = in_p[:, None] & (n < tl.where(fold >= 0, DSTATE, 0))[None, :]
        folded = tl.load(folded, mask=in_fold, other=0.0)
        stored = tl.where(fold >= 0, folded, stored)
        slot = tl.maximum(slot, fold)
        S = tl.where(slot >= 0, stored, S) if CARRIES else stored
        is_new = (k >= old_rows) & (k < count)
        rows = _batch_rows(paths_ptr, first, k - old_rows, is_new)
        old = tail_x_ptr + page * tail_x_stride + k[:, None] * X_SIZE + channel[None, :]
        old = tl.load(old, mask=(k < old_rows)[:, None] & in_p[None, :], other=0.0)
        new = x_ptr + rows[:, None] * x_stride + channel[None, :]
        new = tl.load(new, mask=is_new[:, None] & in_p[None, :], other=0.0)
        row_begin = first_row // _ROWS * _ROWS
        extent = (old_rows, first, count, first_row)
        inputs = _rows_inputs(
            pointers, strides, columns, extent, row_begin, GRID, NHEADS, DOT, BLOCK_R, BLOCK_T
        )
        x = tl.where((k < old_rows)[:, None], old, new).to(DOT)
        to = (out_ptr, out_stride, draft_x, draft_begin)
        _rows(inputs, to, columns, x, tl.trans(S), D, X_SIZE, WITH_D, WITH_Z)
        if MORE:
            for later in range(row_begin + BLOCK_R, count, BLOCK_R):
                inputs = _rows_inputs(
                    pointers, strides, columns, extent, later, GRID, NHEADS, DOT, BLOCK_R, BLOCK_T
                )
                _rows(inputs, to, columns, x, tl.trans(S), D, X_SIZE, WITH_D, WITH_Z)
