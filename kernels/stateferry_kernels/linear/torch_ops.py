"""A projection in torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stateferry_kernels.ssd.grid_form import MIN_ROWS


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (num_rows, in) @ weight (out, in).T + bias: a row's bits do not depend on num_rows.

    Short batches are padded: with few rows the CPU's library sums in another order.
    """
    num_rows = x.shape[0]
    if num_rows >= MIN_ROWS:
        return F.linear(x, weight, bias)
    padded = F.pad(x, (0, 0, 0, MIN_ROWS - num_rows))
    return F.linear(padded, weight, bias)[:num_rows]
