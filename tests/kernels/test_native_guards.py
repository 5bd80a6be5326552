"""What the C++ library may never see is refused before it, and named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stateferry_kernels.conv1d import cpu_ops as conv1d_cpu
from stateferry_kernels.draft_plans import (
    ROOT,
    AcceptPlan,
    AcceptSequence,
    VerifyPlan,
    VerifySequence,
)
from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.linear import cpu_ops as linear_cpu
from stateferry_kernels.norm import cpu_ops as norm_cpu
from stateferry_kernels.operations import Kernels
from stateferry_kernels.plans import (
    BoundaryWrite,
    CommitPlan,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)
from stateferry_kernels.ssd import cpu_ops as ssd_cpu
from stateferry_kernels.state_update import cpu_ops as update_cpu
from stateferry_kernels.state_update import step_cpu
from support.backends import each_backend, kernels_of
from support.ssm_case import (
    MAX_DRAFT,
    NUM_PAGES,
    NUM_SLOTS,
    Shape,
    layer_pass,
    make_layer,
    make_tokens,
    poisoned_drafts,
    poisoned_state,
)

SHAPE = Shape()
LAYER = make_layer(SHAPE)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calling the library fails the test."""

    def called() -> Any:
        pytest.fail("the library was called")

    for module in (conv1d_cpu, linear_cpu, norm_cpu, ssd_cpu, update_cpu, step_cpu):
        monkeypatch.setattr(module, "native", called)


def run(kernels: Kernels, plan: Any, conv: bool) -> None:
    """The convolution or the recurrence of a plan, alone."""
    state, drafts = poisoned_state(LAYER), poisoned_drafts(LAYER)
    if isinstance(plan, CommitPlan):
        kernels.commit(params=LAYER.ssm, plan=plan, state=state)
        return
    if isinstance(plan, AcceptPlan):
        kernels.accept(params=LAYER.ssm, plan=plan, state=state, drafts=drafts)
        return
    if isinstance(plan, ExtendPlan):
        count = plan.total_tokens
    else:
        count = plan.num_rows if isinstance(plan, VerifyPlan) else len(plan.state_slots)

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    skipped = ("causal_conv1d_extend", "causal_conv1d_row", "causal_conv1d_verify")
    if conv:
        skipped = ("chunk_scan", "decode_row", "verify")
    half = dataclasses.replace(kernels, **dict.fromkeys(skipped, nothing))
    layer_pass(half, LAYER, make_tokens(LAYER, count), plan, state, drafts)


def one(slot: int = 0, page: int = 0, boundary: int = 1) -> ExtendPlan:
    return ExtendPlan(32, (ExtendSequence(0, 32, slot, page, (BoundaryWrite(32, boundary),)),))


def draft(slot: int = 0, page: int = 0, draft_page: int = 0, nodes: int = 3) -> VerifyPlan:
    parents = tuple(range(ROOT, nodes - 1))
    return VerifyPlan(32, (VerifySequence(slot, page, 2, draft_page, parents),))


def kept(
    slot: int = 0, page: int = 0, draft_page: int = 0, node: int = 0, boundary: int = PAD_SLOT
) -> AcceptPlan:
    rows = 31 if boundary != PAD_SLOT else 2
    return AcceptPlan(32, (AcceptSequence(slot, page, rows, draft_page, (node,), boundary),))


OUTSIDE: dict[str, tuple[str, Any]] = {
    "extend slot": ("state_slot", one(slot=NUM_SLOTS)),
    "extend boundary": ("state_slot", one(boundary=NUM_SLOTS)),
    "extend page": ("tail_page", one(page=NUM_PAGES)),
    "decode slot": ("state_slots", DecodePlan(32, (NUM_SLOTS,), (0,), (0,))),
    "decode page": ("tail_pages", DecodePlan(32, (1,), (NUM_PAGES,), (0,))),
    "decode page below": ("tail_pages", DecodePlan(32, (1,), (-1,), (0,))),
    "decode grid": ("grid", DecodePlan(64, (1,), (0,), (0,))),
    "commit source": ("src_slots", CommitPlan(32, (-1,), (1,), (0,))),
    "commit target": ("dst_slots", CommitPlan(32, (1,), (NUM_SLOTS,), (0,))),
    "commit page": ("tail_pages", CommitPlan(32, (1,), (2,), (NUM_PAGES,))),
    "verify slot": ("state_slot", draft(slot=NUM_SLOTS)),
    "verify page": ("tail_page", draft(page=NUM_PAGES)),
    "verify draft page": ("draft_page", draft(draft_page=NUM_PAGES)),
    "verify nodes": ("a draft of 17 tokens", draft(nodes=MAX_DRAFT + 1)),
    "accept slot": ("state_slot", kept(slot=NUM_SLOTS)),
    "accept page": ("tail_page", kept(page=NUM_PAGES)),
    "accept draft page": ("draft_page", kept(draft_page=NUM_PAGES)),
    "accept node": ("path", kept(node=MAX_DRAFT)),
    "accept boundary": ("boundary_slot", kept(boundary=NUM_SLOTS)),
}


