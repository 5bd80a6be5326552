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
def _normed(values, eps, SIZE: tl.constexpr):
    mean_square = tl.sum(values * values, axis=0) / SIZE
    return values / tl.sqrt(mean_square + eps)


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
    values = _normed(values, eps, GROUP_SIZE)
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


@triton.jit
def _add_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    summed_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    values = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0)
    summed = round_to(values + residual.to(tl.float32), summed_ptr.dtype.element_ty)
    tl.store(summed_ptr + row * SIZE + column, summed, mask=mask)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    normed = _normed(summed.to(tl.float32), eps, SIZE)
    normed = round_to(normed, weight_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(out_ptr + row * SIZE + column, round_to(normed, out_ptr.dtype.element_ty), mask=mask)


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


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual, both (num_rows, dim), in the residual's dtype; and its norm, in the weight's,
    with the bits of ``rms_norm``. Returns (normed, summed)."""
    num_rows, dim = x.shape
    _check_like("residual", residual, x)
    if weight.shape != (dim,):
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected {(dim,)}")
    summed = torch.empty((num_rows, dim), dtype=residual.dtype, device=x.device)
    normed = torch.empty((num_rows, dim), dtype=weight.dtype, device=x.device)
    if normed.numel():
        x, residual = _packed(x), _packed(residual)
        block = triton.next_power_of_2(dim)
        _add_norm_kernel[(num_rows,)](
            x,
            residual,
            weight.contiguous(),
            summed,
            normed,
            x.stride(0),
            residual.stride(0),
            eps,
            SIZE=dim,
            BLOCK=block,
            num_warps=_num_warps(block),
        )
    return normed, summed


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
    if z is not None:
        _check_like("z", z, x)
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
        num_warps=_num_warps(block),
    )
    return out


def _num_warps(block: int) -> int:
    return min(8, max(1, block // 512))


def _check_like(name: str, rows: torch.Tensor, x: torch.Tensor) -> None:
    if rows.shape != x.shape:
        raise ValueError(f"{name}: shape {tuple(rows.shape)}, expected {tuple(x.shape)}")


def _packed(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()
