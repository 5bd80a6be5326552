"""What was evicted to the host and brought back gives the bytes of what is computed: under eviction
storms, with all free memory full of NaN, with steps in flight, and after steps that failed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from engine.test_exact_reuse import CONTEXT, EDGES, Oracle, ask, engine, key, words
from stateferry.cache.page_copy import HostBlob, PageCopy
from stateferry.colocated.engine import ColocatedEngine
from stateferry.config import CacheSection
from stateferry.core.request import GenerationRequest
from stateferry.prefix.prefix_hash import encode_tokens
from stateferry.worker.parts import EngineParts
from support.tiny_hybrid import CHUNK, write_tiny_hybrid
from support.tiny_model import write_tiny_model

ROOMY = 1 << 22


@pytest.fixture(scope="module", params=["Mamba2", "NemotronH"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny"
    if request.param == "Mamba2":
        return write_tiny_model(target, chunk_size=CHUNK)
    return write_tiny_hybrid(target, request.param)


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> Oracle:
    return Oracle(model_dir)


def poison_what_is_free(parts: EngineParts) -> None:
    """NaN into all that is nobody's, in each launch, once the copies before it were made. Without
    overlap: the books must be those of the launch."""
    pools, books = parts.cache.pools, parts.cache.prefixes.pools

    def poison() -> None:
        for pool, parts_of in (
            (books.state_slots, pools.states.slot_tensors),
            (books.tail_pages, lambda page: pools.states.tail_tensors(page, parts.grid)),
            (books.kv_pages, lambda page: [pools.kv.page_tensor(page, parts.grid)]),
        ):
            first = 1 if pool is books.state_slots else 0
            for number in {*range(first, first + pool.total)} - set(pool.owners()):
                for tensor in parts_of(number):
                    tensor.fill_(float("nan"))

    after_copies(parts, lambda copies: poison())


def after_copies(parts: EngineParts, then: Callable[[tuple[PageCopy, ...]], None]) -> None:
    make = parts.runner.copy

    def copy(copies: Iterable[PageCopy]) -> None:
        copies = tuple(copies)
        make(copies)
        then(copies)

    parts.runner.copy = copy  # type: ignore[method-assign]


def storm(rng: random.Random, cached: ColocatedEngine, check: Callable[[], None]) -> Requests:
    """A few long stems that come back again and again, and others in between that push them out;
    some of them aborted. Returns what was asked; the outputs are in the engine."""
    stems = [words(rng, rng.choice((3, 4, 5)) * CHUNK + rng.randrange(CHUNK)) for _ in range(4)]
    requests: Requests = {}
    for number in range(50):
        stem = rng.choice(stems)
        cut = rng.choice((len(stem), len(stem), rng.randint(1, len(stem))))
        ids = (*stem[:cut], *words(rng, rng.choice((0, 0, 1, 5, CHUNK))))
        if rng.random() < 0.35:
            ids = words(rng, rng.choice(EDGES))
        name = f"r{number}"
        request = ask(name, ids[: CONTEXT - 60], rng.choice((1, 2, 9, 40)), rng.choice((0.0, 0.9)))
        requests[name] = request
        cached.submit(request)
        for _ in range(rng.choice((1, 5, 30))):
            if cached.num_unfinished:
                cached.step()
                check()
        if rng.random() < 0.1:
            cached.abort(name)
    while cached.num_unfinished:
        cached.step()
        check()
    return requests


Requests = dict[str, GenerationRequest]


@pytest.mark.parametrize(("seed", "overlap"), [(0, False), (1, True)])
@pytest.mark.parametrize(
    ("memory_bytes", "host_bytes"), [(0, ROOMY), (80_000, ROOMY), (0, 400_000)]
)
def test_eviction_storms(
    model_dir: Path, oracle: Oracle, seed: int, memory_bytes: int, host_bytes: int, overlap: bool
) -> None:
    """The last host is so small that it drops most of what it gets."""
    rng = random.Random(seed)
    cached, parts = engine(
        model_dir,
        CacheSection(memory_bytes=memory_bytes, tokens_per_state=64, host_bytes=host_bytes),
        budget=rng.choice((CHUNK, 3 * CHUNK, 1 << 20)),
        overlap=overlap,
    )
    if not overlap:
        poison_what_is_free(parts)
    requests = storm(rng, cached, parts.cache.check_conserved)
    compared = 0
    for name, output in cached.outputs.items():
        assert key(output) == oracle(requests[name]), name
        compared += 1
    counters, host = parts.cache.prefixes.counters, parts.cache.prefixes.host
    assert compared > 35
    assert counters.states_restored and counters.tails_restored
    assert bool(counters.kv_pages_restored) == bool(parts.cache.pools.kv.num_pages)
    assert host is not None and 0 < host.used_bytes <= host_bytes
    assert host.used_bytes == counters.host_moved_out_bytes - counters.host_dropped_bytes
    assert bool(counters.host_dropped_bytes) == (host_bytes < ROOMY)


def test_a_repeated_prompt_comes_back_whole(model_dir: Path, oracle: Oracle) -> None:
    """It runs no forward, although it was pushed out of the device."""
    rng = random.Random(2)
    cached, parts = engine(model_dir, CacheSection(memory_bytes=1 << 20, host_bytes=ROOMY))
    poison_what_is_free(parts)
    request = ask("x", words(rng, 3 * CHUNK + 7))
    for number in range(3):
        [output] = cached.generate([request]).values()
        assert key(output) == oracle(request)
        assert parts.cache.prefixes.counters.repeated_prompts == number
        parts.cache.prefixes.clear()
    counters = parts.cache.prefixes.counters
    assert counters.states_restored == counters.tails_restored == 2


def test_a_failed_step_loses_no_copy(model_dir: Path, oracle: Oracle) -> None:
    """The launch fails among its copies, then behind them: what was moving out and back is there
    for the next one."""
    rng = random.Random(4)
    cached, parts = engine(model_dir, CacheSection(memory_bytes=1 << 20, host_bytes=ROOMY))
    request = ask("x", words(rng, 4 * CHUNK + 5))
    cached.generate([request])
    parts.cache.prefixes.clear()
    moves: list[bool] = []

    def fail(copies: tuple[PageCopy, ...]) -> None:
        moves.extend(isinstance(copy.source, HostBlob) for copy in copies)
        raise RuntimeError("on purpose")

    plain = parts.runner.copy
    namespace = parts.cache.reuse.namespace("")
    # Moves out what was evicted; back what it can; fails before and after the copies are made.
    gained = parts.cache.prefixes.restore(namespace, encode_tokens(request.prompt_ids))
    assert gained == request.prompt_len
    due = parts.cache.take_copies()
    outward = [copy for copy in due if isinstance(copy.target, HostBlob)]
    inward = [copy for copy in due if isinstance(copy.source, HostBlob)]
    assert outward and inward and due == (*outward, *inward)
    broken = PageCopy("tail", HostBlob(), 0, 1)
    with pytest.raises(Exception, match="never copied"):
        plain((*outward, broken, *inward))
    parts.runner._due.remove(broken)
    after_copies(parts, fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        parts.runner.copy(())
    parts.runner.copy = plain  # type: ignore[method-assign]
    [output] = cached.generate([request]).values()
    assert key(output) == oracle(request)
    assert parts.cache.prefixes.counters.repeated_prompts == 1