@pytest.mark.usefixtures("no_library")
@each_backend
@pytest.mark.parametrize("conv", [False, True], ids=["recurrence", "convolution"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_memory_that_is_not_there(backend: str, name: str, conv: bool) -> None:
    what, plan = OUTSIDE[name]
    plan = dataclasses.replace(plan, cache={})
    with pytest.raises(ValueError, match=f"^{what}"):
        run(kernels_of(backend), plan, conv)


Call = Callable[[Kernels], Any]
X, W = torch.ones(4, 6), torch.ones(5, 6)
BAD_ROWS: dict[str, tuple[type[Exception], str, Call]] = {
    "linear x dtype": (TypeError, "x", lambda k: k.linear(X.double(), W, None)),
    "linear weight dtype": (TypeError, "weight", lambda k: k.linear(X, W.half(), None)),
    "linear wide weight": (TypeError, "weight", lambda k: k.linear(X.bfloat16(), W, None)),
    "linear weight shape": (ValueError, "weight", lambda k: k.linear(X, W[:, :5], None)),
    "linear weight strides": (ValueError, "weight", lambda k: k.linear(X, W.T[:, :0], None)),
    "linear bias": (ValueError, "bias", lambda k: k.linear(X, W, torch.ones(6))),
    "norm weight": (ValueError, "weight", lambda k: k.rms_norm(X, torch.ones(5), 1e-5)),
    "norm x dtype": (TypeError, "x", lambda k: k.rms_norm(X.double(), torch.ones(6), 1e-5)),
    "norm z": (
        ValueError,
        "z",
        lambda k: k.gated_rms_norm(X, X[:3], torch.ones(6), 1e-5, 6),
    ),
    "norm group": (
        ValueError,
        "6 features",
        lambda k: k.norm_then_gate(X, X, torch.ones(6), 1e-5, 4),
    ),
}


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(name: str) -> None:
    error, what, call = BAD_ROWS[name]
    kernels = kernels_of("cpu")
    with pytest.raises(error, match=f"^{what}"):
        call(kernels)


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "out", "z"])
def test_bad_inputs_of_every_recurrence(name: str) -> None:
    kernels, rows = kernels_of("cpu"), 3
    good = {
        "x": torch.zeros(rows, SHAPE.nheads, SHAPE.headdim),
        "dt": torch.zeros(rows, SHAPE.nheads),
        "B": torch.zeros(rows, SHAPE.ngroups, SHAPE.dstate),
        "C": torch.zeros(rows, SHAPE.ngroups, SHAPE.dstate),
    }
    good |= {"out": good["x"].clone(), "z": good["x"].clone()}
    plans = {
        kernels.chunk_scan: {"plan": ExtendPlan(32, (ExtendSequence(0, rows, 0, 0),))},
        kernels.decode_row: {"plan": DecodePlan(32, (0,) * rows, (0, 1, 2), (0,) * rows)},
        kernels.verify: {"plan": draft(), "drafts": poisoned_drafts(LAYER)},
    }
    for operation, more in plans.items():
        common = {"params": LAYER.ssm, "state": poisoned_state(LAYER), **more}
        for error, bad in ((ValueError, good[name][:2]), (TypeError, good[name].double())):
            with pytest.raises(error, match=f"^{name}: "):
                operation(**{**good, name: bad}, **common)


@each_backend
def test_no_rows_are_no_work(backend: str) -> None:
    kernels, state = kernels_of(backend), poisoned_state(LAYER)
    drafts = poisoned_drafts(LAYER)
    for plan in (ExtendPlan(32, ()), DecodePlan(32, (), (), ()), VerifyPlan(32, ())):
        active, y = layer_pass(kernels, LAYER, make_tokens(LAYER, 0), plan, state, drafts)
        assert len(active) == len(y) == 0
    kernels.commit(params=LAYER.ssm, plan=CommitPlan(32, (), (), ()), state=state)
    kernels.accept(params=LAYER.ssm, plan=AcceptPlan(32, ()), state=state, drafts=drafts)
    assert state.tail_dt.isnan().all() and drafts.dt.isnan().all()
    assert math.isclose(float(state.ssm_state[0].abs().sum()), 0.0)


BAD_STEPS = {
    "state_slots": {"state_slots": [0, NUM_SLOTS]},
    "step_slots": {"step_slots": [0, 2]},
    "parents": {"parents": [[-1, 0, 2], [-1, -1, 3]]},
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_plain_steps_stay_inside_their_memory(name: str) -> None:
    kernels = kernels_of("cpu")
    state = torch.zeros(NUM_SLOTS, SHAPE.nheads, SHAPE.headdim, SHAPE.dstate)
    steps = torch.zeros(2, 3, *state.shape[1:])
    x = torch.zeros(2, 3, SHAPE.nheads, SHAPE.headdim)
    B = torch.zeros(2, 3, SHAPE.ngroups, SHAPE.dstate)
    plan = {"state_slots": [0, 1], "step_slots": [1, 0], "parents": [[-1, 0, 1], [-1, -1, 0]]}

    def run(**given: Any) -> None:
        tables = {key: torch.tensor(value, dtype=torch.int32) for key, value in given.items()}
        rest = {"params": LAYER.ssm, "out": x.clone(), "step_states": steps}
        kernels.state_steps(state, x, x[..., 0], B, B, **rest, **tables)

    run(**plan)
    with pytest.raises(ValueError, match=f"^{name}: "):
        run(**plan | BAD_STEPS[name])
