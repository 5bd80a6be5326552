"""What attention may never see is refused before anything is read or written, and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stateferry_kernels.attention import cpu_ops
from stateferry_kernels.kv_layer import KvLayer, KvPlan, KvSequence
from support.backends import kernels_of
from support.kv_case import Sizes, make_rows, poisoned_layer

each_backend = pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
SIZES = Sizes(4, 2, 8, page_tokens=16)
NUM_PAGES = 6


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def called() -> Any:
        pytest.fail("the library was called")

    monkeypatch.setattr(cpu_ops, "native", called)


def run(backend: str, sequences: tuple[KvSequence, ...], **changed: Any) -> None:
    layer = poisoned_layer(SIZES, NUM_PAGES, torch.float32)
    rows = make_rows(SIZES, sum(s.length for s in sequences), torch.float32)
    good: dict[str, Any] = {"q": rows.q, "k": rows.k, "v": rows.v, "out": rows.q.clone()}
    good |= {"plan": KvPlan(16, sequences), "kv": layer, "scale": 1.0}
    try:
        kernels_of(backend).attention(**good | changed)
    finally:
        assert layer.keys.isnan().all() and layer.values.isnan().all()


PLANS: dict[str, tuple[str, tuple[KvSequence, ...]]] = {
    "too few pages": ("pages: 1 of 16", (KvSequence(0, 17, (0,)),)),
    "no pages": ("pages: 0 of 16", (KvSequence(40, 1, ()),)),
    "a page above": ("pages: 0 to 6", (KvSequence(0, 20, (0, NUM_PAGES)),)),
    "a page below": ("pages: -1 to 2", (KvSequence(20, 1, (-1, 2)),)),
    "an unused page above": ("pages: 0 to 9", (KvSequence(0, 5, (0, 9)),)),
    "one page twice": ("pages: two places", (KvSequence(0, 20, (3, 3)),)),
    "one page for two": ("pages: two places", (KvSequence(3, 1, (1,)), KvSequence(2, 2, (1,)))),
    "a page that another reads": (
        "pages: a page is written",
        (KvSequence(17, 1, (0, 1)), KvSequence(0, 3, (0,))),
    ),
    "a start below": ("start, length", (KvSequence(-1, 1, (0,)),)),
}


@each_backend
@pytest.mark.parametrize("name", PLANS)
def test_plans(backend: str, name: str) -> None:
    what, sequences = PLANS[name]
    with pytest.raises(ValueError, match=f"^{what}"):
        run(backend, sequences)


@each_backend
def test_pages_of_another_size(backend: str) -> None:
    plan = KvPlan(64, (KvSequence(0, 3, (0,)),))
    with pytest.raises(ValueError, match=r"^page_tokens: 64, expected the pool's 16"):
        run(backend, plan.sequences, plan=plan)


def test_a_plan_that_was_checked_is_checked_again_for_a_smaller_pool() -> None:
    plan = KvPlan(16, (KvSequence(0, 20, (0, 5)),))
    rows = make_rows(SIZES, 20, torch.float32)
    for pages in (NUM_PAGES, 4):
        layer = poisoned_layer(SIZES, pages, torch.float32)
        call = {"plan": plan, "kv": layer, "scale": 1.0, "out": rows.q.clone()}
        if pages == NUM_PAGES:
            kernels_of("torch").attention(rows.q, rows.k, rows.v, **call)
        else:
            with pytest.raises(ValueError, match=r"^pages: 0 to 5"):
                kernels_of("cpu").attention(rows.q, rows.k, rows.v, **call)


ONE = (KvSequence(0, 5, (2,)),)


@each_backend
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_rows(backend: str, name: str) -> None:
    rows = make_rows(SIZES, 5, torch.float32)
    good = {"q": rows.q, "k": rows.k, "v": rows.v, "out": rows.q}[name]
    for error, bad in (
        (TypeError, good.double()),
        (TypeError, good.bfloat16()),
        (ValueError, good[:4]),
        (ValueError, good[..., :7]),
        (ValueError, good[:, 0]),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            run(backend, ONE, **{name: bad})


@each_backend
def test_heads_that_do_not_divide(backend: str) -> None:
    q = torch.zeros(5, 3, SIZES.head_dim)
    with pytest.raises(ValueError, match=r"^q: 3 heads"):
        run(backend, ONE, q=q, out=q.clone())


def test_an_output_of_other_strides() -> None:
    out = torch.zeros(4, 5, SIZES.head_dim).transpose(0, 1)
    with pytest.raises(ValueError, match=r"^out: only the first dimension"):
        run("cpu", ONE, out=out)


POOL = torch.zeros(4, 2, 16, 8)
LAYERS: dict[str, tuple[type[Exception], str, KvLayer]] = {
    "dtype": (TypeError, "keys", KvLayer(POOL.double(), POOL.double())),
    "values dtype": (TypeError, "values", KvLayer(POOL, POOL.bfloat16())),
    "values shape": (ValueError, "values", KvLayer(POOL, POOL[:3])),
    "dimensions": (ValueError, "keys", KvLayer(POOL[0], POOL[0])),
    "strides": (ValueError, "keys", KvLayer(POOL.mT.contiguous().mT, POOL)),
}


@each_backend
@pytest.mark.parametrize("name", LAYERS)
def test_layers(backend: str, name: str) -> None:
    error, what, layer = LAYERS[name]
    with pytest.raises(error, match=f"^{what}"):
        run(backend, ONE, kv=layer)
