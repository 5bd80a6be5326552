"""The plain step in Triton against its definition in fp64: interpreted here, on the GPU where there
is one."""

from __future__ import annotations

import math
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from stateferry_kernels.layer_state import PAD_SLOT, SsmLayerParams  # noqa: E402
from stateferry_kernels.state_update import (  # noqa: E402
    step_reference,
    step_tiles,
    step_torch,
    step_triton,
)
from support.ssm_case import relative_error  # noqa: E402
from support.step_case import (  # noqa: E402
    DTYPES,
    NUM_SLOTS,
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
    case = make_step_case(
        slots=(PAD_SLOT, 7),
        dtype=dtype,
        state_dtype=state_dtype,
        with_z=with_z,
        device=DEVICE,
        **SHAPES[shape],
    )
    assert_like_the_definition(case, step_triton.state_step, step_reference.state_step)


@pytest.mark.parametrize(
    "with_D, with_dt_bias, dt_softplus",
    [(False, False, False), (True, False, True), (False, True, True), (True, True, False)],
)
@pytest.mark.parametrize("dt_limit", [(0.0, math.inf), (0.05, 0.3)], ids=["", "limits"])
def test_parameters(
    with_D: bool, with_dt_bias: bool, dt_softplus: bool, dt_limit: tuple[float, float]
) -> None:
    case = make_step_case(
        slots=(4, PAD_SLOT),
        with_D=with_D,
        with_dt_bias=with_dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        device=DEVICE,
    )
    assert_like_the_definition(case, step_triton.state_step, step_reference.state_step)


@pytest.mark.parametrize("shift", [-40.0, -15.0, -8.0, 0.0, 15.0, 25.0])
def test_softplus_far_out(shift: float) -> None:
    """A tiny dt keeps its digits: without D, y and what the state gains are multiples of it."""
    case = make_step_case(slots=(4,), with_D=False, with_dt_bias=False, device=DEVICE)
    case.pool[4] = 0
    case.inputs["dt"].mul_(0.1).add_(shift)
    assert_like_the_definition(case, step_triton.state_step, step_reference.state_step)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_all", [False, True], ids=["", "z, D, bias"])
def test_untied(shape: str, with_all: bool) -> None:
    case = make_step_case(slots=(7, PAD_SLOT), with_z=with_all, device=DEVICE, **SHAPES[shape])
    case.inputs["dt"] = torch.randn_like(case.inputs["x"]).abs()
    parameters = untied_parameters(case)
    if not with_all:
        parameters |= {"D": None, "dt_bias": None}
    assert_like_the_definition(
        case,
        step_triton.state_step_untied,
        step_reference.state_step_untied,
        **parameters,
        dt_softplus=with_all,
    )


def test_untied_takes_expanded_and_transposed_parameters() -> None:
    case = make_step_case(slots=(3, 7), with_z=True, device=DEVICE)
    out, pool = case.run(step_triton.state_step)
    shape, p = case.pool.shape[1:], case.params
    case.inputs["dt"] = case.inputs["dt"][..., None].expand_as(case.inputs["x"])
    shared = {
        "A": p.A[:, None, None].expand(shape),
        "D": p.D[:, None].expand(shape[:2]),
        "dt_bias": p.dt_bias[:, None].expand(shape[:2]),
    }
    turned = {name: tensor.mT.contiguous().mT for name, tensor in shared.items()}
    for parameters in (shared, turned):
        same_out, same_pool = case.run(
            step_triton.state_step_untied, **parameters, dt_softplus=True
        )
        assert relative_error(same_out, out) < 1e-6
        assert relative_error(same_pool[[3, 7]], pool[[3, 7]]) < 1e-6


@pytest.mark.parametrize("how", ["chain", "kept", "tree"])
@pytest.mark.parametrize("write_state", [False, True], ids=["", "write"])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_some_tokens(how: str, write_state: bool, kept: torch.dtype) -> None:
    case = make_step_case(
        slots=(PAD_SLOT, 3, 7), steps=5, nheads=1, ngroups=1, dstate=7, with_z=True, device=DEVICE
    )
    assert_steps_like_the_definition(case, step_triton.state_steps, how, kept, write_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_some_tokens_in_16_bits(dtype: torch.dtype) -> None:
    case = make_step_case(
        slots=(3, 7), steps=3, nheads=1, ngroups=1, dtype=dtype, state_dtype=dtype, device=DEVICE
    )
    assert_steps_like_the_definition(case, step_triton.state_steps, "tree", dtype, True)


def test_some_tokens_are_as_many_single_ones() -> None:
    case = make_step_case(slots=(3, PAD_SLOT), steps=3, nheads=2, device=DEVICE)
    out, pool = case.run(step_triton.state_steps)
    now = case.pool
    for t in range(3):
        inputs = {name: tensor[:, t] for name, tensor in case.inputs.items()}
        single = StepCase(now, inputs, None, case.slots, case.params)
        out_t, now = single.run(step_triton.state_step)
        assert torch.equal(out_t[0], out[0, t])
    assert torch.equal(now[3], pool[3])


def test_rows_of_any_stride() -> None:
    case = make_step_case(slots=(3, 7), with_z=True, device=DEVICE)
    out, pool = case.run(step_triton.state_step)
    for name, tensor in case.inputs.items():
        case.inputs[name] = tensor.mT.contiguous().mT
    same_out, same_pool = case.run(step_triton.state_step)
    assert torch.equal(same_out, out) and torch.equal(same_pool[[3, 7]], pool[[3, 7]])
    strided = torch.empty(2, 16, 4, device=DEVICE).mT
    slots = torch.tensor(case.slots, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="out"):
        step_triton.state_step(
            case.pool, **case.inputs, params=case.params, state_slots=slots, out=strided
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_know_its_neighbours(dtype: torch.dtype) -> None:
    case = make_step_case(
        dtype=dtype, state_dtype=dtype, with_z=True, dstate=33, headdim=9, device=DEVICE
    )
    out, pool = case.run(step_triton.state_step)
    for chosen in ([0], [2], [3, 1, 0]):
        part_out, part_pool = case.rows(chosen).run(step_triton.state_step)
        for place, row in enumerate(chosen):
            if row in case.live:
                assert torch.equal(part_out[place], out[row])
                assert torch.equal(part_pool[case.slots[row]], pool[case.slots[row]])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_does_not_know_its_tile(
    state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_step_case(
        slots=(3,),
        nheads=1,
        ngroups=1,
        headdim=64,
        dstate=128,
        state_dtype=state_dtype,
        device=DEVICE,
    )
    results = []
    for rows, warps in ((4, 1), (8, 1), (16, 1), (16, 2), (64, 4)):
        tile = step_tiles.StepTile(rows, warps)
        monkeypatch.setattr(step_triton, "step_tile", lambda *_, tile=tile: tile)
        results.append(case.run(step_triton.state_step))
    for out, pool in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(pool[3], results[0][1][3])


@pytest.mark.parametrize("slots", [(), (PAD_SLOT, PAD_SLOT)])
def test_no_live_row(slots: tuple[int, ...]) -> None:
    for steps, entry in ((None, step_triton.state_step), (3, step_triton.state_steps)):
        out, pool = make_step_case(slots=slots, steps=steps, device=DEVICE).run(entry)
        assert out.isnan().all() and pool.isnan().all()


# ------------------------------------------------------------------------------------- rounding


def states_after(
    values: torch.Tensor, dtype: torch.dtype, seed: int | None, slot: int = 1
) -> torch.Tensor:
    """What the step stores for ``values`` (headdim, dstate): the state it began with is zero, and
    x B is ``values``, which therefore is of rank one."""
    headdim, dstate = values.shape
    pool = torch.zeros(3, 1, headdim, dstate, dtype=dtype, device=DEVICE)
    x = torch.ones(1, 1, headdim, device=DEVICE)
    B = values[:1, None].contiguous().to(DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    params = SsmLayerParams(
        A=torch.zeros(1, device=DEVICE),
        D=None,
        dt_bias=None,
        dt_softplus=False,
        dt_limit=(0.0, math.inf),
    )
    more = {} if seed is None else {"rounding_seed": seed}
    step_triton.state_step(
        pool,
        x,
        one,
        B,
        B,
        params=params,
        state_slots=torch.tensor([slot], dtype=torch.int32, device=DEVICE),
        out=torch.empty_like(x),
        **more,
    )
    return pool[slot, 0].cpu()


def awkward_values(dtype: torch.dtype) -> torch.Tensor:
    """Ties, mantissas that overflow, subnormal and extreme numbers, next to random ones."""
    info = torch.finfo(dtype)
    picked = torch.tensor(
        [0.0, -0.0, 1.0, 3.0, 1.99, 255.9, 1e-3, info.tiny, info.tiny / 3, 60000.0]
    )
    ties = 1 + torch.arange(8) * info.eps / 2
    random = torch.randn(46, generator=torch.Generator().manual_seed(0)) * 100
    return torch.cat([picked, -picked[2:], ties, -ties, random]).repeat(2, 1)[:, :64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_the_nearest_as_torch_does(dtype: torch.dtype) -> None:
    values = awkward_values(dtype)
    assert torch.equal(states_after(values, dtype, None), values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_at_random_gives_a_neighbour(dtype: torch.dtype) -> None:
    values = awkward_values(dtype)
    exact = values.to(dtype).float() == values
    rounded = states_after(values, dtype, 7).float()
    assert torch.equal(rounded[exact], values[exact])
    error = (rounded - values).abs()
    info = torch.finfo(dtype)
    spacing = values.abs().clamp(min=info.tiny) * info.eps
    assert (error <= spacing).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, -100.0, 1e-6], ids=str)
def test_rounding_at_random_keeps_the_mean(dtype: torch.dtype, size: float) -> None:
    """4 x 8,192 roundings of one value that lies 30 % of the way between two neighbours."""
    if dtype is torch.float16 and size == 1e-6:
        spacing = 2.0**-24
        below = 16 * spacing
    else:
        below = float(torch.tensor(size).to(dtype))
        spacing = 2.0 ** math.floor(math.log2(abs(below))) * torch.finfo(dtype).eps
    value = math.copysign(abs(below) + 0.3 * spacing, size)
    draws = [states_after(torch.full((64, 128), value), dtype, seed) for seed in (0, 1, 5, 2**40)]
    ups = torch.stack([(draw.float().abs() - abs(below)) / spacing for draw in draws])
    assert ((ups == 0) | (ups == 1)).all()
    # Five standard deviations of the mean of 32,768 draws.
    assert abs(float(ups.double().mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / ups.numel())
    for draw in ups:
        assert abs(float(draw.double().mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / draw.numel())
    # Neither along a row nor along a column are the draws alike.
    centred = ups.double() - 0.3
    for axis in (1, 2):
        alike = float((centred * centred.roll(1, axis)).mean()) / (0.3 * 0.7)
        assert abs(alike) < 5 / math.sqrt(ups.numel())


def test_rounding_depends_on_seed_and_slot_alone() -> None:
    values = torch.full((64, 128), 1 + 0.4 * 2.0**-7)
    draw = states_after(values, torch.bfloat16, 3)
    assert torch.equal(draw, states_after(values, torch.bfloat16, 3))
    assert not torch.equal(draw, states_after(values, torch.bfloat16, 4))
    assert not torch.equal(draw, states_after(values, torch.bfloat16, 3, slot=2))
    # A slot's rows are drawn the same whatever is beside them.
    assert torch.equal(draw[:8], states_after(values[:8], torch.bfloat16, 3))


def test_random_rounding_of_the_other_entries() -> None:
    case = make_step_case(slots=(3, 7), state_dtype=torch.bfloat16, dstate=20, device=DEVICE)
    _, nearest = case.run(step_triton.state_step)
    _, pool = case.run(step_triton.state_step, rounding_seed=11)
    spacing = nearest[[3, 7]].float().abs() * 2.0**-7
    assert ((pool[[3, 7]].float() - nearest[[3, 7]].float()).abs() <= spacing).all()
    assert not torch.equal(pool[[3, 7]], nearest[[3, 7]])
    shape, p = case.pool.shape[1:], case.params
    untied = make_step_case(slots=(3, 7), state_dtype=torch.bfloat16, dstate=20, device=DEVICE)
    untied.inputs["dt"] = case.inputs["dt"][..., None].expand_as(case.inputs["x"])
    _, same = untied.run(
        step_triton.state_step_untied,
        A=p.A[:, None, None].expand(shape),
        D=p.D[:, None].expand(shape[:2]),
        dt_bias=p.dt_bias[:, None].expand(shape[:2]),
        dt_softplus=True,
        rounding_seed=11,
    )
    assert torch.equal(same[[3, 7]], pool[[3, 7]])
    stepped = make_step_case(slots=(3, 7), state_dtype=torch.bfloat16, dstate=20, device=DEVICE)
    for name, tensor in case.inputs.items():
        stepped.inputs[name] = tensor[:, None]
    _, same = stepped.run(step_triton.state_steps, rounding_seed=11)
    assert torch.equal(same[[3, 7]], pool[[3, 7]])


def test_refuses() -> None:
    case = make_step_case(device=DEVICE)
    with pytest.raises(ValueError, match="rounding_seed"):
        case.run(step_triton.state_step, rounding_seed=1)
    case.inputs["B"] = case.inputs["B"].double()
    with pytest.raises(TypeError, match="B"):
        case.run(step_triton.state_step)


def test_every_shape_has_a_tile() -> None:
    for state_bytes in (2, 4):
        for headdim, dstate in ((64, 128), (80, 128), (128, 256), (1, 1), (40, 33), (4096, 16)):
            for work in (1, 4096, 4097, 10**7):
                tile = step_tiles.step_tile(state_bytes, headdim, dstate, work)
                for number in (tile.block_rows, tile.num_warps):
                    assert number & (number - 1) == 0 and number > 0
    published = step_tiles.step_tile(4, 64, 128, 4096)
    assert published == step_tiles.StepTile(block_rows=4, num_warps=1)
    assert NUM_SLOTS > 7 and step_torch.state_step is not step_triton.state_step
