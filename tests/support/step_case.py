"""Random inputs of the plain step over a pool that is full of NaN but for the slots in use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stateferry_kernels.layer_state import PAD_SLOT, SsmLayerParams
from stateferry_kernels.state_update import step_reference
from support.ssm_case import relative_error

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NUM_SLOTS = 9
NUM_STEP_ROWS = 10

SHAPES = {
    "plain": {},
    "one group": {"ngroups": 1, "nheads": 3, "headdim": 10, "dstate": 7},
    "eight groups": {"ngroups": 8, "nheads": 8, "headdim": 24, "dstate": 20},
    "channels of Mamba-1": {"ngroups": 1, "nheads": 1, "headdim": 40, "dstate": 16},
}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


@dataclass(frozen=True)
class StepCase:
    """What a call takes. ``pool`` has a stride between slots, as in a pool of several layers."""

    pool: torch.Tensor
    inputs: dict[str, torch.Tensor]  # x, dt, B, C
    z: torch.Tensor | None
    slots: tuple[int, ...]
    params: SsmLayerParams

    @property
    def live(self) -> list[int]:
        return [i for i, slot in enumerate(self.slots) if slot != PAD_SLOT]

    def rows(self, chosen: Sequence[int]) -> StepCase:
        """The same call with only these rows, in this order."""
        index = torch.tensor(chosen, dtype=torch.int64, device=self.pool.device)
        return replace(
            self,
            inputs={name: tensor[index] for name, tensor in self.inputs.items()},
            z=None if self.z is None else self.z[index],
            slots=tuple(self.slots[i] for i in chosen),
        )

    def run(self, step: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Call it on a copy of the pool. Returns out, NaN where nothing was written, and the
        pool."""
        layers = torch.full(
            (NUM_SLOTS, 3, *self.pool.shape[1:]),
            math.nan,
            dtype=self.pool.dtype,
            device=self.pool.device,
        )
        pool = layers[:, 1]
        pool.copy_(self.pool)
        x = self.inputs["x"]
        out = torch.full(x.shape, math.nan, dtype=x.dtype, device=x.device)
        slots = torch.tensor(self.slots, dtype=torch.int32, device=pool.device)
        if "A" not in more:
            more["params"] = self.params
        step(pool, **self.inputs, state_slots=slots, out=out, z=self.z, **more)
        assert layers[:, 0].isnan().all() and layers[:, 2].isnan().all()
        return out, pool


def make_step_case(
    *,
    slots: tuple[int, ...] = (3, PAD_SLOT, 7, 1, PAD_SLOT),
    nheads: int = 4,
    headdim: int = 16,
    dstate: int = 16,
    ngroups: int = 2,
    steps: int | None = None,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    with_z: bool = False,
    with_D: bool = True,
    with_dt_bias: bool = True,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    seed: int = 0,
    device: str = "cpu",
) -> StepCase:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    lead = (len(slots),) if steps is None else (len(slots), steps)
    pool = torch.full((NUM_SLOTS, nheads, headdim, dstate), math.nan, dtype=state_dtype)
    for slot in set(slots) - {PAD_SLOT}:
        pool[slot] = torch.randn(nheads, headdim, dstate, generator=generator)
    # x, B and C are what the convolution leaves: views of one row.
    d_inner, d_groups = nheads * headdim, ngroups * dstate
    active = normal(*lead, d_inner + 2 * d_groups)
    x, B, C = active.split([d_inner, d_groups, d_groups], dim=-1)
    inputs = {
        "x": x.unflatten(-1, (nheads, headdim)),
        "dt": normal(*lead, nheads),
        "B": B.unflatten(-1, (ngroups, dstate)),
        "C": C.unflatten(-1, (ngroups, dstate)),
    }
    for i, slot in enumerate(slots):
        if slot == PAD_SLOT:
            for tensor in inputs.values():
                tensor[i] = math.nan
    if not dt_softplus and not with_dt_bias:
        inputs["dt"].abs_()
    f32 = torch.float32
    params = SsmLayerParams(
        A=-torch.exp(normal(nheads, dtype=f32)),
        D=normal(nheads, dtype=f32) if with_D else None,
        dt_bias=normal(nheads, dtype=f32) - 2 if with_dt_bias else None,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )
    z = normal(*lead, nheads, headdim) if with_z else None
    return StepCase(pool.to(device), inputs, z, slots, params)


