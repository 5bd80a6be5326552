"""Root-mean-square norms on the CPU: native/src/norm.h. Arguments as in ``norm.torch_ops``."""

from __future__ import annotations

import torch

from stateferry_kernels.guards import check_tensor
from stateferry_kernels.layer_state import ACTIVATION_DTYPES
from stateferry_kernels.native.library import native
from stateferry_kernels.native.structs import DTYPE_CODES

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


def _norm(
    x: torch.Tensor,
    z: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    kind: int,
) -> torch.Tensor:
    if x.dim() != 2:
        raise ValueError(f"x: {x.dim()} dimensions, expected 2")
    num_rows, dim = x.shape
    check_tensor("weight", weight, (dim,), ACTIVATION_DTYPES)
    if x.dtype not in DTYPE_CODES:
        raise TypeError(f"x: {x.dtype}, expected {' or '.join(map(str, DTYPE_CODES))}")
    if z is not None:
        check_tensor("z", z, (num_rows, dim), (x.dtype,))
        z = z if dim == 1 or z.stride(1) == 1 else z.contiguous()
    if not group_size or dim % group_size:
        raise ValueError(f"{dim} features do not divide into groups of {group_size}")
    x = x if dim == 1 or x.stride(1) == 1 else x.contiguous()
    weight = weight.contiguous()
    out = torch.empty((num_rows, dim), dtype=weight.dtype)
    native().norm(
        x.data_ptr(),
        x.stride(0),
        DTYPE_CODES[x.dtype],
        0 if z is None else z.data_ptr(),
        0 if z is None else z.stride(0),
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        eps,
        num_rows,
        dim,
        group_size,
        kind,
        out.data_ptr(),
        dim,
        torch.get_num_threads(),
    )
    return out
