"""A projection on the CPU by torch for many rows, by ours for few.

Which of the two computes a row depends on how many share the call, and so do the row's bits.
Torch's own rows depend on their number as well (see row_tile.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stateferry_kernels.linear import cpu_ops
from stateferry_kernels.native.library import processor_features

# From this many rows on, products take longer than reading the weight.
TORCH_FROM_ROWS = 48


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (num_rows, in) @ weight (out, in).T + bias: dtypes and errors as ``cpu_ops.linear``."""
    if not _torch_computes(x, weight, bias):
        return cpu_ops.linear(x, weight, bias)
    if weight.dtype is not x.dtype:
        weight = weight.to(x.dtype)
    return F.linear(x, weight, bias)


def torch_computes(dtype: torch.dtype) -> bool:
    """Whether many rows of this dtype are torch's: without instructions for bf16 products it is
    several times slower at them than ours."""
    return dtype is torch.float32 or (
        dtype is torch.bfloat16 and "avx512_bf16" in processor_features()
    )


def _torch_computes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """What does not fit each other is left to the operation that says so."""
    return (
        x.dim() == weight.dim() == 2
        and len(x) >= TORCH_FROM_ROWS
        and x.shape[1] == weight.shape[1]
        and torch_computes(x.dtype)
        and weight.dtype in (x.dtype, torch.bfloat16)
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype is x.dtype))
    )
