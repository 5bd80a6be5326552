"""The chunk scan against matmul, block matmuls in torch, and vLLM."""

from __future__ import annotations

from typing import Any

import torch

from bench.kernels import torch_peers
from bench.kernels.ceilings import matmul, matmul_flops, matmul_name
from bench.kernels.inputs import BF16, FP32, Source
from bench.kernels.measure import Contender, Local, expect_same, interleave
from bench.kernels.rows import OURS, Row, absent, name_of, rows_of
from bench.kernels.vllm_link import VLLM, VllmLink
from bench.kernels.workload import Workload
from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.plans import BoundaryWrite, ExtendPlan, ExtendSequence

LAST_ONLY = f"{OURS}, last boundary only"
TORCH_BACKEND = "torch backend"


def bench_scan(
    w: Workload, vllm: VllmLink | None, matmul_size: int
) -> tuple[list[Row], dict[str, float]]:
    """The rows, and the ratios of fp32 at the main length. Ours writes every boundary in them,
    where the block matmuls and vLLM return the last state alone."""
    rows: list[Row] = []
    found: dict[str, float] = {}
    for dtype in (FP32, BF16):
        for length in w.lengths if dtype == FP32 else (w.main_length,):
            case_rows, ratios = _case(w, vllm, matmul_size, length, dtype)
            rows += case_rows
            if length == w.main_length and dtype == FP32:
                found = ratios
    return rows, found


def _case(
    w: Workload, vllm: VllmLink | None, matmul_size: int, length: int, dtype: torch.dtype
) -> tuple[list[Row], dict[str, float]]:
    source = Source(w.shape, w.seed)
    params, tokens = source.params(), source.tokens(length, dtype=dtype)
    last = length // w.shape.grid
    layer = source.layer(last + 1, 1, dtype, FP32)
    out = torch.empty_like(tokens["x"])
    at_end = torch.empty(0)

    def entry(scan: Any, first: int) -> Local:
        points = range(first, last + 1)
        writes = tuple(BoundaryWrite(point * w.shape.grid, point) for point in points)
        plan = ExtendPlan(w.shape.grid, (ExtendSequence(0, length, 0, 0, writes),))
        return Local(lambda _: scan(**tokens, params=params, plan=plan, state=layer, out=out))

    def blocks(chunk_size: int) -> Local:
        def call(_: int) -> None:
            nonlocal at_end
            at_end = torch_peers.chunk_scan(**tokens, params=params, chunk_size=chunk_size, out=out)

        return Local(call)

    contenders: dict[str, Contender] = {
        OURS: entry(select_kernels("cpu").chunk_scan, 1),
        LAST_ONLY: entry(select_kernels("cpu").chunk_scan, max(last, 1)),
        TORCH_BACKEND: entry(select_kernels("torch").chunk_scan, 1),
    }
    for chunk_size in w.chunk_sizes:
        contenders[f"torch block matmul, chunk {chunk_size}"] = blocks(chunk_size)
    expected = _run(contenders[OURS], out)
    boundaries = layer.ssm_state.clone()
    for name, contender in contenders.items():
        layer.ssm_state[1:] = 0
        expect_same(f"chunk_scan, out of {name}", expected, _run(contender, out))
        if name in (LAST_ONLY, TORCH_BACKEND):
            kept = slice(last if name == LAST_ONLY else 1, None)
            expect_same(f"states of {name}", boundaries[kept], layer.ssm_state[kept])
        elif name != OURS and length % w.shape.grid == 0:
            expect_same(f"state of {name}", boundaries[last], at_end)
    torch_names = [name for name in contenders if name not in (OURS, LAST_ONLY)]
    work = dict.fromkeys(contenders, 1e-9 * w.shape.scan_flops(length))
    if vllm:
        case = {"operation": "scan", "layers": 1, "A": params.A, "D": params.D, **tokens}
        contenders[VLLM], result = vllm.contender({**case, "dt_bias": params.dt_bias})
        expect_same(f"chunk_scan, out of {VLLM}", expected, result["out"])
        if length % w.shape.grid == 0:
            expect_same(f"state of {VLLM}", boundaries[last], result["state"])
        work[VLLM] = work[OURS]
    ceiling = matmul_name(matmul_size)
    contenders[ceiling] = matmul(matmul_size)
    work[ceiling] = 1e-9 * matmul_flops(matmul_size)

    times = interleave(contenders, w.rounds, w.sample_s, w.group_s)
    rows = rows_of("chunk_scan", f"{length} tokens", name_of(dtype), times, work, "GFLOP/s")
    # The matmul does other work: its row shows a rate, and the ratio of rates is reported apart.
    rows = [Row(**{**vars(r), "speedup": None}) if r.contender == ceiling else r for r in rows]
    if not vllm:
        rows.append(absent("chunk_scan", f"{length} tokens", name_of(dtype), VLLM))
    share = times.speedup(OURS, ceiling) * work[OURS] / work[ceiling]
    ratios = {
        "vs_matmul": share,
        "vs_matmul_last_boundary_only": times.speedup(LAST_ONLY, ceiling)
        * work[OURS]
        / work[ceiling],
        "vs_torch": times.speedup(OURS, times.fastest(torch_names)),
        "dense_flops_over_causal": w.shape.scan_flops_dense(length) / w.shape.scan_flops(length),
    }
    if vllm:
        ratios["vs_vllm"] = times.speedup(OURS, VLLM)
    return rows, ratios


def _run(contender: Contender, out: torch.Tensor) -> torch.Tensor:
    assert isinstance(contender, Local)
    out.fill_(torch.nan)
    contender.call(0)
    return out.clone()
