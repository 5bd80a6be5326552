"""Sizes that only a GPU holds: offsets past 2**31, and sequences of more than 61 thousand tokens.

Each compares a launch far into a large pool or batch with the same one at its beginning, to the
byte."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.layer_state import ConvParams, LayerState, SsmLayerParams
from stateferry_kernels.operations import Kernels
from stateferry_kernels.plans import (
    BoundaryWrite,
    CommitPlan,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device: offsets past 2**31 and long sequences are NOT tested here",
    ),
]

NHEADS, HEADDIM, DSTATE, GRID = 128, 64, 128, 64
CONV_DIM = NHEADS * HEADDIM + 2 * DSTATE
# The first slot that begins past 2**31 elements of ssm_state, and one more.
FAR = 2**31 // (NHEADS * HEADDIM * DSTATE) + 1


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return select_kernels("triton")


def normal(*size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(size, generator=generator, device="cuda").to(dtype)


def params() -> SsmLayerParams:
    return SsmLayerParams(
        A=-torch.exp(normal(NHEADS, dtype=torch.float32)),
        D=normal(NHEADS, dtype=torch.float32, seed=1),
        dt_bias=normal(NHEADS, dtype=torch.float32, seed=2) - 4,
        dt_softplus=True,
        dt_limit=(0.0, math.inf),
    )


def far_state(num_pages: int) -> LayerState:
    """Pools with slots and pages on both sides of 2**31 elements."""
    return LayerState(
        ssm_state=torch.empty(
            (FAR + 4, NHEADS, HEADDIM, DSTATE), dtype=torch.bfloat16, device="cuda"
        ),
        conv_state=torch.zeros((FAR + 4, CONV_DIM, 3), dtype=torch.bfloat16, device="cuda"),
        tail_xBC=torch.zeros((num_pages, GRID, CONV_DIM), dtype=torch.bfloat16, device="cuda"),
        tail_x=torch.empty((num_pages, GRID, NHEADS, HEADDIM), dtype=torch.bfloat16, device="cuda"),
        tail_B=torch.empty((num_pages, GRID, 1, DSTATE), dtype=torch.bfloat16, device="cuda"),
        tail_dt=torch.empty((num_pages, GRID, NHEADS), device="cuda"),
    )


def test_slots_and_pages_past_two_to_the_31(kernels: Kernels) -> None:
    far_page = 2**31 // (GRID * NHEADS * HEADDIM) + 1
    state = far_state(far_page + 1)
    assert state.ssm_state[FAR].storage_offset() > 2**31
    assert state.tail_x[far_page].storage_offset() > 2**31
    near = normal(NHEADS, HEADDIM, DSTATE)
    old = (normal(GRID, NHEADS, HEADDIM), normal(GRID, 1, DSTATE), normal(GRID, NHEADS).abs())
    for slot, page in ((1, 0), (FAR, far_page)):
        state.ssm_state[slot] = near
        state.tail_x[page], state.tail_B[page], state.tail_dt[page] = old
    x, dt = normal(1, NHEADS, HEADDIM), normal(1, NHEADS)
    x, dt = x.repeat(2, 1, 1), dt.repeat(2, 1)
    B, C = normal(1, 1, DSTATE).repeat(2, 1, 1), normal(1, 1, DSTATE, seed=5).repeat(2, 1, 1)
    out = torch.full_like(x, math.nan)
    layer = {"params": params(), "state": state}
    plan = DecodePlan(GRID, (1, FAR), (0, far_page), (40, 40))
    kernels.decode_row(x, dt, B, C, plan=plan, out=out, **layer)
    assert torch.equal(out[0], out[1]) and not out.isnan().any()
    for pool in (state.tail_x, state.tail_B, state.tail_dt):
        assert torch.equal(pool[0], pool[far_page])
    kernels.commit(plan=CommitPlan(GRID, (1, FAR), (2, FAR + 1), (0, far_page)), **layer)
    assert torch.equal(state.ssm_state[2], state.ssm_state[FAR + 1])
    assert not torch.equal(state.ssm_state[2], near)
    slots = torch.tensor([2, FAR + 1], dtype=torch.int32, device="cuda")
    kernels.state_step(
        state.ssm_state, x, dt, B, C, params=layer["params"], state_slots=slots, out=out
    )
    assert torch.equal(state.ssm_state[2], state.ssm_state[FAR + 1])
    assert torch.equal(out[0], out[1])
    lengths = 2 * GRID + 3
    rows = [normal(lengths, NHEADS, HEADDIM), normal(lengths, NHEADS), normal(lengths, 1, DSTATE)]
    x, dt, B = (torch.cat([row, row]) for row in rows)
    writes = [(BoundaryWrite(2 * GRID, 3),), (BoundaryWrite(2 * GRID, FAR + 2),)]
    plan = ExtendPlan(
        GRID,
        (
            ExtendSequence(0, lengths, 1, 0, writes[0]),
            ExtendSequence(0, lengths, FAR, far_page, writes[1]),
        ),
    )
    out = torch.full_like(x, math.nan)
    kernels.chunk_scan(x, dt, B, B, plan=plan, out=out, **layer)
    assert torch.equal(out[:lengths], out[lengths:]) and not out.isnan().any()
    assert torch.equal(state.ssm_state[3], state.ssm_state[FAR + 2])
    assert torch.equal(state.tail_x[0], state.tail_x[far_page])


def test_a_sequence_of_sixty_two_thousand_tokens_in_rows_past_two_to_the_31(
    kernels: Kernels,
) -> None:
    """Whole, from rows that end past 2**31 elements, against two extends of packed copies."""
    length, cut, row = 62_000, 31_040, 35_000
    assert length * row > 2**31
    wide = torch.empty((length, row), dtype=torch.bfloat16, device="cuda")
    columns = wide[:, :CONV_DIM]
    columns.copy_(normal(length, CONV_DIM))
    dt = normal(length, NHEADS)
    state = far_state(2)
    state.ssm_state[0], state.conv_state[0] = 0, 0
    conv = ConvParams(weight=normal(CONV_DIM, 4), bias=normal(CONV_DIM, seed=3))
    wide_out = torch.empty_like(wide)[:, :CONV_DIM]
    last = length // GRID * GRID

    def extend(
        begin: int, end: int, rows: torch.Tensor, into: torch.Tensor, sequence: ExtendSequence
    ) -> torch.Tensor:
        plan = ExtendPlan(GRID, (sequence,))
        kernels.causal_conv1d_extend(rows, conv=conv, plan=plan, state=state, out=into)
        x, B, C = into.split([NHEADS * HEADDIM, DSTATE, DSTATE], dim=-1)
        y = torch.full((end - begin, NHEADS, HEADDIM), math.nan, device="cuda").to(rows.dtype)
        kernels.chunk_scan(
            x.unflatten(-1, (NHEADS, HEADDIM)),
            dt[begin:end],
            B.unflatten(-1, (1, DSTATE)),
            C.unflatten(-1, (1, DSTATE)),
            params=params(),
            plan=plan,
            state=state,
            out=y,
        )
        return y

    whole = ExtendSequence(0, length, 0, 0, (BoundaryWrite(last, 1),))
    y = extend(0, length, columns, wide_out, whole)
    assert not y.isnan().any()
    first = ExtendSequence(0, cut, 0, 1, (BoundaryWrite(cut // GRID * GRID, 2),))
    second = replace(whole, start=cut, length=length - cut, state_slot=2, tail_page=1)
    second = replace(second, boundaries=(BoundaryWrite(last, 3),))
    for begin, end, sequence in ((0, cut, first), (cut, length, second)):
        rows = columns[begin:end].contiguous()
        part = extend(begin, end, rows, torch.empty_like(rows), sequence)
        assert torch.equal(part, y[begin:end])
    assert torch.equal(state.ssm_state[1], state.ssm_state[3])
    assert torch.equal(state.conv_state[1], state.conv_state[3])
    for pool in (state.tail_xBC, state.tail_x, state.tail_B, state.tail_dt):
        assert torch.equal(pool[0, : length - last], pool[1, : length - last])
