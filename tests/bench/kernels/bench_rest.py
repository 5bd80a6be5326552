"""The convolution and the gated norm against torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.kernels.inputs import BF16, FP32, Source
from bench.kernels.measure import Local, expect_same, interleave
from bench.kernels.rows import OURS, Row, name_of, rows_of
from bench.kernels.workload import Workload
from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.plans import BoundaryWrite, DecodePlan, ExtendPlan, ExtendSequence

TORCH = "torch"
_EPS = 1e-5


def bench_rest(w: Workload) -> list[Row]:
    rows: list[Row] = []
    for dtype in (FP32, BF16):
        rows += _conv_extend(w, dtype)
        for batch in w.batches:
            rows += _conv_row(w, dtype, batch)
        for num_rows in (*w.batches, w.main_length):
            rows += _gated_norm(w, dtype, num_rows)
    return rows


def _conv_extend(w: Workload, dtype: torch.dtype) -> list[Row]:
    s, length = w.shape, w.main_length
    source, kernels = Source(s, w.seed), select_kernels("cpu")
    conv = source.conv(dtype)
    xBC = source.normal(length, s.conv_dim, dtype=dtype)
    last = length // s.grid
    layer = source.layer(last + 1, 1, dtype, FP32)
    writes = tuple(BoundaryWrite(point * s.grid, point) for point in range(1, last + 1))
    plan = ExtendPlan(s.grid, (ExtendSequence(0, length, 0, 0, writes),))
    out = torch.empty_like(xBC)

    def ours(_: int) -> torch.Tensor:
        kernels.causal_conv1d_extend(xBC, conv=conv, plan=plan, state=layer, out=out)
        return out

    def theirs(_: int) -> torch.Tensor:
        columns = F.conv1d(
            xBC.T[None], conv.weight[:, None], conv.bias, padding=s.d_conv - 1, groups=s.conv_dim
        )
        return F.silu(columns[0, :, :length]).T

    expect_same("causal_conv1d_extend", ours(0), theirs(0))
    times = interleave(
        {OURS: Local(ours), TORCH: Local(theirs)}, w.rounds, w.sample_s, w.group_s / 4
    )
    work = 2e-9 * xBC.nbytes
    return rows_of("conv1d_extend", f"{length} tokens", name_of(dtype), times, work, "GB/s")


def _conv_row(w: Workload, dtype: torch.dtype, batch: int) -> list[Row]:
    """Against the usual rolling window of d_conv columns, which a step shifts by one."""
    s = w.shape
    source, kernels = Source(s, w.seed), select_kernels("cpu")
    conv = source.conv(dtype)
    xBC = source.normal(batch, s.conv_dim, dtype=dtype)
    fill = s.grid // 2
    layers = [source.layer(batch + 1, batch, dtype, FP32) for _ in range(min(w.layers, 8))]
    plan = DecodePlan(s.grid, tuple(range(1, batch + 1)), tuple(range(batch)), (fill,) * batch)
    out = torch.empty_like(xBC)
    windows = [
        layer.tail_xBC[:, fill - s.d_conv : fill].transpose(1, 2).contiguous() for layer in layers
    ]

    def ours(number: int) -> torch.Tensor:
        kernels.causal_conv1d_row(xBC, conv=conv, plan=plan, state=layers[number], out=out)
        return out

    def theirs(number: int) -> torch.Tensor:
        window = windows[number]
        window.copy_(torch.roll(window, -1, -1))
        window[:, :, -1] = xBC
        columns = (window.float() * conv.weight.float()).sum(-1)
        return F.silu(columns + conv.bias.float()).to(dtype)

    expect_same("causal_conv1d_row", ours(0), theirs(0))
    times = interleave(
        {OURS: Local(ours, len(layers)), TORCH: Local(theirs, len(layers))},
        w.rounds,
        w.sample_s,
        w.group_s / 4,
    )
    # The window read, a column in and one out.
    work = 1e-9 * xBC.nbytes * (s.d_conv + 1)
    return rows_of("conv1d_row", f"batch {batch}", name_of(dtype), times, work, "GB/s")


def _gated_norm(w: Workload, dtype: torch.dtype, num_rows: int) -> list[Row]:
    s = w.shape
    source, kernels = Source(s, w.seed), select_kernels("cpu")
    x, z = (source.normal(num_rows, s.d_inner, dtype=dtype) for _ in range(2))
    weight = source.normal(s.d_inner, dtype=dtype)
    group_size = s.d_inner // s.ngroups

    def ours(_: int) -> torch.Tensor:
        return kernels.gated_rms_norm(x, z, weight, _EPS, group_size)

    def theirs(_: int) -> torch.Tensor:
        gated = (x.float() * F.silu(z.float())).view(num_rows, s.ngroups, group_size)
        normed = F.rms_norm(gated, (group_size,), eps=_EPS).view(x.shape)
        return (normed * weight.float()).to(dtype)

    expect_same("gated_rms_norm", ours(0), theirs(0))
    times = interleave(
        {OURS: Local(ours), TORCH: Local(theirs)}, w.rounds, w.sample_s, w.group_s / 4
    )
    work = 3e-9 * x.nbytes
    return rows_of("gated_rms_norm", f"{num_rows} rows", name_of(dtype), times, work, "GB/s")
