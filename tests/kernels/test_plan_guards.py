"""Plans that would let two sequences touch the same memory, or memory that is not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.plans import (
    BoundaryWrite,
    CommitPlan,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)
from support.ssm_case import NUM_PAGES, NUM_SLOTS, Shape, make_layer, poisoned_state

SHAPE = Shape()
LAYER = make_layer(SHAPE)
KERNELS = select_kernels()


def one(slot: int = 0, page: int = 0, boundary: int = 1) -> ExtendSequence:
    return ExtendSequence(0, 32, slot, page, (BoundaryWrite(32, boundary),))


OVERLAPS: dict[str, Callable[[], object]] = {
    "one page twice": lambda: ExtendPlan(32, (one(), one(boundary=2))),
    "one slot written twice": lambda: ExtendPlan(32, (one(), one(page=1))),
    "a slot read and written": lambda: ExtendPlan(32, (one(slot=7), one(page=1, boundary=7))),
    "a decode page twice": lambda: DecodePlan(32, (1, 2), (3, 3), (0, 0)),
    "a commit slot twice": lambda: CommitPlan(32, (1, 2), (3, 3), (0, 1)),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_shared_memory_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"share|overlap"):
        OVERLAPS[name]()


def test_sharing_a_snapshot_and_padding_a_page_are_fine() -> None:
    assert ExtendPlan(32, (one(slot=7), one(slot=7, page=1, boundary=2)))
    assert DecodePlan(32, (4, 4, PAD_SLOT), (0, 1, 0), (0, 0, 0))


def extend(plan: ExtendPlan) -> None:
    columns = torch.zeros(plan.total_tokens, SHAPE.conv_dim)
    KERNELS.causal_conv1d_extend(
        columns, conv=LAYER.conv, plan=plan, state=poisoned_state(LAYER), out=columns.clone()
    )


def decode(plan: DecodePlan) -> None:
    columns = torch.zeros(len(plan.state_slots), SHAPE.conv_dim)
    KERNELS.causal_conv1d_row(
        columns, conv=LAYER.conv, plan=plan, state=poisoned_state(LAYER), out=columns.clone()
    )


def commit(plan: CommitPlan) -> None:
    KERNELS.commit(params=LAYER.ssm, plan=plan, state=poisoned_state(LAYER))


OUTSIDE: dict[str, tuple[str, Callable[[], None]]] = {
    "extend slot": ("state_slot", lambda: extend(ExtendPlan(32, (one(slot=NUM_SLOTS),)))),
    "extend boundary": ("state_slot", lambda: extend(ExtendPlan(32, (one(boundary=NUM_SLOTS),)))),
    "extend page": ("tail_page", lambda: extend(ExtendPlan(32, (one(page=NUM_PAGES),)))),
    "extend grid": ("grid", lambda: extend(ExtendPlan(16, (ExtendSequence(0, 3, 0, 0),)))),
    "decode slot": ("state_slots", lambda: decode(DecodePlan(32, (NUM_SLOTS,), (0,), (0,)))),
    "decode page": ("tail_pages", lambda: decode(DecodePlan(32, (1,), (-1,), (0,)))),
    "decode grid": ("grid", lambda: decode(DecodePlan(64, (1,), (0,), (0,)))),
    "commit source": ("src_slots", lambda: commit(CommitPlan(32, (-1,), (1,), (0,)))),
    "commit target": ("dst_slots", lambda: commit(CommitPlan(32, (1,), (NUM_SLOTS,), (0,)))),
    "commit page": ("tail_pages", lambda: commit(CommitPlan(32, (1,), (2,), (NUM_PAGES,)))),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_memory_that_is_not_there_is_named(name: str) -> None:
    what, call = OUTSIDE[name]
    with pytest.raises(ValueError, match=f"^{what}: "):
        call()
