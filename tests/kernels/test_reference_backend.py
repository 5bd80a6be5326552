"""Every operation of the torch backend against the definition behind the same host entry.

Both work on equal pools full of NaN, so all that an operation writes is compared: outputs, states,
conv columns and tails; and whatever it must not write is still NaN in both.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stateferry_kernels.dispatch import Kernels, select_kernels
from stateferry_kernels.layer_state import PAD_SLOT, LayerState
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
    make_layer,
    make_tokens,
    poisoned_state,
    relative_error,
    split_active,
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


def layer_pass(
    kernels: Kernels, layer: Layer, plan: ExtendPlan | DecodePlan, state: LayerState, seed: int
) -> torch.Tensor:
    plan = dataclasses.replace(plan, cache={})
    count = plan.total_tokens if isinstance(plan, ExtendPlan) else len(plan.state_slots)
    tokens = make_tokens(layer, count, seed=seed, with_z=True)
    active = torch.full_like(tokens.xBC, torch.nan)
    y = torch.full((count, SHAPE.nheads, SHAPE.headdim), torch.nan, dtype=layer.dtype)
    if isinstance(plan, ExtendPlan):
        kernels.causal_conv1d_extend(
            tokens.xBC, conv=layer.conv, plan=plan, state=state, out=active
        )
    else:
        kernels.causal_conv1d_row(tokens.xBC, conv=layer.conv, plan=plan, state=state, out=active)
    x, B, C = split_active(active, SHAPE)
    inputs = (x, tokens.dt, B, C)
    if isinstance(plan, ExtendPlan):
        kernels.chunk_scan(*inputs, params=layer.ssm, plan=plan, state=state, out=y, z=tokens.z)
    else:
        kernels.decode_row(*inputs, params=layer.ssm, plan=plan, state=state, out=y, z=tokens.z)
    return torch.cat([active, y.flatten(1)], dim=1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_a_life_of_three_sequences(dtype: torch.dtype) -> None:
    layer = make_layer(SHAPE, dtype=dtype, dt_limit=(0.01, 0.5))
    results = []
    for name in ("torch", "reference"):
        kernels, state = select_kernels(name), poisoned_state(layer)
        outputs = [
            layer_pass(kernels, layer, plan, state, seed)
            for seed, plan in enumerate((FIRST, SECOND, DECODE))
        ]
        kernels.commit(params=layer.ssm, plan=COMMIT, state=state)
        outputs.append(layer_pass(kernels, layer, THIRD, state, 3))
        pools = [getattr(state, field.name) for field in dataclasses.fields(state)]
        results.append([*outputs, *pools])
    for number, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert torch.equal(ours.isnan(), theirs.isnan()), number
        assert relative_error(ours.nan_to_num(), theirs.nan_to_num()) < TOLERANCE[dtype], number


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
