"""The definition of the causal convolution, one row after the other, in any float dtype."""

from __future__ import annotations

import torch


def causal_conv1d_reference(
    xBC: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """One sequence from its start: xBC (seqlen, conv_dim), weight (conv_dim, d_conv).

    Returns silu(conv) of the same shape; columns before the start are zero.
    """
    d_conv = weight.shape[1]
    padded = torch.cat([xBC.new_zeros(d_conv - 1, xBC.shape[1]), xBC])
    rows = []
    for t in range(len(xBC)):
        total = (padded[t : t + d_conv] * weight.T).sum(0)
        if bias is not None:
            total = total + bias
        rows.append(total * torch.sigmoid(total))
    return torch.stack(rows) if rows else xBC.clone()
