"""The definition of the rotation, in any float dtype."""

from __future__ import annotations

import torch


def rotary_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Features i and i + half of a head are turned as the two coordinates of a point.

    x (rows, heads, head_dim), cos and sin (max_positions, half), positions (rows,).
    """
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * c - b * s, b * c + a * s, rest], dim=-1)
