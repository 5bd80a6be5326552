"""Verification of drafts in grid form against per-step states, as others verify them."""

from __future__ import annotations

from typing import Any

import torch

from bench.kernels.inputs import FP32, Source
from bench.kernels.measure import Local, expect_same, interleave
from bench.kernels.rows import OURS, Row, name_of, rows_of
from bench.kernels.workload import Workload
from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.draft_plans import ROOT, VerifyPlan, VerifySequence
from stateferry_kernels.plans import CommitPlan

STEPS = "per-step states"
# Two candidates for each of the first tokens, then fewer: 16 nodes, 5 deep.
TREE = (ROOT, ROOT, 0, 0, 1, 1, 2, 2, 3, 4, 6, 6, 7, 8, 10, 11)


def bench_verify(w: Workload) -> tuple[list[Row], dict[str, float]]:
    """The rows, and how many times as fast ours is, by draft and batch."""
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    drafts = {f"chain {t}": (ROOT, *range(t - 1)) for t in w.verify_tokens}
    drafts[f"tree {len(TREE)}"] = TREE
    for batch in w.verify_batches:
        for name, parents in drafts.items():
            case_rows, ratio = _case(w, f"{name}, batch {batch}", batch, parents)
            rows += case_rows
            ratios[f"{name}, batch {batch}"] = ratio
    return rows, ratios


def _case(w: Workload, case: str, batch: int, parents: tuple[int, ...]) -> tuple[list[Row], float]:
    kernels, source, nodes = select_kernels("cpu"), Source(w.shape, w.seed), len(parents)
    grid, state_bytes = w.shape.grid, w.decode_bytes(batch)
    # Half a tail, as on average.
    tail_rows = grid // 2 - 1
    count = max(2, w.layers_of(state_bytes * (2 + nodes), share=0.25))
    params = source.params()
    layers = [source.layer(2 * batch + 1, batch, FP32, FP32) for _ in range(count)]
    pages = [source.drafts(batch, nodes, FP32) for _ in range(count)]
    s = w.shape
    kept = [torch.zeros(batch, nodes, s.nheads, s.headdim, s.dstate) for _ in range(count)]
    tokens = source.tokens(batch, nodes)
    packed = {name: rows.flatten(0, 1) for name, rows in tokens.items()}
    out, steps_out = torch.empty_like(packed["x"]), torch.empty_like(tokens["x"])
    plan = VerifyPlan(
        grid, tuple(VerifySequence(i + 1, i, tail_rows, i, parents) for i in range(batch))
    )
    slots = torch.arange(batch + 1, 2 * batch + 1, dtype=torch.int32)
    arguments: dict[str, Any] = {
        "state_slots": slots,
        "step_slots": torch.arange(batch, dtype=torch.int32),
        "out": steps_out,
        "write_state": False,
    }
    if parents != (ROOT, *range(nodes - 1)):
        arguments["parents"] = torch.tensor([parents] * batch, dtype=torch.int32)

    def verify(number: int) -> None:
        kernels.verify(
            **packed,
            params=params,
            plan=plan,
            state=layers[number],
            drafts=pages[number],
            out=out,
        )

    def steps(number: int) -> None:
        kernels.state_steps(
            layers[number].ssm_state,
            **tokens,
            params=params,
            step_states=kept[number],
            **arguments,
        )

    # The plain form has no tail: its states are those at the draft's start.
    sources, pages_used = tuple(range(1, batch + 1)), tuple(range(batch))
    fold = CommitPlan(grid, sources, tuple(slots.tolist()), pages_used, (tail_rows,) * batch)
    for layer in layers:
        kernels.commit(params=params, plan=fold, state=layer)
    verify(0)
    steps(0)
    expect_same(f"verify against state_steps, {case}", out, steps_out.flatten(0, 1))
    times = interleave(
        {OURS: Local(verify, count), STEPS: Local(steps, count)},
        w.rounds,
        w.sample_s,
        w.group_s / 4,
    )
    # One read; against one read and a write of every step's state.
    work = {OURS: 1e-9 * state_bytes, STEPS: 1e-9 * state_bytes * (1 + nodes)}
    return rows_of("verify", case, name_of(FP32), times, work, "GB/s"), times.speedup(OURS, STEPS)
