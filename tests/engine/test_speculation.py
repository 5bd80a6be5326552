"""Drafts, right or wrong, change no token and no byte of a log-probability: for every architecture,
alone and in company, with the cache and without, past grid points, up to any end."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from stateferry.colocated.engine import ColocatedEngine, Output
from stateferry.config import CacheSection, SpeculationSection
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import Penalties, StopConditions
from stateferry.drafting.payoff import StepCost
from stateferry.drafting.speculator import Drafter, Speculator
from stateferry.drafting.tree import DraftTree, chain, merged
from stateferry.worker.parts import EngineParts
from support.local_engine import NO_CACHE, local_engine
from support.random_requests import random_requests
from support.tiny_hybrid import ARCHITECTURES, CHUNK, write_tiny_hybrid
from support.tiny_model import EOS_ID, write_tiny_model

CONTEXT = 320
GUESSES = 9
Bits = list[tuple[int, str]]
# Of a whole sequence, how far it is: what is guessed to follow, at most so many tokens.
Guess = Callable[[Sequence[int], int, int], DraftTree]


@pytest.fixture(scope="module", params=["Mamba2", *ARCHITECTURES])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny"
    if request.param == "Mamba2":
        return write_tiny_model(target, chunk_size=CHUNK)
    return write_tiny_hybrid(target, request.param)


def all_of_it(trusts: Sequence[float], most: Sequence[int], cost: StepCost) -> list[int]:
    """Whatever it costs."""
    return list(most)


@dataclass
class Scripted:
    """Knows how its sequence goes on, and makes of that what ``guess`` says."""

    guess: Guess
    whole: Sequence[int]
    position: int
    match_length: int = 9

    def observe(self, token_id: int) -> None:
        assert self.whole[self.position] == token_id
        self.position += 1

    def propose(self, most: int) -> DraftTree:
        return self.guess(self.whole, self.position, most)


def right(whole: Sequence[int], position: int, most: int) -> DraftTree:
    return chain(whole[position : position + most])


def wrong(whole: Sequence[int], position: int, most: int) -> DraftTree:
    return chain(_other(token) for token in whole[position : position + most])


def wrong_at(at: int, whole: Sequence[int], position: int, most: int) -> DraftTree:
    known = list(whole[position : position + most])
    return chain([*known[:at], *map(_other, known[at : at + 1]), *known[at + 1 :]])


def at_random(whole: Sequence[int], position: int, most: int) -> DraftTree:
    """Of every length, also none, and wrong anywhere or nowhere."""
    rng = random.Random(position + 7 * len(whole))
    return wrong_at(rng.randrange(most + 3), whole, position, rng.randrange(most + 1))


def branches(whole: Sequence[int], position: int, most: int) -> DraftTree:
    """Three ways to go on, of which one is right for a while: the first, the second or the last."""
    rng = random.Random(position)
    known = list(whole[position : position + rng.randrange(1, 6)])
    ways = [[_other(_other(token)) for token in known[:2]], [*known, 3], [*map(_other, known[:3])]]
    rng.shuffle(ways)
    return merged(ways, most)


def _other(token_id: int) -> int:
    return 3 + (token_id + 1) % 250


def full_drafts(guess: Guess, known: Sequence[Sequence[int]]) -> Speculator:
    """Of sequences that are ``known`` to their ends."""

    def make(history: Sequence[int]) -> Drafter:
        count = len(history)
        [whole] = {tuple(one) for one in known if list(one[:count]) == list(history)}
        return Scripted(guess, whole, count)

    return Speculator(GUESSES, make=make, pays=all_of_it)


def engine(
    model_dir: Path, speculator: Speculator | None, cache: CacheSection = NO_CACHE, seats: int = 8
) -> tuple[ColocatedEngine, EngineParts]:
    settings = SpeculationSection(drafter="ngram", draft_tokens=GUESSES, draft_paths=3)
    _, parts = local_engine(
        model_dir,
        max_requests=seats,
        max_context_tokens=CONTEXT,
        cache=cache,
        speculation=settings,
    )
    for drafts in parts.runner.caches.drafts:
        for rows in (drafts.xBC, drafts.x, drafts.B, drafts.dt):
            rows.fill_(float("nan"))
    made = ColocatedEngine(
        parts.runner,
        parts.cache,
        parts.rules,
        grid=parts.grid,
        budget_tokens=512,
        speculator=speculator,
    )
    return made, parts


def bits(output: Output) -> Bits:
    return [(t.token_id, float.hex(t.logprob or 0.0)) for t in output.tokens]


def requests_of(count: int, seed: int) -> list[GenerationRequest]:
    """Some stop by themselves, some are penalised, some are greedy."""
    made = []
    for n, request in enumerate(
        random_requests(count, seed, max_prompt=3 * CHUNK, max_tokens=(2, 3 * CHUNK, 3 * CHUNK))
    ):
        sampling = request.sampling
        if n % 3 == 0:
            sampling = replace(sampling, penalties=Penalties(1.2, 0.3, 0.2))
        if n % 5 == 0:
            sampling = replace(sampling, temperature=0.0, logprobs=None)
        made.append(replace(request, sampling=sampling))
    return made


@pytest.fixture(scope="module")
def cases(model_dir: Path) -> list[tuple[GenerationRequest, Output]]:
    """Requests, and what becomes of each without drafts."""
    alone, _ = engine(model_dir, None, seats=1)
    made = []
    for n, request in enumerate(requests_of(16, seed=5)):
        [output] = alone.generate([request]).values()
        ids = output.token_ids
        if len(ids) > 20 and n % 3 == 1:
            # One that ends in the middle of what would be accepted.
            stop = StopConditions(request.stop.max_tokens, 0, frozenset({ids[17], EOS_ID}))
            request = replace(request, stop=stop)
            [output] = alone.generate([request]).values()
        made.append((request, output))
    return made


def check(
    model_dir: Path,
    cases: Sequence[tuple[GenerationRequest, Output]],
    guess: Guess,
    *,
    together: bool,
    cache: CacheSection = NO_CACHE,
) -> Speculator:
    known = [(*request.prompt_ids, *output.token_ids) for request, output in cases]
    speculator = full_drafts(guess, known)
    drafting, parts = engine(model_dir, speculator, cache)
    batches = [cases] if together else [[case] for case in cases]
    for batch in batches:
        outputs = drafting.generate([request for request, _ in batch])
        for request, expected in batch:
            output = outputs[request.request_id]
            assert bits(output) == bits(expected), request.request_id
            assert output.finish_reason is expected.finish_reason
    parts.cache.check_conserved()
    assert speculator.counts.verifications and speculator.counts.drafted
    hits = parts.cache.prefixes.counters
    assert bool(hits.boundary_hit_tokens + hits.tail_hit_tokens) == cache.enabled
    return speculator


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_all_right(
    model_dir: Path, cases: list[tuple[GenerationRequest, Output]], together: bool
) -> None:
    counts = check(model_dir, cases, right, together=together).counts
    # All but what would have come after a stop, which nobody gets.
    assert counts.accepted > 0.9 * counts.drafted > 300
    assert counts.by_accepted[GUESSES] > 10, "the longest drafts were never accepted"


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_all_wrong(
    model_dir: Path, cases: list[tuple[GenerationRequest, Output]], together: bool
) -> None:
    counts = check(model_dir, cases, wrong, together=together).counts
    assert counts.drafted > 300 and counts.accepted == 0


@pytest.mark.parametrize("at", [1, 3, GUESSES - 1])
def test_wrong_at(model_dir: Path, cases: list[tuple[GenerationRequest, Output]], at: int) -> None:
    counts = check(model_dir, cases, partial(wrong_at, at), together=True).counts
    assert counts.by_accepted[at] > 10


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_at_random(
    model_dir: Path, cases: list[tuple[GenerationRequest, Output]], together: bool
) -> None:
    counts = check(model_dir, cases, at_random, together=together).counts
    assert sum(count > 0 for count in counts.by_accepted.values()) > 5


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_trees(
    model_dir: Path, cases: list[tuple[GenerationRequest, Output]], together: bool
) -> None:
    counts = check(model_dir, cases, branches, together=together).counts
    assert counts.by_accepted[1] > 20 and counts.by_accepted[4] > 10


def test_trees_with_a_cache(model_dir: Path, cases: list[tuple[GenerationRequest, Output]]) -> None:
    """Whose places for keys and values were copied back, and are read by others later: ``check``
    sees that they were."""
    doubled = [*cases, *((replace(r, request_id=f"{r.request_id}+"), o) for r, o in cases)]
    cache = CacheSection(track_interval_tokens=CHUNK)
    for together in (False, True):
        check(model_dir, doubled, branches, together=together, cache=cache)


def test_what_was_accepted_is_cached(
    model_dir: Path, cases: list[tuple[GenerationRequest, Output]]
) -> None:
    """A second turn resumes from tokens that were guessed, and goes on as one that was computed."""
    known = [(*request.prompt_ids, *output.token_ids) for request, output in cases]
    speculator = full_drafts(right, known)
    drafting, parts = engine(model_dir, speculator, CacheSection(track_interval_tokens=CHUNK))
    alone, _ = engine(model_dir, None, seats=1)
    resumed = 0
    for request, output in cases:
        drafting.generate([request])
        ids = (*request.prompt_ids, *output.token_ids, 5, 6)
        for cut in (len(ids), len(ids) - 9):
            prompt = ids[:cut]
            again = replace(
                request,
                request_id="again",
                prompt_ids=prompt,
                stop=StopConditions(1, 0, frozenset()),
            )
            [expected] = alone.generate([again]).values()
            found = parts.cache.resumable_tokens(again)
            [second] = drafting.generate([again]).values()
            assert bits(second) == bits(expected)
            resumed += found > request.prompt_len
    parts.cache.check_conserved()
    assert resumed > len(cases) // 2 and speculator.counts.accepted > 100
