"""Sequences join, leave, wait for memory and are cut off, and none of it shows in a token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from stateferry.colocated.engine import ColocatedEngine, Output
from stateferry.core.request import GenerationRequest
from stateferry.worker.parts import EngineParts
from support.local_engine import local_engine
from support.random_requests import random_requests
from support.tiny_hybrid import ARCHITECTURES, CHUNK, write_tiny_hybrid
from support.tiny_model import write_tiny_model

EDGES = (1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 3)
CONTEXT = 352
# State for 12 sequences, and KV pages for about half of them.
MEMORY_BYTES = 2_200_000


@pytest.fixture(scope="session", params=["Mamba2", *ARCHITECTURES])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny"
    if request.param == "Mamba2":
        return write_tiny_model(target, chunk_size=CHUNK)
    return write_tiny_hybrid(target, request.param)


@dataclass
class Crowd:
    """An engine that is given requests, and maybe robbed of them, at random moments."""

    engine: ColocatedEngine
    parts: EngineParts
    rng: random.Random
    most_active: int = 0
    # For pages, while there was state for more sequences.
    had_to_wait: bool = False

    def run(
        self, requests: Sequence[GenerationRequest], abort_share: float = 0.0
    ) -> dict[str, Output]:
        """Outputs of those that were not aborted. Books are checked at every step."""
        engine, cache, waiting = self.engine, self.parts.cache, list(reversed(requests))
        alive: list[str] = []
        while waiting or engine.num_unfinished:
            for _ in range(self.rng.choice([0, 0, 1, 1, 2, 6])):
                if waiting:
                    request = waiting.pop()
                    engine.submit(request)
                    alive.append(request.request_id)
            if alive and self.rng.random() < abort_share:
                engine.abort(alive.pop(self.rng.randrange(len(alive))))
            engine.step()
            cache.check_conserved()
            ended = [name for name in alive if engine.outputs[name].finish_reason is not None]
            alive = [name for name in alive if name not in ended]
            active = cache.tail_pages.total - cache.tail_pages.free
            self.most_active = max(self.most_active, active)
            if not ended and active < min(len(alive), cache.tail_pages.total):
                self.had_to_wait = True
        return dict(engine.outputs)

    def is_empty(self) -> bool:
        cache = self.parts.cache
        counts = (cache.state_slots, cache.tail_pages, cache.kv_pages)
        return all(count.free == count.total for count in counts)


def crowd(model_dir: Path, seed: int, overlap: bool) -> Crowd:
    engine, parts = local_engine(
        model_dir,
        max_requests=12,
        budget_tokens=4 * CHUNK,
        max_context_tokens=CONTEXT,
        memory_bytes=MEMORY_BYTES,
        overlap=overlap,
    )
    return Crowd(engine, parts, random.Random(seed))


def bits(output: Output) -> list[tuple[int, float | None]]:
    return [(token.token_id, token.logprob) for token in output.tokens]


def check_as_if_alone(model_dir: Path, count: int, seed: int, overlap: bool) -> None:
    requests = random_requests(count, seed, lengths=EDGES)
    together = crowd(model_dir, seed, overlap)
    outputs = together.run(requests)
    assert bool(together.engine.num_overlapped) == overlap
    assert together.most_active > 4 and together.is_empty()
    if together.parts.sizes.kv_pages:
        assert together.had_to_wait, "pages never ran out, so nothing was shown"
    alone, _ = local_engine(
        model_dir, max_requests=1, budget_tokens=4096, max_context_tokens=CONTEXT
    )
    for request in requests:
        expected = alone.generate([request])[request.request_id]
        output = outputs[request.request_id]
        assert bits(output) == bits(expected)
        assert output.finish_reason is expected.finish_reason
    assert len({tuple(output.token_ids) for output in outputs.values()}) > count // 2


OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlap"])


@OVERLAP
def test_tokens_are_those_of_each_request_alone(model_dir: Path, overlap: bool) -> None:
    check_as_if_alone(model_dir, count=40, seed=1, overlap=overlap)


@pytest.mark.slow
@OVERLAP
def test_500_requests_that_join_and_leave(model_dir: Path, overlap: bool) -> None:
    check_as_if_alone(model_dir, count=500, seed=2, overlap=overlap)


@OVERLAP
def test_aborts_at_any_moment_leak_nothing_and_disturb_nobody(
    model_dir: Path, overlap: bool
) -> None:
    requests = random_requests(60, seed=3, lengths=EDGES)
    disturbed = crowd(model_dir, 3, overlap)
    outputs = disturbed.run(requests, abort_share=0.3)
    assert disturbed.is_empty() and 10 < len(outputs) < 55
    alone, _ = local_engine(model_dir, max_requests=1, max_context_tokens=CONTEXT)
    survivors = [request for request in requests if request.request_id in outputs]
    for request in survivors[:20]:
        expected = alone.generate([request])[request.request_id]
        assert bits(outputs[request.request_id]) == bits(expected)


@pytest.mark.parametrize("budget_tokens", [CHUNK, 2 * CHUNK, 3 * CHUNK + 5])
def test_where_a_prompt_is_cut_does_not_show(model_dir: Path, budget_tokens: int) -> None:
    """Longer than the budget, at and around its multiples."""
    lengths = sorted({n * budget_tokens + d for n in (1, 2) for d in (-1, 0, 1)} | {5 * CHUNK + 3})
    requests = [
        request
        for length in lengths
        for request in random_requests(1, seed=length, lengths=(length,), max_tokens=(20,))
        if request.prompt_len > 1
    ]
    whole, _ = local_engine(model_dir, budget_tokens=4096)
    cut, _ = local_engine(model_dir, budget_tokens=budget_tokens)
    expected, outputs = whole.generate(requests), cut.generate(requests)
    for request in requests:
        assert bits(outputs[request.request_id]) == bits(expected[request.request_id])
