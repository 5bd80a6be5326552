"""The chunk scan of a prefill, against the peers' and against itself with more snapshots."""

from __future__ import annotations

import torch

from bench.gpu.peers import Peers
from bench.gpu.rows import OURS, Row, rows_of
from bench.gpu.scan_peers import scan_peers
from bench.gpu.timing import Call, repeated, times_us
from bench.gpu.workload import (
    DEVICE,
    DTYPE,
    Inputs,
    Shape,
    extend_plan,
    make_inputs,
    make_state,
)
from stateferry_kernels.ssd.triton_ops import chunk_scan

LENGTHS = {
    "1 x 8k": [8192],
    "8 mixed, 8k": [1536, 512, 1000, 24, 2048, 777, 1271, 1024],
    "1 x 64k": [65536],
}
GRID, COARSE = 64, 128
# Two bf16 roundings of outputs and of the weights of products.
_TOLERANCE = 2e-2


def bench_scan(shape: Shape, case: str, peers: Peers) -> list[Row]:
    lengths = LENGTHS[case]
    inputs = make_inputs(shape, sum(lengths))
    others = scan_peers(peers, inputs.named(), lengths, shape.chunk, torch.float32)
    ours, out = _ours(shape, inputs, lengths, GRID, "none", torch.float32)
    ours()
    for name, run in others.items():
        error = _relative_error(run(), out)
        if not error < _TOLERANCE:
            raise ValueError(f"{name}, {shape.name}, {case}: {error:.1e} from ours")
    coarse, _ = _ours(shape, inputs, lengths, COARSE, "none", torch.float32)
    times = 2 if sum(lengths) > 10_000 else 5
    contenders: dict[str, list[Call]] = {
        OURS: repeated(ours, times),
        f"{OURS}, grid {COARSE}": repeated(coarse, times),
    }
    contenders |= {name: repeated(run, times) for name, run in others.items()}
    return rows_of("chunk scan", shape.name, case, times_us(contenders))


def bench_snapshots(shape: Shape, grid: int, state_dtype: torch.dtype) -> list[Row]:
    """8k tokens with none, one and every grid point kept beside the last."""
    lengths = LENGTHS["1 x 8k"]
    inputs = make_inputs(shape, sum(lengths))
    contenders = {
        snapshots: repeated(_ours(shape, inputs, lengths, grid, snapshots, state_dtype)[0], 5)
        for snapshots in ("none", "one", "every")
    }
    name = "fp32" if state_dtype == torch.float32 else "bf16"
    times = {f"{OURS}, {key}": us for key, us in times_us(contenders).items()}
    case = f"grid {grid}, {name} states"
    return rows_of("snapshots", shape.name, case, times, ours=f"{OURS}, none")


def _ours(
    shape: Shape,
    inputs: Inputs,
    lengths: list[int],
    grid: int,
    snapshots: str,
    state_dtype: torch.dtype,
) -> tuple[Call, torch.Tensor]:
    plan = extend_plan(lengths, grid, snapshots)
    slots = 1 + max(write.state_slot for s in plan.sequences for write in s.boundaries)
    state = make_state(shape, slots, len(lengths), grid, state_dtype)
    out = torch.empty((sum(lengths), shape.nheads, shape.headdim), device=DEVICE, dtype=DTYPE)

    def run() -> None:
        chunk_scan(
            inputs.x,
            inputs.dt,
            inputs.B,
            inputs.C,
            params=inputs.params,
            plan=plan,
            state=state,
            out=out,
        )

    return run, out


def _relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a[:4096].double(), b[:4096].double()
    return float((a - b).norm() / b.norm())
