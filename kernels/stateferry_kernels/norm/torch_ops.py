"""Root-mean-square norms in torch operations; statistics in fp32."""

from __future__ import annotations

import torch

from stateferry_kernels.elementwise import silu


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (num_rows, dim) / rms(x) * weight (dim,), in the weight's dtype."""
    values = x.float()
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return weight * (values * scale).to(weight.dtype)


def gated_rms_norm(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> torch.Tensor:
    """Gate, then norm each group of ``group_size`` features. x, z (num_rows, dim), weight (dim,).

    Source: the gated norm of the Mamba-2 paper, as transformers' Mamba2 evaluates it.
    """
    return _group_norm(x.float() * silu(z.float()), weight, eps, group_size, x.dtype)


def norm_then_gate(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> torch.Tensor:
    """Norm each group, then gate: models trained with ``norm_before_gate``. Shapes as above."""
    normed = _group_norm(x.float(), weight, eps, group_size, x.dtype)
    return (normed.float() * silu(z.float())).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual, both (num_rows, dim), in the residual's dtype; and its norm, in the weight's.
    Returns (normed, summed)."""
    summed = (x.float() + residual.float()).to(residual.dtype)
    return rms_norm(summed, weight, eps), summed


def _group_norm(
    values: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    num_rows, dim = values.shape
    if dim % group_size:
        raise ValueError(f"{dim} features do not divide into groups of {group_size}")
    groups = values.reshape(num_rows, dim // group_size, group_size)
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return weight * (groups * scale).view(num_rows, dim).to(dtype)
