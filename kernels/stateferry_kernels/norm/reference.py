"""The definitions of the norms, in any float dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (num_rows, dim), weight (dim,)."""
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def gated_rms_norm_reference(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> torch.Tensor:
    """Gate, then norm each group of ``group_size`` features. x, z (num_rows, dim), weight (dim,).

    Source: ``RMSNormGated`` of mamba_ssm with ``norm_before_gate=False``.
    """
    groups = (x * F.silu(z)).view(len(x), -1, group_size)
    return rms_norm_reference(groups, weight.view(-1, group_size), eps).flatten(-2)


def norm_then_gate_reference(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> torch.Tensor:
    """Norm each group, then gate: ``norm_before_gate=True`` of mamba_ssm. Shapes as above."""
    groups = x.reshape(len(x), -1, group_size)
    normed = rms_norm_reference(groups, weight.view(-1, group_size), eps).flatten(-2)
    return normed * F.silu(z)
