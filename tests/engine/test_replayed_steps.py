"""A decode step whose plan lies in tables that are filled in later gives the bytes of one that has
its own: interpreted here. The graphs themselves are in test_gpu_engine.py."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from stateferry.models.caches import LayerCaches
from stateferry.models.model import Model
from stateferry.models.registry import load_model
from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.kv_layer import KvPlan, KvSequence
from stateferry_kernels.plans import CommitPlan, DecodePlan
from stateferry_kernels.triton_replay import ReplayedCommit, ReplayedDecode
from support.gpu_models import caches_of, write_small_model

# Rows that are padding hold what was in memory before, and numpy would complain of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GRID, LONGEST = 16, 80
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", params=["Mamba2", "NemotronH"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    target = write_small_model(tmp_path_factory.mktemp("model"), request.param)
    kernels = select_kernels("triton")
    return load_model(target, dtype=torch.float32, kernels=kernels, device=DEVICE)


def new_caches(model: Model) -> LayerCaches:
    """Room for four sequences, with numbers everywhere."""
    return caches_of(model, GRID, num_sequences=4, longest=LONGEST, device=DEVICE)


def steps() -> list[tuple[list[int], DecodePlan, KvPlan]]:
    """Three sequences, two of them, then others: slots, pages and positions."""
    places = {0: (1, 0), 1: (4, 3), 2: (7, 1), 3: (8, 2)}  # slot, tail page
    pages = {i: tuple(range(5 * i, 5 * i + 5)) for i in places}
    made = []
    for rows in ([(0, 0), (1, 37), (2, 79)], [(1, 38), (0, 1)], [(3, 31), (1, 39)]):
        plan = DecodePlan(
            GRID,
            tuple(places[i][0] for i, _ in rows),
            tuple(places[i][1] for i, _ in rows),
            tuple(position % GRID for _, position in rows),
        )
        kv_plan = KvPlan(GRID, tuple(KvSequence(p, 1, pages[i]) for i, p in rows))
        made.append(([5 + i for i, _ in rows], plan, kv_plan))
    return made


def pools(caches: LayerCaches) -> list[torch.Tensor]:
    names = ("ssm_state", "conv_state", "tail_xBC", "tail_x", "tail_B", "tail_dt")
    states = [getattr(state, name) for state in caches.states for name in names]
    return states + [tensor for kv in caches.kv for tensor in (kv.keys, kv.values)]


def replayed(model: Model, caches: LayerCaches) -> ReplayedDecode:
    kv = caches.kv[0] if caches.kv else None
    return ReplayedDecode(
        caches.states[0], kv, page_tokens=GRID, num_rows=4, batch_rows=8, longest=LONGEST
    )


@torch.inference_mode()
def test_decode(model: Model) -> None:
    wanted, ours = new_caches(model), new_caches(model)
    inputs = replayed(model, ours)
    chosen = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    model.decode(inputs.consumed(chosen), inputs.plan, inputs.kv_plan, ours)
    for one, other in zip(pools(wanted), pools(ours), strict=True):
        assert torch.equal(one, other), "padding was written"
    for number, (token_ids, plan, kv_plan) in enumerate(steps()):
        ids = torch.tensor(token_ids, device=DEVICE)
        logits = model.decode(ids, plan, kv_plan, wanted)
        # All tokens are given, then the first is not, then none is.
        sources = [7 - i if i < number else -1 for i in range(len(token_ids))]
        for i, source in enumerate(sources):
            if source >= 0:
                chosen[source] = token_ids[i]
        given = [0 if source >= 0 else i for i, source in zip(token_ids, sources, strict=True)]
        inputs.fill(given, sources, plan, kv_plan)
        filled = model.decode(inputs.consumed(chosen), inputs.plan, inputs.kv_plan, ours)
        assert logits.isfinite().all()
        assert torch.equal(logits, filled[: len(token_ids)])
        for one, other in zip(pools(wanted), pools(ours), strict=True):
            assert torch.equal(one, other)


@torch.inference_mode()
def test_commit(model: Model) -> None:
    wanted, ours = new_caches(model), new_caches(model)
    inputs = ReplayedCommit(ours.states[0], 4)
    model.commit(inputs.plan, ours)
    for one, other in zip(pools(wanted), pools(ours), strict=True):
        assert torch.equal(one, other), "padding was written"
    for src, dst, pages in (((1, 4), (2, 5), (0, 3)), ((2, 5, 0), (8, 1, 7), (1, 2, 0))):
        plan = CommitPlan(GRID, src, dst, pages)
        model.commit(plan, wanted)
        inputs.fill(plan)
        model.commit(inputs.plan, ours)
        for one, other in zip(pools(wanted), pools(ours), strict=True):
            assert torch.equal(one, other)


def test_what_pools_do_not_have_is_refused(model: Model) -> None:
    caches = new_caches(model)
    inputs = replayed(model, caches)
    token_ids, plan, kv_plan = steps()[0]
    none = [-1] * len(token_ids)
    with pytest.raises(ValueError, match="state_slots"):
        inputs.fill(
            [1], [-1], DecodePlan(GRID, (9,), (0,), (0,)), KvPlan(GRID, kv_plan.sequences[:1])
        )
    with pytest.raises(ValueError, match="padding"):
        inputs.fill(
            [1], [-1], DecodePlan(GRID, (-1,), (0,), (0,)), KvPlan(GRID, kv_plan.sequences[:1])
        )
    with pytest.raises(ValueError, match="longer than 80"):
        inputs.fill(token_ids, none, plan, KvPlan(GRID, (KvSequence(80, 1, tuple(range(6))),) * 3))
    five = DecodePlan(GRID, (1, 2, 3, 4, 5), (0, 1, 2, 3, 4), (0,) * 5)
    with pytest.raises(ValueError, match="5 rows"):
        inputs.fill([1] * 5, [-1] * 5, five, KvPlan(GRID, kv_plan.sequences))
    if caches.kv:
        with pytest.raises(ValueError, match="past its pages"):
            inputs.fill(token_ids, none, plan, KvPlan(GRID, (KvSequence(16, 1, (3,)),) * 3))
        with pytest.raises(ValueError, match="pages: 20 to 20"):
            inputs.fill(
                [1],
                [-1],
                DecodePlan(GRID, (1,), (0,), (0,)),
                KvPlan(GRID, (KvSequence(3, 1, (20,)),)),
            )
    with pytest.raises(ValueError, match="dst_slots"):
        ReplayedCommit(caches.states[0], 4).fill(CommitPlan(GRID, (1,), (9,), (0,)))
