# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The chunk scan's own kernels: what walk_kernel computes, for runs of consecutive tokens alone.

A walk only folds, and leaves the state that each interval begins with in scratch memory, as
products take it; then all intervals' rows are evaluated at once, C . B once for several heads. The
expressions are those of triton_kernels.py on tiles of the same tokens, so the bits are those of
every other operation.

Bytes per token and layer, beside those of x, z, out, B, C and dt: each interval's start written and
read once, 2 * 2 H P N / grid in bf16, and 4 H P N / grid for a kept fp32 boundary. In exchange the
rows wait for no other interval.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stateferry_kernels.ssd.triton_kernels import _added, _entries, _weights
from stateferry_kernels.triton_math import exp2, round_to, silu


@triton.jit
def _tokens(ptr, first, k, stride, column, mask, DOT: tl.constexpr, WHOLE: tl.constexpr = False):
    """Columns of the batch's rows first + k, zero where not in the mask; WHOLE: all are. k * stride
    is below 2**31: triton_walk.Batch sees to it."""
    places = ptr + first * stride + k[:, None] * stride + column[None, :]
    if WHOLE:
        return tl.load(places).to(DOT)
    return tl.load(places, mask=mask, other=0.0).to(DOT)


@triton.jit
def _interval_of(
    where, number, GRID: tl.constexpr, DOT: tl.constexpr, WHOLE_X: tl.constexpr,
    WHOLE_B: tl.constexpr,
):  # fmt: skip
    """x, B, dt and its running sum of a full interval of a walk, by its number there."""
    pointers, strides, columns, in_columns, origin, decays, decay_step, k = where
    x_ptr, B_ptr, dt_ptr, cumsum_ptr = pointers
    in_rows = (k < GRID)[:, None]
    first = origin + number * GRID
    x_mask, B_mask = in_rows & in_columns[0][None, :], in_rows & in_columns[1][None, :]
    x = _tokens(x_ptr, first, k, strides[0], columns[0], x_mask, DOT, WHOLE_X)
    B = _tokens(B_ptr, first, k, strides[1], columns[1], B_mask, DOT, WHOLE_B)
    place = decays + number * decay_step
    dt = tl.load(dt_ptr + place + k, mask=k < GRID, other=0.0)
    cumsum = tl.load(cumsum_ptr + place + k, mask=k < GRID, other=0.0)
    return x, B, dt, cumsum, tl.load(cumsum_ptr + place + GRID - 1)


