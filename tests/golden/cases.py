"""What must not change a bit: each case names the hazard it meets and makes sure that it did."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from golden.compare import WHOLE, Bits, Engine, PathNotTaken, Tally
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions

PREEMPTED_AT = (1, 8, 31, 127)
D_CONV = 4
Make = Callable[..., Engine]


def lengths_of(grid: int) -> tuple[int, ...]:
    """Prompt lengths at which something begins or ends."""
    around_conv = range(max(1, D_CONV - 2), D_CONV + 2)
    return (1, *around_conv, grid - 1, grid, grid + 1, 2 * grid, 3 * grid + 5, 5 * grid)


class Prompts:
    """Requests of one model, the same for a seed."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self._vocab_size = vocab_size

    def ids(self, length: int) -> tuple[int, ...]:
        return tuple(self.rng.randrange(3, self._vocab_size) for _ in range(length))

    def ask(self, ids: tuple[int, ...], tokens: int = 12) -> GenerationRequest:
        sampling = self.sampling(self.rng.choice([0.0, 0.0, 0.9]))
        return GenerationRequest("", ids, sampling, StopConditions(tokens, 0, frozenset()))

    def sampling(self, temperature: float) -> SamplingParams:
        return SamplingParams(temperature, 0, 1.0, seed=self.rng.getrandbits(32), logprobs=0)


