"""All groups of measurements, and the ratios that are reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.kernels.bench_linear import bench_linear
from bench.kernels.bench_rest import bench_rest
from bench.kernels.bench_row import bench_row
from bench.kernels.bench_scan import bench_scan
from bench.kernels.bench_step import bench_step
from bench.kernels.bench_verify import bench_verify
from bench.kernels.ceilings import measure_ceilings
from bench.kernels.rows import Row
from bench.kernels.vllm_link import VllmLink
from bench.kernels.workload import Workload


@dataclass
class Outcome:
    rows: list[Row] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)


def run_suite(
    workload: Workload, vllm: VllmLink | None, show: Callable[[list[Row]], None]
) -> Outcome:
    """Measure everything; ``show`` gets the rows of each group as they come. Raises Mismatch."""
    torch.set_num_threads(workload.threads)
    outcome = Outcome()

    def add(rows: list[Row]) -> None:
        outcome.rows += rows
        show(rows)

    with torch.inference_mode():
        rows, matmul_size = measure_ceilings(workload)
        add(rows)
        ceilings = {f"{row.contender}, {row.unit}": row.rate for row in rows}
        rows, step = bench_step(workload, vllm)
        add(rows)
        rows, row_ratios = bench_row(workload)
        add(rows)
        rows, scan = bench_scan(workload, vllm, matmul_size)
        add(rows)
        rows, linear = bench_linear(workload)
        add(rows)
        rows, verify = bench_verify(workload)
        add(rows)
        add(bench_rest(workload))

    skinny = {name: ratio for name, ratio in linear.items() if name.endswith(("_m1", "_m8"))}
    outcome.result = {
        "state_update_vs_stream": step["vs_stream"],
        "decode_row_vs_step": row_ratios,
        "chunk_scan_vs_matmul": scan["vs_matmul"],
        "state_update_vs_torch": step["vs_torch"],
        "chunk_scan_vs_torch": scan["vs_torch"],
        "skinny_linear_vs_torch": skinny,
        "state_update_vs_vllm": step["vs_vllm"] or None,
        "chunk_scan_vs_vllm": scan.get("vs_vllm"),
        "vllm": vllm.version if vllm else "not installed",
        "more": {
            "chunk_scan_vs_matmul_last_boundary_only": scan["vs_matmul_last_boundary_only"],
            "dense_flops_over_causal": scan["dense_flops_over_causal"],
            "linear_vs_torch": linear,
            "verify_vs_per_step_states": verify,
        },
        "ceilings": ceilings,
    }
    return outcome
