"""A projection on the CPU: native/src/linear.h."""

from __future__ import annotations

import torch

from stateferry_kernels.guards import check_tensor
from stateferry_kernels.layer_state import ACTIVATION_DTYPES
from stateferry_kernels.native.library import native
from stateferry_kernels.native.structs import DTYPE_CODES


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (num_rows, in) @ weight (out, in).T + bias, all of one dtype, fp32 or bf16.

    A row's bits do not depend on num_rows. Sums in fp32. Raises TypeError, ValueError.
    """
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"x and weight: {x.dim()} and {weight.dim()} dimensions, expected 2 each")
    num_rows, inputs = x.shape
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"x: {x.dtype}, expected {' or '.join(map(str, ACTIVATION_DTYPES))}")
    outputs = weight.shape[0]
    check_tensor("weight", weight, (outputs, inputs), (x.dtype,))
    if not weight.is_contiguous():
        raise ValueError("weight: not contiguous")
    if bias is not None:
        check_tensor("bias", bias, (outputs,), (x.dtype,))
        bias = bias.contiguous()
    x = x if inputs == 1 or x.stride(1) == 1 else x.contiguous()
    out = torch.empty((num_rows, outputs), dtype=x.dtype)
    native().linear(
        x.data_ptr(),
        x.stride(0),
        num_rows,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        inputs,
        outputs,
        out.data_ptr(),
        outputs,
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    return out
