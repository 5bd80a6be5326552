# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Scalar functions for Triton kernels: fp32 in, fp32 out, the same bits for every lane and tile."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x):
    """2**x, zero where that is below the smallest normal number: one instruction, where keeping
    those takes four."""
    if INTERPRETED:
        # numpy's exp gives an element the same bits wherever it lies in a tile; its exp2 does not.
        return tl.exp(x * 0.6931471805599453)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x / (1.0 + exp2(-x * LOG2_E))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to a few units in the last place where the result is tiny, too: with
    e = exp(-|x|) it is max(x, 0) + log1p(e), and log1p(e) = 2 artanh(e / (2 + e)) as a series."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    series = series * q + 1.0
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x in another float dtype, to the nearest, ties to even: what a store converts to."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion is wrong where the mantissa overflows.
        bits = x.to(tl.uint32, bitcast=True)
        return _high_half(x, bits + 0x7FFF + ((bits >> 16) & 1))
    return x.to(dtype)


@triton.jit
def round_at_random(x, random_bits, dtype: tl.constexpr):
    """x in bf16 or fp16: up or down, with the chance that keeps the mean. random_bits: 16 random
    bits for each element, int32 or uint32.

    Added below the last bit that is kept, they carry into it as often as the rest of x is large.
    """
    bits = x.to(tl.uint32, bitcast=True)
    low = random_bits.to(tl.uint32, bitcast=True) & 0xFFFF
    if dtype == tl.bfloat16:
        return _high_half(x, bits + low)
    rounded = ((bits + (low >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
    # Below fp16's smallest normal number the values it holds are 2**-24 apart.
    steps = tl.floor(tl.abs(x) * 16777216.0 + low.to(tl.float32) / 65536.0) / 16777216.0
    rounded = tl.where(tl.abs(x) < 6.103515625e-05, tl.where(x < 0, -steps, steps), rounded)
    return tl.where(x == x, rounded, x).to(dtype)


@triton.jit
def _high_half(x, bits):
    """The upper 16 of the bits as a bf16, NaN where x is."""
    half = tl.where(x == x, bits >> 16, 0x7FC0)
    return half.to(tl.uint16).to(tl.bfloat16, bitcast=True)
