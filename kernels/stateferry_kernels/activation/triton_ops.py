# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""MLP activations in Triton: fp32 inside, rounded once, an element at a time."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from stateferry_kernels.guards import check_rows
from stateferry_kernels.triton_math import round_to, silu

_BLOCK = 1024


@triton.jit
def _activate_kernel(
    x_ptr, up_ptr, out_ptr, x_stride, up_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """relu(x)^2, or silu(x) * up where there is an up."""
    NUM_BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    i = tl.program_id(0) % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = i < SIZE
    x = tl.load(x_ptr + row * x_stride + i, mask=mask, other=0.0).to(tl.float32)
    if up_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + i, mask=mask, other=0.0).to(tl.float32)
        y = silu(x) * up
    else:
        positive = tl.where(x < 0.0, 0.0, x)
        y = positive * positive
    tl.store(out_ptr + row * SIZE + i, round_to(y, out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both (rows, n) fp32 or bf16, in their dtype. Raises as check_rows does."""
    check_rows("gate", gate)
    check_rows("up", up, like=gate)
    return _activate(gate, up)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """relu(x) ** 2, x (rows, n) fp32 or bf16, in its dtype. Raises as check_rows does."""
    check_rows("x", x)
    return _activate(x, None)


def _activate(x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    num_rows, size = x.shape
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    if out.numel():
        _activate_kernel[(num_rows * math.ceil(size / _BLOCK),)](
            x, up, out, x.stride(0), 0 if up is None else up.stride(0), SIZE=size, BLOCK=_BLOCK
        )
    return out
