"""``model.numerics = fast``: rounding of another order, and nothing worse than that.

Fast mode has noise of its own: which kernel computes a row, and so its bits, depends on how many
rows share a call. So the same prompts run through it in three ways: each prefilled alone, packed
together, and cut into pieces. Where two ways part, they had the same tokens until then; the rate is
streams that parted over tokens that were compared. Fast streams may part from exact ones at the
rate at which they part from each other, and 0.1 % of tokens on top.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from stateferry.bundled import bundled_model_dir
from stateferry.colocated.engine import ColocatedEngine
from stateferry.config import CacheSection, ModelSection, WorkerSection
from stateferry.core.errors import ConfigError
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.worker.parts import EngineParts, build_engine
from stateferry_kernels.linear.fast_ops import torch_computes

NUM_PROMPTS, NEW_TOKENS = 48, 32
ALLOWED_MORE = 0.001
GREEDY = SamplingParams(0.0, 0, 1.0, seed=0, logprobs=0)
Streams = list[list[tuple[int, str]]]


def build(
    numerics: str, dtype: str = "float32", kernels: str = "auto", budget: int = 4096
) -> tuple[ColocatedEngine, EngineParts]:
    parts = build_engine(
        bundled_model_dir(),
        ModelSection(numerics=numerics, dtype=dtype, max_context_tokens=512),
        WorkerSection(max_requests=NUM_PROMPTS, kernels=kernels, device="cpu"),
        CacheSection(enabled=False),
    )
    engine = ColocatedEngine(
        parts.runner, parts.cache, parts.rules, grid=parts.grid, budget_tokens=budget
    )
    return engine, parts


def requests(vocab_size: int) -> list[GenerationRequest]:
    rng = random.Random(1)
    return [
        GenerationRequest(
            str(number),
            tuple(rng.randrange(vocab_size) for _ in range(rng.randint(3, 200))),
            GREEDY,
            StopConditions(NEW_TOKENS, 0, frozenset()),
        )
        for number in range(NUM_PROMPTS)
    ]


def run(engine: ColocatedEngine, asked: Sequence[GenerationRequest], alone: bool) -> Streams:
    """Tokens and the bytes of their log-probabilities."""
    for request in asked:
        engine.submit(request)
        while alone and not engine.outputs[request.request_id].tokens:
            engine.step()
    while engine.num_unfinished:
        engine.step()
    outputs = [engine.outputs.pop(request.request_id) for request in asked]
    return [[(t.token_id, float.hex(t.logprob or 0.0)) for t in o.tokens] for o in outputs]


def parted(one: Streams, other: Streams) -> float:
    """Streams that part, for each token that both drew after the same ones."""
    apart = compared = 0
    for left, right in zip(one, other, strict=True):
        for (a, _), (b, _) in zip(left, right, strict=True):
            compared += 1
            if a != b:
                apart += 1
                break
    assert compared > NUM_PROMPTS
    return apart / compared


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fast_streams_part_from_exact_ones_no_more_than_from_each_other(dtype: str) -> None:
    if not torch_computes(getattr(torch, dtype)):
        pytest.skip(f"on this processor fast mode computes {dtype} as exact mode does")
    engine, parts = build("exact", dtype)
    asked = requests(parts.limits.vocab_size)
    exact = run(engine, asked, alone=False)
    exact_numerics = parts.fingerprint.numerics

    engine, parts = build("fast", dtype)
    assert parts.fingerprint.numerics == exact_numerics + "+fast"
    ways = {"alone": run(engine, asked, alone=True), "packed": run(engine, asked, alone=False)}
    engine, parts = build("fast", dtype, budget=parts.grid)
    ways["cut"] = run(engine, asked, alone=False)

    for name, streams in ways.items():
        assert streams != exact, f"{name}: no bit differs, so nothing was compared"
    pairs = list(itertools.combinations(ways.values(), 2))
    assert any(one != other for one, other in pairs), "fast mode has no noise: it is exact"
    noise = sum(parted(one, other) for one, other in pairs) / len(pairs)
    rate = sum(parted(exact, streams) for streams in ways.values()) / len(ways)
    assert rate <= noise + ALLOWED_MORE


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.numerics.*none of exact, fast"):
        build("precise")
    with pytest.raises(ConfigError, match=r"model\.numerics.*torch"):
        build("fast", kernels="torch")