@triton.jit
def _advanced(
    S, tokens, to, number, num_intervals, NUM_COLUMNS: tl.constexpr, DIRECT: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """The state at the end of an interval; stored where it is listed, and as the next start."""
    x, B, dt, cumsum, last = tokens
    state_ptr, state_stride, starts, start_step, entries, states, mask = to
    boundary_slot = tl.load(entries + number * NUM_COLUMNS + 6)
    added = _added(tl.zeros_like(S), x, B, last, cumsum, dt, DOT)
    grown = tl.fma(S, exp2(last) + tl.zeros_like(S), added)
    rounded = round_to(grown, state_ptr.dtype.element_ty)
    S = rounded.to(tl.float32)
    if (number + 1 < num_intervals) & ((boundary_slot < 0) | (not DIRECT)):
        tl.store(starts + (number + 1) * start_step + states, S.to(DOT), mask=mask)
    if boundary_slot >= 0:
        tl.store(state_ptr + boundary_slot * state_stride + states, rounded, mask=mask)
    return S


@triton.jit
def starts_kernel(
    x_ptr,
    B_ptr,
    tail_x_ptr,
    tail_B_ptr,
    state_ptr,
    starts_ptr,
    dt_ptr,
    cumsum_ptr,
    walks_ptr,
    intervals_ptr,
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
    DIRECT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One walk, head and block of the state: starts (num_intervals, nheads, headdim, dstate) in the
    dtype of products, and the listed boundaries. DIRECT: what lies in a slot in that dtype is left
    out of starts.
    """
    N_BLOCKS: tl.constexpr = (DSTATE + BLOCK_N - 1) // BLOCK_N
    P_BLOCKS: tl.constexpr = (HEADDIM + BLOCK_P - 1) // BLOCK_P
    STATE: tl.constexpr = NHEADS * HEADDIM * DSTATE
    X_SIZE: tl.constexpr = NHEADS * HEADDIM
    B_SIZE: tl.constexpr = NHEADS // PER_GROUP * DSTATE
    program = tl.program_id(0)
    walk = (program // (N_BLOCKS * P_BLOCKS * NHEADS)).to(tl.int64)
    head = program // (N_BLOCKS * P_BLOCKS) % NHEADS
    p = program // N_BLOCKS % P_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    n = program % N_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    in_p, in_n = p < HEADDIM, n < DSTATE
    channel, group = head * HEADDIM + p, head // PER_GROUP * DSTATE + n
    states = channel[:, None] * DSTATE + n[None, :]
    k = tl.arange(0, BLOCK_T)
    in_state = in_p[:, None] & in_n[None, :]
    WHOLE_X: tl.constexpr = HEADDIM % BLOCK_P == 0 and GRID == BLOCK_T
    WHOLE_B: tl.constexpr = DSTATE % BLOCK_N == 0 and GRID == BLOCK_T

    begin = tl.load(walks_ptr + walk * 2)
    num_intervals = tl.load(walks_ptr + walk * 2 + 1) - begin
    entries = intervals_ptr + begin * NUM_COLUMNS
    slot, page, old_rows = tl.load(entries), tl.load(entries + 1), tl.load(entries + 2)
    origin = tl.load(entries + 3) - old_rows
    # The last interval alone may be shorter than the grid.
    is_full = tl.load(entries + (num_intervals - 1) * NUM_COLUMNS + 4) == GRID
    num_full = num_intervals - 1 + is_full.to(tl.int64)
    old_states = state_ptr + slot * state_stride + states
    S = tl.load(old_states, mask=in_state, other=0.0).to(tl.float32)
    starts = starts_ptr + begin * STATE
    if not DIRECT:
        tl.store(starts + states, S.to(DOT), mask=in_state)
    if num_full == 0:
        return
    decays = (begin * NHEADS + head) * GRID
    where = (
        (x_ptr, B_ptr, dt_ptr, cumsum_ptr), (x_stride, B_stride), (channel, group),
        (in_p, in_n), origin, decays, NHEADS * GRID, k,
    )  # fmt: skip
    to = (state_ptr, state_stride, starts, STATE, entries, states, in_state)
    tail_x = tail_x_ptr + page * tail_x_stride
    tail_B = tail_B_ptr + page * tail_B_stride
    rows = origin + k
    x = _entries(x_ptr, tail_x, rows, k, old_rows, GRID, x_stride, X_SIZE, channel, in_p, DOT)
    B = _entries(B_ptr, tail_B, rows, k, old_rows, GRID, B_stride, B_SIZE, group, in_n, DOT)
    dt = tl.load(dt_ptr + decays + k, mask=k < GRID, other=0.0)
    cumsum = tl.load(cumsum_ptr + decays + k, mask=k < GRID, other=0.0)
    last = tl.load(cumsum_ptr + decays + GRID - 1)
    tokens = (x, B, dt, cumsum, last)
    S = _advanced(S, tokens, to, 0, num_intervals, NUM_COLUMNS, DIRECT, DOT)
    for number in range(1, num_full):
        # The pipeline computes addresses of intervals past the last, too: keep them in the batch.
        near = tl.minimum(number, num_full - 1)
        later = _interval_of(where, near, GRID, DOT, WHOLE_X, WHOLE_B)
        S = _advanced(S, later, to, number, num_intervals, NUM_COLUMNS, DIRECT, DOT)


@triton.jit
def _head_inputs(
    pointers, strides, head, interval, p, rows, S_head, NHEADS: tl.constexpr,
    HEADDIM: tl.constexpr, DSTATE: tl.constexpr, GRID: tl.constexpr, DOT: tl.constexpr,
    EXCESS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What the rows of one head's channels p are evaluated on. S_head: the head's state at the
    interval's begin; EXCESS: whether some of the channels are past headdim."""
    x_ptr, tail_x, dt_ptr, cumsum_ptr = pointers
    first, row, old_rows, count = rows[0], rows[1], rows[3], rows[4]
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_T)
    in_p = p < HEADDIM
    channel = head * HEADDIM + p
    places = S_head + p[:, None] * DSTATE + n[None, :]
    if EXCESS or DSTATE != BLOCK_N:
        S = tl.load(places, mask=in_p[:, None] & (n < DSTATE)[None, :], other=0.0)
    else:
        S = tl.load(places)
    X_SIZE: tl.constexpr = NHEADS * HEADDIM
    tokens = first + k
    x = _entries(x_ptr, tail_x, tokens, k, old_rows, count, strides[0], X_SIZE, channel, in_p, DOT)
    decays = (interval * NHEADS + head) * GRID
    dt = tl.load(dt_ptr + decays + k, mask=k < GRID, other=0.0)
    cumsum = tl.load(cumsum_ptr + decays + k, mask=k < GRID, other=0.0)
    row_cumsum = tl.load(cumsum_ptr + decays + row, mask=row < GRID, other=-float("inf"))
    return S, x, dt, cumsum, row_cumsum


@triton.jit
def _head_rows(
    x_ptr, z_ptr, out_ptr, D_ptr, strides, head, p, rows, C, CB, inputs,
    HEADDIM: tl.constexpr, DOT: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Evaluate a block of rows of one head's channels p."""
    first, row, is_row = rows[0], rows[1], rows[2]
    S, x, dt, cumsum, row_cumsum = inputs
    channel = head * HEADDIM + p
    mask = is_row[:, None] & (p < HEADDIM)[None, :]
    weights = _weights(CB, row_cumsum, cumsum, dt, row, tl.arange(0, BLOCK_T))
    y = tl.dot(weights.to(DOT), x, input_precision="ieee")
    before = tl.dot(C, tl.trans(S), input_precision="ieee")
    y = tl.fma(before, tl.broadcast_to(exp2(row_cumsum)[:, None], before.shape), y)
    if D_ptr is not None:
        if row.shape[0] == BLOCK_T:
            own = x.to(tl.float32)
        else:
            own = _tokens(x_ptr, first, row, strides[0], channel, mask, tl.float32)
        y = tl.fma(tl.load(D_ptr + head) + tl.zeros_like(y), own, y)
    if z_ptr is not None:
        # Not before the products: there is no register left for it then.
        y *= silu(_tokens(z_ptr, first, row, strides[1], channel, mask, tl.float32))
    outs = out_ptr + first * strides[2] + row[:, None] * strides[2] + channel[None, :]
    tl.store(outs, round_to(y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def outputs_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    out_ptr,
    D_ptr,
    tail_x_ptr,
    tail_B_ptr,
    state_ptr,
    starts_ptr,
    dt_ptr,
    cumsum_ptr,
    intervals_ptr,
    x_stride,
    B_stride,
    C_stride,
    z_stride,
    out_stride,
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
    DIRECT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REST_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One interval, block of its rows, and HEADS heads of a group: C . B is computed once for them.
    DIRECT: boundary states are read where starts_kernel left them, which was not in starts. The
    channels of a head come in blocks of BLOCK_P and, where REST_P is not 0, one of REST_P."""
    R_BLOCKS: tl.constexpr = (GRID + BLOCK_R - 1) // BLOCK_R
    P_BLOCKS: tl.constexpr = 1 if REST_P else (HEADDIM + BLOCK_P - 1) // BLOCK_P
    STATE: tl.constexpr = HEADDIM * DSTATE
    B_SIZE: tl.constexpr = NHEADS // PER_GROUP * DSTATE
    EXCESS: tl.constexpr = 0 if REST_P else HEADDIM % BLOCK_P
    program = tl.program_id(0)
    row_begin = program % R_BLOCKS * BLOCK_R
    p_begin = program // R_BLOCKS % P_BLOCKS * BLOCK_P
    first_head = program // (R_BLOCKS * P_BLOCKS) % (NHEADS // HEADS) * HEADS
    interval = (program // (R_BLOCKS * P_BLOCKS * (NHEADS // HEADS))).to(tl.int64)
    entry = intervals_ptr + interval * NUM_COLUMNS
    page, old_rows, count = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 4)
    first = tl.load(entry + 3) - old_rows
    if (row_begin >= count) | (row_begin + BLOCK_R <= old_rows):
        return
    k = tl.arange(0, BLOCK_T)
    row = row_begin + tl.arange(0, BLOCK_R)
    is_row = (row >= old_rows) & (row < count)
    n = tl.arange(0, BLOCK_N)
    in_n = n < DSTATE
    group = first_head // PER_GROUP * DSTATE + n
    tail_x = tail_x_ptr + page * tail_x_stride
    tail_B = tail_B_ptr + page * tail_B_stride
    S_ptr = starts_ptr + interval * (NHEADS * STATE)
    if DIRECT:
        # The state as products take it lies in a slot, if the one before was asked for.
        slot = tl.load(entry)
        if slot < 0:
            slot = tl.load(entry - NUM_COLUMNS + 6)
        if slot >= 0:
            S_ptr = state_ptr + slot * state_stride
    strides = (x_stride, z_stride, out_stride)
    rows = (first, row, is_row, old_rows, count)
    pointers = (x_ptr, tail_x, dt_ptr, cumsum_ptr)
    p = p_begin + tl.arange(0, BLOCK_P)
    C = _tokens(C_ptr, first, row, C_stride, group, is_row[:, None] & in_n[None, :], DOT)
    B = _entries(B_ptr, tail_B, first + k, k, old_rows, count, B_stride, B_SIZE, group, in_n, DOT)
    if REST_P == 0:
        # Before the product: its operands and these are then on their way at the same time.
        inputs = _head_inputs(
            pointers, strides, first_head, interval, p, rows, S_ptr + first_head * STATE, NHEADS,
            HEADDIM, DSTATE, GRID, DOT, EXCESS, BLOCK_N, BLOCK_T,
        )  # fmt: skip
    CB = tl.dot(C, tl.trans(B), input_precision="ieee")
    if REST_P == 0:
        _head_rows(
            x_ptr, z_ptr, out_ptr, D_ptr, strides, first_head, p, rows, C, CB, inputs, HEADDIM,
            DOT, BLOCK_T,
        )  # fmt: skip
    # With a rest two heads' inputs would not fit in registers.
    for head in range(first_head + (1 if REST_P == 0 else 0), first_head + HEADS):
        main = _head_inputs(
            pointers, strides, head, interval, p, rows, S_ptr + head * STATE, NHEADS, HEADDIM,
            DSTATE, GRID, DOT, EXCESS, BLOCK_N, BLOCK_T,
        )  # fmt: skip
        _head_rows(
            x_ptr, z_ptr, out_ptr, D_ptr, strides, head, p, rows, C, CB, main, HEADDIM, DOT,
            BLOCK_T,
        )  # fmt: skip
        if REST_P:
            q = BLOCK_P + tl.arange(0, REST_P)
            rest = _head_inputs(
                pointers, strides, head, interval, q, rows, S_ptr + head * STATE, NHEADS, HEADDIM,
                DSTATE, GRID, DOT, (HEADDIM - BLOCK_P) % REST_P, BLOCK_N, BLOCK_T,
            )  # fmt: skip
            _head_rows(
                x_ptr, z_ptr, out_ptr, D_ptr, strides, head, q, rows, C, CB, rest, HEADDIM, DOT,
                BLOCK_T,
            )  # fmt: skip
