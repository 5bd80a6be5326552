"""MLP activations in torch operations: fp32 inside, rounded once."""

from __future__ import annotations

import torch

from stateferry_kernels.activation.reference import relu2_reference
from stateferry_kernels.elementwise import silu
from stateferry_kernels.guards import check_rows


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both (rows, n) fp32 or bf16, in their dtype. Raises as check_rows does."""
    check_rows("gate", gate)
    check_rows("up", up, like=gate)
    return (silu(gate.float()) * up.float()).to(gate.dtype)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (rows, n) fp32 or bf16, rounded to ``dtype``; x itself where it has that already."""
    return x.to(dtype)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """relu(x) ** 2, x (rows, n) fp32 or bf16, in its dtype. Raises as check_rows does."""
    check_rows("x", x)
    return relu2_reference(x.float()).to(x.dtype)
