"""Penalties, biases and their order: against definitions written down token by token."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from stateferry.core.errors import InvariantViolation
from stateferry.core.sampling import Penalties, SamplingParams, choice_seed
from stateferry.engine.forward_batch import SampleSpec
from stateferry.engine.penalties import SeenTokens
from stateferry.engine.rules import SequenceRules
from stateferry.engine.sampler import sample

VOCAB = 97


def by_definition(
    logits: list[float], penalties: Penalties, prompt: list[int], output: list[int]
) -> list[float]:
    """vLLM's definition: repetition looks at prompt and output, the others at the output."""
    changed = []
    for token_id, logit in enumerate(logits):
        count = output.count(token_id)
        if count or token_id in prompt:
            factor = penalties.repetition
            logit = logit / factor if logit > 0 else logit * factor
        changed.append(logit - penalties.frequency * count - penalties.presence * (count > 0))
    return changed


@pytest.mark.parametrize("seed", range(40))
def test_penalties_are_those_of_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    penalties = Penalties(
        draw.choice([1.0, 0.5, 1.3]), draw.choice([0.0, 0.5, -1.0]), draw.choice([0.0, 0.25, -2.0])
    )
    prompt = [draw.randrange(VOCAB) for _ in range(draw.choice([1, 10, 300]))]
    output = [draw.randrange(VOCAB) for _ in range(draw.choice([0, 5, 200]))]
    seen = SeenTokens(penalties, prompt if penalties.look_at_prompt else ())
    for token_id in output:
        seen.add_output(token_id)
    logits = [draw.uniform(-8.0, 8.0) for _ in range(VOCAB)]
    row = np.array(logits, dtype=np.float32)
    seen.apply(row)
    assert row.tolist() == pytest.approx(
        by_definition(logits, penalties, prompt, output), rel=1e-5, abs=1e-5
    )


def test_repetition_agrees_with_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 4, 5, 3, 90]])
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    seen = SeenTokens(Penalties(repetition=1.7), [3, 4])
    for token_id in (5, 3, 90):
        seen.add_output(token_id)
    ours = logits[0].numpy().copy()
    seen.apply(ours)
    assert ours.tolist() == theirs[0].tolist()


def spec(index: int, rules: SequenceRules | None, params: SamplingParams) -> SampleSpec:
    return SampleSpec(params, index, rules=rules)


def with_rules(params: SamplingParams, prompt: list[int]) -> SequenceRules:
    return SequenceRules(params, SeenTokens(params.penalties, prompt), None)


def test_a_strong_penalty_makes_greedy_walk_through_the_vocabulary() -> None:
    params = SamplingParams(0.0, 0, 1.0, 0, None, penalties=Penalties(presence=2.0))
    rules = with_rules(params, [])
    logits = torch.tensor([[1.9, 1.5, 1.0, 0.5, 0.0]])
    tokens = [sample(logits, [spec(index, rules, params)])[0] for index in range(6)]
    assert [t.token_id for t in tokens if t] == [0, 1, 2, 3, 4, 0]


def test_a_bias_comes_after_penalties_and_decides() -> None:
    params = SamplingParams(
        0.0, 0, 1.0, 0, 0, penalties=Penalties(repetition=2.0), logit_bias=((0, -100.0), (3, 1.25))
    )
    logits = torch.tensor([[9.0, 4.0, 3.5, 3.0]])
    [token] = sample(logits, [spec(0, with_rules(params, [1, 3]), params)])
    # 9 - 100, 4 / 2, 3.5, 3 / 2 + 1.25
    assert token is not None and token.token_id == 2
    assert token.logprob == pytest.approx(float(torch.log_softmax(logits[0], -1)[2]))
    assert logits.tolist() == [[9.0, 4.0, 3.5, 3.0]]


def test_rules_hear_of_tokens_in_order_and_are_never_left_out() -> None:
    params = SamplingParams(0.0, 0, 1.0, 0, None, penalties=Penalties(presence=1.0))
    rules = with_rules(params, [])
    with pytest.raises(InvariantViolation, match="token 1 came where 0"):
        rules.observe(1, 5)
    rules.observe(0, 5)
    logits = torch.zeros(2, 4)
    plain = SampleSpec(SamplingParams(0.0, 0, 1.0, 0, None), 0)
    # Out of turn, and without rules though the parameters ask for some: no token, and no harm.
    assert [t is None for t in sample(logits, [spec(2, rules, params), plain])] == [True, False]
    assert [t is None for t in sample(logits, [spec(0, None, params), plain])] == [True, False]


def test_nothing_left_to_choose_gives_no_token() -> None:
    params = SamplingParams(0.7, 0, 1.0, 0, None)
    banned = SampleSpec(params, 0, banned_ids=frozenset(range(4)))
    assert sample(torch.zeros(1, 4), [banned]) == [None]


def test_seeds_of_choices_are_fixed_for_ever() -> None:
    """Clients may compute them: these values may never change."""
    assert choice_seed(7, 0) == 7
    assert choice_seed(0, 1) == 7366767015342446414
    assert choice_seed(2**64 - 1, 15) == 6332148429627046330
    assert len({choice_seed(s, c) for s in range(100) for c in range(16)}) == 1600
    assert all(0 <= choice_seed(s, 3) < 2**64 for s in range(100))


def test_logprobs_of_many_sizes_agree_with_torch() -> None:
    for size in (3, 257, 5000, 33_000):
        logits = torch.randn(1, size, generator=torch.Generator().manual_seed(size)) * 5
        [token] = sample(logits, [SampleSpec(SamplingParams(1.0, 0, 1.0, 3, 20), 0)])
        expected = torch.log_softmax(logits[0].double(), -1)
        values, ids = expected.topk(min(20, size))
        assert token is not None and token.logprob is not None
        assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=2e-6)
        assert [t.token_id for t in token.top] == ids.tolist()
        assert [t.logprob for t in token.top] == pytest.approx(values.tolist(), abs=2e-6)
        assert not math.isnan(token.logprob)
