"""Recorded decode steps: the bytes of steps that run through Python, whatever has changed since."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stateferry.models import recorded
from stateferry.models.language_model import LanguageModel
from stateferry.models.registry import load_model
from stateferry_kernels.operations import Kernels
from support.backends import kernels_of, torch_threads
from support.hf_models import CONFIGS, VOCAB, build
from support.model_walk import ModelWalk

ALL_NATIVE = [
    ("Mamba2", "four groups"),
    ("NemotronH", "mamba, attention, mlp"),
    ("Bamba", "biases"),
]
EXPERTS = ("NemotronH", "experts")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Load = Callable[..., LanguageModel]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loaded(
        case: tuple[str, str], kernels: Kernels, dtype: torch.dtype = torch.float32
    ) -> LanguageModel:
        architecture, name = case
        if not any(tmp_path.iterdir()):
            build(tmp_path, architecture, seed=1, **CONFIGS[architecture][name])
        model = load_model(tmp_path, dtype=dtype, kernels=kernels)
        assert isinstance(model, LanguageModel)
        return model

    return loaded


def pair(load: Load, case: tuple[str, str], dtype: torch.dtype) -> list[LanguageModel]:
    """One that records and one that does not."""
    kernels = kernels_of("cpu")
    return [load(case, k, dtype) for k in (kernels, dataclasses.replace(kernels, recorder=None))]


def prompts(count: int) -> dict[int, list[int]]:
    rng = random.Random(count)
    return {n: [rng.randrange(3, VOCAB) for _ in range(3 + 5 * n)] for n in range(count)}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", ALL_NATIVE, ids=[case[0] for case in ALL_NATIVE])
def test_the_same_bytes_while_sequences_come_and_go(
    load: Load, case: tuple[str, str], dtype: torch.dtype
) -> None:
    models = pair(load, case, dtype)
    walks = [ModelWalk(model, 4) for model in models]
    for walk in walks:
        walk.extend(prompts(4))
    rng = random.Random(0)
    sizes = set()
    # Past a grid point of each, so that slots change under the tapes.
    for step in range(3 * models[0].chunk_size):
        members = rng.sample(range(4), rng.choice((1, 2, 4)))
        ids = {n: rng.randrange(3, VOCAB) for n in members}
        with torch_threads(1 + step % 3):
            ours, expected = (walk.decode(ids) for walk in walks)
        assert torch.equal(ours, expected), step
        sizes.add(len(ids))
    assert set(models[0].recorded.sizes) == sizes == {1, 2, 4}
    assert not models[1].recorded.sizes


def test_what_torch_computes_is_not_recorded(load: Load) -> None:
    models = pair(load, EXPERTS, torch.float32)
    walks = [ModelWalk(model, 2) for model in models]
    for walk in walks:
        walk.extend(prompts(2))
    for _ in range(6):
        ours, expected = (walk.decode({0: 5, 1: 9}) for walk in walks)
        assert torch.equal(ours, expected)
    assert not models[0].recorded.sizes


def test_other_caches_are_recorded_anew(load: Load) -> None:
    model, plain = pair(load, ALL_NATIVE[1], torch.float32)
    walks = [ModelWalk(model, 2, seed=seed) for seed in (1, 2)]
    expected = ModelWalk(plain, 2)
    for walk in (*walks, expected):
        walk.extend(prompts(2))
    for _ in range(4):
        logits = expected.decode({0: 5, 1: 9})
        for walk in walks:
            assert torch.equal(walk.decode({0: 5, 1: 9}), logits)
    assert not model.recorded.sizes
    for _ in range(4):
        assert torch.equal(walks[0].decode({0: 5, 1: 9}), expected.decode({0: 5, 1: 9}))
    assert model.recorded.sizes == (2,)


def test_a_sequence_outgrows_the_tables(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a block is 64 positions for the tape; the tables themselves are longer."""
    monkeypatch.setattr(recorded, "BLOCK", 64)
    models = pair(load, ("Bamba", "biases"), torch.float32)
    walks = [ModelWalk(model, 1) for model in models]
    for walk in walks:
        walk.extend({0: list(range(3, 60))})
    seen = []
    for token in range(20):
        ours, expected = (walk.decode({0: 3 + token}) for walk in walks)
        assert torch.equal(ours, expected)
        seen.append(bool(models[0].recorded.sizes))
    # Position 64 is the eighth of these; two steps later there is a new tape.
    assert seen == [False] + [True] * 6 + [False] + [True] * 12


def test_memory_is_bounded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair(load, ALL_NATIVE[0], torch.float32)
    walk, expected = ModelWalk(model, 3), ModelWalk(plain, 3)
    walk.extend(prompts(3))
    expected.extend(prompts(3))

    def decode(*members: int) -> None:
        for _ in range(3):
            ids = dict.fromkeys(members, 7)
            assert torch.equal(walk.decode(ids), expected.decode(ids))

    decode(0)
    decode(0, 1)
    one, two = (model.recorded.num_bytes(rows) for rows in (1, 2))
    assert 0 < one < two
    monkeypatch.setattr(recorded, "MOST_BYTES", one + two)
    decode(1)
    # The least recently used went.
    decode(0, 1, 2)
    assert 2 not in model.recorded.sizes
    monkeypatch.setattr(recorded, "MOST_BYTES", 0)
    decode(1, 2)
    assert not model.recorded.sizes


def test_a_step_that_overlaps_another_runs_by_itself(load: Load) -> None:
    model, plain = pair(load, ALL_NATIVE[1], torch.float32)
    walk, expected = ModelWalk(model, 1), ModelWalk(plain, 1)
    walk.extend(prompts(1))
    expected.extend(prompts(1))
    for _ in range(3):
        walk.decode({0: 5}), expected.decode({0: 5})
    assert model.recorded.sizes == (1,)
    with model.recorded.taken():
        ours = walk.decode({0: 6})
    assert torch.equal(ours, expected.decode({0: 6}))
    assert torch.equal(walk.decode({0: 7}), expected.decode({0: 7}))
