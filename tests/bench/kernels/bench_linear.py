"""Projections of few rows, weights from main memory, against torch."""

from __future__ import annotations

import math
from statistics import fmean

import torch
import torch.nn.functional as F

from bench.kernels.inputs import BF16, FP32, Source
from bench.kernels.measure import Local, expect_same, interleave
from bench.kernels.rows import OURS, Row, name_of, rows_of
from bench.kernels.workload import Workload
from stateferry_kernels.dispatch import select_kernels

TORCH = "torch linear"
# Up to here a call reads weights; above, it multiplies.
_SKINNY_ROWS = 16


def bench_linear(w: Workload) -> tuple[list[Row], dict[str, float]]:
    """The rows, and by dtype and number of rows the geometric mean over the shapes."""
    rows: list[Row] = []
    logs: dict[str, list[float]] = {}
    for dtype in (FP32, BF16):
        for inputs, outputs in w.linears:
            weights = _weights(w, inputs, outputs, dtype)
            for num_rows in w.linear_rows:
                if 2 * num_rows * inputs * outputs > w.linear_flops:
                    continue
                case_rows, speedup = _case(w, weights, num_rows)
                rows += case_rows
                logs.setdefault(f"{name_of(dtype)}_m{num_rows}", []).append(math.log(speedup))
    return rows, {name: math.exp(fmean(values)) for name, values in logs.items()}


def _weights(w: Workload, inputs: int, outputs: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Enough copies that none is in a cache when its turn comes again."""
    first = Source(w.shape, w.seed).normal(outputs, inputs) / math.sqrt(inputs)
    first = first.to(dtype)
    copies = max(2, math.ceil(w.weight_bytes / first.nbytes))
    return [first.clone() for _ in range(copies)]


def _case(w: Workload, weights: list[torch.Tensor], num_rows: int) -> tuple[list[Row], float]:
    outputs, inputs = weights[0].shape
    dtype = weights[0].dtype
    ours = select_kernels("cpu").linear
    x = Source(w.shape, w.seed + num_rows).normal(num_rows, inputs, dtype=dtype)
    expect_same("linear", ours(x, weights[0], None), F.linear(x, weights[0]))
    # Many rows are no question of where the weights are: one copy per call is enough.
    weights = weights if num_rows <= _SKINNY_ROWS else weights[:2]
    contenders = {
        OURS: Local(lambda i: ours(x, weights[i], None), len(weights)),
        TORCH: Local(lambda i: F.linear(x, weights[i]), len(weights)),
    }
    times = interleave(contenders, w.rounds, w.sample_s, w.group_s / 4)
    if num_rows <= _SKINNY_ROWS:
        work, unit = 1e-9 * weights[0].nbytes, "GB/s"
    else:
        work, unit = 2e-9 * num_rows * inputs * outputs, "GFLOP/s"
    case = f"{inputs} x {outputs}, M {num_rows}"
    return rows_of("linear", case, name_of(dtype), times, work, unit), times.speedup(OURS, TORCH)
