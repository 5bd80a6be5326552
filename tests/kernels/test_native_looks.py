"""A call that looks like the layer's last one is not checked again: one that does not, is.

Operations of a decode step keep what they found out about their arguments with the layer. Here one
layer is given arguments of ever other looks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from stateferry_kernels.kv_layer import KvPlan, KvSequence
from stateferry_kernels.layer_state import ZERO_SLOT
from stateferry_kernels.plans import DecodePlan
from support.backends import kernels_of
from support.kv_case import Sizes, make_rows, poisoned_layer
from support.ssm_case import Shape, make_layer, poisoned_state
from support.step_case import make_step_case

Tensors = dict[str, torch.Tensor]
# Tensors by their argument's name -> the output.
Call = Callable[[Tensors], torch.Tensor]

ROWS = 2
SHAPE = Shape()
DTYPE = torch.float32


def drawn(dtype: torch.dtype = DTYPE, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "x": (SHAPE.nheads, SHAPE.headdim),
        "dt": (SHAPE.nheads,),
        "B": (SHAPE.ngroups, SHAPE.dstate),
        "C": (SHAPE.ngroups, SHAPE.dstate),
    }
    return {
        name: torch.randn(ROWS, *size, generator=generator).to(dtype)
        for name, size in sizes.items()
    }


def wider(rows: torch.Tensor) -> torch.Tensor:
    """The same rows further apart, NaN between them."""
    apart = torch.full((rows.shape[0], 2, *rows.shape[1:]), math.nan, dtype=rows.dtype)
    apart[:, 1] = rows
    return apart[:, 1]


def out_for(rows: torch.Tensor) -> torch.Tensor:
    return torch.full(rows.shape, math.nan, dtype=rows.dtype)


def step() -> tuple[Call, Tensors]:
    case = make_step_case(slots=(3, 1))
    params = dataclasses.replace(case.params)

    def call(given: Tensors) -> torch.Tensor:
        out = out_for(given["x"])
        kernels_of("cpu").state_step(
            case.pool.clone(),
            **given,
            params=params,
            state_slots=torch.tensor([3, 1], dtype=torch.int32),
            out=out,
        )
        return out

    return call, drawn()


def decode_row() -> tuple[Call, Tensors]:
    layer = make_layer(SHAPE)
    state = poisoned_state(layer)

    def call(given: Tensors) -> torch.Tensor:
        out = out_for(given["x"])
        plan = DecodePlan(SHAPE.grid, (ZERO_SLOT, ZERO_SLOT), (0, 1), (0, 0))
        kernels_of("cpu").decode_row(**given, params=layer.ssm, plan=plan, state=state, out=out)
        return out

    return call, drawn()


def conv_row() -> tuple[Call, Tensors]:
    layer = make_layer(SHAPE)
    state = poisoned_state(layer)

    def call(given: Tensors) -> torch.Tensor:
        out = out_for(given["xBC"])
        plan = DecodePlan(SHAPE.grid, (ZERO_SLOT, ZERO_SLOT), (0, 1), (0, 0))
        kernels_of("cpu").causal_conv1d_row(
            given["xBC"], conv=layer.conv, plan=plan, state=state, out=out
        )
        return out

    generator = torch.Generator().manual_seed(1)
    return call, {"xBC": torch.randn(ROWS, SHAPE.conv_dim, generator=generator)}


def attention() -> tuple[Call, Tensors]:
    sizes = Sizes()
    layer = poisoned_layer(sizes, 2, DTYPE)
    rows = make_rows(sizes, ROWS, DTYPE)

    def call(given: Tensors) -> torch.Tensor:
        out = out_for(given["q"])
        plan = KvPlan(sizes.page_tokens, tuple(KvSequence(0, 1, (page,)) for page in range(ROWS)))
        kernels_of("cpu").attention(**given, plan=plan, kv=layer, scale=1.0, out=out)
        return out

    return call, {"q": rows.q, "k": rows.k, "v": rows.v}


OPERATIONS = pytest.mark.parametrize(
    "make", [step, decode_row, conv_row, attention], ids=lambda make: make.__name__
)


@OPERATIONS
def test_other_strides_give_the_same_bytes(make: Callable[[], tuple[Call, Tensors]]) -> None:
    call, given = make()
    expected = call(given)
    assert expected.isfinite().all()
    for name in given:
        assert torch.equal(call({**given, name: wider(given[name])}), expected), name
        assert torch.equal(call(given), expected), f"after {name}"


@OPERATIONS
def test_a_wrong_shape_after_a_right_one_is_refused(
    make: Callable[[], tuple[Call, Tensors]],
) -> None:
    call, given = make()
    expected = call(given)
    for name, tensor in given.items():
        for wrong in (tensor[:1], tensor[..., :-1], tensor.unsqueeze(0)):
            with pytest.raises((TypeError, ValueError)):
                call({**given, name: wrong.contiguous()})
        with pytest.raises((TypeError, ValueError)):
            call({**given, name: tensor.double()})
    assert torch.equal(call(given), expected)


@pytest.mark.parametrize("make", [step, decode_row], ids=lambda make: make.__name__)
def test_dt_of_another_dtype(make: Callable[[], tuple[Call, Tensors]]) -> None:
    """It may differ from the activations', so it alone may change."""
    call, given = make()
    given["dt"] = given["dt"].bfloat16().float()
    expected = call(given)
    for _ in range(2):
        assert torch.equal(call({**given, "dt": given["dt"].bfloat16()}), expected)
        assert torch.equal(call(given), expected)
