# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The plain step's Triton kernels: one program per block of headdim, head and sequence.

A program owns its block of the state, reads it once and writes it once. Whatever it reads is fp32
from there on; a row's bits depend neither on the block it lies in nor on the other sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.triton_math import round_at_random, round_to, silu, softplus

_PAD = tl.constexpr(PAD_SLOT)


@triton.jit
def _place(NHEADS: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's sequence, head and rows of headdim."""
    NUM_BLOCKS: tl.constexpr = (HEADDIM + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    rows = program % NUM_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    return program // (NUM_BLOCKS * NHEADS), program // NUM_BLOCKS % NHEADS, rows


@triton.jit
def _processed(dt, bias, dt_low, dt_high, SOFTPLUS: tl.constexpr):
    dt += bias
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.minimum(tl.maximum(dt, dt_low), dt_high)


@triton.jit
def _advance(state, decay, dt, x, B, C):
    """The state after a token, and C . state. decay and dt: of the head or of its channels."""
    state = state * decay + (dt * x)[:, None] * B[None, :]
    return state, tl.sum(state * C[None, :], axis=1)


@triton.jit
def _random_bits(seed, slot, row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """16 random bits for each element, the same wherever the block begins. row: of the slot."""
    EIGHTHS: tl.constexpr = BLOCK_N // 8
    element = row[:, None] * EIGHTHS + tl.arange(0, EIGHTHS)[None, :]
    none = element * 0
    r0, r1, r2, r3 = tl.philox(seed, element, none + slot.to(tl.int32), none, none)
    words = tl.join(tl.join(r0, r1), tl.join(r2, r3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_M, BLOCK_N))


@triton.jit
def _store_state(pointers, state, mask, seed, slot, row):
    """To the nearest, or at random where a seed is given."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    if seed is not None:
        bits = _random_bits(seed, slot, row, state.shape[0], state.shape[1])
        tl.store(pointers, round_at_random(state, bits, dtype), mask=mask)
    else:
        tl.store(pointers, round_to(state, dtype), mask=mask)


@triton.jit
def state_step_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    out_ptr,
    A_ptr,
    D_ptr,
    bias_ptr,
    slots_ptr,
    state_stride,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    out_stride,
    dt_low,
    dt_high,
    seed,
    NHEADS: tl.constexpr,
    HEADDIM: tl.constexpr,
    DSTATE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence, head, m = _place(NHEADS, HEADDIM, BLOCK_M)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    if slot == _PAD:
        return
    i = sequence.to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    in_m, in_n = m < HEADDIM, n < DSTATE
    mask = in_m[:, None] & in_n[None, :]
    row = head * HEADDIM + m
    group = head // PER_GROUP * DSTATE + n
    states = state_ptr + slot * state_stride + row[:, None] * DSTATE + n[None, :]
    state = tl.load(states, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + i * x_stride + row, mask=in_m, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + i * B_stride + group, mask=in_n, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + i * C_stride + group, mask=in_n, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + i * dt_stride + head).to(tl.float32)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + head)
    dt = _processed(dt, bias, dt_low, dt_high, SOFTPLUS)
    state, y = _advance(state, tl.exp(dt * tl.load(A_ptr + head)), dt, x, B, C)
    if D_ptr is not None:
        y += tl.load(D_ptr + head) * x
    if z_ptr is not None:
        y *= silu(tl.load(z_ptr + i * z_stride + row, mask=in_m, other=0.0).to(tl.float32))
    _store_state(states, state, mask, seed, slot, row)
    tl.store(out_ptr + i * out_stride + row, round_to(y, out_ptr.dtype.element_ty), mask=in_m)


@triton.jit
def state_step_untied_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    out_ptr,
    A_ptr,
    D_ptr,
    bias_ptr,
    slots_ptr,
    state_stride,
    x_stride,
    dt_stride,
    dt_stride_head,
    dt_stride_channel,
    B_stride,
    C_stride,
    z_stride,
    out_stride,
    A_stride_head,
    A_stride_channel,
    A_stride_state,
    D_stride_head,
    D_stride_channel,
    bias_stride_head,
    bias_stride_channel,
    seed,
    NHEADS: tl.constexpr,
    HEADDIM: tl.constexpr,
    DSTATE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence, head, m = _place(NHEADS, HEADDIM, BLOCK_M)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    if slot == _PAD:
        return
    i = sequence.to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    in_m, in_n = m < HEADDIM, n < DSTATE
    mask = in_m[:, None] & in_n[None, :]
    row = head * HEADDIM + m
    group = head // PER_GROUP * DSTATE + n
    states = state_ptr + slot * state_stride + row[:, None] * DSTATE + n[None, :]
    state = tl.load(states, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + i * x_stride + row, mask=in_m, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + i * B_stride + group, mask=in_n, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + i * C_stride + group, mask=in_n, other=0.0).to(tl.float32)
    dt_row = dt_ptr + i * dt_stride + head * dt_stride_head
    dt = tl.load(dt_row + m * dt_stride_channel, mask=in_m, other=0.0).to(tl.float32)
    bias = 0.0
    if bias_ptr is not None:
        bias_row = bias_ptr + head * bias_stride_head
        bias = tl.load(bias_row + m * bias_stride_channel, mask=in_m, other=0.0)
    dt += bias
    if SOFTPLUS:
        dt = softplus(dt)
    A_rows = A_ptr + head * A_stride_head + m[:, None] * A_stride_channel
    A = tl.load(A_rows + n[None, :] * A_stride_state, mask=mask, other=0.0)
    state, y = _advance(state, tl.exp(dt[:, None] * A), dt, x, B, C)
    if D_ptr is not None:
        D_row = D_ptr + head * D_stride_head
        y += tl.load(D_row + m * D_stride_channel, mask=in_m, other=0.0) * x
    if z_ptr is not None:
        y *= silu(tl.load(z_ptr + i * z_stride + row, mask=in_m, other=0.0).to(tl.float32))
    _store_state(states, state, mask, seed, slot, row)
    tl.store(out_ptr + i * out_stride + row, round_to(y, out_ptr.dtype.element_ty), mask=in_m)


@triton.jit
def state_steps_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    out_ptr,
    A_ptr,
    D_ptr,
    bias_ptr,
    slots_ptr,
    kept_ptr,
    kept_slots_ptr,
    parents_ptr,
    state_stride,
    x_stride,
    x_step,
    dt_stride,
    dt_step,
    B_stride,
    B_step,
    C_stride,
    C_step,
    z_stride,
    z_step,
    out_stride,
    out_step,
    kept_stride,
    parents_stride,
    dt_low,
    dt_high,
    seed,
    num_steps,
    NHEADS: tl.constexpr,
    HEADDIM: tl.constexpr,
    DSTATE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WRITE_STATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """kept_ptr: states after each step, or None; parents_ptr: only with kept_ptr."""
    sequence, head, m = _place(NHEADS, HEADDIM, BLOCK_M)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    if slot == _PAD:
        return
    i = sequence.to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    in_m, in_n = m < HEADDIM, n < DSTATE
    mask = in_m[:, None] & in_n[None, :]
    row = head * HEADDIM + m
    group = head // PER_GROUP * DSTATE + n
    tile = row[:, None] * DSTATE + n[None, :]
    STATE_SIZE: tl.constexpr = NHEADS * HEADDIM * DSTATE
    states = state_ptr + slot * state_stride + tile
    state = tl.load(states, mask=mask, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + head)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + head)
    is_kept = False
    if kept_ptr is not None:
        kept_slot = tl.load(kept_slots_ptr + sequence).to(tl.int64)
        is_kept = kept_slot != _PAD
        kept = kept_ptr + kept_slot * kept_stride + tile
    for t in range(num_steps):
        if parents_ptr is not None:  # noqa: SIM102
            if is_kept & (t > 0):
                parent = tl.load(parents_ptr + i * parents_stride + t).to(tl.int64)
                if parent < 0:
                    state = tl.load(states, mask=mask, other=0.0).to(tl.float32)
                else:
                    stored = kept + parent * STATE_SIZE
                    state = tl.load(stored, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + i * x_stride + t * x_step + row, mask=in_m, other=0.0).to(tl.float32)
        B_row = B_ptr + i * B_stride + t * B_step
        C_row = C_ptr + i * C_stride + t * C_step
        B = tl.load(B_row + group, mask=in_n, other=0.0).to(tl.float32)
        C = tl.load(C_row + group, mask=in_n, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + i * dt_stride + t * dt_step + head).to(tl.float32)
        dt = _processed(dt, bias, dt_low, dt_high, SOFTPLUS)
        state, y = _advance(state, tl.exp(dt * A), dt, x, B, C)
        if D_ptr is not None:
            y += tl.load(D_ptr + head) * x
        if z_ptr is not None:
            z_row = z_ptr + i * z_stride + t * z_step
            y *= silu(tl.load(z_row + row, mask=in_m, other=0.0).to(tl.float32))
        out_row = out_ptr + i * out_stride + t * out_step
        tl.store(out_row + row, round_to(y, out_ptr.dtype.element_ty), mask=in_m)
        if kept_ptr is not None:
            if is_kept:
                after = kept + tl.cast(t, tl.int64) * STATE_SIZE
                tl.store(after, round_to(state, kept_ptr.dtype.element_ty), mask=mask)
            if parents_ptr is not None:
                # Another thread of this program may be the one to read the element again.
                tl.debug_barrier()
    if WRITE_STATE:
        _store_state(states, state, mask, seed, slot, row)
