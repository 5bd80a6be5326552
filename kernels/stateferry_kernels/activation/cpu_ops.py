"""MLP activations on the CPU: native/src/activation.h. Arguments as in ``activation.torch_ops``."""

from __future__ import annotations

import torch

from stateferry_kernels.guards import check_rows
from stateferry_kernels.native.library import native
from stateferry_kernels.native.structs import ACTIVATION_ARGS, CAST_ARGS, DTYPE_CODES

_SILU_MUL, _RELU2 = range(2)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both (rows, n)."""
    size, dtype = gate.shape, gate.dtype
    strides, up_strides = gate.stride(), up.stride()
    plain = strides[-1:] == up_strides[-1:] == (1,)
    if not (plain and len(size) == 2 and size == up.shape and dtype is up.dtype):
        check_rows("gate", gate)
        check_rows("up", up, like=gate)
    return _run(gate, strides[0], up.data_ptr(), up_strides[0], _SILU_MUL)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """relu(x) ** 2, x (rows, n)."""
    strides = x.stride()
    if len(strides) != 2 or strides[1] != 1:
        check_rows("x", x)
    return _run(x, strides[0], 0, 0, _RELU2)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (rows, n) fp32 or bf16, rounded to ``dtype``; x itself where it has that already."""
    if x.dtype is dtype:
        return x
    strides = x.stride()
    if len(strides) != 2 or strides[1] != 1 or x.dtype not in DTYPE_CODES:
        check_rows("x", x)
    if dtype not in DTYPE_CODES:
        raise TypeError(f"{dtype}, expected {' or '.join(map(str, DTYPE_CODES))}")
    num_rows, n = x.shape
    out = torch.empty(num_rows, n, dtype=dtype)
    packed = CAST_ARGS.pack(
        x.data_ptr(),
        strides[0],
        DTYPE_CODES[x.dtype],
        num_rows,
        n,
        out.data_ptr(),
        DTYPE_CODES[dtype],
    )
    native().cast(packed, torch.get_num_threads())
    return out


def _run(x: torch.Tensor, stride: int, other: int, other_stride: int, kind: int) -> torch.Tensor:
    dtype, (num_rows, n) = x.dtype, x.shape
    if dtype not in DTYPE_CODES:
        check_rows("gate" if kind == _SILU_MUL else "x", x)
    out = torch.empty(num_rows, n, dtype=dtype)
    packed = ACTIVATION_ARGS.pack(
        x.data_ptr(),
        stride,
        other,
        other_stride,
        num_rows,
        n,
        DTYPE_CODES[dtype],
        kind,
        out.data_ptr(),
    )
    native().activation(packed, torch.get_num_threads())
    return out
