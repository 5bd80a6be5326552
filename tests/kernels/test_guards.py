"""Host entries and plans refuse what they cannot work with, and say what was wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stateferry_kernels.plans import (
    BoundaryWrite,
    CommitPlan,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)
from stateferry_kernels.ssd.torch_ops import chunk_scan
from support.ssm_case import Shape, make_layer, poisoned_state

SHAPE = Shape()
LAYER = make_layer(SHAPE)


def arguments() -> dict[str, torch.Tensor]:
    return {
        "x": torch.zeros(5, SHAPE.nheads, SHAPE.headdim),
        "dt": torch.zeros(5, SHAPE.nheads),
        "B": torch.zeros(5, SHAPE.ngroups, SHAPE.dstate),
        "C": torch.zeros(5, SHAPE.ngroups, SHAPE.dstate),
        "out": torch.zeros(5, SHAPE.nheads, SHAPE.headdim),
    }


def scan(**changed: torch.Tensor) -> torch.Tensor:
    given = {**arguments(), **changed}
    plan = ExtendPlan(SHAPE.grid, (ExtendSequence(0, 5, 0, 0),))
    chunk_scan(**given, params=LAYER.ssm, plan=plan, state=poisoned_state(LAYER))
    return given["out"]


def test_the_right_arguments_pass() -> None:
    assert torch.equal(scan(), torch.zeros(5, SHAPE.nheads, SHAPE.headdim))


@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "out"])
def test_a_wrong_shape_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: shape"):
        scan(**{name: torch.zeros(4, 1, 1)})


@pytest.mark.parametrize("name", ["x", "B", "C", "out"])
def test_a_wrong_dtype_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: torch.float16"):
        scan(**{name: arguments()[name].half()})


def test_a_strided_pool_is_refused() -> None:
    state = poisoned_state(LAYER)
    strided = state.ssm_state.transpose(2, 3).contiguous().transpose(2, 3)
    plan = ExtendPlan(SHAPE.grid, (ExtendSequence(0, 5, 0, 0),))
    with pytest.raises(ValueError, match="ssm_state"):
        chunk_scan(
            **arguments(),
            params=LAYER.ssm,
            plan=plan,
            state=dataclasses.replace(state, ssm_state=strided),
        )


BAD_SEQUENCES = {
    "no tokens": (0, 0, 0, 0, ()),
    "before the start": (-1, 3, 0, 0, ()),
    "padding slot": (0, 3, -1, 0, ()),
    "a boundary off the grid": (0, 40, 0, 0, (BoundaryWrite(33, 1),)),
    "a boundary not passed": (0, 40, 0, 0, (BoundaryWrite(64, 1),)),
    "the last boundary missing": (0, 70, 0, 0, (BoundaryWrite(32, 1),)),
    "no boundary": (0, 32, 0, 0, ()),
    "out of order": (0, 64, 0, 0, (BoundaryWrite(64, 1), BoundaryWrite(32, 2))),
    "into the zero slot": (0, 32, 0, 0, (BoundaryWrite(32, 0),)),
}


@pytest.mark.parametrize("name", BAD_SEQUENCES)
def test_a_bad_extend_plan_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        ExtendPlan(32, (ExtendSequence(*BAD_SEQUENCES[name]),))


def test_bad_decode_and_commit_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        DecodePlan(32, (1, 2), (0,), (0, 0))
    with pytest.raises(ValueError, match="out of range"):
        DecodePlan(32, (1,), (0,), (32,))
    with pytest.raises(ValueError, match="ZERO_SLOT"):
        CommitPlan(32, (1,), (0,), (0,))
    with pytest.raises(ValueError, match="overlap"):
        CommitPlan(32, (1, 2), (2, 3), (0, 1))
