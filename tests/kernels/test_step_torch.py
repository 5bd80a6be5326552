"""The plain step in torch operations against its definition in fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.ssd.reference import ssd_reference
from stateferry_kernels.state_update import step_reference, step_torch
from support.ssm_case import relative_error
from support.step_case import (
    DTYPES,
    SHAPES,
    StepCase,
    assert_like_the_definition,
    assert_steps_like_the_definition,
    make_step_case,
    untied_parameters,
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("with_z", [False, True], ids=["", "z"])
def test_one_token(shape: str, dtypes: tuple[torch.dtype, torch.dtype], with_z: bool) -> None:
    dtype, state_dtype = dtypes
    case = make_step_case(dtype=dtype, state_dtype=state_dtype, with_z=with_z, **SHAPES[shape])
    assert_like_the_definition(case, step_torch.state_step, step_reference.state_step)


@pytest.mark.parametrize(
    "with_D, with_dt_bias, dt_softplus", list(itertools.product([False, True], repeat=3))
)
@pytest.mark.parametrize("dt_limit", [(0.0, math.inf), (0.05, 0.3)], ids=["", "limits"])
def test_parameters(
    with_D: bool, with_dt_bias: bool, dt_softplus: bool, dt_limit: tuple[float, float]
) -> None:
    case = make_step_case(
        with_D=with_D, with_dt_bias=with_dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit
    )
    assert_like_the_definition(case, step_torch.state_step, step_reference.state_step)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_z", [False, True], ids=["", "z"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_untied(shape: str, with_z: bool, with_bias: bool) -> None:
    case = make_step_case(with_z=with_z, **SHAPES[shape])
    case.inputs["dt"] = torch.randn_like(case.inputs["x"]).abs()
    parameters = untied_parameters(case)
    if not with_bias:
        parameters |= {"D": None, "dt_bias": None}
    assert_like_the_definition(
        case,
        step_torch.state_step_untied,
        step_reference.state_step_untied,
        **parameters,
        dt_softplus=with_bias,
    )


def test_untied_with_shared_parameters_is_the_step() -> None:
    case = make_step_case(with_z=True)
    out, pool = case.run(step_reference.state_step)
    shape = case.pool.shape[1:]
    p = case.params
    case.inputs["dt"] = case.inputs["dt"][..., None].expand_as(case.inputs["x"])
    untied = {
        "A": p.A[:, None, None].expand(shape),
        "D": p.D[:, None].expand(shape[:2]),
        "dt_bias": p.dt_bias[:, None].expand(shape[:2]),
        "dt_softplus": True,
    }
    for entries in (step_reference, step_torch):
        same_out, same_pool = case.run(entries.state_step_untied, **untied)
        assert relative_error(same_out[case.live], out[case.live]) < 1e-5
        assert relative_error(same_pool[[1, 3, 7]], pool[[1, 3, 7]]) < 1e-5


def test_the_definition_is_the_recurrence() -> None:
    case = make_step_case(steps=6, slots=(2,), with_z=True)
    out, pool = case.run(step_reference.state_steps)
    p = case.params
    wide = {name: tensor[0].double() for name, tensor in case.inputs.items()}
    y, state, _ = ssd_reference(
        **wide,
        A=p.A.double(),
        D=p.D.double(),
        z=case.z[0].double(),
        dt_bias=p.dt_bias.double(),
        dt_softplus=True,
        initial_state=case.pool[2].double(),
    )
    assert relative_error(out[0], y) < 1e-6
    assert relative_error(pool[2], state) < 1e-6


@pytest.mark.parametrize("how", ["chain", "kept", "tree"])
@pytest.mark.parametrize("write_state", [False, True], ids=["", "write"])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["plain", "one group"])
def test_some_tokens(how: str, write_state: bool, kept: torch.dtype, shape: str) -> None:
    case = make_step_case(steps=5, with_z=True, **SHAPES[shape])
    assert_steps_like_the_definition(case, step_torch.state_steps, how, kept, write_state)


def test_some_tokens_are_as_many_single_ones() -> None:
    case = make_step_case(steps=4)
    out, pool = case.run(step_torch.state_steps)
    now = case.pool
    for t in range(4):
        inputs = {name: tensor[:, t] for name, tensor in case.inputs.items()}
        single = StepCase(now, inputs, None, case.slots, case.params)
        out_t, now = single.run(step_torch.state_step)
        assert torch.equal(out_t[case.live], out[case.live, t])
    assert torch.equal(now[[1, 3, 7]], pool[[1, 3, 7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_know_its_neighbours(dtype: torch.dtype) -> None:
    case = make_step_case(dtype=dtype, state_dtype=dtype, with_z=True, dstate=33, headdim=24)
    out, pool = case.run(step_torch.state_step)
    for chosen in ([0], [2], [3, 1, 0], [2, 3]):
        part = case.rows(chosen)
        part_out, part_pool = part.run(step_torch.state_step)
        for place, row in enumerate(chosen):
            if row in case.live:
                assert torch.equal(part_out[place], out[row])
                assert torch.equal(part_pool[case.slots[row]], pool[case.slots[row]])


@pytest.mark.parametrize("slots", [(), (PAD_SLOT, PAD_SLOT)])
def test_no_live_row(slots: tuple[int, ...]) -> None:
    for steps, entry in ((None, step_torch.state_step), (3, step_torch.state_steps)):
        case = make_step_case(slots=slots, steps=steps)
        out, pool = case.run(entry)
        assert out.isnan().all() and pool.isnan().all()


BAD = {
    "x": (lambda t: t[..., :-1], ValueError),
    "dt": (lambda t: t[:, :-1], ValueError),
    "B": (lambda t: t.double(), TypeError),
    "C": (lambda t: t[:, :1], ValueError),
}


@pytest.mark.parametrize("field", BAD)
@pytest.mark.parametrize("steps", [None, 3])
def test_refuses(field: str, steps: int | None) -> None:
    spoil, error = BAD[field]
    case = make_step_case(steps=steps)
    case.inputs[field] = spoil(case.inputs[field])
    with pytest.raises(error, match=field):
        case.run(step_torch.state_step if steps is None else step_torch.state_steps)


def test_refuses_parents_without_states() -> None:
    case = make_step_case(steps=3)
    parents = torch.zeros(5, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="step_states"):
        case.run(step_torch.state_steps, parents=parents)
    too_short = torch.zeros(10, 2, *case.pool.shape[1:])
    with pytest.raises(ValueError, match="step_states"):
        case.run(step_torch.state_steps, step_states=too_short)


def test_refuses_groups_that_do_not_divide_the_heads() -> None:
    case = make_step_case(nheads=4, ngroups=3)
    with pytest.raises(ValueError, match="groups"):
        case.run(step_torch.state_step)
