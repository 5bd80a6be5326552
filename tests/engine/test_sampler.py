"""The sampler: greedy, filtered, reproducible, and blind to batch mates."""

from __future__ import annotations

import math

import pytest
import torch

from stateferry.core.sampling import SamplingParams
from stateferry.engine.forward_batch import SampleSpec
from stateferry.engine.sampler import sample, uniform


def spec(
    index: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1,
    logprobs: int | None = None,
    banned: frozenset[int] = frozenset(),
) -> SampleSpec:
    return SampleSpec(SamplingParams(temperature, top_k, top_p, seed, logprobs), index, banned)


def draws(logits: torch.Tensor, count: int, **kwargs: float) -> list[int]:
    specs = [spec(index, **kwargs) for index in range(count)]  # type: ignore[arg-type]
    tokens = sample(logits.expand(count, -1), specs)
    return [token.token_id for token in tokens if token is not None]


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    tokens = sample(logits, [spec(temperature=0.0)] * 9)
    assert [t.token_id for t in tokens if t] == logits.argmax(-1).tolist()


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 10 categories; the 99.9 % point of 9 degrees of freedom is 27.9."""
    probabilities = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005])
    count = 20_000
    seen = torch.bincount(torch.tensor(draws(probabilities.log(), count)), minlength=10)
    chi_square = float(((seen - count * probabilities) ** 2 / (count * probabilities)).sum())
    assert chi_square < 27.9


def test_temperature_sharpens() -> None:
    logits = torch.tensor([1.0, 0.0])
    share = draws(logits, 4000, temperature=0.5).count(0) / 4000
    assert abs(share - 1 / (1 + math.exp(-2))) < 0.03


def test_top_k_and_top_p_keep_only_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(logits, 500, top_k=2)) == {0, 1}
    assert set(draws(logits, 500, top_p=0.79)) == {0, 1}
    assert set(draws(logits, 500, top_p=0.81)) == {0, 1, 2}
    assert set(draws(logits, 500, top_p=1e-9)) == {0}


def test_equal_logits_are_ordered_by_id() -> None:
    assert set(draws(torch.zeros(6), 200, top_k=2)) == {0, 1}


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(17, 300, generator=torch.Generator().manual_seed(1))
    specs = [spec(i, temperature=0.8, top_p=0.9, seed=i, logprobs=3) for i in range(17)]
    together = sample(logits, specs)
    alone = [sample(logits[i : i + 1], [specs[i]])[0] for i in range(17)]
    assert together == alone


def test_uniform_is_fixed_for_ever() -> None:
    """A stream can be continued by another version: these values may never change."""
    assert uniform(0, 0) == 0.0564663990004608
    assert uniform(2**64 - 1, 12345) == 0.9877791309092729
    values = [uniform(7, i) for i in range(10_000)]
    assert min(values) >= 0.0 and max(values) < 1.0
    assert abs(sum(values) / len(values) - 0.5) < 0.02


def test_banned_ids_are_never_chosen() -> None:
    logits = torch.tensor([[5.0, 4.0, 0.0]])
    for temperature in (0.0, 1.0):
        token = sample(logits, [spec(temperature=temperature, banned=frozenset({0, 1}))])[0]
        assert token is not None and token.token_id == 2


def test_logprobs_are_of_the_untempered_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    token = sample(logits, [spec(temperature=0.0, logprobs=2)])[0]
    expected = torch.log_softmax(logits[0], -1)
    assert token is not None and token.logprob == pytest.approx(float(expected[0]))
    assert [t.token_id for t in token.top] == [0, 1]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_row_gives_no_token(poison: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = poison
    tokens = sample(logits, [spec()] * 3)
    assert [t is None for t in tokens] == [False, True, False]
