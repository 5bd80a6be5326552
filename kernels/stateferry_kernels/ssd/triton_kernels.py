# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The grid form in Triton: one kernel walks through grid intervals, whoever asks.

A prefill's chunks, a decode row, a draft's paths and a commit are all *walks*: runs of intervals
that carry a state from one to the next. Each interval names its entries (rows of a tail page, then
rows of the batch), the entries to evaluate and where the state at its end goes; triton_walk.py
describes the tables. So an entry's output comes from one expression on tiles of one shape, with the
entry at the same place in them: its bits depend neither on the walk nor on the neighbours, nor on
entries that come after it, whose weights are exactly zero.

Entries beyond an interval's count are never read: masked loads select zeros in their place.

Bytes moved per token and layer, in elements of 2 bytes (bf16) for x, z, out, B, C and 4 for dt
(H heads, P headdim, N dstate, G groups):
  chunk scan   2 H P 3 (x, z, out) + 2 G N 2 (B, C; each head reads them again, from L2)
               + H (2 raw dt + 8 written and 8 read for dt and its running sum)
               + H P N state bytes per listed boundary; no dense states, no second pass (shapes
               that triton_scan_kernels.py serves spend bytes on states instead, and less time)
               Mamba-2 2.7b (H 80, P 64, N 128, G 1): 30720 + 512 + 1440 = 33 kB
  decode row   H P N state bytes read once, none written, and the tail's rows:
               t (2 H P + 2 G N + 4 H) for t = tail_rows; 2.6 MB + t 10.8 kB, with fp32 states
  verify       the same once per sequence, not per draft token, unless a path passes the grid
"""

from __future__ import annotations

import triton
import triton.language as tl

from stateferry_kernels.triton_math import LOG2_E, exp2, round_to, silu, softplus


@triton.jit
def _batch_rows(paths_ptr, first, k, mask):
    """Rows of the batch of an interval's new entries k, counted from its first new one."""
    if paths_ptr is not None:
        return tl.load(paths_ptr + first + k, mask=mask, other=0)
    return first + k


@triton.jit
def _processed(raw, dt_low, dt_high, SOFTPLUS: tl.constexpr):
    """dt of a raw one with its bias."""
    if SOFTPLUS:
        raw = softplus(raw)
    return tl.minimum(tl.maximum(raw, dt_low), dt_high)


@triton.jit
def _running_sum(total, dt, A, row, k):
    """total + the sum of dt A over the entries k up to each row, (rows, heads), in powers of two.

    A product with a triangle of ones: in fp32 that adds one entry after the other, in their order,
    however the threads share the work. A scan would add them as a tree.
    """
    ones = tl.where(row[:, None] >= k[None, :], 1.0, 0.0)
    return tl.dot(ones, dt * (A * LOG2_E), total, input_precision="ieee")


