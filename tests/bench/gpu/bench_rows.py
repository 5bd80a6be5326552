"""A decode token and a verification: the plain step, the grid form, and the peers' steps."""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu.peers import Peers
from bench.gpu.rows import OURS, Row, rows_of
from bench.gpu.step_peers import spec_peer, step_peers
from bench.gpu.timing import Call, times_us
from bench.gpu.workload import (
    DEVICE,
    Shape,
    chain,
    commit_plan,
    decode_plan,
    make_drafts,
    make_inputs,
    make_state,
    tail_rows,
    tree_of_16,
    verify_plan,
)
from stateferry_kernels.state_update.step_triton import state_step, state_steps
from stateferry_kernels.state_update.triton_ops import commit, decode_row, verify

BATCHES = (1, 8, 64, 512)
GRID = 64
_POOL = 512
GRID_FORM = f"{OURS}, grid form"
PASSING = ", some pass the grid"


def bench_decode(
    shape: Shape, batch: int, state_dtype: torch.dtype, peers: Peers, tbs: float
) -> list[Row]:
    """Calls take turns over a pool that no cache holds, as layers do. The grid form's time has its
    share of the commits in it: one for each sequence and ``GRID`` tokens."""
    sets = max(1, _POOL // batch)
    state = make_state(shape, 1 + _POOL, batch, GRID, state_dtype)
    inputs = make_inputs(shape, batch)
    out = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    arguments = (inputs.x, inputs.dt, inputs.B, inputs.C)
    of_layer = {"params": inputs.params, "state": state}
    contenders: dict[str, list[Call]] = {OURS: [], GRID_FORM: [], "commit": []}
    for first in range(1, 1 + sets * batch, batch):
        slots = list(range(first, first + batch))
        on_device = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
        contenders[OURS].append(
            partial(
                state_step,
                state.ssm_state,
                *arguments,
                params=inputs.params,
                state_slots=on_device,
                out=out,
            )
        )
        plan = decode_plan(slots, GRID)
        contenders[GRID_FORM].append(
            partial(decode_row, *arguments, plan=plan, out=out, **of_layer)
        )
        half = slots[: max(1, batch // 2)]
        fresh = [
            (slot + batch - 1) % _POOL + 1 if batch == 1 else slot + batch // 2 for slot in half
        ]
        commits = commit_plan(half, fresh, GRID)
        contenders["commit"].append(partial(commit, plan=commits, **of_layer))
        for name, run in step_peers(peers, shape, inputs, state.ssm_state, on_device).items():
            contenders.setdefault(name, []).append(run)
    times = times_us(contenders)
    times[GRID_FORM] += times.pop("commit") * (2 if batch > 1 else 1) / GRID
    step_bytes = batch * (2 * shape.state_bytes(state_dtype) + 3 * shape.row_bytes)
    read = batch * (1 + 2 / GRID) * shape.state_bytes(state_dtype)
    tails = (sum(tail_rows(batch, GRID)) + 3 * batch) * shape.row_bytes
    floors = {name: step_bytes / tbs / 1e6 for name in times}
    floors[GRID_FORM] = (read + tails) / tbs / 1e6
    name = "fp32" if state_dtype == torch.float32 else "bf16"
    return rows_of("decode", shape.name, f"batch {batch}, {name} states", times, floors)


def bench_verify(shape: Shape, batch: int, peers: Peers) -> list[Row]:
    """Drafts of several tokens: the grid form reads each state once; the others write one for each
    token."""
    rows: list[Row] = []
    drafts = {f"T={n}": chain(n) for n in (2, 4, 8)} | {"tree of 16": tree_of_16()}
    drafts |= {f"T=4{PASSING}": chain(4)}
    state = make_state(shape, 1 + batch, batch, GRID, torch.float32)
    slots = list(range(1, 1 + batch))
    on_device = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    for case, parents in drafts.items():
        steps = len(parents)
        inputs = make_inputs(shape, batch * steps)
        out = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
        pages = make_drafts(shape, batch, steps)
        kept = torch.empty(
            (batch, steps, *state.ssm_state.shape[1:]), device=DEVICE, dtype=torch.float32
        )
        by_step = [
            t.unflatten(0, (batch, steps)) for t in (inputs.x, inputs.dt, inputs.B, inputs.C)
        ]
        at = torch.tensor([parents] * batch, dtype=torch.int32, device=DEVICE)
        contenders: dict[str, list[Call]] = {
            OURS: [
                partial(
                    verify,
                    inputs.x,
                    inputs.dt,
                    inputs.B,
                    inputs.C,
                    params=inputs.params,
                    plan=verify_plan(slots, GRID, parents, passing=PASSING in case),
                    state=state,
                    drafts=pages,
                    out=out,
                )
            ],
            "a state per token (ours)": [
                partial(
                    state_steps,
                    state.ssm_state,
                    *by_step,
                    params=inputs.params,
                    state_slots=on_device,
                    out=out.unflatten(0, (batch, steps)),
                    step_states=kept,
                    step_slots=torch.arange(batch, dtype=torch.int32, device=DEVICE),
                    parents=None if case.startswith("T=") else at,
                    write_state=False,
                )
            ],
        }
        peer = spec_peer(peers, shape, inputs, state.ssm_state, on_device, kept)
        if peer is not None and case.startswith("T="):
            contenders["sglang, a state per token"] = [peer]
        times = times_us({name: calls * 3 for name, calls in contenders.items()})
        rows += rows_of("verify", shape.name, f"batch {batch}, {case}", times)
    return rows
