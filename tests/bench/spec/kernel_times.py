"""One layer's verification on this processor, by draft, against a decode row and against others'
way: a state written for each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.kernels.bench_verify import STEPS, TREE, bench_verify
from bench.kernels.rows import OURS
from bench.kernels.workload import Shape, Workload

NHEADS = (24, 128)
TOKENS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, slots=True)
class KernelRatio:
    """Times of ours and of the way with a state per token, over ours for one row."""

    nheads: int
    draft: str
    ours: float
    per_step: float


def kernel_ratios(*, quick: bool, threads: int, seed: int) -> list[KernelRatio]:
    """All drafts and both numbers of heads, one sequence."""
    torch.set_num_threads(threads)
    made = []
    for nheads in NHEADS[: 1 if quick else None]:
        workload = Workload(
            shape=Shape(nheads=nheads),
            seed=seed,
            threads=threads,
            verify_batches=(1,),
            verify_tokens=TOKENS,
            rounds=2 if quick else 7,
            group_s=0.5 if quick else 2.5,
        )
        with torch.inference_mode():
            rows, _ = bench_verify(workload)
        seconds = {(row.case, row.contender): row.seconds or 0.0 for row in rows}
        one = seconds["chain 1, batch 1", OURS]
        for draft in (*(f"chain {t}" for t in TOKENS), f"tree {len(TREE)}"):
            case = f"{draft}, batch 1"
            ours, per_step = seconds[case, OURS], seconds[case, STEPS]
            made.append(KernelRatio(nheads, draft, ours / one, per_step / one))
    return made