def untied_parameters(case: StepCase, seed: int = 0) -> dict[str, Any]:
    """A, D and dt_bias of every channel."""
    generator = torch.Generator().manual_seed(100 + seed)
    _, nheads, headdim, dstate = case.pool.shape
    shapes = {"A": (nheads, headdim, dstate), "D": (nheads, headdim), "dt_bias": (nheads, headdim)}
    drawn = {
        name: torch.randn(shape, generator=generator).to(case.pool.device)
        for name, shape in shapes.items()
    }
    return {"A": -torch.exp(drawn["A"]), "D": drawn["D"], "dt_bias": drawn["dt_bias"] - 2}


def assert_only_touched(before: torch.Tensor, after: torch.Tensor, slots: Sequence[int]) -> None:
    """Every slot but these is as it was, to the byte."""
    others = [slot for slot in range(len(before)) if slot not in slots]
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0, equal_nan=True)


def assert_like_the_definition(
    case: StepCase, step: Any, definition: Any, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    out, pool = case.run(step, **more)
    expected_out, expected_pool = case.run(definition, **more)
    slots = [case.slots[i] for i in case.live]
    padding = [i for i in range(len(case.slots)) if i not in case.live]
    assert relative_error(out[case.live], expected_out[case.live]) < TOLERANCE[out.dtype]
    assert relative_error(pool[slots], expected_pool[slots]) < TOLERANCE[pool.dtype]
    assert out[padding].isnan().all()
    assert_only_touched(case.pool, pool, slots)
    return out, pool


TREE = [[-1, 0, 0, 1, 3, -1], [-1, -1, 1, 0, 2, 3], [-1, 0, 1, 2, 3, 4]]


def step_arguments(case: StepCase, how: str, kept: torch.dtype) -> dict[str, Any]:
    """Arguments of state_steps; step_states comes poisoned, with more rows and steps than
    needed."""
    if how == "chain":
        return {}
    steps = case.inputs["x"].shape[1]
    states = torch.full(
        (NUM_STEP_ROWS, steps + 1, *case.pool.shape[1:]),
        math.nan,
        dtype=kept,
        device=case.pool.device,
    )
    arguments: dict[str, Any] = {"step_states": states}
    if how == "tree":
        parents = torch.tensor(
            [
                [-1] * steps if s == PAD_SLOT else TREE[i % 3][:steps]
                for i, s in enumerate(case.slots)
            ]
        )
        arguments["parents"] = parents.to(torch.int32).to(case.pool.device)
        rows = [PAD_SLOT if s == PAD_SLOT else 2 * i for i, s in enumerate(case.slots)]
        arguments["step_slots"] = torch.tensor(rows, dtype=torch.int32, device=case.pool.device)
    return arguments


def assert_steps_like_the_definition(
    case: StepCase, state_steps: Any, how: str, kept: torch.dtype, write_state: bool
) -> None:
    given = step_arguments(case, how, kept)
    wanted = step_arguments(case, how, kept)
    out, pool = case.run(state_steps, **given, write_state=write_state)
    expected_out, expected_pool = case.run(
        step_reference.state_steps, **wanted, write_state=write_state
    )
    slots = [case.slots[i] for i in case.live]
    padding = [i for i in range(len(case.slots)) if i not in case.live]
    tolerance = TOLERANCE[out.dtype]
    if how == "tree":
        tolerance = max(tolerance, TOLERANCE[kept])
    assert relative_error(out[case.live], expected_out[case.live]) < tolerance
    assert out[padding].isnan().all()
    if write_state:
        assert relative_error(pool[slots], expected_pool[slots]) < max(
            tolerance, TOLERANCE[pool.dtype]
        )
    assert_only_touched(case.pool, pool, slots if write_state else [])
    if how != "chain":
        states, expected = given["step_states"], wanted["step_states"]
        written = ~expected.isnan()
        assert torch.equal(written, ~states.isnan())
        steps = case.inputs["x"].shape[1]
        assert int(written.sum()) == len(slots) * steps * case.pool[0].numel()
        assert relative_error(states[written], expected[written]) < TOLERANCE[kept]
