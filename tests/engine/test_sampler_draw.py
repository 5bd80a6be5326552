"""Which tokens a draw keeps, and which one it takes: against a definition that sorts everything."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stateferry.core.sampling import SamplingParams
from stateferry.engine.draw import draw
from stateferry.engine.forward_batch import SampleSpec
from stateferry.engine.likeliest import likeliest
from stateferry.engine.sampler import sample, uniform

Floats = npt.NDArray[np.float32]


def params(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 1
) -> SamplingParams:
    return SamplingParams(temperature, top_k, top_p, seed, None, min_p=min_p)


def kept_by_definition(logits: Floats, how: SamplingParams) -> tuple[dict[int, float], float]:
    """Id -> probability of the tokens that may be drawn, in id order; and how far the nearest
    token is from being on the other side of a threshold."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    scaled = (logits.astype(np.float64) - float(logits.max())) / how.temperature
    weights = np.exp(scaled)
    margin = float(np.abs(weights[weights != 1.0] - how.min_p).min(initial=1.0))
    kept = [i for i in order if weights[i] >= how.min_p]
    if how.top_k:
        kept = kept[: how.top_k]
    if how.top_p < 1.0:
        reached = np.cumsum([weights[i] for i in kept])
        margin = min(margin, float(np.abs(reached / reached[-1] - how.top_p).min()))
        kept = kept[: int((reached < how.top_p * reached[-1]).sum()) + 1]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in sorted(kept)}, margin


def drawn_by_definition(shares: dict[int, float], u: float) -> tuple[int, float]:
    """The token, and how far ``u`` is from where it would be another."""
    running, token_id = 0.0, -1
    for token_id, share in shares.items():
        if u < running + share:
            return token_id, min(u - running, running + share - u)
        running += share
    return token_id, 0.0


def random_logits(seed: int, size: int, spread: float) -> Floats:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(size) * spread).astype(np.float32)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([2, 7, 255, 256, 257, 1000, 4096, 20_001]),
    spread=st.sampled_from([0.0, 0.1, 3.0, 20.0]),
    how=st.builds(
        params,
        temperature=st.sampled_from([0.1, 0.7, 1.0, 2.5]),
        top_k=st.sampled_from([0, 1, 2, 50]),
        top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
        min_p=st.sampled_from([0.0, 0.05, 1.0]),
    ),
    u=st.floats(0.0, 1.0, exclude_max=True),
)
def test_the_token_is_the_one_of_the_definition(
    seed: int, size: int, spread: float, how: SamplingParams, u: float
) -> None:
    logits = random_logits(seed, size, spread)
    got = draw(logits, float(logits.max()), how, u)
    shares, margin = kept_by_definition(logits, how)
    # Within rounding of an edge either side is right.
    assume(how.min_p == 0.0 or margin > 1e-6)
    assume(how.top_p == 1.0 or margin > 1e-6)
    wanted, distance = drawn_by_definition(shares, u)
    assert got in shares
    assert got == wanted or distance < 1e-6


@pytest.mark.parametrize("size", [300, 5000, 40_000])
def test_draws_lie_where_the_definition_says(size: int) -> None:
    """In the middle of each share that is not tiny, far from any rounding."""
    logits = random_logits(3, size, 3.0)
    how = params(temperature=0.8, top_p=0.95)
    running, middles = 0.0, {}
    for token_id, share in kept_by_definition(logits, how)[0].items():
        if share > 1e-4:
            middles[token_id] = running + share / 2
        running += share
    assert len(middles) > 5
    for token_id, middle in middles.items():
        assert draw(logits, float(logits.max()), how, middle) == token_id


def test_all_of_a_large_flat_vocabulary_is_within_reach() -> None:
    """Shares of 1e-5 each, whose single-precision running sum would drift."""
    size = 100_000
    logits = np.zeros(size, dtype=np.float32)
    for token_id in (0, 1, 255, 256, 49_999, 99_998, 99_999):
        assert draw(logits, 0.0, params(), (token_id + 0.5) / size) == token_id
        kept = draw(logits, 0.0, params(top_p=0.5), (token_id + 0.5) / size)
        assert kept == (token_id + 0.5) // 2


def test_the_ends_of_the_unit_interval() -> None:
    logits = np.array([-np.inf, 0.0, 1.0, -np.inf], dtype=np.float32)
    assert draw(logits, 1.0, params(), 0.0) == 1
    assert draw(logits, 1.0, params(), 1.0 - 2.0**-53) == 2
    assert draw(logits, 1.0, params(temperature=1e-30), 0.0) == 2


def test_tokens_that_are_out_of_the_question_are_never_drawn() -> None:
    logits = np.full(3000, -np.inf, dtype=np.float32)
    logits[[5, 1000, 2999]] = [0.0, 0.5, 0.25]
    for how in (params(), params(top_k=50), params(top_p=0.999), params(min_p=1e-6)):
        drawn = {draw(logits, 0.5, how, uniform(1, i)) for i in range(200)}
        assert drawn == {5, 1000, 2999}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 5, 128, 5000, 33_000]),
    k=st.integers(1, 200),
    levels=st.sampled_from([1, 3, 1 << 20]),
)
def test_likeliest_are_the_k_largest_and_first_of_equals(
    seed: int, size: int, k: int, levels: int
) -> None:
    values = np.random.default_rng(seed).integers(0, levels, size).astype(np.float32)
    order = sorted(range(size), key=lambda i: (-values[i], i))
    assert likeliest(values, k).tolist() == sorted(order[:k])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [300, 40_000])
def test_a_row_is_the_same_in_any_batch_and_place(size: int, threads: int) -> None:
    """Logits of one row, at any address, beside any others, on any number of threads."""
    row = torch.from_numpy(random_logits(9, size, 3.0))
    specs = [
        SampleSpec(SamplingParams(t, k, p, seed, 3, min_p=m), index)
        for index, (t, k, p, m, seed) in enumerate(
            [(0.0, 0, 1.0, 0.0, 1), (0.9, 0, 1.0, 0.0, 2), (1.0, 40, 0.9, 0.0, 3)]
            + [(1.3, 0, 0.95, 0.0, 4), (1.0, 0, 1.0, 0.05, 5)] * 3
        )
    ]
    alone = [sample(row[None].clone(), [spec])[0] for spec in specs]
    torch.set_num_threads(threads)
    try:
        for before in (0, 1, 3, 6):
            others = torch.randn(before, size)
            noise = SampleSpec(SamplingParams(1.0, 0, 1.0, 0, None), 0)
            for spec, expected in zip(specs, alone, strict=True):
                batch = torch.cat([others, row[None], others[:1]])
                mates = [noise] * before, [noise] * len(others[:1])
                assert sample(batch, [*mates[0], spec, *mates[1]])[before] == expected
    finally:
        torch.set_num_threads(1)
