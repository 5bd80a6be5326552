"""Every operation of the torch backend against the definition behind the same host entry.

Both work on equal pools full of NaN, so all that an operation writes is compared: outputs, states,
conv columns and tails; and whatever it must not write is still NaN in both.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.draft_plans import (
    ROOT,
    AcceptPlan,
    AcceptSequence,
    VerifyPlan,
    VerifySequence,
)
from stateferry_kernels.layer_state import PAD_SLOT, STATE_DTYPES
from stateferry_kernels.operations import Kernels
from stateferry_kernels.plans import (
    BoundaryWrite,
    CommitPlan,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)
from support.ssm_case import (
    Layer,
    Shape,
    all_pools,
    layer_pass,
    make_layer,
    make_tokens,
    poisoned_drafts,
    poisoned_state,
    relative_error,
)

SHAPE = Shape(nheads=6, headdim=20, dstate=12, ngroups=3, grid=16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

# A first extend from position 0, a second that is cut mid-grid and packs a newcomer in between,
# decode rows with padding up to a boundary, the commit that follows, and an extend whose window
# begins before its grid point.
FIRST = ExtendPlan(
    16,
    (
        ExtendSequence(0, 1, 0, 0),
        ExtendSequence(0, 37, 0, 1, (BoundaryWrite(16, 1), BoundaryWrite(32, 2))),
    ),
)
SECOND = ExtendPlan(
    16,
    (
        ExtendSequence(37, 30, 2, 1, (BoundaryWrite(64, 3),)),
        ExtendSequence(0, 16, 0, 2, (BoundaryWrite(16, 4),)),
        ExtendSequence(1, 14, 0, 0),
    ),
)
DECODE = DecodePlan(16, (PAD_SLOT, 0, 3, PAD_SLOT, 4), (0, 0, 1, 0, 2), (0, 15, 3, 9, 0))
COMMIT = CommitPlan(16, (0,), (5,), (0,))
THIRD = ExtendPlan(
    16,
    (
        ExtendSequence(17, 17, 4, 2, (BoundaryWrite(32, 6),)),
        ExtendSequence(16, 1, 5, 0),
        ExtendSequence(68, 12, 3, 1, (BoundaryWrite(80, 7),)),
    ),
)


# After that a draft of each sequence: a chain that stays inside its interval, a tree whose branches
# pass the grid at different nodes, and one that starts at a grid point.
DRAFT = VerifyPlan(
    16,
    (
        VerifySequence(5, 0, 1, 3, (ROOT, 0, 1)),
        VerifySequence(7, 1, 13, 1, (ROOT, ROOT, 0, 1, 2, 3, 3, 5, 4)),
        VerifySequence(6, 2, 0, 0, (ROOT, 0, 0)),
    ),
)
ACCEPT = AcceptPlan(
    16, (AcceptSequence(7, 1, 13, 1, (1, 3, 5, 7), 8), AcceptSequence(5, 0, 1, 3, (0,)))
)
DECODE_AFTER = DecodePlan(16, (5, 8), (0, 1), (2, 1))


def life(kernels: Kernels, layer: Layer) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Everything that three sequences live through: outputs of each step, and the pools."""
    state, drafts = poisoned_state(layer), poisoned_drafts(layer)
    outputs: list[torch.Tensor] = []

    def step(plan: ExtendPlan | DecodePlan | VerifyPlan) -> None:
        plan = dataclasses.replace(plan, cache={})
        if isinstance(plan, ExtendPlan):
            count = plan.total_tokens
        else:
            count = plan.num_rows if isinstance(plan, VerifyPlan) else len(plan.state_slots)
        tokens = make_tokens(layer, count, seed=len(outputs), with_z=True)
        outputs.append(torch.cat(layer_pass(kernels, layer, tokens, plan, state, drafts), dim=1))

    for plan in (FIRST, SECOND, DECODE):
        step(plan)
    kernels.commit(params=layer.ssm, plan=COMMIT, state=state)
    step(THIRD)
    step(DRAFT)
    kernels.accept(params=layer.ssm, plan=ACCEPT, state=state, drafts=drafts)
    step(DECODE_AFTER)
    partial = CommitPlan(16, (8, 5), (9, 10), (1, 0), (2, 1))
    kernels.commit(params=layer.ssm, plan=partial, state=state)
    return outputs, all_pools(state, drafts)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=["fp32 state", "bf16 state"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_a_life_of_three_sequences(name: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    layer = make_layer(SHAPE, dtype=dtype, state_dtype=state_dtype, dt_limit=(0.01, 0.5))
    outputs, pools = life(select_kernels(name), layer)
    wanted_outputs, wanted_pools = life(select_kernels("reference"), layer)
    named = {f"step {number}": output for number, output in enumerate(outputs)} | pools
    wanted = {f"step {number}": output for number, output in enumerate(wanted_outputs)}
    tolerance = TOLERANCE[torch.bfloat16 if torch.bfloat16 in (dtype, state_dtype) else dtype]
    for place, theirs in (wanted | wanted_pools).items():
        ours = named[place]
        assert torch.equal(ours.isnan(), theirs.isnan()), place
        assert relative_error(ours.nan_to_num(), theirs.nan_to_num()) < tolerance, place


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("group_size", [30, 60, 120])
def test_norms(dtype: torch.dtype, group_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(5, 120, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(120, generator=generator).to(dtype)
    ours, theirs = select_kernels("torch"), select_kernels("reference")
    pairs = [(ours.rms_norm(x, weight, 1e-5), theirs.rms_norm(x, weight, 1e-5))]
    pairs += [
        (norm(x, z, weight, 1e-5, group_size), definition(x, z, weight, 1e-5, group_size))
        for norm, definition in (
            (ours.gated_rms_norm, theirs.gated_rms_norm),
            (ours.norm_then_gate, theirs.norm_then_gate),
        )
    ]
    for a, b in pairs:
        assert a.dtype == dtype
        assert relative_error(a, b) < TOLERANCE[dtype]
    assert relative_error(pairs[1][0], pairs[2][0]) > 0.1
