# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Rotary position embedding in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stateferry_kernels.guards import check_rotary_inputs
from stateferry_kernels.triton_inputs import packed
from stateferry_kernels.triton_math import round_to


@triton.jit
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    out_ptr,
    x_stride,
    positions_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: the first 2 HALF features of each head are turned in pairs."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row * positions_stride)
    i = tl.arange(0, BLOCK)
    mask = i < HEADS * HEAD_DIM
    d = i % HEAD_DIM
    turned = mask & (d < 2 * HALF)
    own = tl.load(x_ptr + row * x_stride + i, mask=mask, other=0.0)
    pair = tl.where(d < HALF, i + HALF, i - HALF)
    other = tl.load(x_ptr + row * x_stride + pair, mask=turned, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + position * HALF + d % HALF, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + position * HALF + d % HALF, mask=turned, other=0.0)
    y = own.to(tl.float32) * cos + other * tl.where(d < HALF, -sin, sin)
    y = tl.where(turned, y, own.to(tl.float32))
    tl.store(
        out_ptr + row * (HEADS * HEAD_DIM) + i, round_to(y, out_ptr.dtype.element_ty), mask=mask
    )


def rotary(
    x: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Rotate the first features of every head by its row's position.

    Args, result and errors: as ``rotary.torch_ops.rotary``, but that positions past the tables are
    not noticed.
    """
    check_rotary_inputs(x, cos, sin, positions)
    x = packed(x)
    num_rows, heads, head_dim = x.shape
    out = torch.empty((num_rows, heads, head_dim), dtype=x.dtype, device=x.device)
    if out.numel():
        _rotary_kernel[(num_rows,)](
            x,
            cos.contiguous(),
            sin.contiguous(),
            positions,
            out,
            x.stride(0),
            positions.stride(0),
            HEADS=heads,
            HEAD_DIM=head_dim,
            HALF=cos.shape[1],
            BLOCK=triton.next_power_of_2(heads * head_dim),
            enable_fp_fusion=False,
        )
    return out