class Oracle:
    """Every prompt computed alone, in one piece, in one engine without a cache."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[GenerationRequest, Bits] = {}

    def __call__(self, request: GenerationRequest) -> Bits:
        if request not in self._known:
            [self._known[request]] = self._engine.run(request)
        return self._known[request]


def all_cases(make: Make, prompts: Prompts, tally: Tally) -> Iterator[str]:
    """Run every case of one model; yields the name of each when it is done."""
    first = make(cached=False, overlap=False)
    oracle, grid = Oracle(first), first.grid
    for case in (
        chunked,
        repeated,
        every_grid_point,
        chats,
        stopped,
        preempted,
        packed,
        short_of_memory,
    ):
        case(make, prompts, oracle, tally, grid)
        yield case.__name__


def chunked(make: Make, prompts: Prompts, oracle: Oracle, tally: Tally, grid: int) -> None:
    """Computed in pieces, cut at any grid point."""
    requests = [prompts.ask(prompts.ids(n)) for n in lengths_of(grid)]
    for budget in (grid, 2 * grid, 3 * grid, WHOLE):
        engine = make(cached=False, budget=budget)
        for request in requests:
            [bits] = engine.run(request)
            cut = request.prompt_len > budget
            path = "chunked prefill" if cut else "cold"
            tally.compare(path, f"{request.prompt_len} by {budget}", bits, oracle(request))


def repeated(make: Make, prompts: Prompts, oracle: Oracle, tally: Tally, grid: int) -> None:
    """No forward at all."""
    engine = make()
    for length in lengths_of(grid):
        request = prompts.ask(prompts.ids(length))
        engine.run(request)
        for _ in range(2):
            before = engine.counters.repeated_prompts
            [bits] = engine.run(request)
            _need(engine.counters.repeated_prompts == before + 1, f"{length}: computed again")
            tally.compare("repeated prompt", f"{length}", bits, oracle(request))


def every_grid_point(make: Make, prompts: Prompts, oracle: Oracle, tally: Tally, grid: int) -> None:
    """Prompts that part from a long one at and around each of its grid points."""
    for budget in (WHOLE, grid):
        engine = make(budget=budget)
        long = prompts.ids(5 * grid + 3)
        for depth in sorted({d + e for d in range(grid, 5 * grid + 1, grid) for e in (-1, 0, 1)}):
            # Seeds the branch point, which the second one then resumes from.
            engine.run(prompts.ask((*long[:depth], *prompts.ids(3))))
            before = engine.counters.boundary_hit_tokens + engine.counters.tail_hit_tokens
            request = prompts.ask((*long[:depth], *prompts.ids(9)))
            [bits] = engine.run(request)
            hit = engine.counters.boundary_hit_tokens + engine.counters.tail_hit_tokens - before
            _need(hit >= depth // grid * grid, f"depth {depth}: resumed at {hit}")
            path = "resumed at a grid point" if hit % grid == 0 else "resumed inside a tail"
            tally.compare(path, f"depth {depth} of {len(long)}", bits, oracle(request))


def chats(make: Make, prompts: Prompts, oracle: Oracle, tally: Tally, grid: int) -> None:
    """Each turn resumes at the last token that the one before consumed."""
    for start in (1, grid - 1, grid, 2 * grid + 7):
        engine = make()
        history, consumed = prompts.ids(start), 0
        for turn in range(5):
            before = engine.counters.boundary_hit_tokens + engine.counters.tail_hit_tokens
            request = prompts.ask(history, tokens=19)
            [bits] = engine.run(request)
            hit = engine.counters.boundary_hit_tokens + engine.counters.tail_hit_tokens - before
            _need(hit == consumed, f"turn {turn}: resumed at {hit}, not {consumed}")
            tally.compare("next turn of a chat", f"turn {turn}", bits, oracle(request))
            consumed = len(history) + 18
            history = (*history, *(token for token, _ in bits), *prompts.ids(3 + turn))


def stopped(make: Make, prompts: Prompts, oracle: Oracle, tally: Tally, grid: int) -> None:
    """Ended by a stop id, before and after a grid point: a step too many, if steps overlap, must
    not be seen by the next turn, which resumes at the last token that was wanted."""
    for start in (1, grid - 7, grid - 1, 2 * grid - 5):
        engine = make()
        ids = prompts.ids(start)
        free = replace(prompts.ask(ids, tokens=2 * grid), sampling=prompts.sampling(1.5))
        tokens = [token for token, _ in oracle(free)]
        for at in sorted({tokens.index(tokens[n]) for n in (*range(1, 10), grid - 1, grid)}):
            if not at:
                continue
            stop = StopConditions(2 * grid, 0, frozenset({tokens[at]}))
            [bits] = engine.run(replace(free, stop=stop))
            tally.compare("stopped", f"{start} + {at}", bits, oracle(free)[: at + 1])
            before = engine.counters.boundary_hit_tokens + engine.counters.tail_hit_tokens
            follow = prompts.ask((*ids, *tokens[: at + 1], *prompts.ids(3)))
            [bits] = engine.run(follow)
            hit = engine.counters.boundary_hit_tokens + engine.counters.tail_hit_tokens - before
            _need(hit == start + at, f"{start} + {at}: resumed at {hit}")
            tally.compare("resumed after a stop", f"{start} + {at}", bits, oracle(follow))


def preempted(make: Make, prompts: Prompts, oracle: Oracle, tally: Tally, grid: int) -> None:
    """Memory taken away in the middle of the output, alone and in company."""
    for at in PREEMPTED_AT:
        engine = make()
        requests = [prompts.ask(prompts.ids(n), at + 5) for n in (1, grid - 1, grid, 2 * grid + 9)]
        for request in requests:
            before = engine.counters.tail_hit_tokens + engine.counters.boundary_hit_tokens
            [bits] = engine.run(request, preempt_at=at)
            hit = engine.counters.tail_hit_tokens + engine.counters.boundary_hit_tokens - before
            _need(hit >= request.prompt_len + at - 1, f"at {at}: resumed at {hit}")
            tally.compare("preempted", f"at {at}", bits, oracle(request))
        others = [prompts.ask(r.prompt_ids[:-1] or (3,), at + 5) for r in requests]
        for request, bits in zip(others, engine.run(*others, preempt_at=at), strict=True):
            tally.compare("preempted in company", f"at {at}", bits, oracle(request))


def packed(make: Make, prompts: Prompts, oracle: Oracle, tally: Tally, grid: int) -> None:
    """Eight at a time, of all lengths, warm and cold in one step."""
    for budget in (grid, 3 * grid, WHOLE):
        engine = make(budget=budget)
        stem = prompts.ids(2 * grid + 3)
        for _ in range(3):
            fresh = [prompts.ids(prompts.rng.choice(lengths_of(grid))) for _ in range(4)]
            warm = [(*stem[: prompts.rng.randrange(len(stem))], *prompts.ids(4)) for _ in range(4)]
            requests = [prompts.ask(ids) for ids in (*fresh, *warm)]
            for request, bits in zip(requests, engine.run(*requests), strict=True):
                tally.compare("packed with 7", f"{request.prompt_len}", bits, oracle(request))
        hits = engine.counters.tail_hit_tokens + engine.counters.boundary_hit_tokens
        _need(hits > 0, "nothing was warm")


def short_of_memory(make: Make, prompts: Prompts, oracle: Oracle, tally: Tally, grid: int) -> None:
    """Nothing but what running sequences leave idle: everything is evicted all the time."""
    engine = make(cache_bytes=0, max_requests=4)
    stem = prompts.ids(3 * grid)
    for _ in range(6):
        stems = [stem[: prompts.rng.randrange(1, len(stem))] for _ in range(4)]
        requests = [prompts.ask((*ids, *prompts.ids(5)), 40) for ids in stems]
        for request, bits in zip(requests, engine.run(*requests), strict=True):
            tally.compare("evicted under pressure", f"{request.prompt_len}", bits, oracle(request))
    _need(engine.counters.states_evicted > 0, "nothing was evicted")


def _need(held: bool, otherwise: str) -> None:
    if not held:
        raise PathNotTaken(otherwise)
