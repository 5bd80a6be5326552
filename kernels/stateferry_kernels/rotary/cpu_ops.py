"""Rotary position embedding on the CPU: native/src/activation.h. Arguments as in
``rotary.torch_ops``."""

from __future__ import annotations

import torch

from stateferry_kernels.guards import check_rotary_inputs
from stateferry_kernels.native.arguments import packed_heads
from stateferry_kernels.native.library import native
from stateferry_kernels.native.structs import DTYPE_CODES, ROTARY_ARGS


def rotary(
    x: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Rotate the first features of every head by its row's position. Raises IndexError on a
    position that is not in the tables."""
    size, table, dtype = x.shape, cos.shape, x.dtype
    fine = (
        len(size) == 3
        and len(table) == 2
        and table == sin.shape
        and positions.shape == size[:1]
        and 2 * table[1] <= size[2]
        and dtype in DTYPE_CODES
        and cos.dtype is sin.dtype is torch.float32
        and positions.dtype is torch.int64
    )
    if not fine:
        check_rotary_inputs(x, cos, sin, positions)
    x, stride = packed_heads(x)
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    out = torch.empty(*size, dtype=dtype)
    packed = ROTARY_ARGS.pack(
        x.data_ptr(),
        stride,
        *size,
        DTYPE_CODES[dtype],
        cos.data_ptr(),
        sin.data_ptr(),
        *table,
        positions.data_ptr(),
        out.data_ptr(),
    )
    if not native().rotary(packed, torch.get_num_threads()):
        raise IndexError(f"positions: one is not in [0, {table[0]}), the length of the tables")
    return out
