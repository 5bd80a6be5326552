# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Decode rows of the grid form in two kernels, with the arithmetic of ssd/triton_kernels.py.

The first does once for a sequence what its heads share: C . B, dt and its running sum, and from
them the weight with which each row of the tail enters each head's output. The second reads states
and the tail's x, each once. Between them goes nheads * grid numbers a sequence. Both also append
their part of the new row to the tail: no program reads a row at or past it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.ssd.triton_kernels import _entries, _processed, _running_sum
from stateferry_kernels.triton_math import exp2, round_to, silu

# The fewest rows that a product takes. One is the token, in the place that it has in a block of the
# interval's rows; the others are zeros.
_ROWS = tl.constexpr(16)
_PAD = tl.constexpr(PAD_SLOT)


@triton.jit
def decode_weights_kernel(
    dt_ptr,
    B_ptr,
    C_ptr,
    A_ptr,
    bias_ptr,
    tail_B_ptr,
    tail_dt_ptr,
    rows_ptr,
    weights_ptr,
    growth_ptr,
    dt_stride_row,
    dt_stride_head,
    B_stride,
    C_stride,
    tail_B_stride,
    tail_dt_stride,
    dt_low,
    dt_high,
    NHEADS: tl.constexpr,
    DSTATE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GRID: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One sequence and block of a group's heads: weights (num_rows, NHEADS, GRID) in DOT, growth
    (num_rows, NHEADS) fp32, what the state at the grid point has become."""
    H_BLOCKS: tl.constexpr = (PER_GROUP + BLOCK_H - 1) // BLOCK_H
    GROUPS: tl.constexpr = NHEADS // PER_GROUP
    program = tl.program_id(0)
    number = (program // (H_BLOCKS * GROUPS)).to(tl.int64)
    of_group = program // H_BLOCKS % GROUPS
    in_group = program % H_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    head = of_group * PER_GROUP + in_group
    in_heads = in_group < PER_GROUP
    token = tl.load(rows_ptr + number * 4)
    if tl.load(rows_ptr + number * 4 + 1) == _PAD:
        return
    page, newest = tl.load(rows_ptr + number * 4 + 2), tl.load(rows_ptr + number * 4 + 3)
    k = tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    in_n = n < DSTATE
    group = of_group * DSTATE + n

    tail_dt = tail_dt_ptr + page * tail_dt_stride + head
    raw = tl.load(dt_ptr + token * dt_stride_row + head * dt_stride_head, mask=in_heads, other=0.0)
    raw = raw.to(tl.float32)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + head, mask=in_heads, other=0.0)
    new_dt = _processed(raw, dt_low, dt_high, SOFTPLUS)
    tl.store(tail_dt + newest * NHEADS, new_dt, mask=in_heads)
    old = (k < newest)[:, None] & in_heads[None, :]
    dt = tl.load(tail_dt[None, :] + k[:, None] * NHEADS, mask=old, other=0.0)
    dt = tl.where((k == newest)[:, None] & in_heads[None, :], new_dt[None, :], dt)
    A = tl.load(A_ptr + head, mask=in_heads, other=0.0)
    cumsum = _running_sum(tl.zeros_like(dt), dt, A[None, :], k, k)
    row_cumsum = tl.sum(tl.where((k == newest)[:, None], cumsum, 0.0), axis=0)

    tail_B = tail_B_ptr + page * tail_B_stride
    B_SIZE: tl.constexpr = GROUPS * DSTATE
    B = _entries(
        B_ptr, tail_B, token - newest + k, k, newest, newest + 1, B_stride, B_SIZE, group, in_n, DOT
    )
    if program % H_BLOCKS == 0:
        new_B = tl.load(B_ptr + token * B_stride + group, mask=in_n, other=0.0)
        tl.store(tail_B + newest * B_SIZE + group, new_B, mask=in_n)
    is_row = tl.arange(0, _ROWS) == newest % _ROWS
    C_places = C_ptr + token * C_stride + group[None, :] + tl.zeros((_ROWS, 1), dtype=tl.int32)
    C = tl.load(C_places, mask=is_row[:, None] & in_n[None, :], other=0.0).to(DOT)
    CB = tl.dot(C, tl.trans(B), input_precision="ieee")
    CB = tl.sum(tl.where(is_row[:, None], CB, 0.0), axis=0)
    log_decay = tl.where((k > newest)[:, None], -float("inf"), row_cumsum[None, :] - cumsum)
    weights = CB[:, None] * exp2(log_decay) * dt
    places = weights_ptr + (number * NHEADS + head)[None, :] * GRID + k[:, None]
    tl.store(places, weights.to(DOT), mask=(k < GRID)[:, None] & in_heads[None, :])
    tl.store(growth_ptr + number * NHEADS + head, exp2(row_cumsum), mask=in_heads)


@triton.jit
def decode_rows_kernel(
    x_ptr,
    C_ptr,
    z_ptr,
    out_ptr,
    D_ptr,
    tail_x_ptr,
    state_ptr,
    rows_ptr,
    weights_ptr,
    growth_ptr,
    x_stride,
    C_stride,
    z_stride,
    out_stride,
    tail_x_stride,
    state_stride,
    NHEADS: tl.constexpr,
    HEADDIM: tl.constexpr,
    DSTATE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GRID: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One sequence, head and block of headdim."""
    NUM_BLOCKS: tl.constexpr = (HEADDIM + BLOCK_P - 1) // BLOCK_P
    X_SIZE: tl.constexpr = NHEADS * HEADDIM
    program = tl.program_id(0)
    number = (program // (NUM_BLOCKS * NHEADS)).to(tl.int64)
    head = program // NUM_BLOCKS % NHEADS
    p = program % NUM_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_T)
    in_p, in_n = p < HEADDIM, n < DSTATE
    channel = head * HEADDIM + p
    group = head // PER_GROUP * DSTATE + n
    token, slot = tl.load(rows_ptr + number * 4), tl.load(rows_ptr + number * 4 + 1)
    if slot == _PAD:
        return
    page, newest = tl.load(rows_ptr + number * 4 + 2), tl.load(rows_ptr + number * 4 + 3)
    states = state_ptr + slot * state_stride + channel[:, None] * DSTATE + n[None, :]
    S = tl.load(states, mask=in_p[:, None] & in_n[None, :], other=0.0).to(tl.float32)
    tail_x = tail_x_ptr + page * tail_x_stride
    x = _entries(
        x_ptr,
        tail_x,
        token - newest + k,
        k,
        newest,
        newest + 1,
        x_stride,
        X_SIZE,
        channel,
        in_p,
        DOT,
    )
    none = tl.zeros((_ROWS, 1), dtype=tl.int32)
    is_row = (tl.arange(0, _ROWS) == newest % _ROWS)[:, None]
    mask = is_row & in_p[None, :]
    C_places = C_ptr + token * C_stride + group[None, :] + none
    C = tl.load(C_places, mask=is_row & in_n[None, :], other=0.0).to(DOT)
    places = weights_ptr + (number * NHEADS + head) * GRID + k[None, :] + none
    weights = tl.load(places, mask=is_row & (k < GRID)[None, :], other=0.0)
    growth = tl.load(growth_ptr + number * NHEADS + head)
    own = tl.load(x_ptr + token * x_stride + channel[None, :] + none, mask=mask, other=0.0)
    if z_ptr is not None:
        z = tl.load(z_ptr + token * z_stride + channel[None, :] + none, mask=mask, other=0.0)
    y = tl.dot(weights, x, input_precision="ieee")
    before = tl.dot(C, tl.trans(S.to(DOT)), input_precision="ieee")
    y = tl.fma(before, growth + tl.zeros_like(y), y)
    if D_ptr is not None:
        y = tl.fma(tl.load(D_ptr + head) + tl.zeros_like(y), own.to(tl.float32), y)
    if z_ptr is not None:
        y *= silu(z.to(tl.float32))
    outs = out_ptr + token * out_stride + channel[None, :] + none
    tl.store(outs, round_to(y, out_ptr.dtype.element_ty), mask=mask)
    appended = tail_x + newest * X_SIZE + channel[None, :] + none
    tl.store(appended, own, mask=mask)
