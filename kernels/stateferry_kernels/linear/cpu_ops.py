"""A projection on the CPU: native/src/linear.h."""

from __future__ import annotations

import torch

from stateferry_kernels.guards import check_tensor
from stateferry_kernels.layer_state import ACTIVATION_DTYPES
from stateferry_kernels.native.library import native
from stateferry_kernels.native.structs import DTYPE_CODES, LINEAR_ARGS


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (num_rows, in) @ weight (out, in).T + bias, all of one dtype, fp32 or bf16; under fp32 the
    weight may be bf16, which is read in half the time.

    A row's bits do not depend on num_rows. Sums in fp32. Raises TypeError, ValueError.
    """
    dtype, size, table = x.dtype, x.shape, weight.shape
    narrow = weight.dtype
    fine = (
        len(size) == len(table) == 2
        and size[1] == table[1]
        and (dtype is narrow or narrow is torch.bfloat16)
        and dtype in DTYPE_CODES
        and weight.is_contiguous()
    )
    if not fine:
        _refuse(x, weight)
    address = 0
    if bias is not None:
        check_tensor("bias", bias, (table[0],), (dtype,))
        bias = bias.contiguous()
        address = bias.data_ptr()
    stride, inner = x.stride()
    if inner != 1 and size[1] != 1:
        x = x.contiguous()
        stride = size[1]
    # Sizes one by one: as a tuple they take half a microsecond more.
    out = torch.empty(size[0], table[0], dtype=dtype)
    packed = LINEAR_ARGS.pack(
        x.data_ptr(),
        stride,
        size[0],
        weight.data_ptr(),
        address,
        size[1],
        table[0],
        out.data_ptr(),
        DTYPE_CODES[dtype],
        DTYPE_CODES[narrow],
    )
    native().linear(packed, torch.get_num_threads())
    return out


def _refuse(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Say what is wrong with them."""
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"x and weight: {x.dim()} and {weight.dim()} dimensions, expected 2 each")
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"x: {x.dtype}, expected {' or '.join(map(str, ACTIVATION_DTYPES))}")
    check_tensor("weight", weight, (weight.shape[0], x.shape[1]), (x.dtype,))
    raise ValueError("weight: not contiguous")
