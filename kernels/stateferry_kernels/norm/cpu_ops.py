"""Root-mean-square norms on the CPU: native/src/norm.h. Arguments as in ``norm.torch_ops``."""

from __future__ import annotations

import torch

from stateferry_kernels.guards import check_tensor
from stateferry_kernels.layer_state import ACTIVATION_DTYPES
from stateferry_kernels.native.library import native
from stateferry_kernels.native.structs import ADD_NORM_ARGS, DTYPE_CODES, NORM_ARGS

_PLAIN, _GATE_THEN_NORM, _NORM_THEN_GATE = range(3)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (num_rows, dim) / rms(x) * weight (dim,), in the weight's dtype."""
    return _norm(x, None, weight, eps, x.shape[-1], _PLAIN)


def gated_rms_norm(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> torch.Tensor:
    """Gate, then norm each group of ``group_size`` features. x, z (num_rows, dim)."""
    return _norm(x, z, weight, eps, group_size, _GATE_THEN_NORM)


def norm_then_gate(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> torch.Tensor:
    """Norm each group, then gate. Shapes as above."""
    return _norm(x, z, weight, eps, group_size, _NORM_THEN_GATE)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual, both (num_rows, dim), in the residual's dtype; and its norm, in the weight's.
    Returns (normed, summed)."""
    code, num_rows, dim = _checked(x, weight)
    if residual.dtype not in DTYPE_CODES or residual.shape != x.shape:
        check_tensor("residual", residual, (num_rows, dim), ACTIVATION_DTYPES)
    x, x_stride = _packed(x)
    residual, residual_stride = _packed(residual)
    weight = weight.contiguous()
    summed = torch.empty(num_rows, dim, dtype=residual.dtype)
    out = torch.empty(num_rows, dim, dtype=weight.dtype)
    packed = ADD_NORM_ARGS.pack(
        x.data_ptr(),
        x_stride,
        code,
        residual.data_ptr(),
        residual_stride,
        DTYPE_CODES[residual.dtype],
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        eps,
        num_rows,
        dim,
        summed.data_ptr(),
        out.data_ptr(),
    )
    native().add_norm(packed, torch.get_num_threads())
    return out, summed


def _norm(
    x: torch.Tensor,
    z: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    kind: int,
) -> torch.Tensor:
    code, num_rows, dim = _checked(x, weight)
    z_address = z_stride = 0
    if z is not None:
        if z.dtype is not x.dtype or z.shape != x.shape:
            check_tensor("z", z, (num_rows, dim), (x.dtype,))
        z, z_stride = _packed(z)
        z_address = z.data_ptr()
    if not group_size or dim % group_size:
        raise ValueError(f"{dim} features do not divide into groups of {group_size}")
    x, x_stride = _packed(x)
    weight = weight.contiguous()
    # Sizes one by one: as a tuple they take half a microsecond more.
    out = torch.empty(num_rows, dim, dtype=weight.dtype)
    packed = NORM_ARGS.pack(
        x.data_ptr(),
        x_stride,
        code,
        z_address,
        z_stride,
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        eps,
        num_rows,
        dim,
        group_size,
        kind,
        out.data_ptr(),
    )
    native().norm(packed, torch.get_num_threads())
    return out


def _checked(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, int, int]:
    """The dtype's code and the size of x. Raises TypeError, ValueError."""
    size, code = x.shape, DTYPE_CODES.get(x.dtype)
    if len(size) != 2:
        raise ValueError(f"x: {x.dim()} dimensions, expected 2")
    if weight.shape != size[1:] or weight.dtype not in DTYPE_CODES:
        check_tensor("weight", weight, (size[1],), ACTIVATION_DTYPES)
    if code is None:
        raise TypeError(f"x: {x.dtype}, expected {' or '.join(map(str, DTYPE_CODES))}")
    return code, size[0], size[1]


def _packed(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """rows (n, dim), copied unless only the first dimension is strided; and that stride."""
    first, inner = rows.stride()
    if inner == 1 or rows.shape[1] == 1:
        return rows, first
    rows = rows.contiguous()
    return rows, rows.stride(0)
