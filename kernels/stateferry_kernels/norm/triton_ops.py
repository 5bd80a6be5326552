# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Root-mean-square norms in Triton: one program per row or group, statistics in fp32.

A program sees one group and nothing else, so its bits do not depend on the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stateferry_kernels.triton_math import round_to, silu


@triton.jit
def _group_norm_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    z_stride,
    out_stride,
    eps,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """GATE: none, before or after the norm."""
    row = (tl.program_id(0) // NUM_GROUPS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < GROUP_SIZE
    column += tl.program_id(0) % NUM_GROUPS * GROUP_SIZE
    values = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if GATE != "none":
        gate = silu(tl.load(z_ptr + row * z_stride + column, mask=mask, other=0.0).to(tl.float32))
    if GATE == "before":
        values = values * gate
    mean_square = tl.sum(values * values, axis=0) / GROUP_SIZE
    values = values / tl.sqrt(mean_square + eps)
    # The model's own order of roundings: normed, weighted and gated values are each rounded.
    if GATE == "none":
        values = round_to(values, weight_ptr.dtype.element_ty).to(tl.float32) * weight
    else:
        values = round_to(values, x_ptr.dtype.element_ty).to(tl.float32) * weight
    if GATE == "after":
        if weight_ptr.dtype.element_ty == x_ptr.dtype.element_ty:
            values = round_to(values, x_ptr.dtype.element_ty).to(tl.float32)
        values = values * gate
    tl.store(
        out_ptr + row * out_stride + column, round_to(values, out_ptr.dtype.element_ty), mask=mask
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (num_rows, dim) / rms(x) * weight (dim,), in the weight's dtype."""
    return _norm(x, None, weight, eps, x.shape[1], "none", weight.dtype)


def gated_rms_norm(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> torch.Tensor:
    """Gate, then norm each group of ``group_size`` features. x, z (num_rows, dim), weight (dim,).

    Returns the dtype that x and the weight promote to.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return _norm(x, z, weight, eps, group_size, "before", dtype)


def norm_then_gate(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> torch.Tensor:
    """Norm each group, then gate: models trained with ``norm_before_gate``. Shapes as above, the
    result in x's dtype."""
    return _norm(x, z, weight, eps, group_size, "after", x.dtype)


def _norm(
    x: torch.Tensor,
    z: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    gate: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    num_rows, dim = x.shape
    if weight.shape != (dim,):
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected {(dim,)}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z: shape {tuple(z.shape)}, expected {tuple(x.shape)}")
    if dim % group_size:
        raise ValueError(f"{dim} features do not divide into groups of {group_size}")
    out = torch.empty((num_rows, dim), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    x = _packed(x)
    z = None if z is None else _packed(z)
    block = triton.next_power_of_2(group_size)
    _group_norm_kernel[(num_rows * (dim // group_size),)](
        x,
        z,
        weight.contiguous(),
        out,
        x.stride(0),
        0 if z is None else z.stride(0),
        out.stride(0),
        eps,
        NUM_GROUPS=dim // group_size,
        GROUP_SIZE=group_size,
        GATE=gate,
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )
    return out


def _packed(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()
