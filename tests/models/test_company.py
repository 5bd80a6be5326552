"""A sequence's logits do not depend on who shares its batches, nor on prefill against decode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stateferry.cache.state_pool import StatePool
from stateferry.models.registry import load_model
from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.plans import (
    BoundaryWrite,
    CommitPlan,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)
from support.tiny_model import write_tiny_model

GRID = 32


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@torch.inference_mode()
def run(
    model_dir: Path, dtype: torch.dtype, prompts: list[torch.Tensor], steps: torch.Tensor
) -> torch.Tensor:
    """Logits (num_prompts, 1 + num_steps, vocab): one extend, then the same tokens for all."""
    count = len(prompts)
    model = load_model(model_dir, dtype=dtype, kernels=select_kernels())
    pool = StatePool(
        model.config.geometry, grid=GRID, dtype=dtype, num_slots=1 + 4 * count, num_pages=count
    )
    pool.poison()
    slots, fresh, positions, rows = [0] * count, iter(range(1, 1 + 4 * count)), [], []
    for number, prompt in enumerate(prompts):
        last, writes = len(prompt) // GRID * GRID, ()
        if last:
            writes = (BoundaryWrite(last, next(fresh)),)
        rows.append(ExtendSequence(0, len(prompt), 0, number, writes))
        slots[number] = writes[0].state_slot if writes else 0
        positions.append(len(prompt))
    plan = ExtendPlan(GRID, tuple(rows))
    last_rows = [end - 1 for end in plan.cu_seqlens[1:]]
    logits = [model.extend(torch.cat(prompts), plan, pool.layers, last_rows)]
    for token in steps:
        decode = DecodePlan(
            GRID, tuple(slots), tuple(range(count)), tuple(p % GRID for p in positions)
        )
        logits.append(model.decode(token.expand(count), decode, pool.layers))
        positions = [p + 1 for p in positions]
        full = [n for n, p in enumerate(positions) if p % GRID == 0]
        if full:
            dst = [next(fresh) for _ in full]
            src = tuple(slots[n] for n in full)
            model.commit(CommitPlan(GRID, src, tuple(dst), tuple(full)), pool.layers)
            for number, slot in zip(full, dst, strict=True):
                slots[number] = slot
    return torch.stack(logits, dim=1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_alone_in_company_and_by_one_prefill(tmp_path: Path, dtype: torch.dtype) -> None:
    model_dir = write_tiny_model(tmp_path, chunk_size=GRID)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(3, 250, (40,), generator=generator)
    lengths = [1, 2, 3, 31, 32, 33, 60, 64, 65]
    prompts = [torch.randint(3, 250, (n,), generator=generator) for n in lengths]
    together = run(model_dir, dtype, prompts, steps)
    assert torch.isfinite(together).all()
    for number, prompt in enumerate(prompts):
        alone = run(model_dir, dtype, [prompt], steps)
        assert torch.equal(alone[0], together[number]), len(prompt)
        whole = run(model_dir, dtype, [torch.cat([prompt, steps])], steps[:0])
        assert torch.equal(whole[0, 0], together[number, -1]), len(prompt)


def test_the_reference_backend_agrees(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path, chunk_size=GRID)
    token_ids = torch.randint(3, 250, (40,), generator=torch.Generator().manual_seed(1))
    plan_row = ExtendSequence(0, 40, 0, 0, (BoundaryWrite(32, 1),))
    logits = []
    for name in (None, "torch", "reference"):
        model = load_model(model_dir, dtype=torch.float32, kernels=select_kernels(name))
        pool = StatePool(
            model.config.geometry, grid=GRID, dtype=torch.float32, num_slots=2, num_pages=1
        )
        pool.poison()
        plan = ExtendPlan(GRID, (plan_row,))
        logits.append(model.extend(token_ids, plan, pool.layers, range(40)))
    for fast in logits[:2]:
        assert float((fast - logits[2]).abs().max() / logits[2].abs().max()) < 1e-5
