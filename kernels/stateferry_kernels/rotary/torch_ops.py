"""Rotary position embedding in torch operations."""

from __future__ import annotations

import torch

from stateferry_kernels.guards import check_rotary_inputs
from stateferry_kernels.rotary.reference import rotary_reference


def rotary(
    x: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Rotate the first features of every head by its row's position.

    Args:     x (rows, heads, head_dim) fp32 or bf16; cos and sin (max_positions, rotary_dim / 2)
              fp32; positions (rows,) int64, each in [0, max_positions). Features i and
              i + rotary_dim / 2 make a pair; those from rotary_dim on stay.
    Returns:  a new tensor like x; computed in fp32, rounded once.
    Raises:   TypeError, ValueError on a mismatch; positions out of range as indexing does.
    """
    check_rotary_inputs(x, cos, sin, positions)
    return rotary_reference(x.float(), cos, sin, positions).to(x.dtype)
