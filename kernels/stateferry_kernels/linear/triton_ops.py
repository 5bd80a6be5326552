"""Projections on a GPU, by the vendor's matrix product.

A library picks its kernel by the shape of the product, so a row's bits can depend on how many rows
share the call. What holds here:

- Calls of 1 to ROW_BUCKET rows run as ROW_BUCKET rows: one shape, hence one kernel, for every
  decode batch of that size. On the same device and software a row's bits then depend on neither
  the number of rows nor their values, as far as the kernel treats all its rows alike; kernels that
  split the sum differently from tile to tile would not, which ``rows_are_alike`` tries out.
- Larger calls run as the next multiple of ROW_BUCKET. Nothing is promised between two such sizes,
  and so nothing between a prefill and a decode.
- ``linear_in_tiles`` makes no call of any other size than ROW_BUCKET rows, whatever the length:
  prefill and decode then agree where ``rows_are_alike``, at the price of reading the weight once
  per ROW_BUCKET rows.

torch's switches for reduced precision (TF32, bf16 sums of split products) are left as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Reading a weight takes as long as multiplying this many rows with it, and longer than fewer.
ROW_BUCKET = 64


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (num_rows, in) @ weight (out, in).T + bias: bits as described above."""
    num_rows = x.shape[0]
    if not num_rows:
        return x.new_empty((0, weight.shape[0]))
    return F.linear(_whole_buckets(x), weight, bias)[:num_rows]


def linear_in_tiles(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same product by calls of ROW_BUCKET rows."""
    num_rows = x.shape[0]
    out = x.new_empty((num_rows + -num_rows % ROW_BUCKET, weight.shape[0]))
    padded = _whole_buckets(x)
    for first in range(0, len(out), ROW_BUCKET):
        tile = slice(first, first + ROW_BUCKET)
        out[tile] = F.linear(padded[tile], weight, bias)
    return out[:num_rows]


def rows_are_alike(weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether a row of a call of ROW_BUCKET rows has the same bits in every place and beside other
    rows, tried out with a few. Waits for the device: for the start of a worker."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(ROW_BUCKET, weight.shape[1], generator=generator)
    rows = drawn.to(weight.dtype).to(weight.device)
    product = F.linear(rows, weight, bias)
    for shift in (1, ROW_BUCKET // 2 + 3):
        turned = F.linear(rows.roll(shift, 0), weight, bias)
        if not torch.equal(turned.roll(-shift, 0), product):
            return False
    alone = torch.zeros_like(rows)
    alone[5] = rows[5]
    return torch.equal(F.linear(alone, weight, bias)[5], product[5])


def _whole_buckets(x: torch.Tensor) -> torch.Tensor:
    short = -x.shape[0] % ROW_BUCKET
    return F.pad(x, (0, 0, 0, short)) if short else x
