# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton kernels of the causal convolution; triton_ops.py launches them and builds their tables.

An output's products are added oldest tap first, bias last, by the same functions in all three
kernels, so its bits depend on its own columns alone. Raw columns are copied as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.triton_math import round_to, silu

_PAD = tl.constexpr(PAD_SLOT)


@triton.jit
def _add_tap(total, column, weight, k: tl.constexpr):
    """total + column * weight, rounded once on a GPU, whatever surrounds it."""
    if k == 0:
        return column.to(tl.float32) * weight
    return tl.fma(column.to(tl.float32), weight, total)


@triton.jit
def _activated(total, bias_ptr, c, in_c):
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    return silu(total)


@triton.jit
def _old_column(conv_ptr, tail_ptr, row, c, in_c, CONV_DIM: tl.constexpr, WINDOW: tl.constexpr):
    """The raw column ``row`` tokens after the grid point (a scalar): of the tail, or of conv_state
    when it is negative. conv_ptr and tail_ptr: of the slot and the page."""
    if row >= 0:
        column = tl.load(tail_ptr + row * CONV_DIM + c, mask=in_c, other=0.0)
    else:
        column = tl.load(conv_ptr + c * WINDOW + WINDOW + row, mask=in_c, other=0.0)
    return column


@triton.jit
def extend_kernel(
    xBC_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    conv_ptr,
    tail_ptr,
    table_ptr,
    xBC_stride,
    out_stride,
    weight_stride_channel,
    weight_stride_tap,
    conv_stride,
    tail_stride,
    CONV_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    WRITE_TAIL: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of tokens of one grid interval by a block of channels. Rows of the table:
    triton_ops.ExtendTile."""
    NUM_BLOCKS: tl.constexpr = (CONV_DIM + BLOCK_C - 1) // BLOCK_C
    entry = table_ptr + (tl.program_id(0) // NUM_BLOCKS).to(tl.int64) * NUM_COLUMNS
    first_row = tl.load(entry)
    begin = tl.load(entry + 1)
    count = tl.load(entry + 2)
    conv_old = conv_ptr + tl.load(entry + 3) * conv_stride
    tail_page = tail_ptr + tl.load(entry + 4) * tail_stride
    old_rows = tl.load(entry + 5)
    boundary_slot = tl.load(entry + 6)
    tail_row = tl.load(entry + 7)

    c = tl.program_id(0) % NUM_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < CONV_DIM
    t = tl.arange(0, BLOCK_T)
    mask = (t < count)[:, None] & in_c[None, :]
    xBC_rows = xBC_ptr + first_row * xBC_stride

    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for k in tl.static_range(WINDOW + 1):
        token = begin + t - WINDOW + k
        is_new = (token >= 0)[:, None]
        new = xBC_rows + token[:, None] * xBC_stride + c[None, :]
        column = tl.load(new, mask=mask & is_new, other=0.0).to(tl.float32)
        if begin + k < WINDOW:
            row = (old_rows + token)[:, None]
            in_tail = mask & (row >= 0) & (is_new == 0)
            in_conv = mask & (row < 0) & (is_new == 0)
            old = tl.load(tail_page + row * CONV_DIM + c[None, :], mask=in_tail, other=0.0)
            column = tl.where(in_tail, old.to(tl.float32), column)
            older = conv_old + c[None, :] * WINDOW + WINDOW + row
            column = tl.where(
                in_conv, tl.load(older, mask=in_conv, other=0.0).to(tl.float32), column
            )
        taps = weight_ptr + c * weight_stride_channel + k * weight_stride_tap
        weight = tl.load(taps, mask=in_c, other=0.0).to(tl.float32)
        total = _add_tap(total, column, weight[None, :], k)
    out = out_ptr + (first_row + begin + t)[:, None] * out_stride + c[None, :]
    y = _activated(total, bias_ptr, c[None, :], in_c[None, :])
    tl.store(out, round_to(y, out_ptr.dtype.element_ty), mask=mask)

    if boundary_slot != _PAD:
        snapshot = conv_ptr + boundary_slot * conv_stride + c * WINDOW
        for k in tl.static_range(WINDOW):
            last = begin + count - WINDOW + k
            if last >= 0:
                kept = tl.load(xBC_rows + last * xBC_stride + c, mask=in_c, other=0.0)
            else:
                kept = _old_column(conv_old, tail_page, old_rows + last, c, in_c, CONV_DIM, WINDOW)
            tl.store(snapshot + k, kept, mask=in_c)
    if WRITE_TAIL:  # noqa: SIM102
        if tail_row >= 0:
            new = xBC_rows + (begin + t)[:, None] * xBC_stride + c[None, :]
            places = tail_page + (tail_row + t)[:, None] * CONV_DIM + c[None, :]
            tl.store(places, tl.load(new, mask=mask, other=0.0), mask=mask)


@triton.jit
def leave_tail_kernel(
    xBC_ptr,
    tail_ptr,
    table_ptr,
    xBC_stride,
    tail_stride,
    CONV_DIM: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The raw columns of the tiles that belong into tails."""
    NUM_BLOCKS: tl.constexpr = (CONV_DIM + BLOCK_C - 1) // BLOCK_C
    entry = table_ptr + (tl.program_id(0) // NUM_BLOCKS).to(tl.int64) * NUM_COLUMNS
    first_row = tl.load(entry) + tl.load(entry + 1)
    count = tl.load(entry + 2)
    tail_page = tail_ptr + tl.load(entry + 4) * tail_stride
    tail_row = tl.load(entry + 7)
    c = tl.program_id(0) % NUM_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    mask = (t < count)[:, None] & (c < CONV_DIM)[None, :]
    raw = tl.load(
        xBC_ptr + (first_row + t)[:, None] * xBC_stride + c[None, :], mask=mask, other=0.0
    )
    tl.store(tail_page + (tail_row + t)[:, None] * CONV_DIM + c[None, :], raw, mask=mask)


@triton.jit
def row_kernel(
    xBC_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    conv_ptr,
    tail_ptr,
    table_ptr,
    xBC_stride,
    out_stride,
    weight_stride_channel,
    weight_stride_tap,
    conv_stride,
    tail_stride,
    CONV_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One new column by a block of channels. Rows of the table: state slot, tail page, tail row."""
    NUM_BLOCKS: tl.constexpr = (CONV_DIM + BLOCK_C - 1) // BLOCK_C
    i = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    slot = tl.load(table_ptr + i * 3)
    if slot == _PAD:
        return
    tail_page = tail_ptr + tl.load(table_ptr + i * 3 + 1) * tail_stride
    tail_row = tl.load(table_ptr + i * 3 + 2)
    c = tl.program_id(0) % NUM_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < CONV_DIM
    conv_old = conv_ptr + slot * conv_stride
    new = tl.load(xBC_ptr + i * xBC_stride + c, mask=in_c, other=0.0)
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for k in tl.static_range(WINDOW + 1):
        if k == WINDOW:
            column = new
        else:
            row = tail_row - WINDOW + k
            column = _old_column(conv_old, tail_page, row, c, in_c, CONV_DIM, WINDOW)
        taps = weight_ptr + c * weight_stride_channel + k * weight_stride_tap
        weight = tl.load(taps, mask=in_c, other=0.0).to(tl.float32)
        total = _add_tap(total, column, weight, k)
    y = _activated(total, bias_ptr, c, in_c)
    tl.store(out_ptr + i * out_stride + c, round_to(y, out_ptr.dtype.element_ty), mask=in_c)
    tl.store(tail_page + tail_row * CONV_DIM + c, new, mask=in_c)


@triton.jit
def verify_kernel(
    xBC_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    conv_ptr,
    tail_ptr,
    draft_ptr,
    table_ptr,
    xBC_stride,
    out_stride,
    weight_stride_channel,
    weight_stride_tap,
    conv_stride,
    tail_stride,
    draft_stride,
    CONV_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One draft column by a block of channels. Rows of the table: triton_ops.verify_table."""
    NUM_BLOCKS: tl.constexpr = (CONV_DIM + BLOCK_C - 1) // BLOCK_C
    i = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    entry = table_ptr + i * NUM_COLUMNS
    conv_old = conv_ptr + tl.load(entry) * conv_stride
    tail_page = tail_ptr + tl.load(entry + 1) * tail_stride
    draft_page = draft_ptr + tl.load(entry + 2) * draft_stride
    node = tl.load(entry + 3)
    c = tl.program_id(0) % NUM_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < CONV_DIM
    new = tl.load(xBC_ptr + i * xBC_stride + c, mask=in_c, other=0.0)
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for k in tl.static_range(WINDOW + 1):
        if k == WINDOW:
            column = new
        else:
            ancestor = tl.load(entry + 4 + 2 * k)
            row = tl.load(entry + 5 + 2 * k)
            if ancestor >= 0:
                column = tl.load(xBC_ptr + ancestor * xBC_stride + c, mask=in_c, other=0.0)
            else:
                column = _old_column(conv_old, tail_page, row, c, in_c, CONV_DIM, WINDOW)
        taps = weight_ptr + c * weight_stride_channel + k * weight_stride_tap
        weight = tl.load(taps, mask=in_c, other=0.0).to(tl.float32)
        total = _add_tap(total, column, weight, k)
    y = _activated(total, bias_ptr, c, in_c)
    tl.store(out_ptr + i * out_stride + c, round_to(y, out_ptr.dtype.element_ty), mask=in_c)
    tl.store(draft_page + node * CONV_DIM + c, new, mask=in_c)
