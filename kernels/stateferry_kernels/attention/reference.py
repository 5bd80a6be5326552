"""The definition of attention, in any float dtype."""

from __future__ import annotations

import torch


def attention_reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """One row over all it may see. q (num_heads, head_dim), keys and values
    (kv_heads, num_tokens, head_dim); heads [g * i, g * (i + 1)) share head i of them."""
    kv_heads, _, head_dim = keys.shape
    grouped = q.view(kv_heads, -1, head_dim)
    weights = torch.softmax(scale * grouped @ keys.mT, dim=-1)
    return (weights @ values).view(q.shape)
