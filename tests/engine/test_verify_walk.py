"""The tokens that a verification gives have the target's own distribution: chi-square of chains and
trees against direct sampling, and against the probabilities themselves."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache, partial

import pytest
import torch

from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.drafting.tree import NO_DRAFT, DraftTree, chain, merged
from stateferry.engine.forward_batch import SampleSpec
from stateferry.engine.verify_batch import Run, VerifyBatch, VerifyInput
from stateferry.engine.verify_walk import walk

KINDS = 6
DRAWS = pytest.mark.parametrize("draws", [8_000, pytest.param(50_000, marks=pytest.mark.slow)])
STOP = StopConditions(1000, 0, frozenset())
TREE = merged([(0, 1), (1, 2), (2, 0), (4, 4)], most=8)
DRAFTS = {"none": NO_DRAFT, "chain": chain((1, 2, 0)), "tree": TREE}


def logits_of(previous: tuple[int, ...]) -> torch.Tensor:
    """Of a target that knows only its last tokens; (KINDS,)."""
    generator = torch.Generator().manual_seed(17 + sum((i + 1) * t for i, t in enumerate(previous)))
    return torch.randn(KINDS, generator=generator)


def chi_square_p(statistic: float, freedom: int) -> float:
    """How likely a statistic this large is, where the distributions are the same."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def spec(seed: int, index: int, temperature: float = 1.0, top_k: int = 0) -> SampleSpec:
    return SampleSpec(SamplingParams(temperature, top_k, 1.0, seed, None), index)


def verified(draft: DraftTree, seeds: range) -> list[Run]:
    """One verification of so many sequences, all of which consume token 3 first."""
    paths: list[tuple[int, ...]] = [(3,)]
    for parent, token in zip(draft.parents, draft.token_ids, strict=True):
        paths.append((*paths[parent + 1], token))
    rows = torch.stack([logits_of(path) for path in paths])
    lease = None  # the walk looks at no memory
    inputs = tuple(
        VerifyInput(lease, 3, 1, draft, partial(spec, seed), STOP)  # type: ignore[arg-type]
        for seed in seeds
    )
    return walk(rows.repeat(len(seeds), 1), VerifyBatch(inputs))


@cache
def first_two(draft: DraftTree, draws: int) -> Counter[tuple[int, int]]:
    """Of each sequence the first two tokens; where the draft gave one only, the second is sampled
    by a verification without a draft, as the next step would."""
    counted: Counter[tuple[int, int]] = Counter()
    alone: dict[int, list[int]] = {}
    for seed, run in zip(range(draws), verified(draft, range(draws)), strict=True):
        if len(run.tokens) > 1:
            counted[run.token_ids[:2]] += 1
        else:
            alone.setdefault(run.token_ids[0], []).append(seed)
    for first, seeds in alone.items():
        inputs = tuple(
            VerifyInput(None, first, 2, NO_DRAFT, partial(spec, seed), STOP)  # type: ignore[arg-type]
            for seed in seeds
        )
        rows = logits_of((3, first)).repeat(len(seeds), 1)
        for run in walk(rows, VerifyBatch(inputs)):
            counted[first, run.token_ids[0]] += 1
    return counted


@DRAWS
@pytest.mark.parametrize("name", DRAFTS)
def test_distribution(name: str, draws: int) -> None:
    expected = {}
    first = torch.softmax(logits_of((3,)).double(), -1)
    for a in range(KINDS):
        second = torch.softmax(logits_of((3, a)).double(), -1)
        for b in range(KINDS):
            expected[a, b] = draws * float(first[a] * second[b])
    observed = first_two(DRAFTS[name], draws)
    assert sum(observed.values()) == draws
    statistic = sum((observed[k] - e) ** 2 / e for k, e in expected.items())
    assert chi_square_p(statistic, len(expected) - 1) > 0.01


@DRAWS
@pytest.mark.parametrize("name", ["chain", "tree"])
def test_no_draw_differs_from_direct_sampling(name: str, draws: int) -> None:
    """Which is more than a distribution can say."""
    assert first_two(DRAFTS[name], draws) == first_two(NO_DRAFT, draws)


@DRAWS
@pytest.mark.parametrize("name", ["chain", "tree"])
def test_guesses_are_accepted_as_often_as_they_are_likely(name: str, draws: int) -> None:
    draft = DRAFTS[name]
    runs = verified(draft, range(draws))
    roots = {t for t, parent in zip(draft.token_ids, draft.parents, strict=True) if parent < 0}
    chance = float(torch.softmax(logits_of((3,)).double(), -1)[sorted(roots)].sum())
    accepted = sum(len(run.path) > 1 for run in runs)
    assert abs(accepted - draws * chance) < 4 * math.sqrt(draws * chance * (1 - chance))
    assert max(len(run.path) for run in runs) == 1 + draft.depth


def test_a_stop_ends_the_run() -> None:
    likely = int(logits_of((3,)).argmax())
    stop = StopConditions(1000, 0, frozenset({likely}))
    draft = chain((likely, 0))
    rows = torch.stack([logits_of(p) for p in ((3,), (3, likely), (3, likely, 0))])
    greedy = partial(spec, 0, temperature=0.0)
    one = VerifyInput(None, 3, 1, draft, greedy, stop)  # type: ignore[arg-type]
    [run] = walk(rows, VerifyBatch((one,)))
    assert run.token_ids == (likely,) and run.path == (0,)


def test_logits_that_are_not_finite_end_it_where_they_are() -> None:
    likely = int(logits_of((3,)).argmax())
    rows = torch.stack([logits_of((3,)), torch.full((KINDS,), math.nan)])
    greedy = partial(spec, 0, temperature=0.0)
    one = VerifyInput(None, 3, 1, chain((likely,)), greedy, STOP)  # type: ignore[arg-type]
    [run] = walk(rows, VerifyBatch((one,)))
    assert run.token_ids == (likely,) and run.path == (0,)
    [nothing] = walk(rows.flip(0), VerifyBatch((one,)))
    assert nothing == Run()
