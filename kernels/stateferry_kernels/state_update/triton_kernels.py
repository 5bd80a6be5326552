# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton kernels that move rows of tails and drafts, and columns of conv_state; they compute
nothing. Launched apart from those that read what is overwritten."""

from __future__ import annotations

import triton
import triton.language as tl

from stateferry_kernels.layer_state import PAD_SLOT

_PAD = tl.constexpr(PAD_SLOT)


@triton.jit
def leave_rows_kernel(
    x_ptr,
    B_ptr,
    dt_ptr,
    to_x_ptr,
    to_B_ptr,
    to_dt_ptr,
    table_ptr,
    x_stride,
    B_stride,
    to_x_stride,
    to_B_stride,
    to_dt_stride,
    X: tl.constexpr,
    B: tl.constexpr,
    NHEADS: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of a batch to rows of pages. Rows of the table: row of x and B, interval * GRID + row of
    dt (num_intervals, NHEADS, GRID), page, row; a row of -1 is padding. X and B: elements of a
    row."""
    NUM_BLOCKS: tl.constexpr = (max(X, max(B, NHEADS)) + BLOCK - 1) // BLOCK
    entry = table_ptr + (tl.program_id(0) // NUM_BLOCKS).to(tl.int64) * 4
    token = tl.load(entry)
    place = tl.load(entry + 1)
    page = tl.load(entry + 2)
    row = tl.load(entry + 3)
    if token < 0:
        return
    i = tl.program_id(0) % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * x_stride + i, mask=i < X)
    tl.store(to_x_ptr + page * to_x_stride + row * X + i, x, mask=i < X)
    b = tl.load(B_ptr + token * B_stride + i, mask=i < B)
    tl.store(to_B_ptr + page * to_B_stride + row * B + i, b, mask=i < B)
    dt = tl.load(dt_ptr + (place // GRID * NHEADS + i) * GRID + place % GRID, mask=i < NHEADS)
    tl.store(to_dt_ptr + page * to_dt_stride + row * NHEADS + i, dt, mask=i < NHEADS)


@triton.jit
def move_rows_kernel(
    from_ptr,
    to_ptr,
    table_ptr,
    from_stride,
    to_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of pages to rows of other pages. Rows of the table: page, row, page, row."""
    NUM_BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    entry = table_ptr + (tl.program_id(0) // NUM_BLOCKS).to(tl.int64) * 4
    i = tl.program_id(0) % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    source = from_ptr + tl.load(entry) * from_stride + tl.load(entry + 1) * SIZE
    target = to_ptr + tl.load(entry + 2) * to_stride + tl.load(entry + 3) * SIZE
    tl.store(target + i, tl.load(source + i, mask=i < SIZE), mask=i < SIZE)


@triton.jit
def conv_window_kernel(
    conv_ptr,
    tail_ptr,
    table_ptr,
    conv_stride,
    tail_stride,
    CONV_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The raw columns before a tail's row, from the tail or, where it is shorter than the window,
    from the conv_state it began with. Rows of the table: source slot, target slot (PAD_SLOT: none),
    page, row."""
    NUM_BLOCKS: tl.constexpr = (CONV_DIM + BLOCK - 1) // BLOCK
    entry = table_ptr + (tl.program_id(0) // NUM_BLOCKS).to(tl.int64) * 4
    c = tl.program_id(0) % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = c < CONV_DIM
    if tl.load(entry + 1) == _PAD:
        return
    source = conv_ptr + tl.load(entry) * conv_stride + c * WINDOW
    target = conv_ptr + tl.load(entry + 1) * conv_stride + c * WINDOW
    page = tail_ptr + tl.load(entry + 2) * tail_stride + c
    end = tl.load(entry + 3)
    for k in tl.static_range(WINDOW):
        row = end - WINDOW + k
        if row >= 0:
            column = tl.load(page + row * CONV_DIM, mask=mask)
        else:
            column = tl.load(source + WINDOW + row, mask=mask)
        tl.store(target + k, column, mask=mask)