@triton.jit
def decay_kernel(
    dt_ptr,
    bias_ptr,
    A_ptr,
    tail_ptr,
    intervals_ptr,
    paths_ptr,
    dt_out_ptr,
    cumsum_ptr,
    dt_stride_row,
    dt_stride_head,
    tail_stride,
    dt_low,
    dt_high,
    NHEADS: tl.constexpr,
    GRID: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Each interval's processed dt, zero where no entry is, and the running sum of dt A in
    powers of two, both (num_intervals, NHEADS, GRID) fp32."""
    NUM_BLOCKS: tl.constexpr = (NHEADS + BLOCK_H - 1) // BLOCK_H
    interval = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    head = tl.program_id(0) % NUM_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    in_heads = (head < NHEADS)[None, :]
    entry = intervals_ptr + interval * NUM_COLUMNS
    page = tail_ptr + tl.load(entry + 1) * tail_stride
    old_rows = tl.load(entry + 2)
    first = tl.load(entry + 3)
    count = tl.load(entry + 4)
    A = tl.load(A_ptr + head, mask=head < NHEADS, other=0.0)[None, :]
    place = interval * NHEADS
    for begin in range(0, GRID, BLOCK_T):
        row = begin + tl.arange(0, BLOCK_T)
        total = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
        dt = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
        for before in range(0, begin + BLOCK_T, BLOCK_T):
            k = before + tl.arange(0, BLOCK_T)
            old = (k < old_rows)[:, None] & in_heads
            dt = tl.load(page + k[:, None] * NHEADS + head[None, :], mask=old, other=0.0)
            if dt_ptr is not None:
                is_new = (k >= old_rows) & (k < count)
                rows = _batch_rows(paths_ptr, first, k - old_rows, is_new)
                new = is_new[:, None] & in_heads
                raw = dt_ptr + rows[:, None] * dt_stride_row + head[None, :] * dt_stride_head
                raw = tl.load(raw, mask=new, other=0.0).to(tl.float32)
                if bias_ptr is not None:
                    raw += tl.load(bias_ptr + head, mask=head < NHEADS, other=0.0)[None, :]
                dt = tl.where(new, _processed(raw, dt_low, dt_high, SOFTPLUS), dt)
            total = _running_sum(total, dt, A, row, k)
        places = (place + head)[None, :] * GRID + row[:, None]
        mask = (row < GRID)[:, None] & in_heads
        tl.store(dt_out_ptr + places, dt, mask=mask)
        tl.store(cumsum_ptr + places, total, mask=mask)


@triton.jit
def _entries(
    new_ptr, old_ptr, rows, k, old_rows, count, new_stride, old_stride, column, in_columns, DOT
):
    """Columns of an interval's entries k, (entries, columns), zero where no entry is."""
    if new_ptr is not None:
        mask = ((k >= old_rows) & (k < count))[:, None] & in_columns[None, :]
        places = new_ptr + rows[:, None] * new_stride + column[None, :]
        tokens = tl.load(places, mask=mask, other=0.0).to(DOT)
    else:
        tokens = tl.zeros((k.shape[0], column.shape[0]), dtype=DOT)
    if old_rows > 0:
        is_old = (k < old_rows)[:, None]
        places = old_ptr + k[:, None] * old_stride + column[None, :]
        old = tl.load(places, mask=is_old & in_columns[None, :], other=0.0).to(DOT)
        tokens = tl.where(is_old, old, tokens)
    return tokens


@triton.jit
def _block(
    k,
    where,
    GRID: tl.constexpr,
    X_SIZE: tl.constexpr,
    B_SIZE: tl.constexpr,
    DOT: tl.constexpr,
):
    """x, B, dt and its running sum of an interval's entries k."""
    sources, extent, columns = where
    x_ptr, B_ptr, tail_x, tail_B, dt_row, cumsum_row, paths_ptr = sources
    old_rows, first, count, x_stride, B_stride = extent
    channel, group, in_p, in_n = columns
    rows = _batch_rows(paths_ptr, first, k - old_rows, (k >= old_rows) & (k < count))
    x = _entries(x_ptr, tail_x, rows, k, old_rows, count, x_stride, X_SIZE, channel, in_p, DOT)
    B = _entries(B_ptr, tail_B, rows, k, old_rows, count, B_stride, B_SIZE, group, in_n, DOT)
    dt = tl.load(dt_row + k, mask=k < GRID, other=0.0)
    cumsum = tl.load(cumsum_row + k, mask=k < GRID, other=0.0)
    return x, B, dt, cumsum


@triton.jit
def _weights(CB, row_cumsum, cumsum, dt, row, k):
    """What each row takes of each entry k's x, (rows, entries)."""
    later = k[None, :] > row[:, None]
    log_decay = tl.where(later, -float("inf"), row_cumsum[:, None] - cumsum[None, :])
    return CB * exp2(log_decay) * dt[None, :]


@triton.jit
def _within(total, C, B, x, row_cumsum, cumsum, dt, row, k, DOT: tl.constexpr):
    """total + what the entries k add to the rows, (rows, headdim)."""
    CB = tl.dot(C, tl.trans(B), input_precision="ieee")
    weights = _weights(CB, row_cumsum, cumsum, dt, row, k)
    return tl.dot(weights.to(DOT), x, total, input_precision="ieee")


@triton.jit
def _added(total, x, B, last, cumsum, dt, DOT: tl.constexpr):
    """total + what the entries add to the state at the interval's end, (headdim, dstate)."""
    return _added_by(total, x, B, exp2(last - cumsum) * dt, DOT)


@triton.jit
def _added_by(total, x, B, weights, DOT: tl.constexpr):
    """total + the entries' x times their weights times B, (headdim, dstate).

    A product of bf16 would leave the state 8 bits of x times its weight; two hold 16, and a state
    lives long. The first 8 are cut off, not rounded, which is an instruction less, and taken from
    the result of an fma, which no compiler can join with the difference in one kernel alone.
    """
    weights = tl.broadcast_to(weights[:, None], x.shape)
    weighted = tl.fma(x.to(tl.float32), weights, tl.zeros_like(weights))
    if DOT == tl.float32:  # noqa: SIM300
        return tl.dot(tl.trans(weighted), B, total, input_precision="ieee")
    high = (weighted.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    total = tl.dot(tl.trans(high.to(DOT)), B, total, input_precision="ieee")
    return tl.dot(tl.trans((weighted - high).to(DOT)), B, total, input_precision="ieee")


@triton.jit
def _fields(entry):
    """A row of the table of intervals: the fields of triton_walk.Interval."""
    slot, page, old_rows, first = (
        tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3),
    )  # fmt: skip
    count, first_row = tl.load(entry + 4), tl.load(entry + 5)
    return slot, page, old_rows, first, count, first_row, tl.load(entry + 6), tl.load(entry + 7)


@triton.jit
def walk_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    out_ptr,
    D_ptr,
    tail_x_ptr,
    tail_B_ptr,
    state_ptr,
    dt_ptr,
    cumsum_ptr,
    walks_ptr,
    intervals_ptr,
    paths_ptr,
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
    FOLDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One walk, head and block of headdim. The state stays in registers from the walk's first
    interval to its last. FOLDS: whether any interval of any walk does."""
    NUM_BLOCKS: tl.constexpr = (HEADDIM + BLOCK_P - 1) // BLOCK_P
    X_SIZE: tl.constexpr = NHEADS * HEADDIM
    B_SIZE: tl.constexpr = NHEADS // PER_GROUP * DSTATE
    ONE_BLOCK: tl.constexpr = BLOCK_T >= GRID
    program = tl.program_id(0)
    walk = (program // (NUM_BLOCKS * NHEADS)).to(tl.int64)
    head = program // NUM_BLOCKS % NHEADS
    p = program % NUM_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    in_p, in_n = p < HEADDIM, n < DSTATE
    channel = head * HEADDIM + p
    group = head // PER_GROUP * DSTATE + n
    states = channel[:, None] * DSTATE + n[None, :]
    in_state = in_p[:, None] & in_n[None, :]
    columns = (channel, group, in_p, in_n)

    S = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for interval in range(tl.load(walks_ptr + walk * 2), tl.load(walks_ptr + walk * 2 + 1)):
        entry = intervals_ptr + interval * NUM_COLUMNS
        slot, page, old_rows, first, count, first_row, boundary_slot, carries_on = _fields(entry)
        tail_x = tail_x_ptr + page * tail_x_stride
        tail_B = tail_B_ptr + page * tail_B_stride
        decays = (interval * NHEADS + head) * GRID
        dt_row, cumsum_row = dt_ptr + decays, cumsum_ptr + decays
        if slot >= 0:
            old_states = state_ptr + slot * state_stride + states
            S = tl.load(old_states, mask=in_state, other=0.0).to(tl.float32)

        k = tl.arange(0, BLOCK_T)
        sources = (x_ptr, B_ptr, tail_x, tail_B, dt_row, cumsum_row, paths_ptr)
        extent = (old_rows, first, count, x_stride, B_stride)
        where = (sources, extent, columns)
        if ONE_BLOCK:
            x, B, dt, cumsum = _block(k, where, GRID, X_SIZE, B_SIZE, DOT)

        if out_ptr is not None:
            S_dot = tl.trans(S.to(DOT))
            for row_begin in range(first_row // BLOCK_R * BLOCK_R, count, BLOCK_R):
                row = row_begin + tl.arange(0, BLOCK_R)
                is_row = (row >= first_row) & (row < count)
                places = _batch_rows(paths_ptr, first, row - old_rows, is_row)[:, None]
                in_C = is_row[:, None] & in_n[None, :]
                C = tl.load(C_ptr + places * C_stride + group[None, :], mask=in_C, other=0.0)
                C = C.to(DOT)
                row_cumsum = tl.load(cumsum_row + row, mask=row < GRID, other=-float("inf"))
                mask = is_row[:, None] & in_p[None, :]
                # Before the products, so that they need not wait for one memory after the other.
                if D_ptr is not None:
                    own = x_ptr + places * x_stride + channel[None, :]
                    own = tl.load(own, mask=mask, other=0.0).to(tl.float32)
                if z_ptr is not None:
                    z = z_ptr + places * z_stride + channel[None, :]
                    z = tl.load(z, mask=mask, other=0.0).to(tl.float32)
                y = tl.zeros((BLOCK_R, BLOCK_P), dtype=tl.float32)
                if ONE_BLOCK:
                    y = _within(y, C, B, x, row_cumsum, cumsum, dt, row, k, DOT)
                else:
                    for block in range(0, row_begin + BLOCK_R, BLOCK_T):
                        xb, Bb, dtb, cb = _block(block + k, where, GRID, X_SIZE, B_SIZE, DOT)
                        y = _within(y, C, Bb, xb, row_cumsum, cb, dtb, row, block + k, DOT)
                before = tl.dot(C, S_dot, input_precision="ieee")
                grown = tl.broadcast_to(exp2(row_cumsum)[:, None], (BLOCK_R, BLOCK_P))
                y = tl.fma(before, grown, y)
                if D_ptr is not None:
                    y = tl.fma(tl.load(D_ptr + head) + tl.zeros_like(y), own, y)
                if z_ptr is not None:
                    y *= silu(z)
                outs = out_ptr + places * out_stride + channel[None, :]
                tl.store(outs, round_to(y, out_ptr.dtype.element_ty), mask=mask)

        if FOLDS:  # noqa: SIM102
            if carries_on != 0:
                last = tl.load(cumsum_row + GRID - 1)
                added = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
                if ONE_BLOCK:
                    added = _added(added, x, B, last, cumsum, dt, DOT)
                else:
                    for block in range(0, GRID, BLOCK_T):
                        xb, Bb, dtb, cb = _block(block + k, where, GRID, X_SIZE, B_SIZE, DOT)
                        added = _added(added, xb, Bb, last, cb, dtb, DOT)
                S = tl.fma(S, exp2(last) + tl.zeros_like(S), added)
                rounded = round_to(S, state_ptr.dtype.element_ty)
                S = rounded.to(tl.float32)
                if boundary_slot >= 0:
                    new_states = state_ptr + boundary_slot * state_stride + states
                    tl.store(new_states, rounded, mask=in_state)
