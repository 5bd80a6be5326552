"""A sequence's logits do not depend on who shares its batches, on cuts, nor on prefill against
decode: byte for byte."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stateferry.models.model import Model
from stateferry.models.registry import load_model
from stateferry_kernels.dispatch import select_kernels
from support.backends import kernels_of
from support.hf_models import CONFIGS, VOCAB, build
from support.model_walk import ModelWalk

# The one with the most parts of each architecture.
RICHEST = {
    "Mamba2": "four groups",
    "NemotronH": "latent experts in groups, biases",
    "FalconH1": "norm before gate",
    "GraniteMoeHybrid": "experts, rope",
    "Bamba": "biases",
}
STEPS = 40
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=RICHEST)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture = request.param
    path = tmp_path_factory.mktemp(architecture)
    build(path, architecture, seed=1, **CONFIGS[architecture][RICHEST[architecture]])
    return path


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(
    model: Model, prompts: list[list[int]], steps: list[int], *, page_tokens: int = 16
) -> torch.Tensor:
    """Logits (num_prompts, 1 + num_steps, vocab): one extend, then the same tokens for all."""
    walk = ModelWalk(model, len(prompts), page_tokens=page_tokens, seed=len(prompts))
    rows = [walk.extend(dict(enumerate(prompts)))]
    for token in steps:
        rows.append(walk.decode(dict.fromkeys(range(len(prompts)), token)))
    return torch.stack(rows, dim=1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_logits_alone_in_company_and_by_one_prefill(model_dir: Path, dtype: torch.dtype) -> None:
    kernels_of("cpu")
    model = load_model(model_dir, dtype=dtype, kernels=select_kernels())
    rng = random.Random(0)
    steps = [rng.randrange(3, VOCAB) for _ in range(STEPS)]
    chunk = model.chunk_size
    lengths = [1, 2, 3, chunk - 1, chunk, chunk + 1, 2 * chunk, 2 * chunk + 1]
    prompts = [[rng.randrange(3, VOCAB) for _ in range(n)] for n in lengths]
    together = run(model, prompts, steps)
    assert torch.isfinite(together).all()
    for number, prompt in enumerate(prompts):
        alone = run(model, [prompt], steps, page_tokens=64)
        assert torch.equal(alone[0], together[number]), len(prompt)
        whole = run(model, [prompt + steps], [])
        assert torch.equal(whole[0, 0], together[number, -1]), len(prompt)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_logits_of_a_prompt_in_pieces(model_dir: Path, dtype: torch.dtype) -> None:
    kernels_of("cpu")
    model = load_model(model_dir, dtype=dtype, kernels=select_kernels())
    rng = random.Random(1)
    ids = [rng.randrange(3, VOCAB) for _ in range(3 * model.chunk_size + 5)]
    whole = run(model, [ids], [])[0, 0]
    for _ in range(4):
        walk, done = ModelWalk(model, 1), 0
        while done < len(ids):
            count = min(rng.randint(1, model.chunk_size + 9), len(ids) - done)
            logits = walk.extend({0: ids[done : done + count]})
            done += count
        assert torch.equal(logits[0], whole)


def test_no_logits_are_made_that_nobody_asked_for(model_dir: Path) -> None:
    model = load_model(model_dir, dtype=torch.float32, kernels=select_kernels())
    walk = ModelWalk(model, 2)
    logits = walk.extend({0: [5, 6, 7], 1: [8, 9]}, rows=[])
    assert logits.shape == (0, VOCAB) and logits.dtype == torch.float32
    assert torch.isfinite(walk.decode({0: 3, 1: 4})).all()


def test_every_backend_agrees(model_dir: Path) -> None:
    rng = random.Random(2)
    ids = [rng.randrange(3, VOCAB) for _ in range(40)]
    logits = []
    for name in ("cpu", "torch", "reference"):
        model = load_model(model_dir, dtype=torch.float32, kernels=kernels_of(name))
        walk = ModelWalk(model, 1)
        logits.append(torch.cat([walk.extend({0: ids}, rows=range(40)), walk.decode({0: 7})]))
    for fast in logits[:2]:
        assert float((fast - logits[2]).abs().max() / logits[2].abs().max()) < 1e-5
