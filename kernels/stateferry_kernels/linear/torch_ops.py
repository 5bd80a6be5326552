"""A projection in torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stateferry_kernels.row_tile import whole_tiles


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (num_rows, in) @ weight (out, in).T + bias.

    A row's bits do not depend on num_rows, but for fp32 products of less than four outputs, where
    the library sums some sizes in an order that does (seen with 7 and 33 inputs).
    """
    num_rows = x.shape[0]
    if not num_rows:
        return x.new_empty((0, weight.shape[0]))
    product = F.linear(whole_tiles(x), weight, bias)
    return product if product.shape[0] == num_rows else product[:num_rows]
